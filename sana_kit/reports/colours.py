"""How far the colours of some images are from those of others."""

from __future__ import annotations

import numpy as np
from PIL import Image

SIDE = 64  # of the copies that are compared


def pixels_of(image: Image.Image) -> np.ndarray:
    """RGB of the image at 64 x 64: float32 (4096, 3), 0 to 255."""
    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, np.float32).reshape(-1, 3)


def colour_quantiles(images: list[np.ndarray]) -> np.ndarray:
    """Quantiles of the pooled pixels along 64 fixed directions in RGB space: (64, 512), for `colour_distance`."""
    # Evenly spread over the sphere (Fibonacci lattice), so that a shift counts the same whatever its direction.
    height = 1 - (2 * np.arange(64) + 1) / 64
    turn = np.arange(64) * np.pi * (3 - np.sqrt(5))
    across = np.sqrt(1 - height**2)
    directions = np.stack([across * np.cos(turn), across * np.sin(turn), height], axis=1).astype(np.float32)
    projected = directions @ np.concatenate(images).T  # (64, pixels)
    projected.sort(axis=1)
    points = (np.arange(512) + 0.5) / 512 * projected.shape[1]
    return projected[:, points.astype(int)].astype(np.float64)


def colour_distance(images: list[np.ndarray], others: list[np.ndarray]) -> float:
    """How far pixels have to move in RGB, on average, until the first images have the colours of the others.

    Twice the sliced Wasserstein-1 distance of the pooled pixels, over 64 fixed directions: a shift of all pixels by d
    gives d (the mean of |cos| over directions in space is 1/2). Unit: 8-bit levels; white and black are 442 apart.

    Args:
        images, others: float32 arrays (N, 3) of RGB values 0 to 255, one per image.
    """
    return quantile_distance(colour_quantiles(images), colour_quantiles(others))


def quantile_distance(quantiles: np.ndarray, others: np.ndarray) -> float:
    return float(2 * np.abs(quantiles - others).mean())
