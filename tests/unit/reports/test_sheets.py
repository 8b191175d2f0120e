"""Sheets: pairs without and with a fine-tuning, and labels in every script."""

import numpy as np
import pytest
from PIL import Image

from sana_kit.reports.before_after import CELL, GAP, Pair, before_after_sheet
from sana_kit.reports.contact_sheet import contact_sheet
from sana_kit.reports.lettering import BUNDLED, has, lettering


def square(folder, name, colour, size=(64, 64)):
    path = folder / f"{name}.png"
    Image.new("RGB", size, colour).save(path)
    return path


def test_a_pair_stands_side_by_side_and_each_once(tmp_path):
    red, blue = square(tmp_path, "red", "#f00"), square(tmp_path, "blue", "#00f", (32, 64))
    sections = [("In", [Pair(red, blue, "one"), Pair(red, blue, "two")]), ("Not in", [Pair(red, blue, "three")])]
    path = before_after_sheet(sections, tmp_path / "sheet.png", title="T", note="n", columns=2)
    pixels = np.asarray(Image.open(path)).astype(int)
    assert pixels.shape[1] == GAP + 2 * (2 * CELL + GAP)
    reds = (pixels == (255, 0, 0)).all(-1)
    blues = (pixels == (0, 0, 255)).all(-1)
    assert reds.sum() == 3 * CELL * CELL
    assert blues.sum() == 3 * CELL * CELL // 2  # half as wide, on white
    left = np.flatnonzero(reds.any(0))
    assert (left[0], left[CELL]) == (GAP, GAP + 2 * CELL + GAP)  # the second pair begins behind the first
    with pytest.raises(ValueError, match="no pair"):
        before_after_sheet([("In", [])], path, title="T")


@pytest.mark.parametrize(
    "text", ["一只小猫，金色纸上的深蓝墨线", "ねこのかお カタカナ", "рыжая лиса", "crème brûlée “x” — ok"]
)
def test_the_bundled_font_draws_labels_of_these_scripts(text):
    ((font, part),) = lettering(20).runs(text)
    assert font.path == str(BUNDLED) and part == text
    assert all(has(font, letter) for letter in text if letter != " ")


def test_letters_that_the_bundled_font_lacks_take_no_others_along():
    """One label in Arabic had all labels of a sheet drawn in a font without Chinese letters, as boxes."""
    letters = lettering(20)
    text = "一只猫 | قطة صغيرة, ok \U000f0000"
    runs = letters.runs(text)
    assert "".join(part for _, part in runs) == text
    for font, part in runs:
        if {"猫", "ok"} & {*part, *part.split()}:
            assert font.path == str(BUNDLED)
    if any(has(font, "ق") for font in letters.fonts):  # where a font with Arabic letters is installed
        assert [part for font, part in runs if has(font, "ق")] == ["قطة صغيرة"]
    assert letters.width(text) == pytest.approx(sum(font.getlength(part) for font, part in runs))


def test_korean_is_spelled_where_no_font_has_it(monkeypatch):
    letters = lettering(20)
    monkeypatch.setattr(letters, "fonts", [font for font in letters.fonts if not has(font, "고")])
    assert letters.readable("고양이 猫") == "goyangi 猫"


def test_the_same_label_is_drawn_the_same_whatever_the_others_are(tmp_path):
    image = Image.new("RGB", (128, 128), "red")
    alone = Image.open(contact_sheet([image], ["一只小猫"], tmp_path / "a.png", 1))
    among = Image.open(contact_sheet([image] * 2, ["一只小猫", "قطة حمراء שלום"], tmp_path / "b.png", 2))
    width = 128 + 8
    assert np.array_equal(np.asarray(alone)[:, :width], np.asarray(among)[: alone.height, :width])
