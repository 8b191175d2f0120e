"""The trainings that the page lists, read from their logs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sana_kit.reports.report import figures
from sana_kit.runlog import RunLog, load_run

LOG = "train_log.jsonl"
SILENT_SECONDS = 900.0  # a training that has logged nothing for so long is told as stopped
# What a report page and a gallery link to. Nothing else of a folder is served.
_SERVED = {".html", ".png", ".jpg", ".jpeg", ".webp", ".json", ".jsonl", ".log", ".md", ".yaml", ".safetensors"}


def find_runs(places: Sequence[str]) -> list[Path]:
    """Output folders of trainings: the places themselves and what lies directly in them, the latest log first."""
    found: dict[Path, float] = {}
    for place in map(Path, places):
        if not place.is_dir():
            continue
        for folder in (place, *(entry for entry in place.iterdir() if entry.is_dir())):
            log = folder / LOG
            if log.is_file():
                found[folder.resolve()] = log.stat().st_mtime
    return sorted(found, key=lambda folder: (-found[folder], folder))


def _state(run: RunLog, quiet: float) -> str:
    if run.end is not None:
        return "stopped" if run.was_stopped else "done"
    return "running" if quiet < SILENT_SECONDS else "stopped"


def describe_run(folder: Path) -> dict[str, Any]:
    """{"name", "state", "figures", "report", "problem"} of one training; `state` is running, done or stopped.

    A training that ended says so in its log. One that does not is running as long as its log grows.
    """
    try:
        run = load_run(folder / LOG)
    except (OSError, ValueError) as error:
        return {"name": folder.name, "state": "stopped", "figures": [], "report": False, "problem": str(error)}
    quiet = time.time() - (folder / LOG).stat().st_mtime
    return {
        "name": folder.name,
        "state": _state(run, quiet),
        "figures": figures(run, run.configs[-1] if run.configs else {}),
        "report": (folder / "report.html").is_file(),
        "problem": "",
    }


def served_file(folder: Path, name: str) -> Path | None:
    """The file of a run that a page may have, None for anything else: hidden, elsewhere, or of another kind."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or path.suffix.lower() not in _SERVED or not path.is_file():
        return None
    if any(part.startswith(".") for part in path.relative_to(folder.resolve()).parts):
        return None
    return path
