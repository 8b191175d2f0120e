"""The models that encode, loaded when first needed: the VAE and the text encoder, one at a time on the device.

What encodes once lets them go; a stream encodes again and again, and keeps them in the host's memory in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sana_kit.models.folder import Model
from sana_kit.models.loading import load_text_encoder, load_vae


class Encoders:
    """Lends the models that encode.

    Args:
        model: found and checked; its VAE and text encoder are lent.
        keep: hold them in the host's memory between two loans, instead of loading them again.
    """

    def __init__(self, model: Model, keep: bool = False):
        self.model, self._keep = model, keep
        self._kept: dict[str, Any] = {}

    @contextmanager
    def vae(self, device: torch.device, dtype: torch.dtype) -> Iterator[torch.nn.Module]:
        """The VAE on `device`."""
        with self._lent("vae", lambda: (None, load_vae(self.model, device=device, dtype=dtype)), device) as (_, vae):
            yield vae

    @contextmanager
    def text(self, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, torch.nn.Module]]:
        """(tokenizer, text encoder on `device`)."""
        with self._lent("text", lambda: load_text_encoder(self.model, device=device, dtype=dtype), device) as parts:
            yield parts

    @contextmanager
    def _lent(
        self, name: str, load: Callable[[], tuple[Any, torch.nn.Module]], device: torch.device
    ) -> Iterator[tuple[Any, torch.nn.Module]]:
        parts = self._kept.pop(name, None)
        if parts is None:
            parts = load()
        else:
            parts[1].to(device)
        try:
            yield parts
        finally:
            if self._keep:
                parts[1].to("cpu")
                self._kept[name] = parts
