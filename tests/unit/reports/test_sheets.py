"""Sheets: pairs without and with a fine-tuning, and labels in every script."""

import numpy as np
import pytest
from PIL import Image

from sana_kit.reports.before_after import CELL, GAP, Pair, before_after_sheet
from sana_kit.reports.contact_sheet import _BUNDLED, _has, font_for


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
    font = font_for([text], 20)
    assert font.path == str(_BUNDLED)
    assert all(_has(font, letter) for letter in text if letter != " ")


def test_of_what_no_font_has_the_rest_is_drawn():
    assert font_for(["\U000f0000 猫"], 20).path == str(_BUNDLED)
    assert not _has(font_for(["猫"], 20), "\U000f0000")
