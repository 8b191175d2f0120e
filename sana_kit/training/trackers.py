"""The trackers that a run can report to: one entry each in TRACKERS, under accelerate's name.

A new one that accelerate knows is one entry here, and its name among the choices in training/settings.py.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import netrc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from sana_kit.errors import Problem, setting

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

# {"file": below the output folder, "prompt", "seed"} of each image, and where it lies
LogImages = Callable[[object, Sequence[dict], Sequence[Path], int], None]


@dataclasses.dataclass(frozen=True)
class TrackerKind:
    """One tracker.

    Attributes:
        log_images: (accelerate's tracker, entries, paths, step) hands validation images over.
        publishes: whether a run's configuration leaves the machine.
        logged_in: whether it can log in without asking.
        login: what to do where it cannot.
        settings: (output folder) -> what accelerate starts it with.
    """

    log_images: LogImages
    publishes: bool = False
    logged_in: Callable[[], bool] = lambda: True
    login: str = ""
    settings: Callable[[Path], dict[str, object]] = lambda output_dir: {}


def _to_tensorboard(tracker: GeneralTracker, entries: Sequence[dict], paths: Sequence[Path], step: int) -> None:
    stacked = np.stack([np.asarray(Image.open(path)) for path in paths])
    tracker.writer.add_images("validation", stacked, step, dataformats="NHWC")


def _to_wandb(tracker: GeneralTracker, entries: Sequence[dict], paths: Sequence[Path], step: int) -> None:
    image = importlib.import_module("wandb").Image
    shown = [image(str(path), caption=entry["prompt"]) for path, entry in zip(paths, entries, strict=True)]
    tracker.log({"validation": shown}, step=step)


def _to_comet(tracker: GeneralTracker, entries: Sequence[dict], paths: Sequence[Path], step: int) -> None:
    for path in paths:
        tracker.writer.log_image(str(path), name=path.name, step=step)


def _wandb_logged_in() -> bool:
    """Whether wandb can log in without asking, or is told to stay offline."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun") or os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


TRACKERS: dict[str, TrackerKind] = {
    "tensorboard": TrackerKind(_to_tensorboard),
    "wandb": TrackerKind(
        _to_wandb,
        publishes=True,
        logged_in=_wandb_logged_in,
        login="Run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline.",
        settings=lambda output_dir: {"dir": str(output_dir)},
    ),
    "comet_ml": TrackerKind(_to_comet, publishes=True),
}


def log_images(tracker: GeneralTracker, entries: Sequence[dict], output_dir: Path, step: int) -> None:
    """Hand validation images to one of accelerate's trackers; one that the kit does not know gets none."""
    kind = TRACKERS.get(tracker.name)
    if kind is not None:
        kind.log_images(tracker, entries, [output_dir / entry["file"] for entry in entries], step)


def tracker_problems(report_to: str, hub_token: str | None) -> list[Problem]:
    """What keeps a tracker from starting, and a token that it might publish; "all" is every tracker installed."""
    installed = [name for name in TRACKERS if importlib.util.find_spec(name) is not None]
    chosen = installed if report_to == "all" else [report_to]
    problems = []
    if report_to in TRACKERS and report_to not in installed:
        reason = f"the package {report_to} is not installed"
        remedy = f"Install it, or use {setting('report_to')}=tensorboard."
        problems.append(Problem("report_to", report_to, reason, remedy))
    if hub_token is not None and (report_to == "all" or any(TRACKERS[n].publishes for n in chosen if n in TRACKERS)):
        reason = f"must not be given with {setting('report_to')}={report_to}, which may publish it"
        problems.append(Problem("hub_token", None, reason, "Log in beforehand (`hf auth login`)."))
    for name in chosen:
        if name in installed and not TRACKERS[name].logged_in():
            problems.append(Problem("report_to", report_to, f"there is no login for {name}", TRACKERS[name].login))
    return problems
