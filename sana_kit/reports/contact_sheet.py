"""Contact sheets: one image of many, with labels."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from sana_kit.files import write_atomic
from sana_kit.reports.lettering import Lettering, lettering, wrap_text

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def contact_sheet(
    images: Sequence,
    labels: Sequence[str] | None,
    path: str | os.PathLike,
    columns: int,
    title: str | None = None,
    row_labels: Sequence[str] | None = None,
    cell_size: int | None = None,
) -> Path:
    """One image of all images, row by row, each over its label; written atomically.

    Args:
        images: PIL images or paths, of any sizes; each is scaled to fit its cell, never cropped.
        labels: one text per image, wrapped to at most three lines; None for none.
        path: .png, .jpg or .webp.
        columns: images per row.
        row_labels: one text per row, to the left of it (a prompt whose seeds fill the row).
        cell_size: pixels of the longer side of a cell; default the largest image's, at most 512.

    Raises:
        ValueError: no image, or numbers of labels, rows and images that do not fit one another; another suffix.
    """
    _check(images, labels, path, columns, row_labels)
    grid = _Grid.of([_opened(image).size for image in images], min(columns, len(images)), cell_size)
    letters = lettering(grid.text_size)
    wrapped = [wrap_text(label, letters, grid.cell_width, 3) for label in labels or []]
    side = max(140, grid.cell_width * 3 // 4) if row_labels is not None else 0
    row_heights = grid.row_heights(wrapped)
    width = grid.gap + (side + grid.gap if side else 0) + grid.columns * (grid.cell_width + grid.gap)
    title_letters = lettering(round(grid.text_size * 1.5))
    title_lines = wrap_text(title, title_letters, width - 2 * grid.gap, 3) if title else []
    title_height = len(title_lines) * grid.title_line_height + (grid.gap if title_lines else 0)

    height = grid.gap + title_height + sum(row_heights) + grid.gap * len(row_heights)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    _write_lines(draw, title_lines, grid.gap, grid.gap, grid.title_line_height, title_letters, "#111")
    y = grid.gap + title_height
    for row, row_height in enumerate(row_heights):
        x = grid.gap
        if side:
            lines = wrap_text(row_labels[row], letters, side, max(1, grid.cell_height // grid.line_height))
            _write_lines(draw, lines, x, y, grid.line_height, letters, "#111")
            x += side + grid.gap
        for index in range(row * grid.columns, min((row + 1) * grid.columns, len(images))):
            scaled = _scaled(images[index], grid.sizes[index])
            left, top = (grid.cell_width - scaled.width) // 2, (grid.cell_height - scaled.height) // 2
            sheet.paste(scaled, (x + left, y + top))
            lines = wrapped[index] if wrapped else []
            _write_lines(draw, lines, x, y + grid.cell_height + grid.gap // 2, grid.line_height, letters, "#444")
            x += grid.cell_width + grid.gap
        y += row_height + grid.gap
    return write_atomic(path, lambda file: sheet.save(file, _FORMATS[Path(path).suffix.lower()], quality=90))


def _check(
    images: Sequence,
    labels: Sequence[str] | None,
    path: str | os.PathLike,
    columns: int,
    row_labels: Sequence[str] | None,
) -> None:
    """Raise ValueError with everything that does not fit."""
    rows = math.ceil(len(images) / columns) if columns > 0 else 0
    problems = []
    if not images:
        problems.append("no image was given")
    if columns < 1:
        problems.append(f"columns={columns}: must be at least 1")
    if labels is not None and len(labels) != len(images):
        problems.append(f"{len(labels)} labels for {len(images)} images")
    if row_labels is not None and columns > 0 and len(row_labels) != rows:
        problems.append(f"{len(row_labels)} row labels for {rows} rows")
    if Path(path).suffix.lower() not in _FORMATS:
        problems.append(f"{path}: the name must end in .png, .jpg or .webp")
    if problems:
        raise ValueError("contact_sheet: " + "; ".join(problems) + ".")


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Where cells lie, in pixels: one cell for the largest image, all of one size."""

    columns: int
    sizes: list[tuple[int, int]]  # of each image once it is scaled: (width, height)
    cell_width: int
    cell_height: int

    @classmethod
    def of(cls, sizes: Sequence[tuple[int, int]], columns: int, cell_size: int | None) -> _Grid:
        """The grid of images of these sizes; `cell_size` as in `contact_sheet`."""
        cell = cell_size or min(512, max(max(size) for size in sizes))
        scales = [cell / max(size) for size in sizes]
        scaled = [
            (max(1, round(width * scale)), max(1, round(height * scale)))
            for (width, height), scale in zip(sizes, scales, strict=True)
        ]
        widest = max(max(width for width, _ in scaled), 96)  # room for a word of a label under a very small image
        return cls(columns, scaled, widest, max(height for _, height in scaled))

    @property
    def text_size(self) -> int:
        return max(12, round(self.cell_width / 22))

    @property
    def gap(self) -> int:
        return max(8, self.cell_width // 32)

    @property
    def line_height(self) -> int:
        return round(self.text_size * 1.35)

    @property
    def title_line_height(self) -> int:
        return round(self.line_height * 1.5)

    def row_heights(self, wrapped: Sequence[Sequence[str]]) -> list[int]:
        """Each row's cells and, where it has any, the lines of its longest label (`wrapped`: lines per image)."""
        heights = []
        for first in range(0, len(self.sizes), self.columns):
            lines = max((len(label) for label in wrapped[first : first + self.columns]), default=0)
            heights.append(self.cell_height + (lines * self.line_height + self.gap // 2 if lines else 0))
        return heights


def _opened(image: Image.Image | str | os.PathLike) -> Image.Image:
    """A path's image; only its header is read here."""
    return image if isinstance(image, Image.Image) else Image.open(image)


def _scaled(image: Image.Image | str | os.PathLike, size: tuple[int, int]) -> Image.Image:
    scaled = _opened(image).convert("RGB")
    if size == scaled.size:
        return scaled
    enlarge = size[0] > scaled.size[0]
    return scaled.resize(size, Image.Resampling.BICUBIC if enlarge else Image.Resampling.LANCZOS)


def _write_lines(
    draw: ImageDraw.ImageDraw, lines: Sequence[str], x: int, y: int, line_height: int, letters: Lettering, color: str
) -> None:
    """Lines of text below one another, the first one's upper left corner at (x, y)."""
    for number, line in enumerate(lines):
        letters.write(draw, x, y + number * line_height, line, color)
