"""The lines that stand before every prompt (`complex_human_instruction`). Nothing here imports torch."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

from sana_kit.errors import Problem, UserError


def parse_instruction(value: str | None) -> list[str] | None:
    """The lines that go before a prompt (`complex_human_instruction`), or None.

    'default' is SanaPipeline's own; 'none' is no instruction; else a file (a JSON list, or text whose lines are taken
    one by one) or a JSON list of strings.

    Raises:
        UserError: neither a file nor a JSON list of strings.
    """
    if value is None or value.strip().lower() in ("none", ""):
        return None
    if value.strip().lower() == "default":
        from diffusers import SanaPipeline

        return list(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)
    field, text, source = "complex_human_instruction", value, "it"
    if not value.lstrip().startswith("["):
        path = Path(value)
        if not path.is_file():
            example = '["Describe the image:", "User Prompt: "]'
            remedy = f"Give 'default' (SanaPipeline's own), 'none', a file, or a JSON list such as '{example}'."
            raise UserError(Problem(field, value, "no such file", remedy))
        text, source = path.read_text(encoding="utf-8"), f"the file {value}"
        if not text.lstrip().startswith("["):
            return text.splitlines() or None
    try:
        lines = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(Problem(field, None, f"{source} is not a JSON list: {error}")) from error
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise UserError(Problem(field, None, f"{source} must be a JSON list of strings"))
    return lines or None
