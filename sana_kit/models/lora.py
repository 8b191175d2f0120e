"""LoRA layers as the trainer runs them: compute dtype, the update inside the matrix product, recomputation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch.utils.checkpoint import checkpoint

from sana_kit.models.lora_layers import DEFAULT_LORA_LAYERS


class _InBaseDtype(torch.nn.Module):
    """Before a peft layer's class: compute in the base layer's dtype, whatever dtype the small matrices have.

    peft casts a layer's whole input to the adapter's float32, or needs an autocast around the model; here the small
    matrices are cast instead.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.cast_input_dtype_enabled = False

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """hidden_states in the base layer's dtype -> the layer's output in the same dtype."""
        weight = getattr(self.base_layer, "weight", None)
        # a quantised weight is kept in another dtype than it computes in
        dtype = weight.dtype if type(weight) is torch.nn.Parameter else hidden_states.dtype
        if self.lora_A[self.active_adapters[0]].weight.dtype == dtype:
            return self.compute(hidden_states, *args, **kwargs)
        with torch.autocast(hidden_states.device.type, dtype=dtype):
            return self.compute(hidden_states, *args, **kwargs)

    def compute(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer itself, as peft computes it."""
        return super().forward(hidden_states, *args, **kwargs)


class FusedLoraLinear(_InBaseDtype, lora.Linear):
    """peft's LoRA linear, with y + s * (x A^T) B^T as one addmm: rounded once, not three times.

    peft writes the update, scales it and adds it in passes over the whole output. What is no plain LoRA (DoRA, a
    bias, several or merged or disabled adapters) is computed by peft itself.
    """

    def compute(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        if args or kwargs or not self._plain():
            return super().compute(hidden_states, *args, **kwargs)
        (name,) = self.active_adapters
        base = self.base_layer(hidden_states)
        down = self.lora_A[name](self.lora_dropout[name](hidden_states))
        up = self.lora_B[name].weight
        total = torch.addmm(base.flatten(0, -2), down.flatten(0, -2), up.t(), alpha=self.scaling[name])
        return total.view_as(base)

    def _plain(self) -> bool:
        if len(self.active_adapters) != 1 or self.disable_adapters or self.merged:
            return False
        name = self.active_adapters[0]
        variant = getattr(self, "lora_variant", {}) or self.use_dora.get(name)
        return not variant and self.lora_B[name].bias is None


class LoraConv2d(_InBaseDtype, lora.Conv2d):
    """peft's LoRA convolution in the base layer's dtype."""


def lora_config(
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    layers: str | Sequence[str] = DEFAULT_LORA_LAYERS,
    **settings: Any,
) -> LoraConfig:
    """A peft configuration whose layers are the kit's classes; `settings` are further ones of peft's.

    Args:
        layers: see `parse_layers`.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        init_lora_weights=settings.pop("init_lora_weights", "gaussian"),
        target_modules=layers if isinstance(layers, str) else list(layers),
        **settings,
    )
    # peft has no public registration yet (0.14 to 0.21); tests fail clearly when this one goes away.
    config._register_custom_module({torch.nn.Linear: FusedLoraLinear, torch.nn.Conv2d: LoraConv2d})
    return config


def recompute_blocks(transformer: torch.nn.Module, interval: int) -> None:
    """Recompute every `interval`-th block in the backward pass instead of keeping its activations.

    By diffusers' own switch, which hands each block with its arguments to a function.
    """
    chosen = {id(block) for block in transformer.transformer_blocks[::interval]}

    def run(block: torch.nn.Module, *args: Any) -> Any:
        if id(block) in chosen:
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    transformer.enable_gradient_checkpointing(run)
