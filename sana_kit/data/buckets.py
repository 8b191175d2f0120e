"""Aspect-ratio buckets: which size each image is trained at, from the tables that SANA itself was trained with.

An image goes to the size of its table whose ratio of height to width is nearest its own, as SANA's data loader and
SanaPipeline choose. What hangs over is cropped; `Assignment.lost` says how much that is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=1)
def tables() -> dict[int, dict[str, list[float]]]:
    """{resolution: {ratio of height to width: [height, width] in pixels}}: SANA's own, and any that is added here.

    Their modules import all of diffusers, which the launcher's checks need not wait for.
    """
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN, ASPECT_RATIO_1024_BIN
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN
    from diffusers.pipelines.sana.pipeline_sana import ASPECT_RATIO_4096_BIN

    return {
        512: ASPECT_RATIO_512_BIN,
        1024: ASPECT_RATIO_1024_BIN,
        2048: ASPECT_RATIO_2048_BIN,
        4096: ASPECT_RATIO_4096_BIN,
    }


@lru_cache(maxsize=32)
def bucket_table(resolution: int, multiple: int) -> np.ndarray:
    """(K, 2) int64: width and height in pixels of the sizes for a resolution, each once.

    Those of `tables`, which has SANA's own for 512, 1024, 2048 and 4096; of any other the table of 512, scaled.

    Args:
        multiple: every side is a multiple of this, the VAE's factor times the patch.
    """
    table = tables().get(resolution)
    sides = np.array(list((table or tables()[512]).values()), dtype=np.float64)[:, ::-1]
    if table is None:
        sides = sides * (resolution / 512)
    rounded = np.maximum(np.round(sides / multiple), 1).astype(np.int64) * multiple
    return np.array(list(dict.fromkeys(map(tuple, rounded.tolist()))), dtype=np.int64)


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The sizes that images are trained at.

    Attributes:
        sizes: (N, 2) int64, width and height in pixels of each image's bucket.
        lost: (N,) float64, the share of each image's area that is cropped away.
        enlarged: (N,) bool, which images are smaller than their bucket.
    """

    sizes: np.ndarray
    lost: np.ndarray
    enlarged: np.ndarray

    def rows(self) -> list[dict[str, float]]:
        """Per bucket, the fullest first: width, height, images, mean share lost, images enlarged."""
        found, which = np.unique(self.sizes, axis=0, return_inverse=True)
        which = which.reshape(-1)
        rows = [
            {
                "width": int(width),
                "height": int(height),
                "images": int((which == k).sum()),
                "lost": float(self.lost[which == k].mean()),
                "enlarged": int(self.enlarged[which == k].sum()),
            }
            for k, (width, height) in enumerate(found)
        ]
        return sorted(rows, key=lambda row: -row["images"])


def assign(sizes: np.ndarray, resolutions: Sequence[int], multiple: int, no_upscale: bool = False) -> Assignment:
    """Give each image its bucket.

    With several resolutions an image goes to the largest one that it fills without being enlarged, to the smallest one
    if it fills none. With `no_upscale` an image that is smaller than even that bucket is trained at its own size,
    rounded down to `multiple`.

    Args:
        sizes: (N, 2) width and height of the upright images, in pixels.
        resolutions: in pixels, as of --resolution.
        multiple: see `bucket_table`.

    Raises:
        ValueError: an image is smaller than `multiple` where nothing may be enlarged.
    """
    sizes = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
    chosen = np.zeros_like(sizes)
    for resolution in sorted(resolutions):
        table = bucket_table(resolution, multiple)
        nearest = table[_nearest(sizes[:, 1] / sizes[:, 0], table[:, 1] / table[:, 0])]
        fills = (sizes >= nearest).all(axis=1)
        take = fills | (chosen[:, 0] == 0)
        chosen[take] = nearest[take]
    enlarged = (sizes < chosen).any(axis=1)
    if no_upscale and enlarged.any():
        own = sizes[enlarged] // multiple * multiple
        if (own == 0).any():
            raise ValueError(f"an image is smaller than {multiple} pixels and must not be enlarged")
        chosen[enlarged] = np.minimum(own, chosen[enlarged])
        enlarged = np.zeros(len(sizes), dtype=bool)
    scale = (chosen / sizes).max(axis=1)
    return Assignment(chosen, 1 - chosen.prod(axis=1) / (sizes * scale[:, None]).prod(axis=1), enlarged)


def in_squares(sizes: np.ndarray, side: int) -> Assignment:
    """Squares for images of `sizes` (N, 2), beside others that have buckets."""
    sizes = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
    short, long = sizes.min(axis=1), sizes.max(axis=1)
    return Assignment(np.full_like(sizes, side), 1 - short / np.maximum(long, 1), short < side)


def _nearest(ratios: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Index into `table` of the ratio nearest each of `ratios`; (N, K) distances a slice of the images at a time."""
    slices = [ratios[i : i + 65536] for i in range(0, len(ratios), 65536)]
    return np.concatenate([np.abs(part[:, None] - table[None]).argmin(axis=1) for part in slices] or [[]]).astype(int)
