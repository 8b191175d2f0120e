"""What the tests of the playground ask for, and a training that it shows."""

from __future__ import annotations

import json
import time
from pathlib import Path

ASKED = {"prompt": "a dog", "seeds": [8], "steps": 2, "width": 96, "height": 64, "guidance": 2.0, "lora_scale": 0.5}


def write_run(folder: Path, *, ended: bool = True) -> Path:
    """The log and the page of a training."""
    folder.mkdir(parents=True)
    now = time.time()
    lines = [{"event": "start", "time": now, "world_size": 2, "config": {"max_train_steps": 20}}]
    lines += [{"event": "step", "step": step, "time": now + step, "loss": 1 / step} for step in (5, 10)]
    lines += [{"event": "end", "time": now + 11, "summary": {"duration_seconds": 11.0}}] if ended else []
    (folder / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "report.html").write_text("<h1>the report</h1>")
    return folder
