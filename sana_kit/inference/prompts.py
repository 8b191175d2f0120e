"""Prompt files: lines of text, JSON lines, a JSON list, or a table."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from sana_kit.errors import Problem, did_you_mean
from sana_kit.files import expand
from sana_kit.generation.jobs import Prompt

FIELD = "prompts_file"
COLUMNS = tuple(field.name for field in dataclasses.fields(Prompt))
IMAGES = ("init_image", "mask_image", "control_image")
_Entries = Iterable[tuple[int, Callable[[], Prompt]]]  # (line number, what reads the entry or raises ValueError)


def read_prompts(path: str) -> tuple[list[Prompt], list[Problem]]:
    """(prompts, problems) of a prompt file; problems name the line. The file's ending says how it is read.

    Paths of images count from the file's own folder.
    """
    file = expand(path)
    if not file.is_file():
        return [], [Problem(FIELD, path, "no such file", "Give a .txt, .jsonl, .json, .csv or .tsv file.")]
    read = _READERS.get(file.suffix.lower())
    if read is None:
        reason = f"files ending in {file.suffix} are not read"
        return [], [Problem(FIELD, path, reason, f"Use one of {', '.join(ending for ending in _READERS if ending)}.")]
    try:
        text = file.read_bytes().decode("utf-8-sig")
        entries = read(text)
    except UnicodeDecodeError as error:
        return [], [Problem(FIELD, path, f"is not UTF-8 text ({error.reason} at byte {error.start})")]
    except ValueError as error:
        return [], [Problem(FIELD, path, str(error))]
    prompts, problems = [], []
    for number, entry in entries:
        try:
            prompts.append(_with_paths(entry(), file.parent))
        except ValueError as error:
            problems.append(Problem(FIELD, path, f"line {number}: {error}"))
    if not prompts and not problems:
        problems.append(Problem(FIELD, path, "holds no prompt"))
    return prompts, problems


def _with_paths(prompt: Prompt, folder: Path) -> Prompt:
    paths = {name: getattr(prompt, name) for name in IMAGES}
    for name, path in paths.items():
        if path is not None:
            changes: dict[str, Any] = {name: str(folder / expand(path))}
            prompt = dataclasses.replace(prompt, **changes)
    return prompt


def _lines(text: str) -> list[tuple[int, str]]:
    """(number, line) of what is not empty. A line ends with a line feed; U+2028 and its like may stand in a prompt."""
    lines = ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1))
    return [(number, line) for number, line in lines if line]


def _text(text: str) -> _Entries:
    return [(number, partial(Prompt, line)) for number, line in _lines(text) if not line.startswith("#")]


def _prompt_of_line(line: str) -> Prompt:
    return _prompt_of(json.loads(line))


def _json_lines(text: str) -> _Entries:
    return [(number, partial(_prompt_of_line, line)) for number, line in _lines(text)]


def _json(text: str) -> _Entries:
    """A JSON list of prompts, whose entries are counted instead of lines; else JSON lines."""
    if not text.lstrip().startswith("["):
        return _json_lines(text)
    try:
        listed = json.loads(text)
    except ValueError:
        return _json_lines(text)
    return [(number, partial(_prompt_of, entry)) for number, entry in enumerate(listed, 1)]


def _table(delimiter: str) -> Callable[[str], _Entries]:
    def read(text: str) -> _Entries:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        header = [name.strip() for name in next(rows, [])]
        unknown = [name for name in header if name not in COLUMNS]
        if "prompt" not in header or unknown:
            named = "".join(did_you_mean(name, COLUMNS) for name in unknown)
            raise ValueError(f"its first line must name columns, one of them prompt, of {', '.join(COLUMNS)}.{named}")

        def entry(row: list[str]) -> Prompt:
            if len(row) != len(header):
                raise ValueError(f"{len(row)} cells, and the header has {len(header)}; quote cells that hold commas")
            return _prompt_of(_typed(dict(zip(header, row, strict=True))))

        return [(rows.line_num, partial(entry, row)) for row in rows if any(cell.strip() for cell in row)]

    return read


def _typed(cells: dict[str, str]) -> dict[str, Any]:
    """A table's row with whole numbers where they belong; empty cells are left out."""
    entry: dict[str, Any] = {name: cell.strip() for name, cell in cells.items() if cell.strip() or name == "prompt"}
    for side in ("height", "width"):
        if side in entry and not entry[side].isdecimal():
            raise ValueError(f"{side} must be a whole number of pixels, not {entry[side]!r}")
        entry |= {side: int(entry[side])} if side in entry else {}
    if "strength" in entry:
        try:
            entry["strength"] = float(entry["strength"])
        except ValueError:
            raise ValueError(f"strength must be a number, not {entry['strength']!r}") from None
    if "seeds" in entry:
        try:
            entry["seeds"] = [int(seed) for seed in entry["seeds"].replace(",", " ").split()]
        except ValueError:
            raise ValueError(f"seeds must be whole numbers, not {entry['seeds']!r}") from None
    return entry


def _prompt_of(entry: Any) -> Prompt:
    """A Prompt of one JSON value; ValueError with a sentence about what is wrong with it."""
    if isinstance(entry, str):
        entry = {"prompt": entry}
    if not isinstance(entry, dict):
        raise ValueError("each entry must be a JSON object or a JSON string")
    unknown = sorted(set(entry) - set(COLUMNS))
    if unknown:
        raise ValueError(f"unknown entries {unknown}; known are {', '.join(COLUMNS)}")
    if not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        raise ValueError("prompt must be a text that is not empty")
    if not isinstance(entry.get("negative_prompt"), (str, type(None))):
        raise ValueError("negative_prompt must be a text")
    seeds = entry.get("seeds")
    if seeds is not None and not (isinstance(seeds, list) and seeds and all(type(seed) is int for seed in seeds)):
        raise ValueError("seeds must be a list of whole numbers")
    for side in ("height", "width"):
        if entry.get(side) is not None and type(entry[side]) is not int:
            raise ValueError(f"{side} must be a whole number of pixels")
    strength = entry.get("strength")
    if strength is not None and not (type(strength) in (int, float) and 0 < strength <= 1):
        raise ValueError("strength must be a number above 0 and at most 1")
    for name in IMAGES:
        if entry.get(name) is not None and not (isinstance(entry[name], str) and entry[name].strip()):
            raise ValueError(f"{name} must be the path of an image")
    return Prompt(**{**entry, "seeds": None if seeds is None else tuple(seeds)})


_READERS: dict[str, Callable[[str], _Entries]] = {
    ".txt": _text,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    "": _text,
}
