"""The end of a run: its validation images held against what it was trained on, on one process."""

import numpy as np
import pytest
import tiny
from helpers.memorised import NoStop, as_trained, drawn, fields
from helpers.ranks import ALONE
from PIL import Image

from sana_kit.errors import ImageError
from sana_kit.training import memorisation
from sana_kit.training.memorisation import compare_with_training_images


@pytest.fixture
def encoded(tmp_path):
    return fields(tmp_path / "images")


def test_a_copy_of_what_is_trained_on_is_found_and_other_images_are_not(encoded, tmp_path):
    other = tiny.make_images(1)[0][0].resize((64, 64))
    entries = drawn(tmp_path, other, as_trained(encoded, 3), as_trained(encoded, 8))
    found = compare_with_training_images(encoded, 8, entries, tmp_path, ALONE, NoStop())
    assert [row["file"] for row in found.copies] == ["validation/1.png"]  # sample 8 is not trained on
    best = found.rows[0]
    assert best["training_image"] == encoded.images.name(3) and best["prompt"] == "prompt 1" and best["seed"] == 1
    assert best["ratio"] < 0.1 and best["caption"] == "a field"
    shown = Image.open(tmp_path / best["nearest"]).resize((64, 64))
    # what is written is the crop that was trained on, so both can be laid side by side
    assert np.abs(np.asarray(shown, int) - as_trained(encoded, 3)).mean() < 12
    assert found.figures()["copies"] == 1 and "validation/1.png of 1.png" in found.told()
    less = compare_with_training_images(encoded, 8, entries[:1], tmp_path, ALONE, NoStop())
    assert not less.copies and "no copy" in less.told()
    assert [path.name for path in (tmp_path / memorisation.FOLDER).iterdir()] == ["00.png"]  # the older ones are gone


def test_a_copy_that_was_asked_for_by_its_own_caption_is_expected(encoded, tmp_path):
    """One image's own caption as the prompt brings it back: learnt, as asked. A caption of all images names none."""
    encoded.images.captions = [f"field {sample // 2}" for sample in range(10)]
    entries = drawn(tmp_path, as_trained(encoded, 2), as_trained(encoded, 4))
    entries[0]["prompt"] = "  Field 1 "
    asked = compare_with_training_images(encoded, 8, entries[:1], tmp_path, ALONE, NoStop())
    assert asked.copies and not asked.unexpected and asked.rows[0]["prompt_in_set"] == 1
    assert "1 of 1 validation images is a copy" in asked.told() and "so this is expected" in asked.told()
    assert "by heart" not in asked.told() and asked.figures()["expected_copies"] == 1
    both = compare_with_training_images(encoded, 8, entries, tmp_path, ALONE, NoStop())
    assert [row["prompt"] for row in both.unexpected] == ["prompt 1"]
    assert "learnt images by heart" in both.told() and "1 of them is expected" in both.told()
    assert both.told().count("validation/1.png of 2.png") == 1  # the one that nobody asked for
    encoded.images.captions = ["field 1"] * 10
    shared = compare_with_training_images(encoded, 8, entries[:1], tmp_path, ALONE, NoStop())
    assert shared.unexpected and shared.rows[0]["prompt_in_set"] == 4


def test_many_samples_are_looked_at_in_part_and_said_so(encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(memorisation, "MOST", 3)
    entries = drawn(tmp_path, as_trained(encoded, 0))
    found = compare_with_training_images(encoded, 8, entries, tmp_path, ALONE, NoStop())
    assert found.looked_at == 3 and found.copies and "evenly spread among more" in found.told()


def test_nothing_to_compare_and_a_signal(encoded, tmp_path):
    assert compare_with_training_images(encoded, 8, [], tmp_path, ALONE, NoStop()) is None
    stop = NoStop()
    stop.requested = True
    assert (
        compare_with_training_images(encoded, 8, drawn(tmp_path, as_trained(encoded, 0)), tmp_path, ALONE, stop)
        is None
    )


def test_an_image_that_changed_meanwhile_is_told(encoded, tmp_path):
    entries = drawn(tmp_path, as_trained(encoded, 0))
    Image.new("RGB", (150, 100)).save(tmp_path / "images/1.png")
    with pytest.raises(ImageError, match=r"1\.png: the image changed"):
        compare_with_training_images(encoded, 8, entries, tmp_path, ALONE, NoStop())
