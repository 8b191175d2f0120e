"""How an image becomes a training sample: scale, crop, flip. The decision needs no pixels; the pixels follow it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

# Above this side a tensor of the VAE's first stage (128 channels) passes 2^31 elements for one image, which many
# kernels cannot index, so the image is encoded in overlapping tiles of the size below.
WHOLE_ENCODE_SIDE, ENCODE_TILE, ENCODE_STRIDE = 3072, 2048, 1536


@dataclass(frozen=True)
class TransformPlan:
    """Scale to `scaled` (width, height), take `size` (width, height) of it at `crop` (left, top), flip or not."""

    scaled: tuple[int, int]
    crop: tuple[int, int]
    flip: bool
    size: tuple[int, int]


def plan_transform(
    size: tuple[int, int], *, target: tuple[int, int], center_crop: bool, random_flip: bool, seed: int, index: int
) -> TransformPlan:
    """The transform's decision for an upright image of `size` (width, height), without its pixels.

    The image is scaled until it covers `target` (width, height), and what hangs over is cropped. The random numbers
    come from a hash of (seed, index) alone: no rank, worker, order or library version matters.
    """
    # the axis that needs the larger scale
    along = 0 if target[0] * size[1] >= target[1] * size[0] else 1
    wide, high = (max(target[k], int(target[along] * size[k] / size[along])) for k in (0, 1))
    scaled = (wide, high)
    room = (scaled[0] - target[0], scaled[1] - target[1])
    digest = hashlib.sha256(f"{int(seed)}:{int(index)}".encode()).digest()
    if center_crop:
        crop = (round(room[0] / 2.0), round(room[1] / 2.0))
    else:
        left, top = (int.from_bytes(digest[8 * k : 8 * k + 8], "big") % (room[k] + 1) for k in (0, 1))
        crop = (left, top)
    return TransformPlan(scaled, crop, bool(random_flip and digest[16] & 1), target)


def crop_box(size: tuple[int, int], plan: TransformPlan) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the plan's crop in pixels of the image of `size` (width, height), unscaled."""
    x_step, y_step = size[0] / plan.scaled[0], size[1] / plan.scaled[1]
    left, top = plan.crop
    return (
        left * x_step,
        top * y_step,
        min((left + plan.size[0]) * x_step, size[0]),
        min((top + plan.size[1]) * y_step, size[1]),
    )


def apply_transform(image: Image.Image, plan: TransformPlan) -> np.ndarray:
    """Scale (bilinear, antialiased), crop and flip an RGB image: uint8 (height, width, 3).

    Only the part inside the crop is computed, so a 1 x 10000 image costs no more than a square one.
    """
    box = crop_box(image.size, plan)
    image = image.resize(plan.size, Image.Resampling.BILINEAR, box=box)
    if plan.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(image)


def to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (..., H, W, 3) to float32 (..., 3, H, W) in [-1, 1]."""
    return pixels.movedim(-1, -3).to(torch.float32).div(255.0).sub(0.5).div(0.5)


def transform(
    image: Image.Image, *, resolution: int, center_crop: bool, random_flip: bool, seed: int, index: int
) -> torch.Tensor:
    """A square training sample of an RGB image: float32 (3, resolution, resolution) in [-1, 1].

    The short side is scaled to `resolution`; crop and flip follow from (seed, index) alone, see `plan_transform`.
    """
    plan = plan_transform(
        image.size,
        target=(resolution, resolution),
        center_crop=center_crop,
        random_flip=random_flip,
        seed=seed,
        index=index,
    )
    return to_unit_range(torch.from_numpy(apply_transform(image, plan)))
