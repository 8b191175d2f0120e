"""A run of the trainer and several of the drawing scripts in one process: several_runs_here.py RUNS.

RUNS is a JSON file: "train" the trainer's flags, "draw" lists of the drawing scripts' flags. Started by
test_ascend.py, whose emulated NPU takes long to start.
"""

import json
import sys
from pathlib import Path

from helpers import run_trainer

from sana_kit.inference.command import main

if __name__ == "__main__":
    runs = json.loads(Path(sys.argv[1]).read_text())
    sys.exit(max([run_trainer(*runs["train"]), *(main("several", flags) for flags in runs["draw"])]))
