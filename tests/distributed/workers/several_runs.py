"""Several runs of the trainer one after another in the same processes: a launch costs more than a tiny run.

    accelerate launch ... several_runs.py RUNS.json

RUNS.json is a list of runs, each [flags, folder to copy to the output folder's checkpoint before, or null].
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from helpers import run_trainer


def main() -> int:
    """The largest exit code."""
    worst = 0
    # DeepSpeed keeps the first run's process group for all later ones
    torch.distributed.destroy_process_group = lambda group=None: None
    for flags, checkpoint in json.loads(Path(sys.argv[1]).read_text()):
        if checkpoint is not None and os.environ["RANK"] == "0":  # the others take it from the first
            output = next(flag.partition("=")[2] for flag in flags if flag.startswith("--output_dir="))
            shutil.copytree(checkpoint, Path(output, Path(checkpoint).name))
        worst = max(worst, run_trainer(*flags))
    return worst


if __name__ == "__main__":
    sys.exit(main())
