"""Signals, Ctrl-C and kills: what a run saves, which code it ends with, and that nobody is left behind.

Real processes, real engines, a tiny model. `-m "not slow"` leaves out the many kills.
"""

import random
import signal
import time

import psutil
import pytest
from helpers import adapter_weights, same
from helpers.runs import log_of, start_launcher, start_long_run, train, wait_for_new_step, wait_for_step
from helpers.waiting import finish, kill, nobody_left, tree, until

from sana_kit.training import checkpoints


def test_the_launcher_passes_sigterm_on_saves_and_resumes_to_the_bit(tiny_model, parquet_dataset, tmp_path):
    arguments = [
        "--model_name", tiny_model, f"--dataset_name={parquet_dataset}", "--batch_size=1", "--num_processors=2",
        "--max_train_steps=120", "--resolution=64", "--",
        "--logging_steps=1", "--lora_dropout=0.1", "--report_to=none", "--learning_rate=1e-3",
    ]  # fmt: skip
    output, whole = tmp_path / "stopped", tmp_path / "whole"
    process = start_launcher(output, *arguments)
    wait_for_step(output, 5, process)
    family = tree(process.pid)
    assert len(family) > 4
    process.send_signal(signal.SIGTERM)
    assert finish(process) == 143, log_of(output).read_text()[-4000:]
    assert nobody_left(family)
    stopped_at = checkpoints.list_checkpoints(output)[-1][0]
    assert 5 <= stopped_at < 120 and checkpoints.find_damage(output / f"checkpoint-{stopped_at}") is None
    again = start_launcher(output, *arguments, "--resume_from_checkpoint=latest")
    assert finish(again) == 0, log_of(output).read_text()[-4000:]
    assert finish(start_launcher(whole, *arguments)) == 0, log_of(whole).read_text()[-4000:]
    assert same(adapter_weights(whole), adapter_weights(output))


def test_a_second_signal_ends_at_once_and_leaves_nobody(flags, tmp_path):
    """The first is answered after the step, which here takes minutes; the second does not wait for it."""
    output = tmp_path / "out"
    process = start_long_run(output, flags, "--max_train_steps=2", "--gradient_accumulation_steps=20000")
    log, printed = output / "train_log.jsonl", log_of(output)
    until(lambda: log.exists() and '"event": "start"' in log.read_text(), process, printed)
    family = tree(process.pid)
    try:
        time.sleep(1)  # well inside the step
        process.send_signal(signal.SIGTERM)
        until(lambda: "once more to end at once" in printed.read_text(), process, printed)
        time.sleep(1)
        assert all(child.is_running() for child in family)
        process.send_signal(signal.SIGTERM)
        assert finish(process) != 0
        assert nobody_left(family)
    finally:
        kill(family)
    assert not list(output.glob("checkpoint-*")) and '"event": "step"' not in log.read_text()


def test_ctrl_c_saves_and_ends_with_130(tiny_model, parquet_dataset, tmp_path):
    """Ctrl-C reaches the launcher, which has put the run into a session of its own and passes it on."""
    output = tmp_path / "out"
    process = start_launcher(
        output, "--model_name", tiny_model, f"--dataset_name={parquet_dataset}", "--batch_size=1",
        "--num_processors=2", "--resolution=64", "--", "--logging_steps=1", "--report_to=none",
    )  # fmt: skip
    wait_for_step(output, 3, process)
    family = tree(process.pid)
    process.send_signal(signal.SIGINT)
    assert finish(process) == 130, log_of(output).read_text()[-4000:]
    assert nobody_left(family)
    (step, folder), *_ = checkpoints.list_checkpoints(output)
    assert step >= 3 and checkpoints.find_damage(folder) is None
    assert "stopped by signal 2" in (output / "train_log.jsonl").read_text()


@pytest.mark.slow
def test_thirty_kills_at_random_moments_lose_nothing(flags, tmp_path):
    """SIGKILL of one rank or of the whole tree while encoding, training and saving; the same command resumes each
    time, and the finished adapter is that of an undisturbed run to the bit."""
    more = ["--train_batch_size=1", "--max_train_steps=250", "--checkpointing_steps=4", "--checkpoints_total_limit=3"]
    more += ["--lora_dropout=0.1", "--validation_steps=10"]
    whole, output = tmp_path / "whole", tmp_path / "killed"
    train(whole, flags, *more, processes=2, engine="zero")
    generator = random.Random(0)
    kills, moments = 0, []
    while kills < 30:
        process = start_long_run(output, flags, *more, "--resume_from_checkpoint=latest")
        before = checkpoints.list_checkpoints(output)[-1][0] if checkpoints.list_checkpoints(output) else 0
        if kills < 5:  # while starting and encoding
            time.sleep(generator.uniform(0.2, 3))
        else:  # some steps on, and anywhere in a step or a checkpoint: these take tens of milliseconds each
            wait_for_new_step(output, process, generator.randrange(1, 9))
            time.sleep(generator.uniform(0, 0.15))
        assert process.poll() is None, "the run ended before it could be killed: give it more steps"
        family, ranks = tree(process.pid), psutil.Process(process.pid).children()
        if kills % 2 and ranks:
            kill([generator.choice(ranks)])
            finish(process)  # the launcher notices and ends the other rank
            assert nobody_left(family)
        else:
            kill(family)
            finish(process)
        kills += 1
        moments.append(before)
    train(output, flags, *more, "--resume_from_checkpoint=latest", processes=2, engine="zero")
    print(f"{kills} kills, from checkpoints {moments}")
    assert kills >= 30 and max(moments) >= 40, moments  # most kills hit a run that was getting on
    assert same(adapter_weights(whole), adapter_weights(output))
