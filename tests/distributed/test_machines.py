"""Several machines on this one: as two launchers, or as two processes that are each the first of their machine."""

import shutil
import sys

import pytest
from helpers import KIT, TRAINER, adapter_weights, free_port, same, script_environment, start
from helpers.runs import CONFIG, log_of, train, wait_for_step
from helpers.waiting import finish, kill, nobody_left, tree

from sana_kit.training import checkpoints

# ---------------------------------------------------------------------------------------------------------------------
# Two launchers


def machine_config(folder, rank, port):
    """The kit's yaml edited as README.md says: three lines uncommented, numbers set."""
    text = CONFIG.read_text()
    for old, new in {
        "  # deepspeed_multinode_launcher: standard": "  deepspeed_multinode_launcher: standard",
        "# main_process_ip: localhost": "main_process_ip: 127.0.0.1",
        "# main_process_port: 6000": f"main_process_port: {port}",
        "machine_rank: 0": f"machine_rank: {rank}",
        "num_machines: 1": "num_machines: 2",
        "num_processes: 8": "num_processes: 2",
    }.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / f"machine{rank}.yaml"
    path.write_text(text)
    return path


def start_launchers(outputs, flags, *more):
    """One launcher per "machine", each with its own log beside its output folder; returns the processes."""
    port, processes = free_port(), []
    for rank, output in enumerate(outputs):
        config = machine_config(output.parent, rank, port)
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, KIT / TRAINER]
        with open(log_of(output).with_suffix(f".log{rank or ''}"), "ab") as log:
            processes.append(start([*command, *flags, f"--output_dir={output}", *more], log))
    return processes


@pytest.mark.parametrize("shared", [True, False], ids=["shared folder", "separate folders"])
def test_two_machines_train_save_and_resume(flags, zero2_no_dropout, tmp_path, shared):
    """Training, checkpoint and resume on two machines give what two processes on one machine give, to the bit."""
    outputs = [tmp_path / "out", tmp_path / ("out" if shared else "other")]
    for more in ([], ["--resume_from_checkpoint=latest"]):
        for process in start_launchers(outputs, flags, "--train_batch_size=1", *more):
            assert finish(process) == 0, log_of(outputs[0]).read_text()[-4000:]
        shutil.rmtree(outputs[0] / "checkpoint-6")  # the second time it must come from checkpoint-3
        (outputs[0] / "summary.json").unlink()  # a run that was killed wrote none
    assert same(adapter_weights(zero2_no_dropout), adapter_weights(outputs[0]))
    if not shared:
        assert not list(outputs[1].glob("checkpoint-*")) and (outputs[1] / "encodings").is_dir()


def test_a_lost_machine_ends_the_other_and_the_run_resumes(flags, tmp_path):
    output = tmp_path / "out"
    more = ["--train_batch_size=1", "--max_train_steps=400", "--checkpointing_steps=5"]
    first, second = start_launchers([output, output], flags, *more)
    wait_for_step(output, 6, first)
    family = tree(first.pid)
    kill(tree(second.pid))
    assert finish(first) != 0
    assert nobody_left(family)
    step = checkpoints.list_checkpoints(output)[-1][0]
    train(
        output, flags, "--train_batch_size=1", f"--max_train_steps={step + 1}", "--resume_from_checkpoint=latest",
        processes=2, engine="zero",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Two processes without a common folder


def run_machines(tmp_path, flags_of):
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
        with open(home / "log", "wb") as log:
            machines.append(start([sys.executable, KIT / TRAINER, *flags_of(rank)], log, env=environment, cwd=home))
    codes = [finish(machine) for machine in machines]
    return [(code, (tmp_path / f"machine{rank}" / "log").read_text()) for rank, code in enumerate(codes)]


@pytest.fixture
def apart_flags(tiny_model, image_folder):
    return [
        f"--pretrained_model_name_or_path={tiny_model}", f"--instance_data_dir={image_folder}",
        "--instance_prompt=a drawing", "--resolution=64", "--train_batch_size=1", "--report_to=none",
        "--max_train_steps=2", "--checkpointing_steps=1", "--output_dir=out",
    ]  # fmt: skip


def test_a_problem_of_the_second_machine_ends_both_and_both_tell_it(apart_flags, tmp_path):
    def flags_of(rank):
        return [*apart_flags, "--resume_from_checkpoint=latest", *(["--class_prompt=x"] if rank else [])]

    for code, told in run_machines(tmp_path, flags_of):
        assert code == 1
        assert "--class_prompt=x: has no effect without --with_prior_preservation" in told
        assert "Traceback" not in told


def test_machines_that_share_no_folder_resume_from_the_firsts_checkpoint(apart_flags, tmp_path):
    assert [code for code, _ in run_machines(tmp_path, lambda rank: [*apart_flags, "--max_train_steps=1"])] == [0, 0]
    assert (tmp_path / "machine0" / "out" / "checkpoint-1").is_dir()
    assert not (tmp_path / "machine1" / "out" / "checkpoint-1").exists()
    for code, told in run_machines(tmp_path, lambda rank: [*apart_flags, "--resume_from_checkpoint=checkpoint-1"]):
        assert code == 0, told
    assert (tmp_path / "machine0" / "out" / "checkpoint-2").is_dir()
