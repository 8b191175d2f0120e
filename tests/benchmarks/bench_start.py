"""Seconds from the launcher's command to the first step, and what they are made of.

    python tests/benchmarks/bench_start.py --repeats 3          ZeRO-2, 2 processes, the quick start's model and images

The first run encodes and is told as cold; the others find the encodings. `command to first step` is what a user waits,
`processes to first step` what summary.json calls start_seconds, `CPU s a rank` what the scheduler gave a training
process until then: on a machine that does other work it says more than the clock. `--fault` times what is told before
a process starts: a wrong model folder.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

KIT = Path(__file__).resolve().parent.parent.parent
LAUNCHER = KIT / "finetune_sana_dreambooth_lora_deepspeed_bf16.sh"
ASSETS = KIT / "sana_kit" / "quickstart_assets"


def command(folder: Path, model: Path, steps: int) -> list[str]:
    """The launcher's command line of a small run in `folder`."""
    words = [f"--model_name={model}", f"--dataset_name={ASSETS / 'style_dataset'}", f"--output_dir={folder / 'out'}"]
    words += ["--resolution=64", "--batch_size=2", "--num_processors=2", f"--max_train_steps={steps}"]
    return ["bash", str(LAUNCHER), *words, "--", f"--encodings_dir={folder / 'encodings'}", "--logging_steps=1"]


def environment() -> dict[str, str]:
    """This Python for the launcher, offline."""
    return {**os.environ, "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def measure(folder: Path) -> dict:
    """Start a run; its figures, in seconds."""
    log_file, output = folder / "out" / "train_log.jsonl", folder / "screen.txt"
    started, begun = time.perf_counter(), time.time()
    more = ["--overwrite_output_dir"]
    with open(output, "w") as screen:
        run = subprocess.Popen(
            [*command(folder, ASSETS / "model", 3), *more], stdout=screen, stderr=screen, env=environment()
        )
        at, spent = None, []
        while run.poll() is None:
            if at is None and log_file.is_file() and log_file.stat().st_mtime > begun:
                lines = log_file.read_text().splitlines()
                if any('"event": "step"' in line for line in lines):
                    at = time.perf_counter() - started
                    spent = cpu_of_ranks(run.pid)
            time.sleep(0.02)
    if run.returncode or at is None:
        sys.exit(output.read_text()[-3000:])
    start = json.loads((folder / "out" / "summary.json").read_text())["start_seconds"]
    found = {"command to first step": at, "processes to first step": sum(start.values())}
    return {**found, **start, "CPU s a rank": sum(spent) / max(len(spent), 1), "whole": time.perf_counter() - started}


def is_trainer(process: psutil.Process) -> bool:
    """Whether it runs the trainer's script; a loader's workers have the same command line."""
    return any(word.endswith("train_dreambooth_lora_sana.py") for word in process.cmdline()[:3])


def cpu_of_ranks(launcher: int) -> list[float]:
    """CPU seconds of each training process below the launcher."""
    spent = []
    for process in psutil.Process(launcher).children(recursive=True):
        try:
            if is_trainer(process) and not is_trainer(process.parent()):
                spent.append(process.cpu_times().user + process.cpu_times().system)
        except psutil.NoSuchProcess:
            continue
    return spent


def measure_fault(folder: Path) -> dict:
    """Seconds until a wrong model folder is told."""
    started, before = time.perf_counter(), os.times()
    words = command(folder, folder / "nowhere", 3)
    done = subprocess.run(words, capture_output=True, text=True, env=environment())
    assert done.returncode == 1 and "no such folder" in done.stderr, done.stderr
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return {"command to error": time.perf_counter() - started, "CPU s": spent}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="warm starts")
    parser.add_argument("--fault", action="store_true", help="time a wrong model folder instead")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.fault:
            runs = {f"fault {i + 1}": measure_fault(folder) for i in range(options.repeats)}
        else:
            runs = {"cold": measure(folder)}
            runs.update({f"warm {i + 1}": measure(folder) for i in range(options.repeats)})
    width = max(len(row) for figures in runs.values() for row in figures)
    print(f"{os.cpu_count()} cores, load before {load:.1f}")
    print(" " * width + "".join(f"{name:>9}" for name in runs))
    for row in next(iter(runs.values())):
        print(f"{row:{width}}" + "".join(f"{figures.get(row, float('nan')):9.2f}" for figures in runs.values()))


if __name__ == "__main__":
    main()
