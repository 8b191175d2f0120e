"""Sizes at which images are made, and back to the size asked for.

python -m pytest tests/unit/generation/test_sizes.py
"""

import numpy as np
import pytest
import torch
from helpers.drawing import draw, encode_few, levels, load_plain, plan, reference_image

from sana_kit.generation.sizes import generation_size, nearest_bin, resize_and_crop


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    return load_plain(tiny_model)


@pytest.fixture(scope="module")
def embeds(pipeline):
    return encode_few(pipeline)


@pytest.mark.parametrize(
    ("size", "sample_size", "made"),
    [
        ((1024, 1024), 32, (1024, 1024)),
        ((1000, 1000), 32, (1024, 1024)),
        ((768, 768), 32, (1024, 1024)),
        ((1400, 1400), 32, (1024, 1024)),
        ((720, 1280), 32, (768, 1344)),
        ((512, 512), 32, (512, 512)),  # a quarter of the bin's pixels: off
        ((1024, 1024), 128, (1024, 1024)),  # the 4K checkpoint: off
        ((4000, 4000), 128, (4096, 4096)),
        ((500, 500), 16, (512, 512)),
        ((96, 64), 16, (96, 64)),
        ((96, 64), 8, (96, 64)),  # no table
    ],
)
def test_resolution_binning_is_used_within_a_factor_of_two_in_pixels(size, sample_size, made):
    assert generation_size(*size, sample_size) == made
    assert generation_size(*size, sample_size, False) == size


def test_nearest_bin_is_that_of_diffusers():
    from diffusers.image_processor import PixArtImageProcessor
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_1024_BIN

    for height, width in [(1024, 1024), (640, 1536), (2000, 500), (777, 1010)]:
        expected = PixArtImageProcessor.classify_height_width_bin(height, width, ratios=ASPECT_RATIO_1024_BIN)
        assert nearest_bin(height, width, 32) == expected


def test_a_table_for_training_moves_no_drawing(monkeypatch):
    from sana_kit.generation import sizes

    own = {**sizes.tables(), 768: {"1.0": [768.0, 768.0]}}
    monkeypatch.setattr(sizes, "tables", lambda: own)
    assert nearest_bin(700, 800, 24) is None and generation_size(700, 800, 24) == (700, 800)
    assert nearest_bin(1000, 1000, 32) == (1024, 1024)


def test_resized_images_have_exactly_the_size_asked_for():
    from diffusers.image_processor import PixArtImageProcessor

    rng = np.random.default_rng(0)
    shorter = 0
    for _ in range(200):
        made, asked = rng.integers(4, 40, 2) * 8, rng.integers(30, 320, 2)
        image = torch.zeros(1, 1, *made.tolist())
        assert resize_and_crop(image, *asked.tolist()).shape[-2:] == tuple(asked.tolist())
        theirs = PixArtImageProcessor.resize_and_crop_tensor(image, int(asked[1]), int(asked[0]))
        shorter += theirs.shape[-2:] != tuple(asked.tolist())
    assert shorter > 0, "diffusers' own function no longer falls a pixel short: the kit's can go"


def test_binned_images_are_resized_to_the_size_asked_for(pipeline, embeds):
    """500 x 375 is no multiple of 8: the tiny model works at its 512 px bin and the image is cut to size."""
    jobs = plan(["a red square"], [8], height=375, width=500, steps=1)
    assert generation_size(375, 500, 16) == (416, 576)
    (image,) = draw(pipeline, embeds, jobs, use_resolution_binning="auto")
    assert image.size == (500, 375)
    reference = reference_image(pipeline, jobs[0], use_resolution_binning=True)
    assert reference.size == (500, 375) and levels(image, reference) <= 1
