"""Training images for the report: which, cropped where, and what the report finds of them."""

import json

import numpy as np
import pytest
from PIL import Image

from sana_kit.data.discover import load_images
from sana_kit.data.transform import apply_transform, plan_transform
from sana_kit.reports.pages import folder_images
from sana_kit.reports.report import write_report
from sana_kit.reports.training_images import CroppedImages, TrainingImage, draw_crop, write_training_images


def white(width, height):
    return Image.new("RGB", (width, height), "white")


def test_what_is_cropped_away_is_dark_and_what_is_trained_on_is_not():
    drawn = np.asarray(draw_crop(TrainingImage(white(100, 60), (20.0, 0.0, 80.0, 60.0), "a")))
    assert drawn.shape == (60, 100, 3)
    assert (drawn[:, :20] == int(255 * 0.35)).all() and (drawn[:, 80:] == int(255 * 0.35)).all()
    assert (drawn[:, 20:80] == 255).all()
    whole = white(50, 50)
    assert np.array_equal(np.asarray(draw_crop(TrainingImage(whole, (0, 0, 50, 50), "a"))), np.asarray(whole))


def test_the_crop_is_mirrored_with_the_image_and_large_images_are_scaled():
    image = white(2000, 1000)
    drawn = np.asarray(draw_crop(TrainingImage(image, (0, 0, 1000, 1000), "a", mirrored=True), side=200))
    assert drawn.shape == (100, 200, 3) and (drawn[:, :99] < 255).all() and (drawn[:, 101:] == 255).all()


def test_what_a_loss_mask_leaves_out_is_red_inside_the_crop_and_mirrored_with_it():
    mask = Image.new("L", (100, 50))
    mask.paste(255, (0, 0, 50, 50))
    mask.paste(128, (50, 0, 60, 50))
    sample = TrainingImage(white(100, 50), (0, 0, 80, 50), "a", mirrored=True, mask=mask)
    drawn = np.asarray(draw_crop(sample)).astype(int)[25, ::-1]
    assert (drawn[1:49] == 255).all()
    red = np.array([255 - 0.6 * (255 - channel) for channel in (214, 40, 40)])
    assert np.abs(drawn[62:78] - red).max() <= 2 and np.abs(drawn[52:58] - (255 + red) / 2).max() <= 3
    assert (drawn[82:].max(axis=0) <= 0.36 * red + 2).all()  # cropped away, too


def test_masks_of_the_data_set_reach_the_page(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        white(40, 40).save(folder / name)
    mask = Image.new("L", (40, 40))
    mask.paste(255, (0, 0, 20, 40))
    mask.save(folder / "a.mask.png")
    images = load_images(instance_data_dir=str(folder), instance_prompt="a field")
    plan = plan_transform((40, 40), index=0, target=(32, 32), center_crop=True, random_flip=False, seed=0)
    out = tmp_path / "out"
    shown = folder_images(write_training_images(CroppedImages(images, lambda index: plan), out))
    assert [item["line"]["masked"] for item in shown.values()] == [True, False]
    lines = [{"event": "start", "step": 0, "time": 0, "config": {"mask_outside": 0.25}}]
    (out / "train_log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = write_report(out).read_text()
    assert "What is red is outside the loss mask and counts 0.25." in page and page.count("(loss mask)") == 1


@pytest.mark.parametrize("number", [1, 3, 40])
def test_evenly_spread_and_only_what_is_written_is_asked_for(tmp_path, number):
    asked = []

    class Images(list):
        def __getitem__(self, index):
            asked.append(index)
            return TrainingImage(white(8, 8), (0, 0, 8, 8), f"caption {index} 猫", f"{index}.png")

    folder = write_training_images(Images(range(number)), tmp_path, count=5)
    assert len(asked) == min(5, number) and (asked[0], asked[-1]) == (0, number - 1)
    found = folder_images(folder)
    assert [item["title"] for item in found.values()] == [f"caption {index} 猫" for index in asked]
    assert json.loads((folder / "manifest.jsonl").read_text().splitlines()[0])["name"] == "0.png"


def test_an_older_folder_is_replaced_and_a_failure_leaves_it(tmp_path):
    two = [TrainingImage(white(8, 8), (0, 0, 8, 8), name) for name in "ab"]
    write_training_images(two, tmp_path)
    write_training_images(two[:1], tmp_path)
    assert len(list((tmp_path / "training_images").glob("*.png"))) == 1
    with pytest.raises(AttributeError):
        write_training_images([None], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["training_images"]
    assert write_training_images([], tmp_path) is None


def test_crops_are_those_of_the_training(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "wide.png")
    images = load_images(instance_data_dir=str(tmp_path), instance_prompt="a field")
    plan = plan_transform((90, 40), index=0, target=(40, 40), center_crop=False, random_flip=True, seed=3)
    sample = CroppedImages(images, lambda index: plan)[0]
    kept = sample.image.crop(tuple(map(round, sample.crop)))
    kept = kept.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if sample.mirrored else kept
    assert np.array_equal(np.asarray(kept), apply_transform(images.load(0), plan))
    assert (sample.caption, sample.name) == ("a field", "wide.png")
