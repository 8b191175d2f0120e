"""Make NotoSansCJK-subset.otf, the font of the contact sheets' labels, from Noto Sans CJK.

    pip install fonttools rinoh-typeface-notosanscjk==0.0.1
    python sana_kit/reports/fonts/make_subset.py PATH/notosanscjkjp-regular.otf

It holds the 3,755 commonest Chinese characters (GB 2312, first level) in their Chinese forms, kana, Latin and Cyrillic
letters, plain Greek ones, and punctuation, without hinting or layout features.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fontTools.ttLib import TTFont

OUTPUT = Path(__file__).with_name("NotoSansCJK-subset.otf")
_RANGES = ((0x20, 0x7F), (0xA0, 0x180), (0x370, 0x530), (0x2010, 0x2040), (0x3000, 0x3100), (0xFF01, 0xFF60))


def hanzi() -> set[int]:
    """Code points of GB 2312's first level."""
    found = set()
    for row in range(0xB0, 0xD8):
        for cell in range(0xA1, 0xFF):
            found.update(map(ord, bytes([row, cell]).decode("gb2312", "ignore")))
    return found


def chinese_forms(font: TTFont) -> dict[str, str]:
    """Glyph -> glyph that simplified Chinese has instead (the font's own forms are Japanese)."""
    layout = font["GSUB"].table
    (script,) = (record.Script for record in layout.ScriptList.ScriptRecord if record.ScriptTag == "hani")
    (language,) = (record.LangSys for record in script.LangSysRecord if record.LangSysTag == "ZHS ")
    forms: dict[str, str] = {}
    for index in language.FeatureIndex:
        feature = layout.FeatureList.FeatureRecord[index]
        if feature.FeatureTag == "locl":
            for lookup in feature.Feature.LookupListIndex:
                for table in layout.LookupList.Lookup[lookup].SubTable:
                    forms.update(getattr(getattr(table, "ExtSubTable", table), "mapping", {}))
    return forms


def main() -> None:
    from fontTools import subset
    from fontTools.ttLib import TTFont

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="notosanscjkjp-regular.otf")
    font = TTFont(parser.parse_args().source)
    forms, characters = chinese_forms(font), hanzi()
    for table in font["cmap"].tables:
        if table.format in (4, 12):
            for character in characters & table.cmap.keys():
                table.cmap[character] = forms.get(table.cmap[character], table.cmap[character])
    options = subset.Options(layout_features=[], hinting=False, name_IDs=[0, 1, 2, 3, 4, 5, 6, 7, 13, 14])
    options.notdef_outline = True
    options.drop_tables += ["BASE", "GDEF", "GPOS", "GSUB", "VORG", "vhea", "vmtx"]
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=characters.union(*(range(first, end) for first, end in _RANGES)))
    subsetter.subset(font)
    font.save(OUTPUT)


if __name__ == "__main__":
    main()
