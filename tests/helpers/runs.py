"""Training runs for the tests of engines, signals, machines and disks: started, waited for, compared."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from helpers import KIT, TRAINER, launch, launch_command, script_environment, start
from helpers.waiting import until
from sana_kit.training import checkpoints

LAUNCHER = KIT / "finetune_sana_dreambooth_lora_deepspeed_bf16.sh"
CONFIG = KIT / "bf16_accelerate_config.yaml"


def farthest(first, second):
    """Largest difference of two sets of tensors, relative to the largest value."""
    scale = max(value.float().abs().max().item() for value in first.values())
    return max((first[k].float() - second[k].float()).abs().max().item() for k in first) / scale


def train(output, flags, *more, **how):
    """A whole run by helpers.launch, which must succeed."""
    done = launch(TRAINER, *flags, f"--output_dir={output}", *more, **how)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done


def as_it_was_at(output, step, tmp_path):
    """A copy of a run whose newest checkpoint is `step`."""
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    for number, folder in checkpoints.list_checkpoints(copy):
        if number > step:
            shutil.rmtree(folder)
    (copy / "summary.json").unlink(missing_ok=True)  # a run that was killed wrote none
    return copy


def config_with(path, **changes):
    """The kit's accelerate config with other values, written to `path`."""
    text = CONFIG.read_text()
    for name, value in changes.items():
        old = next(line for line in text.splitlines() if line.strip().startswith(f"{name}:"))
        text = text.replace(old, old.partition(":")[0] + f": {value}")
    path.write_text(text)
    return path


def log_of(output):
    """The file beside an output folder that a run started here prints to."""
    return output.with_suffix(".log")


def start_long_run(output, flags, *more, processes=2):
    """The trainer under ZeRO-2 in a session of its own, with enough steps to be interrupted."""
    command = launch_command(TRAINER, *flags, f"--output_dir={output}", *more, processes=processes, engine="zero")
    with open(log_of(output), "ab") as log:
        return start(command, log)


def start_launcher(output, *arguments, env=None, **how):
    """The launcher in a session of its own."""
    command = ["bash", LAUNCHER, f"--output_dir={output}", *arguments]
    with open(log_of(output), "ab") as log:
        return start(command, log, env=launcher_environment(env), cwd=output.parent, **how)


def launcher_environment(more=None):
    """What the launcher is started with: this interpreter, nothing of another launcher."""
    return {**script_environment(), "PYTHON": sys.executable, **(more or {})}


def steps_logged(output: Path) -> list[int]:
    """The steps in a run's log so far, of all its starts."""
    path = output / "train_log.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # being written
            continue
        if entry["event"] == "step":
            found.append(entry["step"])
    return found


def wait_for_step(output, step, process):
    """Wait until the run has logged `step`; fails if it ends before."""
    until(lambda: max(steps_logged(output), default=0) >= step, process, log_of(output))


def wait_for_new_step(output, process, count=1):
    """Wait until the run has logged `count` steps since this call: the log also holds those of runs before."""
    before = len(steps_logged(output))
    until(lambda: len(steps_logged(output)) >= before + count, process, log_of(output))
