"""The sheet that shows the same prompts and seeds without and with a fine-tuning, in pairs; readable on a phone."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from sana_kit.files import write_atomic
from sana_kit.reports.lettering import lettering, wrap_text

COLUMNS = 3
CELL = 128  # pixels of one image's side
GAP = 18
# On a phone the sheet is half as wide: labels are then about 10 pixels high.
LABEL, HEADING, TITLE = 20, 22, 28
_INK, _SOFT = "#1c1e21", "#555b63"


@dataclasses.dataclass(frozen=True)
class Pair:
    """One prompt's image without (`before`) and with (`after`) the fine-tuning, and what is written under them."""

    before: Path
    after: Path
    label: str


def read_images(folder: str | Path) -> dict[tuple[str, int], Path]:
    """(prompt, seed) -> image of an inference script's output folder, in the order of its manifest.jsonl.

    Raises:
        ValueError: no manifest, a line that is not JSON or lacks file, prompt or seed, an image that is not there, or
            one prompt and seed twice (two runs in one folder): every problem is named.
    """
    folder = Path(folder)
    manifest = folder / "manifest.jsonl"
    if not manifest.is_file():
        raise ValueError(f"{manifest}: not there. Name the output folder of an inference script.")
    found, problems = {}, []
    for number, line in enumerate(manifest.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            key, path = (row["prompt"], int(row["seed"])), folder / row["file"]
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"{manifest}, line {number}: {type(error).__name__}: {error}")
            continue
        if not path.is_file():
            problems.append(f"{path}: listed in line {number} of the manifest, but not there")
        elif key in found and found[key] != path:
            problems.append(f"{manifest}, line {number}: prompt '{key[0]}' with seed {key[1]} is listed twice")
        found[key] = path
    if not found and not problems:
        problems.append(f"{manifest}: lists no image")
    if problems:
        raise ValueError("\n".join(problems))
    return found


class _Sheet:
    """A page that is written from top to bottom, twice: without an image it only measures."""

    def __init__(self, image: Image.Image | None, width: int):
        self.image, self.width, self.y = image, width, GAP
        self.draw = ImageDraw.Draw(image) if image is not None else None

    def text(self, text: str, size: int, fill: str, x: int = GAP, width: int | None = None, lines: int = 3) -> int:
        """Write at the current height without moving on; returns the height of what was written."""
        letters, step = lettering(size), round(size * 1.45)
        wrapped = wrap_text(text, letters, width or self.width - 2 * GAP, lines)
        for number, line in enumerate(wrapped):
            if self.draw is not None:
                letters.write(self.draw, x, self.y + number * step, line, fill)
        return step * len(wrapped)

    def row(self, pairs: Sequence[Pair], columns: int) -> None:
        """One row of pairs with their labels."""
        wide = 2 * CELL
        for column, pair in enumerate(pairs[:columns]):
            for place, path in enumerate((pair.before, pair.after)):
                if self.image is not None:
                    self.image.paste(_fitted(path), (GAP + column * (wide + GAP) + place * CELL, self.y))
        self.y += CELL + 4
        heights = [
            self.text(pair.label, LABEL, _SOFT, GAP + column * (wide + GAP), wide, 2)
            for column, pair in enumerate(pairs[:columns])
        ]
        self.y += max(heights) + GAP // 2


def _fitted(path: Path) -> Image.Image:
    """The image, scaled to fit a cell, on white."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    scale = CELL / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    image = image.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)
    cell = Image.new("RGB", (CELL, CELL), "white")
    cell.paste(image, ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    return cell


def before_after_sheet(
    sections: Sequence[tuple[str, Sequence[Pair]]],
    path: str | os.PathLike,
    *,
    title: str,
    note: str = "",
    columns: int = COLUMNS,
) -> Path:
    """Write the sheet as PNG, atomically; returns its path.

    Args:
        sections: (heading, pairs) each, in order.
        note: a line below the title.
        columns: pairs in a row.

    Raises:
        ValueError: no pair at all.
    """
    if not any(pairs for _, pairs in sections):
        raise ValueError("before_after_sheet: no pair was given.")
    width = GAP + columns * (2 * CELL + GAP)

    def write(sheet: _Sheet) -> int:
        sheet.y += sheet.text(title, TITLE, _INK)
        if note:
            sheet.y += sheet.text(note, LABEL, _SOFT)
        for heading, pairs in sections:
            sheet.y += GAP // 2
            sheet.y += sheet.text(heading, HEADING, _INK) + 4
            for start in range(0, len(pairs), columns):
                sheet.row(pairs[start : start + columns], columns)
        return sheet.y

    image = Image.new("RGB", (width, write(_Sheet(None, width)) + GAP // 2), "white")
    write(_Sheet(image, width))
    return write_atomic(Path(path), lambda file: image.save(file, "PNG"))
