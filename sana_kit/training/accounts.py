"""Logins and names that a run needs at its end, checked before it begins: the hub's, and the trackers'."""

from __future__ import annotations

import importlib.util
import netrc
import os
from pathlib import Path

from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from sana_kit.errors import Problem

# Trackers that send a run's configuration away, and where it is seen by others.
PUBLISHING_TRACKERS = ("wandb", "comet_ml")


def upload_problems(
    push_to_hub: bool, hub_model_id: str | None, hub_token: str | None, output_dir: str
) -> list[Problem]:
    """What keeps the upload from succeeding that can be told without the network: no login, no repository name."""
    if not push_to_hub:
        return []
    problems = []
    name = hub_model_id or Path(output_dir).resolve().name
    try:
        validate_repo_id(name)
    except HFValidationError:
        field = "hub_model_id" if hub_model_id else "output_dir"
        reason = "cannot be the name of a repository"
        problems.append(Problem(field, name, reason, "Give --hub_model_id as NAME or USER/NAME."))
    if not (hub_token or get_token()):
        reason = "there is no login for the upload"
        problems.append(Problem("push_to_hub", None, reason, "Run `hf auth login`, or set HF_TOKEN."))
    return problems


def _wandb_login() -> bool:
    """Whether wandb can log in without asking, or is told to stay offline."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun") or os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def tracker_problems(report_to: str, hub_token: str | None) -> list[Problem]:
    """What keeps a tracker from starting, and a token that it might publish; "all" is every tracker installed."""
    problems = []
    installed = [name for name in PUBLISHING_TRACKERS if importlib.util.find_spec(name) is not None]
    chosen = installed if report_to == "all" else [report_to]
    for name in ("tensorboard", *PUBLISHING_TRACKERS):
        if report_to == name and importlib.util.find_spec(name) is None:
            reason = f"the package {name} is not installed"
            problems.append(Problem("report_to", report_to, reason, "Install it, or use --report_to=tensorboard."))
    if hub_token is not None and (report_to in PUBLISHING_TRACKERS or report_to == "all"):
        reason = f"must not be given with --report_to={report_to}, which may publish it"
        problems.append(Problem("hub_token", None, reason, "Log in beforehand (`hf auth login`)."))
    if "wandb" in chosen and "wandb" in installed and not _wandb_login():
        remedy = "Run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline."
        problems.append(Problem("report_to", report_to, "there is no login for wandb", remedy))
    return problems
