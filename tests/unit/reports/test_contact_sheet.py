"""Contact sheets: every image in its place, labels in their column."""

import pytest
from PIL import Image

from sana_kit.reports.contact_sheet import contact_sheet
from sana_kit.reports.lettering import lettering, wrap_text


def test_contact_sheet_places_every_image(tmp_path):
    colors = ["red", "lime", "blue", "yellow", "aqua"]
    images = [Image.new("RGB", (120, 120), color) for color in colors[:4]]
    images[1].save(tmp_path / "lime.png")
    images[1] = tmp_path / "lime.png"
    images.append(Image.new("L", (60, 120), 128))  # another size and mode
    labels = [
        "short",
        "a long label that needs several lines " * 3,
        "",
        "ein Häuschen",
        "averylongwordwithoutspaces" * 3,
    ]
    path = contact_sheet(
        images, labels, tmp_path / "sheets" / "sheet.png", 3, title="Title", row_labels=["first", "second"]
    )
    sheet = Image.open(path)
    found = {color: count for count, color in sheet.getcolors(100_000)}
    for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)):
        assert found[color] == 120 * 120
    assert found[(128, 128, 128)] >= 60 * 120
    assert [entry.name for entry in path.parent.iterdir()] == ["sheet.png"]  # no temporary file stays


def test_contact_sheet_labels_stay_in_their_column():

    for text in ("a word " * 40, "w" * 300, "一只小狗" * 30, "", "one"):
        lines = wrap_text(text, lettering(14), 150, 3)
        assert 1 <= len(lines) <= 3 and all(lettering(14).width(line) <= 150 for line in lines)
        assert lines[-1].endswith("…") == (len(text) > 20)


def test_contact_sheet_names_every_problem(tmp_path):
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="3 labels for 2 images; 1 row labels for 2 rows"):
        contact_sheet([image, image], ["a"] * 3, tmp_path / "a.png", 1, row_labels=["x"])
    with pytest.raises(ValueError, match="no image"):
        contact_sheet([], None, tmp_path / "a.png", 1)
    with pytest.raises(ValueError, match="a.gif"):
        contact_sheet([image], None, tmp_path / "a.gif", 1)
    assert not list(tmp_path.iterdir())
