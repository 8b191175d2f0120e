"""Two machines, as two processes that are each the first of its machine and share no folder."""

import subprocess
import sys

import pytest
from helpers import KIT, free_port, script_environment


def start_machines(tmp_path, flags_of, timeout=150):
    """[(exit code, what it printed)] of both machines; `flags_of(rank)` are the trainer's, each in its own folder."""
    port, machines = free_port(), []
    for rank in range(2):
        home = tmp_path / f"machine{rank}"
        home.mkdir(exist_ok=True)
        environment = {
            **script_environment(),
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "SANA_LAUNCHED": "1",
        }
        command = [sys.executable, str(KIT / "train_dreambooth_lora_sana.py"), *map(str, flags_of(rank))]
        machines.append(
            subprocess.Popen(
                command, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    return [(machine.returncode, text) for machine in machines for text in (machine.communicate(timeout=timeout)[0],)]


@pytest.fixture
def flags(tiny_model, image_folder):
    return [
        f"--pretrained_model_name_or_path={tiny_model}", f"--instance_data_dir={image_folder}",
        "--instance_prompt=a drawing", "--resolution=64", "--train_batch_size=1", "--report_to=none",
        "--max_train_steps=2", "--checkpointing_steps=1", "--output_dir=out",
    ]  # fmt: skip


def test_a_problem_of_the_second_machine_ends_both_and_both_tell_it(flags, tmp_path):
    def flags_of(rank):
        return [*flags, "--resume_from_checkpoint=latest", *(["--class_prompt=x"] if rank else [])]

    for code, told in start_machines(tmp_path, flags_of):
        assert code == 1
        assert "--class_prompt=x: has no effect without --with_prior_preservation" in told
        assert "Traceback" not in told


def test_machines_that_share_no_folder_resume_from_the_firsts_checkpoint(flags, tmp_path):
    assert [code for code, _ in start_machines(tmp_path, lambda rank: [*flags, "--max_train_steps=1"])] == [0, 0]
    assert (tmp_path / "machine0" / "out" / "checkpoint-1").is_dir()
    assert not (tmp_path / "machine1" / "out" / "checkpoint-1").exists()
    for code, told in start_machines(tmp_path, lambda rank: [*flags, "--resume_from_checkpoint=checkpoint-1"]):
        assert code == 0, told
    assert (tmp_path / "machine0" / "out" / "checkpoint-2").is_dir()
