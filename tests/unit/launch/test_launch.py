"""From the launcher's words to the exit code: checks before processes, one line at the end."""

import json
import os
import signal
import sys
import threading
from functools import partial

import psutil
import pytest
from helpers import KIT
from torch.distributed import DistStoreError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from sana_kit.launch import __main__ as start
from sana_kit.launch import ranks
from sana_kit.launchers import ACCELERATE_FLAGS, accelerate_flags
from sana_kit.quiet import quiet_libraries


@pytest.fixture
def launched(monkeypatch, tiny_model, parquet_dataset, tmp_path):
    """launched(*words, run=...): (exit code, words of `accelerate launch` or None); `run` stands for the processes."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.delenv("SANA_ERROR_FILE", raising=False)
    monkeypatch.setattr(start, "tie", lambda parent: None)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv(ACCELERATE_FLAGS, "")
    seen = []

    def begin(*words, run=lambda: None, options=("--config_file", str(KIT / "bf16_accelerate_config.yaml"))):
        def launch_command(arguments):
            seen.append(arguments)
            run()

        monkeypatch.setattr(ranks.launch, "launch_command", launch_command)
        given = [f"--output_dir={tmp_path / 'out'}", "--resolution=64", f"--dataset_name={parquet_dataset}"]
        given += [f"--pretrained_model_name_or_path={tiny_model}", "--caption_column=text", "--instance_prompt=x"]
        code = start.main(["1", *options, "--", *given, *words])
        os.environ.pop("SANA_ERROR_FILE", None)
        return code, (seen[-1] if seen else None)

    yield begin
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_run_that_can_start_is_started_with_what_the_config_leaves_open(launched, open_config):
    code, arguments = launched()
    assert code == 0 and arguments.num_processes == 1 and arguments.mixed_precision is None
    words = arguments.training_script_args
    assert "--gradient_accumulation_steps=1" in words and "--mixed_precision=bf16" not in words
    code, arguments = launched("--mixed_precision=no", options=(*open_config, "--small"))
    assert code == 0 and arguments.num_processes == 2 and arguments.mixed_precision == "no"


def test_the_processes_are_told_with_what_the_same_run_is_started(launched, open_config):
    """Report and model card show it; the port that was free is free at another start or not."""
    config = open_config[1]
    assert launched("--mixed_precision=no", options=(*open_config, "--small"))[0] == 0
    flags = ["--config_file", config, "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    assert accelerate_flags("train.py") == flags


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["python", "/bin/accelerate", "launch", "--num_cpu", "1", "train.py", "launch"], ["--num_cpu", "1"]),
        (["python", "/bin/accelerate", "launch", "other.py"], []),
        (["bash", "launch", "train.py"], []),
    ],
)
def test_a_plain_accelerate_launch_is_read_from_its_command_line(words, flags, monkeypatch):
    class Parent:
        def cmdline(self):
            return words

    monkeypatch.delenv(ACCELERATE_FLAGS, raising=False)
    monkeypatch.setattr(psutil.Process, "parents", lambda process: [Parent()])
    assert accelerate_flags("train.py") == flags


@pytest.fixture
def open_config(tmp_path):
    """An accelerate config that says nothing about the precision."""
    path = tmp_path / "open.yaml"
    path.write_text((KIT / "bf16_accelerate_config.yaml").read_text().replace("mixed_precision: bf16", ""))
    return ("--config_file", str(path))


def test_an_accumulation_of_the_config_is_taken(launched, tmp_path):
    path = tmp_path / "four.yaml"
    text = (KIT / "bf16_accelerate_config.yaml").read_text()
    path.write_text(text.replace("deepspeed_config:", "deepspeed_config:\n  gradient_accumulation_steps: 4"))
    code, arguments = launched(options=("--config_file", str(path)))
    assert code == 0 and not [w for w in arguments.training_script_args if "gradient_acc" in w]
    assert arguments.gradient_accumulation_steps is None  # accelerate takes the file's own


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--pretrained_model_name_or_path=/no/model"], "--model_name=/no/model: no such folder"),
        (["--dataset_name=/no/data"], "--dataset_name=/no/data: no such folder"),
        (["--caption_column=title"], "--caption_column=title: no such column"),
        (["--resolution=65"], "--resolution=65: must be a multiple of"),
        (["--train_batch_size=0"], "--batch_size=0"),
        (["--mixed_precision=fp16"], "--mixed_precision=fp16"),
    ],
)
def test_what_is_wrong_is_told_before_a_process_starts(launched, capsys, words, told):
    code, arguments = launched(*words)
    shown = capsys.readouterr().err
    assert code == 1 and arguments is None
    assert told in shown and shown.count(told) == 1 and "Traceback" not in shown


def test_one_of_several_machines_leaves_the_checks_to_the_ranks_which_tell_all_others(launched, tmp_path):
    """A launcher that ended by itself would leave the other machines waiting for this one."""
    text = (KIT / "bf16_accelerate_config.yaml").read_text().replace("num_machines: 1", "num_machines: 2")
    text = text.replace("# main_process_", "main_process_").replace("# deepspeed_multi", "deepspeed_multi")
    (tmp_path / "two.yaml").write_text(text.replace("machine_rank: 0", "machine_rank: 1"))
    options = ("--config_file", str(tmp_path / "two.yaml"))
    code, arguments = launched("--resume_from_checkpoint=checkpoint-3", options=options)
    assert code == 0 and arguments.machine_rank == 1 and arguments.num_machines == 2


def test_a_misspelt_flag_is_told_before_torch_is_looked_for(launched, monkeypatch, capsys):
    monkeypatch.setattr(start, "find_devices", lambda: pytest.fail("the host was looked at"))
    with pytest.raises(SystemExit) as refused:
        launched("--rnk=3")
    told = capsys.readouterr().err
    assert refused.value.code == 2 and "Did you mean --rank?" in told
    assert told.startswith("train_dreambooth_lora_sana.py: error: ")


def test_a_dry_run_starts_no_process(launched, open_config, capsys):
    code, arguments = launched("--dry_run", options=("--num_processors=2", *open_config))
    assert code == 0 and arguments is None
    assert "2 processes" in capsys.readouterr().out


def test_a_config_that_is_no_yaml_is_told(launched, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("a: [")
    code, arguments = launched(options=("--config_file", str(tmp_path / "config.yaml")))
    assert code == 2 and arguments is None and "not a YAML file" in capsys.readouterr().err


def failing(code, *, tell=None):
    def run():
        if tell:
            with open(os.environ["SANA_ERROR_FILE"], "a") as file:
                file.write(tell)
        failure = ProcessFailure(local_rank=1, pid=1, exitcode=code, error_file="<N/A>")
        raise ChildFailedError("train", {1: failure})

    return run


def test_the_trainers_error_is_told_once_and_last_with_its_own_code(launched, capsys):
    code, _ = launched(run=failing(3, tell="error: the disk is full\n"))
    shown = capsys.readouterr().err
    assert code == 3 and shown.endswith("\nerror: the disk is full\n") and shown.count("disk") == 1
    code, _ = launched(run=failing(7))
    assert code == 7 and capsys.readouterr().err == "error: training ended with exit code 7\n"


def test_a_process_that_was_killed_is_explained(launched, capsys):
    code, _ = launched(run=failing(-9))
    shown = capsys.readouterr().err
    assert code == 137 and "rank 1 was ended by SIGKILL" in shown and "memory is short" in shown


@pytest.mark.parametrize(("number", "expected", "name"), [(15, 143, "SIGTERM"), (2, 130, "Ctrl-C")])
@pytest.mark.parametrize("saved", [True, False])
def test_a_stop_is_one_line(launched, tmp_path, capsys, number, expected, name, saved):
    def stopped():
        if saved:
            (tmp_path / "out").mkdir()
            summary = {"global_step": 7, "interrupted_by_signal": number}
            (tmp_path / "out" / "summary.json").write_text(json.dumps(summary))
        raise SignalException("", signal.Signals(number))

    code, _ = launched(run=stopped)
    lines = capsys.readouterr().err.splitlines()
    told = f"stopped by {name} after update 7" if saved else f"stopped by {name}; no checkpoint was written"
    assert code == expected and len(lines) == 1 and lines[0].startswith(told)


def test_a_stop_that_could_not_save_is_an_error(launched, capsys):
    def stopped():
        with open(os.environ["SANA_ERROR_FILE"], "a") as file:
            file.write("error: no space left\n")
        raise SignalException("", signal.SIGTERM)

    assert launched(run=stopped)[0] == 1 and capsys.readouterr().err == "\nerror: no space left\n"


def test_ranks_that_a_scheduler_stopped_by_itself_count_as_stopped(launched, tmp_path, capsys):
    def stopped():
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "summary.json").write_text('{"global_step": 5, "interrupted_by_signal": 15}')
        failing(143)()

    assert launched(run=stopped)[0] == 143 and "after update 5" in capsys.readouterr().err


def test_notices_that_nobody_can_act_on_are_kept_off_the_screen(caplog):
    import logging
    import warnings

    quiet_libraries()
    logger = logging.getLogger("diffusers.models.modeling_utils")
    logger.warning("There are modules that should be kept in float32: []. Casting directly")
    logger.warning("There are modules that should be kept in float32: ['norm']. Casting directly")
    assert [record.args or record.msg for record in caplog.records if "float32" in record.msg] == [
        "There are modules that should be kept in float32: ['norm']. Casting directly"
    ]
    with warnings.catch_warnings(record=True) as seen:
        quiet_libraries()
        warnings.warn("in the next release", FutureWarning, stacklevel=1)
        warnings.warn("look at this", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["look at this"]


def test_the_run_ends_with_the_process_that_started_it():
    with pytest.raises(SystemExit, match="is gone"):
        start.tie(os.getpid() if os.getppid() != os.getpid() else sys.maxsize)


def test_machines_that_do_not_meet_are_told_of_in_words(launched, tmp_path, capfd, monkeypatch):
    path = tmp_path / "two.yaml"
    words = {"num_machines: 1": "num_machines: 2", "# main_process_ip: localhost": "main_process_ip: 10.0.0.7"}
    words["# main_process_port: 6000"] = "main_process_port: 6123"
    text = (KIT / "bf16_accelerate_config.yaml").read_text()
    for old, new in words.items():
        text = text.replace(old, new)
    path.write_text(text)
    told = threading.Event()
    lines = []

    def say(line):
        lines.append(line)
        told.set()

    monkeypatch.setattr(ranks, "announced", partial(ranks.announced, after=0.0, say=say))

    def alone():
        assert told.wait(60)
        raise DistStoreError("Timed out after 901 seconds waiting for clients. 1/2 clients joined.\nframe #0: ...")

    # This process has a child that is none of the run's.
    monkeypatch.setattr(psutil.Process, "children", lambda self: [psutil.Process(1)])
    assert launched(run=alone, options=("--config_file", str(path)))[0] == 1
    assert lines[0].startswith("machine 0 of num_machines=2 waits for the others at 10.0.0.7:6123")
    said = capfd.readouterr().err
    assert "the machines did not meet" in said and "1/2 clients joined" in said
    assert "frame" not in said and "Traceback" not in said
