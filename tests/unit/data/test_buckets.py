"""Which size an image is trained at: SANA's own tables, several resolutions, nothing enlarged."""

import numpy as np
import pytest

from sana_kit.data import buckets
from sana_kit.data.buckets import assign, bucket_table, tables


@pytest.mark.parametrize("resolution", tables())
def test_the_sizes_are_sanas_own(resolution):
    sizes = {(int(width), int(height)) for height, width in tables()[resolution].values()}
    assert set(map(tuple, bucket_table(resolution, 32).tolist())) == sizes


def test_a_table_that_is_added_is_used_for_its_resolution(monkeypatch):
    own = {768: {"0.5": [512.0, 1024.0], "1.0": [768.0, 768.0]}}
    monkeypatch.setattr(buckets, "tables", lambda: {**tables(), **own})
    bucket_table.cache_clear()
    try:
        found = assign(np.array([[2000, 1000], [900, 1000]]), [768], 32).sizes
    finally:
        bucket_table.cache_clear()
    assert found.tolist() == [[1024, 512], [768, 768]]


def test_another_resolution_scales_the_table_to_multiples_of_the_vaes_factor():
    table = bucket_table(64, 8)
    assert (table % 8 == 0).all() and [64, 64] in table.tolist() and len(table) == len(np.unique(table, axis=0))
    areas = table.prod(axis=1) / 64**2
    assert areas.min() > 0.7 and areas.max() < 1.3


def test_the_nearest_ratio_of_height_to_width_is_chosen_as_sanas_loader_does():
    rng = np.random.default_rng(0)
    sizes = rng.integers(300, 4000, (500, 2))
    found = assign(sizes, [1024], 32).sizes
    for (width, height), (bucket_width, bucket_height) in zip(sizes, found, strict=True):
        nearest = min(tables()[1024], key=lambda ratio: abs(float(ratio) - height / width))
        expected = tables()[1024][nearest]
        # the table's keys are rounded to two digits, so a neighbour may be as near
        ratio = expected[0] / expected[1]
        assert abs(bucket_height / bucket_width - height / width) <= abs(ratio - height / width) + 1e-9


def test_what_is_cropped_away_is_told():
    found = assign([(1024, 1024), (2048, 2048), (1000, 100)], [1024], 32)
    assert found.sizes.tolist() == [[1024, 1024], [1024, 1024], [2048, 512]]
    assert found.lost[:2].tolist() == [0, 0] and found.enlarged.tolist() == [False, False, True]
    assert found.lost[2] == pytest.approx(1 - 400 / 1000)  # 4 : 1 of 10 : 1
    row = found.rows()[0]
    assert row == {"width": 1024, "height": 1024, "images": 2, "lost": 0.0, "enlarged": 0}


def test_an_image_goes_to_the_largest_resolution_that_it_fills():
    found = assign([(3000, 3000), (700, 700), (1023, 1023), (100, 100)], [1024, 512], 32)
    assert found.sizes[:, 0].tolist() == [1024, 512, 512, 512]


def test_small_images_keep_their_size_where_nothing_may_be_enlarged():
    found = assign([(300, 200), (3000, 2000)], [512], 32, no_upscale=True)
    assert found.sizes[0].tolist() == [288, 192] and not found.enlarged.any()
    with pytest.raises(ValueError, match="smaller than 32"):
        assign([(30, 200)], [512], 32, no_upscale=True)
