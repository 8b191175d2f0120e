"""Loss masks of encoded samples: weights by place, of mean 1, made once and mapped."""

import os
import pickle
import time

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from sana_kit.data.discover import load_images
from sana_kit.distributed import Ranks
from sana_kit.encodings import masks as module
from sana_kit.encodings import usage
from sana_kit.training.recipes import loss_per_sample

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def folder(tmp_path):
    """Four images; the first is white left, the second white all over, the third in one corner only."""
    folder = tiny.write_image_folder(tmp_path / "set", count=4)
    sizes = [Image.open(folder / f"image_{k:02d}.png").size for k in range(3)]
    boxes = [(0, 0, sizes[0][0] // 2, sizes[0][1]), (0, 0, *sizes[1]), (0, 0, 2, 2)]
    for k, (size, box) in enumerate(zip(sizes, boxes, strict=True)):
        mask = Image.new("L", size)
        mask.paste(255, box)
        mask.save(folder / f"image_{k:02d}.mask.png")
    return folder


@pytest.mark.parametrize("outside", [0.0, 0.1])
def test_weights_have_a_mean_of_one_and_white_is_no_mask(folder, run, outside):
    encoded = run(load_images(instance_data_dir=str(folder)), center_crop=True, resolution=64)
    assert "loss_weights" not in encoded[0]
    encoded.add_masks(outside, ALONE)
    items = [encoded[i]["loss_weights"] for i in range(4)]
    height, width = encoded[0]["latents"].shape[1:]
    assert all(item.shape == (1, height, width) and item.dtype == torch.float32 for item in items)
    assert torch.equal(items[1], torch.ones_like(items[1])) and torch.equal(items[3], torch.ones_like(items[3]))
    assert items[0].mean().item() == pytest.approx(1, abs=1e-6)
    left, right = items[0][..., 0].mean(), items[0][..., -1].mean()
    assert (right / left).item() == pytest.approx(outside, abs=0.02)
    again = pickle.loads(pickle.dumps(encoded.masks))
    assert all(torch.equal(again.weights(i), items[i]) for i in range(4))


def test_a_crop_without_its_mask_counts_as_outside_and_is_counted(folder, run):
    """A landscape image, its centre cut out: the white corner is not in it."""
    size = (160, 80)
    Image.open(folder / "image_02.png").resize(size).save(folder / "image_02.png")
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, 10, 10))
    mask.save(folder / "image_02.mask.png")
    encoded = run(load_images(instance_data_dir=str(folder)), center_crop=True)
    encoded.add_masks(0.25, ALONE)
    assert torch.equal(encoded.masks.weights(2), torch.full((1, *encoded.masks.shapes[2]), 0.25))
    assert encoded.masks.counts() == (3, 1)


def test_masks_are_made_once_and_anew_where_one_changed(folder, run, monkeypatch):
    encoded = run(load_images(instance_data_dir=str(folder)))
    encoded.add_masks(0.0, ALONE)
    made, real = [], module.mask_of_sample
    monkeypatch.setattr(module, "mask_of_sample", lambda *words: made.append(1) or real(*words))
    run(load_images(instance_data_dir=str(folder))).add_masks(0.5, ALONE)
    assert not made
    path = folder / "image_00.mask.png"
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    run(load_images(instance_data_dir=str(folder))).add_masks(0.0, ALONE)
    assert len(made) == 3


def test_buckets_give_masks_of_several_shapes(folder, run):
    encoded = run(load_images(instance_data_dir=str(folder)), resolutions=(64, 96))
    encoded.add_masks(0.0, ALONE)
    for i in range(4):
        assert encoded[i]["loss_weights"].shape[1:] == encoded[i]["latents"].shape[1:]


def test_the_loss_is_the_weighted_mean_of_the_places():
    torch.manual_seed(0)
    prediction, target, sigma = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([0.5, 0.9])
    places = torch.ones(2, 1, 4, 4)
    places[0, :, :, 2:] = 0
    places[0] /= places[0].mean()
    found = loss_per_sample(prediction, target, sigma, "none", places)
    expected = (prediction[0, :, :, :2] - target[0, :, :, :2]).square().mean()
    torch.testing.assert_close(found[0], expected)
    assert torch.equal(found[1], loss_per_sample(prediction, target, sigma, "none")[1])


def test_masks_that_no_run_used_lately_are_pruned(folder, run, tmp_path):
    encoded = run(load_images(instance_data_dir=str(folder)))
    encoded.add_masks(0.0, ALONE)
    (path,) = (tmp_path / "store" / "masks").iterdir()
    os.utime(path, (time.time() - 40 * 86400,) * 2)
    encoded.add_masks(0.0, ALONE)  # a start renews them
    usage.prune(tmp_path / "store")
    assert path.exists()
    os.utime(path, (time.time() - 40 * 86400,) * 2)
    usage.prune(tmp_path / "store")
    assert not path.exists()
