"""Stores of encodings in tests: their shards, and comparisons of what they serve."""

from __future__ import annotations

from pathlib import Path

import torch


def shards(store, part: str) -> list[Path]:
    """The shards of a part of a store, by name."""
    return sorted((Path(store) / part).glob("*.safetensors"))


def all_of(encoded) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(latents, prompt embeddings) of every sample."""
    return [(s["latents"], s["prompt_embeds"]) for s in (encoded[i] for i in range(len(encoded)))]


def equal(first, second) -> bool:
    """Whether two encoded data sets serve the same bits."""
    pairs = zip(all_of(first), all_of(second), strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)
