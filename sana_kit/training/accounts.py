"""The login and the name that the upload needs at a run's end, checked before it begins."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from sana_kit.errors import Problem, setting


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
        problems.append(Problem(field, name, reason, f"Give {setting('hub_model_id')} as NAME or USER/NAME."))
    if not (hub_token or get_token()):
        reason = "there is no login for the upload"
        problems.append(Problem("push_to_hub", None, reason, "Run `hf auth login`, or set HF_TOKEN."))
    return problems
