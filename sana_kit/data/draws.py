"""Random numbers that depend on a run's seed and a key alone, never on what was drawn before."""

from __future__ import annotations

import numpy as np


def generator(seed: int, *key: int) -> np.random.Generator:
    """Numbers that depend on a run's seed (up to 64 bits) and `key` alone."""
    return np.random.default_rng([seed & 0xFFFFFFFF, seed >> 32, *key])
