"""Contact sheets: one image of many, with labels."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from sana_kit.files import write_atomic

# The bundled font has Chinese, Japanese kana, Latin and Cyrillic letters (fonts/make_subset.py); for what it lacks,
# fonts as distributions, macOS and Windows install them.
_BUNDLED = Path(__file__).parent / "fonts" / "NotoSansCJK-subset.otf"
_FONTS = (
    str(_BUNDLED),
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "PingFang.ttc",
    "msyh.ttc",
    "malgun.ttf",
    "Arial Unicode.ttf",
    "DejaVuSans.ttf",
)
_NOWHERE = "\U0010fffe"  # in no font: what is drawn for it is drawn for every missing letter


@lru_cache(maxsize=64)
def _font(name: str, size: int):
    """A font by file name, None where it is not installed; "": Pillow's own."""
    from PIL import ImageFont

    try:
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except OSError:
        return None


def _has(font, letter: str) -> bool:
    """Whether a font draws a letter, and not the box that stands for a missing one."""
    return bytes(font.getmask(letter)) != bytes(font.getmask(_NOWHERE))


def font_for(texts: Sequence[str], size: int):
    """The font that has the most of the letters of `texts`, the bundled one where several have all."""
    letters = {letter for text in texts for letter in text if not letter.isspace() and letter.isprintable()}
    best, most = None, -1
    for name in (*_FONTS, ""):
        font = _font(name, size)
        if font is None:
            continue
        count = sum(_has(font, letter) for letter in letters)
        if count > most:
            best, most = font, count
        if most == len(letters):
            break
    return best


def wrap_text(text: str, font, width: int, max_lines: int) -> list[str]:
    """`text` in lines of at most `width` pixels, broken at spaces, else inside words; "…" where it was cut."""
    lines, line = [], ""
    for word in text.split():
        candidate = f"{line} {word}" if line else word
        if font.getlength(candidate) <= width:
            line = candidate
            continue
        if line:
            lines.append(line)
        line = ""
        for character in word:  # a word longer than a line, or a script without spaces
            if line and font.getlength(line + character) > width:
                lines.append(line)
                line = ""
            line += character
    lines.append(line)
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = lines[: max_lines - 1] + [last.rstrip() + "…"]
    return lines


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
        ValueError: no image, or numbers of labels, rows and images that do not fit one another.
    """
    from PIL import Image, ImageDraw

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
    if problems:
        raise ValueError("contact_sheet: " + "; ".join(problems) + ".")
    columns = min(columns, len(images))

    def opened(image):
        if isinstance(image, Image.Image):
            return image
        return Image.open(image)  # lazily: only the header is read here

    sizes = [opened(image).size for image in images]
    cell = cell_size or min(512, max(max(size) for size in sizes))
    scales = [cell / max(size) for size in sizes]
    cell_width = max(max(1, round(size[0] * scale)) for size, scale in zip(sizes, scales, strict=True))
    cell_height = max(max(1, round(size[1] * scale)) for size, scale in zip(sizes, scales, strict=True))
    cell_width = max(cell_width, 96)  # room for a word of a label under a very small image

    text_size = max(12, round(cell_width / 22))
    gap = max(8, cell_width // 32)
    font = font_for([*(labels or []), *(row_labels or [])], text_size)
    line_height = round(text_size * 1.35)
    wrapped = [wrap_text(label, font, cell_width, 3) for label in labels] if labels is not None else []
    side = max(140, cell_width * 3 // 4) if row_labels is not None else 0
    label_heights = [
        max((len(lines) for lines in wrapped[row * columns : (row + 1) * columns]), default=0) * line_height
        for row in range(rows)
    ]
    row_heights = [cell_height + (height + gap // 2 if height else 0) for height in label_heights]

    width = gap + (side + gap if side else 0) + columns * (cell_width + gap)
    title_font = font_for([title or ""], round(text_size * 1.5))
    title_lines = wrap_text(title, title_font, width - 2 * gap, 3) if title else []
    title_height = len(title_lines) * round(line_height * 1.5) + (gap if title_lines else 0)
    height = gap + title_height + sum(row_heights) + gap * rows

    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    y = gap
    for line in title_lines:
        draw.text((gap, y), line, fill="#111", font=title_font)
        y += round(line_height * 1.5)
    y = gap + title_height
    for row in range(rows):
        x = gap
        if side:
            for number, line in enumerate(wrap_text(row_labels[row], font, side, max(1, cell_height // line_height))):
                draw.text((x, y + number * line_height), line, fill="#111", font=font)
            x += side + gap
        for index in range(row * columns, min((row + 1) * columns, len(images))):
            scaled = opened(images[index]).convert("RGB")
            size = tuple(max(1, round(side_length * scales[index])) for side_length in sizes[index])
            if size != scaled.size:
                enlarge = size[0] > scaled.size[0]
                scaled = scaled.resize(size, Image.Resampling.BICUBIC if enlarge else Image.Resampling.LANCZOS)
            sheet.paste(scaled, (x + (cell_width - size[0]) // 2, y + (cell_height - size[1]) // 2))
            for number, line in enumerate(wrapped[index] if wrapped else ()):
                draw.text((x, y + cell_height + gap // 2 + number * line_height), line, fill="#444", font=font)
            x += cell_width + gap
        y += row_heights[row] + gap
    kind = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(Path(path).suffix.lower())
    if kind is None:
        raise ValueError(f"contact_sheet: {path}: the name must end in .png, .jpg or .webp.")
    return write_atomic(path, lambda file: sheet.save(file, kind, quality=90))
