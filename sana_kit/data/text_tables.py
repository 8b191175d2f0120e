"""Tables in text files: .csv, .tsv, .jsonl, .json lists; every row must have as many cells as there are columns."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pyarrow.parquet as pq

TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")


def read_text_table(file: Path) -> tuple[list[str], list[dict]]:
    """(columns, rows) of a .jsonl, .json, .csv, .tsv or small .parquet table.

    Raises:
        ValueError: what is wrong, with file name and line.
    """
    kind = file.suffix.lower()
    if kind == ".parquet":
        table = pq.read_table(file)
        return table.column_names, table.to_pylist()
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.name} cannot be read as UTF-8 text ({error})") from None
    if kind in (".csv", ".tsv"):
        return _read_separated(file.name, text, "\t" if kind == ".tsv" else ",")
    if text.lstrip().startswith("["):
        return _read_json_list(file.name, text)
    return _read_json_lines(file.name, text)


def _read_separated(name: str, text: str, separator: str) -> tuple[list[str], list[dict]]:
    """A caption with a separator in it that is not quoted would be cut there: each such row is an error."""
    csv.field_size_limit(2**24)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    rows, odd = [], []
    try:
        header = next(reader, [])
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                odd.append(f"line {reader.line_num} has {len(cells)}")
            rows.append(dict(zip(header, cells, strict=False)))
    except csv.Error as error:
        raise ValueError(f"{name}, line {reader.line_num}: {error}") from None
    if odd:
        shown = ", ".join(odd[:5]) + (f" and {len(odd) - 5} more" if len(odd) > 5 else "")
        word = "tab" if separator == "\t" else "comma"
        remedy = f'Put a caption that holds a {word} into double quotes ("...")'
        raise ValueError(f"{name}: the header has {len(header)} cells, but {shown}. {remedy}")
    return header, rows


def _read_json_list(name: str, text: str) -> tuple[list[str], list[dict]]:
    """One JSON list of objects."""
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}, line {error.lineno}: not JSON ({error})") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{name}, entry {number}: a JSON object is expected, not {type(row).__name__}")
    return list(dict.fromkeys(key for row in rows for key in row)), rows


def _read_json_lines(name: str, text: str) -> tuple[list[str], list[dict]]:
    """One JSON object a line. Not str.splitlines: JSON strings may hold line separators that it would split at."""
    columns: dict[str, None] = {}
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{name}, line {number}: a JSON object is expected, not {type(row).__name__}")
        columns.update(dict.fromkeys(row))
        rows.append(row)
    return list(columns), rows
