"""Several captions of an image: lines of a file, texts of a cell, weighted columns; which one a draw takes."""

import json

import numpy as np
import pytest
import tiny

from sana_kit.data.captions import Choices, caption_columns, lines_of
from sana_kit.data.discover import load_images
from sana_kit.data.image_set import concat
from sana_kit.data.texts import Texts


def table_of(folder, rows):
    tiny.write_image_folder(folder, count=len(rows), captions=False)
    lines = [{"file_name": f"image_{k:02d}.png", **row} for k, row in enumerate(rows)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder)


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("text", [("text", 1)]),
        ("a,b", [("a", 1), ("b", 1)]),
        (" a:3, b ", [("a", 3), ("b", 1)]),
        ("a:0.5", [("a", 0.5)]),
        ("odd,name:2", [("odd,name:2", 1)]),
        ("colon:name,a:2", [("colon:name", 1), ("a", 2)]),
        ("not_there", [("not_there", 1)]),
    ],
)
def test_columns_and_weights_are_read(named, found):
    assert caption_columns(named, ["text", "a", "b", "odd,name:2", "colon:name"]) == found


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("a:0", "the weight of 'a' is 0; it must be above 0"),
        ("a:-1,b", "it must be above 0"),
        ("a:nan,b", "it must be above 0"),
        ("a:many,b", "'many', which is no number"),
        ("a,,b", "name is empty"),
        ("a:2,a:1", "named twice"),
    ],
)
def test_columns_that_cannot_be_meant_are_refused_before_an_image_is_read(tmp_path, named, told):
    folder = table_of(tmp_path / "set", [{"a": "x", "b": "y"}])
    with pytest.raises(ValueError, match=told):
        load_images(dataset_name=folder, caption_column=named)


def test_an_absent_column_among_several_is_named(tmp_path):
    folder = table_of(tmp_path / "set", [{"a": "x", "b": "y"}])
    with pytest.raises(ValueError, match="caption_column=c: no such column .*columns present: image .*, a, b"):
        load_images(dataset_name=folder, caption_column="a,c:2")


def test_columns_share_their_weight_among_their_captions_and_leave_it_where_they_are_empty(tmp_path):
    rows = [{"a": ["x", "y"], "b": "z"}, {"a": None, "b": "z"}, {"a": "", "b": " "}]
    folder = table_of(tmp_path / "set", rows)
    images = load_images(dataset_name=folder, caption_column="a:3,b:1", instance_prompt="p")
    assert images.captions == ["x", "z", "p"] and images.all_captions == ["x", "y", "z", "z", "p"]
    assert images.choices.weights.tolist() == [1.5, 1.5, 1, 1, 1]
    assert images.report["images with several captions"] == 1
    assert images.report["captions from instance_prompt"] == 1


def test_lines_of_a_caption_file_are_captions_and_one_line_is_what_it_was(tmp_path):
    folder = tiny.write_image_folder(tmp_path / "set", count=3)
    before = load_images(instance_data_dir=str(folder))
    assert before.choices is None and before.report["images with several captions"] == 0
    digest = before.digest()
    (folder / "image_01.txt").write_text("\n" + before.captions[1] + "\n\n")
    assert load_images(instance_data_dir=str(folder)).digest() == digest
    (folder / "image_01.txt").write_text("one\r\n \n  two  \n")
    images = load_images(instance_data_dir=str(folder))
    assert images.all_captions == [before.captions[0], "one", "two", before.captions[2]]
    assert any("1 image(s) have several captions" in note for note in images.notes)
    assert images.digest() != digest


def test_lines_without_words_are_none():
    assert lines_of("a\n \n\n") == "a\n \n\n" and lines_of("") == "" and lines_of("a\nb") == ["a", "b"]


def test_draws_follow_the_weights():
    choices = Choices(Texts(["a", "b", "c", "d"]), [0, 1, 4], [1, 2, 1, 1])
    assert {choices.draw(0, u) for u in (0.0, 0.5, 1 - 2**-53)} == {0}
    assert [choices.draw(1, u) for u in (0.0, 0.49, 0.5, 0.74, 0.75, 1 - 2**-53)] == [1, 1, 2, 2, 3, 3]
    counts = np.bincount([choices.draw(1, u) for u in np.random.default_rng(0).random(4000)])
    assert np.abs(counts[1:] / 4000 - [0.5, 0.25, 0.25]).max() < 0.03


def test_sets_keep_their_captions_when_they_are_cut_joined_and_affixed(tmp_path):
    rows = [{"a": ["x", "y"]}, {"a": "z"}, {"a": ["u", "v", "w"]}]
    first = load_images(dataset_name=table_of(tmp_path / "set", rows), caption_column="a")
    second = load_images(instance_data_dir=str(tiny.write_image_folder(tmp_path / "two", count=1)))
    left = first.without([0])
    assert left.all_captions == ["z", "u", "v", "w"] and left.choices.starts.tolist() == [0, 1, 4]
    both = concat(second, left)
    assert both.all_captions == [second.captions[0], "z", "u", "v", "w"] and len(both.choices) == len(both) == 3
    before = both.digest()
    both.affix("<", ">")
    assert both.captions == [f"<{second.captions[0]}>", "<z>", "<u>"]
    assert both.all_captions[-1] == "<w>" and both.digest() != before
    assert concat(second, second).choices is None
