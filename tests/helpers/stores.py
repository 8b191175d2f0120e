"""Stores of encodings in tests: filling them, their shards, and comparisons of what they serve."""

from __future__ import annotations

from pathlib import Path

import torch

from helpers.ranks import ALONE
from sana_kit.encodings.dataset import EncodedDataset
from sana_kit.encodings.encode import encode
from sana_kit.encodings.settings import EncodingSettings
from sana_kit.models.folder import find_model


def encode_alone(images, model, store: Path, **changes) -> EncodedDataset:
    """`encode` on one process at 64 px; model: a folder or a Model; changes: settings and words of `encode`."""
    words = {name: changes.pop(name) for name in ("extra_prompts", "stop", "log", "seed") if name in changes}
    if not hasattr(model, "base"):
        model, problems = find_model(str(model))
        assert not problems
    settings = EncodingSettings(**{"encodings_dir": str(store), "resolution": 64, "num_workers": 2, **changes})
    return encode(images, model, settings, ranks=ALONE, **words)


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
