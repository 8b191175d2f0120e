"""Sizes: SanaPipeline's resolution bins, and back to the size asked for."""

from __future__ import annotations

import torch

from sana_kit.data.buckets import tables

# The sample sizes for which SanaPipeline has a table; those of others are for training.
_BINNED = (16, 32, 64, 128)


def vae_factor(vae: torch.nn.Module) -> int:
    """Pixels per latent along an axis (32 for SANA's DC-AE)."""
    return 2 ** (len(vae.config.encoder_block_out_channels) - 1)


def nearest_bin(height: int, width: int, sample_size: int) -> tuple[int, int] | None:
    """(height, width) of the trained size of nearest aspect ratio, in SanaPipeline's table for a `sample_size`.

    None where SanaPipeline has no table (`_BINNED`).
    """
    if sample_size not in _BINNED:
        return None
    table = tables()[32 * sample_size]
    nearest = min(table, key=lambda ratio: abs(float(ratio) - height / width))
    return int(table[nearest][0]), int(table[nearest][1])


def generation_size(
    height: int, width: int, sample_size: int, use_resolution_binning: bool | str = "auto"
) -> tuple[int, int]:
    """(height, width) in pixels at which the transformer works for an image of the size asked for.

    SanaPipeline's resolution binning moves a size to the nearest aspect ratio that the checkpoint was trained on and
    resizes the image afterwards. "auto" (or True) does so where that bin is within a factor of 2 of the pixels asked
    for; False never.
    """
    if not use_resolution_binning:
        return height, width
    trained = nearest_bin(height, width, sample_size)
    if trained is not None and 0.5 <= (trained[0] * trained[1]) / (height * width) <= 2.0:
        return trained
    return height, width


def resize_and_crop(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """images (N, C, h, w) float32, scaled to cover (height, width) and cut at the centre; exactly that size.

    As SanaPipeline does it, except that a rounded-down side never leaves the image a pixel too small.
    """
    if images.shape[-2:] == (height, width):
        return images
    ratio = max(height / images.shape[2], width / images.shape[3])
    covered = max(height, int(images.shape[2] * ratio)), max(width, int(images.shape[3] * ratio))
    images = torch.nn.functional.interpolate(images, size=covered, mode="bilinear", align_corners=False)
    top, left = (covered[0] - height) // 2, (covered[1] - width) // 2
    return images[:, :, top : top + height, left : left + width]
