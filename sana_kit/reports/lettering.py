"""Labels on sheets in any script: each letter in the first font that has it, and lines that fit a width."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TypeAlias

from PIL import ImageDraw, ImageFont

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

# The bundled font has Chinese, Japanese kana, Latin and Cyrillic letters (fonts/make_subset.py); for what it lacks,
# fonts as distributions, macOS and Windows install them.
BUNDLED = Path(__file__).parent / "fonts" / "NotoSansCJK-subset.otf"
_FONTS = (
    str(BUNDLED),
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "PingFang.ttc",
    "msyh.ttc",
    "malgun.ttf",
    "AppleSDGothicNeo.ttc",
    "Arial Unicode.ttf",
    "segoeui.ttf",
    "Nirmala.ttf",
    "leelawui.ttf",
    "NotoSansArabic-Regular.ttf",
    "NotoSansHebrew-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf",
    "NotoSansThai-Regular.ttf",
    "DejaVuSans.ttf",
    "",  # Pillow's own
)
_NOWHERE = "\U0010fffe"  # in no font: what is drawn for it is drawn for every missing letter
_HANGUL = range(0xAC00, 0xD7A4)
_MARKS = ("Mn", "Me", "Mc", "Cf")


@lru_cache(maxsize=64)
def _font(name: str, size: int) -> Font | None:
    """A font by file name, None where it is not installed; "": Pillow's own."""
    try:
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except OSError:
        return None


@lru_cache(maxsize=4096)
def has(font: Font, letter: str) -> bool:
    """Whether a font draws a letter, and not the box that stands for a missing one."""
    return bytes(font.getmask(letter)) != bytes(font.getmask(_NOWHERE))


class Lettering:
    """All fonts of one size. The first one sets the baseline, and draws the box of a letter that none has."""

    def __init__(self, size: int):
        fonts = (_font(name, size) for name in _FONTS)
        self.fonts: Sequence[Font] = [font for font in fonts if font is not None]

    def _font_of(self, letter: str) -> Font | None:
        return next((font for font in self.fonts if has(font, letter)), None)

    def readable(self, text: str) -> str:
        """The text, Korean syllables in Latin letters where no font has them: Unicode names them so."""

        def spelled(letter: str) -> str:
            if ord(letter) not in _HANGUL or self._font_of(letter) is not None:
                return letter
            return unicodedata.name(letter).rpartition(" ")[2].lower()

        return "".join(spelled(letter) for letter in unicodedata.normalize("NFC", text))

    def runs(self, text: str) -> list[tuple[Font, str]]:
        """[(font, part of `text`)]: as few parts as can be, in order.

        Marks that are set on a letter, and joiners, stay in the part before them; spaces between two parts are of the
        first font, since behind Arabic or Hebrew they would stand on the wrong side.
        """
        chosen: list[Font] = []
        for letter in text:
            before = chosen[-1] if chosen else self.fonts[0]
            joined = unicodedata.category(letter) in _MARKS
            keeps = before is not self.fonts[0] and not letter.isascii() and has(before, letter)
            chosen.append(before if joined or keeps else self._font_of(letter) or self.fonts[0])
        for place in range(1, len(text) - 1):
            if text[place].isspace() and chosen[place - 1] is chosen[place + 1]:
                chosen[place] = chosen[place - 1]
        parts = groupby(zip(chosen, text, strict=True), key=lambda pair: pair[0])
        return [(font, "".join(letter for _, letter in part)) for font, part in parts]

    def width(self, text: str) -> float:
        """Pixels that the text takes."""
        return sum(font.getlength(part) for font, part in self.runs(text))

    def write(self, draw: ImageDraw.ImageDraw, x: float, y: float, text: str, fill: str) -> None:
        """Write the text, its upper left corner at (x, y)."""
        baseline = y + _ascent(self.fonts[0])
        for font, part in self.runs(text):
            draw.text((x, baseline - _ascent(font)), part, fill=fill, font=font)
            x += font.getlength(part)


def _ascent(font: Font) -> int:
    return font.getmetrics()[0] if isinstance(font, ImageFont.FreeTypeFont) else 0


@lru_cache(maxsize=16)
def lettering(size: int) -> Lettering:
    """The fonts of this size, looked for once."""
    return Lettering(size)


def wrap_text(text: str, letters: Lettering, width: int, max_lines: int) -> list[str]:
    """`text` in lines of at most `width` pixels, broken at spaces, else inside words; "…" where it was cut."""
    lines, line = [], ""
    for word in letters.readable(text).split():
        candidate = f"{line} {word}" if line else word
        if letters.width(candidate) <= width:
            line = candidate
            continue
        if line:
            lines.append(line)
        line = ""
        for cluster in _clusters(word):  # a word longer than a line, or a script without spaces
            if line and letters.width(line + cluster) > width:
                lines.append(line)
                line = ""
            line += cluster
    lines.append(line)
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and letters.width(last + "…") > width:
            last = last[:-1]
        lines = lines[: max_lines - 1] + [last.rstrip() + "…"]
    return lines


def _clusters(word: str) -> Iterable[str]:
    """Letters with the marks that are set on them."""
    cluster = ""
    for letter in word:
        if cluster and unicodedata.category(letter) not in _MARKS:
            yield cluster
            cluster = ""
        cluster += letter
    if cluster:
        yield cluster
