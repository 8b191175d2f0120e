"""What a start finds on a host: the accelerate config, processes, ports."""

import os
import socket

import pytest
from helpers import KIT

from sana_kit.errors import UserError
from sana_kit.launch.host import AccelerateConfig, free_port, host_threads, launch_words, processes_here

PLAIN = (KIT / "bf16_accelerate_config.yaml").read_text()


@pytest.fixture
def config(tmp_path):
    """config(old, new): the kit's accelerate config with a change."""

    def make(old="", new=""):
        assert old in PLAIN
        path = tmp_path / "config.yaml"
        path.write_text(PLAIN.replace(old, new) if old else PLAIN)
        return AccelerateConfig(str(path))

    return make


def test_the_kits_own_config_leaves_accumulation_open(config):
    found = config()
    assert (found.machines, found.processes, found.port, found.decides) == (1, 8, None, {"mixed_precision"})


@pytest.mark.parametrize(
    ("old", "new", "decides"),
    [
        ("deepspeed_config:", "deepspeed_config:\n  gradient_accumulation_steps: 4", "both"),
        ("deepspeed_config:", "deepspeed_config:\n  gradient_accumulation_steps: auto", "precision"),
        ("deepspeed_config:", "gradient_accumulation_steps: 4\ndeepspeed_config:", "both"),
        ("mixed_precision: bf16", "", "nothing"),
        ("deepspeed_config:", "deepspeed_config:\n  deepspeed_config_file: ds.json", "both"),
    ],
)
def test_what_the_config_decides(config, old, new, decides):
    expected = {"both": {"mixed_precision", "gradient_accumulation_steps"}, "precision": {"mixed_precision"}}
    assert config(old, new).decides == expected.get(decides, set())


@pytest.mark.parametrize("machines", ["2", '"2"', "'2'"])
def test_numbers_may_stand_in_quotes(config, machines):
    found = config("num_machines: 1", f"num_machines: {machines}\nmain_process_port: '6000'")
    assert found.machines == 2
    words = launch_words(found, None)
    assert words[2:] == ["--num_machines", "2", "--machine_rank", "0", "--main_process_port", "6000"]


@pytest.mark.parametrize("text", ["a: [", "just words", "\udcff", "num_machines: many", "num_machines: 0"])
def test_a_config_that_cannot_be_used_is_named(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_bytes(os.fsencode(text))
    with pytest.raises(UserError) as refused:
        AccelerateConfig(str(path))
    assert str(path) in str(refused.value) and refused.value.problems[0].field == "config_file"


def test_processes_follow_the_devices(config):
    assert processes_here(config(), "npu", 8, None, small=False) == 8
    assert processes_here(config(), "npu", 8, 3, small=False) == 3
    assert processes_here(config(), "cpu", 0, None, small=False) == 1
    assert processes_here(config(), "cpu", 0, None, small=True) == 2
    assert processes_here(config(), "cpu", 0, 3, small=True) == 3
    with pytest.raises(UserError, match=r"num_processors=4: this machine has 2 npu device\(s\)"):
        processes_here(config(), "npu", 2, 4, small=False)


def test_a_port_that_is_in_use_is_told(config):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"main_process_port: {port} is in use"):
            free_port(port)
    assert free_port(port) == port and free_port(None) != 0


def test_the_cores_are_shared_among_the_processes(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8))
    assert [host_threads(n) for n in (1, 2, 3, 8, 99)] == [8, 4, 3, 1, 1]
