"""Prompt files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from sana_kit.generation.jobs import Prompt


def read_prompts(path: str) -> tuple[list, list[str]]:
    """(list of generation.Prompt, problems) of a .txt or .jsonl file; problems name the line."""

    file = Path(path)
    if not file.is_file():
        return [], [f"--prompts_file={path}: no such file. Give a .txt or .jsonl file."]
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        return [], [f"--prompts_file={path}: is not UTF-8 text ({error.reason} at byte {error.start})."]
    if file.suffix.lower() not in (".jsonl", ".json"):
        prompts = [Prompt(line.strip()) for line in lines if line.strip()]
        return prompts, [] if prompts else [f"--prompts_file={path}: holds no prompt."]
    prompts, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompts.append(_prompt_of(json.loads(line)))
        except ValueError as error:
            problems.append(f"--prompts_file={path}, line {number}: {error}")
    if not prompts and not problems:
        problems.append(f"--prompts_file={path}: holds no prompt.")
    return prompts, problems


def _prompt_of(entry):
    """A generation.Prompt of one JSON value; ValueError with a sentence about what is wrong with it."""

    if isinstance(entry, str):
        entry = {"prompt": entry}
    if not isinstance(entry, dict):
        raise ValueError("each line must be a JSON object or a JSON string.")
    unknown = set(entry) - {field.name for field in dataclasses.fields(Prompt)}
    if unknown:
        raise ValueError(
            f"unknown entries {sorted(unknown)}; known are prompt, negative_prompt, seeds, height, width."
        )
    if not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        raise ValueError("prompt must be a text that is not empty.")
    if not isinstance(entry.get("negative_prompt"), (str, type(None))):
        raise ValueError("negative_prompt must be a text.")
    seeds = entry.get("seeds")
    if seeds is not None and not (isinstance(seeds, list) and seeds and all(type(seed) is int for seed in seeds)):
        raise ValueError("seeds must be a list of whole numbers.")
    for side in ("height", "width"):
        if entry.get(side) is not None and type(entry[side]) is not int:
            raise ValueError(f"{side} must be a whole number of pixels.")
    return Prompt(**{**entry, "seeds": None if seeds is None else tuple(seeds)})
