"""An inference script with a fault on rank 1: FAULT=raise, kill or apart. Started by test_inference_scripts.py."""

import os
import signal
import sys
from pathlib import Path

from sana_kit.inference import command, run

rank, fault = int(os.environ["RANK"]), os.environ["FAULT"]
real = run.load_pipeline


def load_pipeline(*args, **kwargs):
    if rank == 1 and fault == "raise":
        raise OSError("the disk of rank 1 is gone")
    if rank == 1 and fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)


run.load_pipeline = load_pipeline
if fault == "apart":
    folder = Path(os.environ["PLACE"]) / f"machine{rank}"
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
if __name__ == "__main__":
    sys.exit(command.main("faulty"))
