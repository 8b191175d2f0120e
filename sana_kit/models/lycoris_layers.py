"""LoKr and LoHa as the trainer runs them: peft's layers, computed without the whole difference where that is less.

peft builds the difference of every weight in each forward pass and keeps it for the backward one: at 1600M that is
10 MB a layer in bf16. A Kronecker product needs two small products instead, and a Hadamard product of two rank-r
matrices is a LoRA of rank r * r. Tests hold both against peft's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import LoHaConfig, LoKrConfig
from peft.tuners import loha, lokr

from sana_kit.models.factors import hadamard_pair
from sana_kit.models.lora_layers import FACTOR_KINDS


def _conv(layer: lokr.Conv2d | loha.Conv2d, adapter_name: str, hidden_states: torch.Tensor) -> torch.Tensor:
    """A convolution's difference, made in its factors' dtype and used in the input's."""
    base, delta = layer.get_base_layer(), layer.get_delta_weight(adapter_name).to(hidden_states.dtype)
    return F.conv2d(hidden_states, delta, None, base.stride, base.padding, base.dilation, base.groups)


class LoKrConv2d(lokr.Conv2d):
    """peft's LoKr of a convolution."""

    def _get_delta_activations(
        self, adapter_name: str, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        return _conv(self, adapter_name, hidden_states)


class LoHaConv2d(loha.Conv2d):
    """peft's LoHa of a convolution."""

    def _get_delta_activations(
        self, adapter_name: str, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        return _conv(self, adapter_name, hidden_states)


class LoKrLinear(lokr.Linear):
    """peft's LoKr linear; kron(w1, w2) x is w1 X w2^T, with x as the rows of a matrix X."""

    def _get_delta_activations(
        self, adapter_name: str, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """(..., in) -> (..., out) in the input's dtype."""
        first, second = (self._factor(half, adapter_name).to(hidden_states.dtype) for half in ("lokr_w1", "lokr_w2"))
        rows = hidden_states.unflatten(-1, (first.shape[1], second.shape[1]))
        return (first @ F.linear(rows, second)).flatten(-2) * self.scaling[adapter_name]

    def _factor(self, half: str, name: str) -> torch.Tensor:
        whole = getattr(self, half)
        return whole[name] if name in whole else getattr(self, f"{half}_a")[name] @ getattr(self, f"{half}_b")[name]


class LoHaLinear(loha.Linear):
    """peft's LoHa linear; (a1 b1) * (a2 b2) is a product of inner dimension r * r, used where that is smaller."""

    def _get_delta_activations(
        self, adapter_name: str, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """(..., in) -> (..., out) in the input's dtype."""
        dtype = hidden_states.dtype
        a1, b1, a2, b2 = (getattr(self, f"hada_w{number}_{half}")[adapter_name] for number in (1, 2) for half in "ab")
        if b1.shape[0] ** 2 >= min(len(a1), b1.shape[1]):
            return F.linear(hidden_states, self.get_delta_weight(adapter_name).to(dtype))
        down, up = (factor.to(dtype) for factor in hadamard_pair(a1, b1, a2, b2))
        return F.linear(F.linear(hidden_states, down), up) * self.scaling[adapter_name]


_CLASSES = {lokr.Linear: LoKrLinear, lokr.Conv2d: LoKrConv2d, loha.Linear: LoHaLinear, loha.Conv2d: LoHaConv2d}


def add_factors(
    transformer: torch.nn.Module, kind: str, *, rank: int, alpha: float, layers: str | list[str], factor: int = -1
) -> None:
    """Put trainable LoKr or LoHa layers into a transformer, which begin with no effect.

    Args:
        kind: of FACTOR_KINDS.
        layers: see `lora_layers.parse_layers`.
        factor: LoKr's: the first factor's size, -1 for about the root of the layer's.
    """
    assert kind in FACTOR_KINDS, kind
    settings: dict[str, Any] = {"r": rank, "alpha": alpha, "target_modules": layers}
    if kind == "lokr":
        config = LoKrConfig(**settings, decompose_factor=factor)
    else:
        config = LoHaConfig(**settings)
    transformer.add_adapter(config)
    for module in transformer.modules():  # peft registers classes of one's own for LoRA only (0.14 to 0.21)
        if type(module) in _CLASSES:
            module.__class__ = _CLASSES[type(module)]
