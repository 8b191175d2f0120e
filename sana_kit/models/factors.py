"""LoKr and LoHa, LyCORIS' other factorisations: what they add to a weight, and the LoRA that equals it.

LoKr adds scale * kron(w1, w2), LoHa scale * (w1_a @ w1_b) * (w2_a @ w2_b) (element by element); each of LoKr's w1, w2
may be a product of two itself. scale is alpha / rank, and 1 for a LoKr of two whole factors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
FACTORS = (*_LOHA, *_LOKR, "hada_t1", "hada_t2", "lokr_t2", "lora_mid.weight", "diff", "diff_b")  # all that is read


def check_factors(factors: Mapping[str, torch.Tensor]) -> str | None:
    """What of a layer's factors is not supported or missing, None where all is well."""
    names = set(factors)
    others = names - {*_LOHA, *_LOKR}
    if others:
        return f"{', '.join(sorted(others))} (Tucker factors and whole differences) are not supported"
    if names & {*_LOHA}:
        return None if names == {*_LOHA} else f"LoHa needs {', '.join(_LOHA)}"
    for half in ("lokr_w1", "lokr_w2"):
        if not ({half} <= names or {f"{half}_a", f"{half}_b"} <= names):
            return f"LoKr needs {half}, or {half}_a and {half}_b"
    return None


def factor_rank(factors: Mapping[str, torch.Tensor]) -> int | None:
    """The rank that alpha is divided by; None for a LoKr of two whole factors, whose scale is 1."""
    for name in ("lokr_w2_b", "lokr_w1_b", "hada_w1_b"):
        if name in factors:
            return factors[name].shape[0]
    return None


def _half(factors: Mapping[str, torch.Tensor], half: str) -> torch.Tensor:
    """A factor of LoKr, whole, in float32."""
    if half in factors:
        return factors[half].float()
    return factors[f"{half}_a"].float() @ factors[f"{half}_b"].float().flatten(1)


def factor_delta(factors: Mapping[str, torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """What the factors add to a weight of that shape before scaling, float32; ValueError where they do not fit."""
    if "hada_w1_a" in factors:
        first, second = ((factors[f"hada_w{i}_a"].float() @ factors[f"hada_w{i}_b"].float()) for i in (1, 2))
        delta = first * second
    else:
        second = _half(factors, "lokr_w2")
        first = _half(factors, "lokr_w1")
        delta = torch.kron(first.view(*first.shape, *(1 for _ in second.shape[2:])), second)
    if delta.numel() != shape.numel():
        raise ValueError(f"their product has {tuple(delta.shape)}, the weight {tuple(shape)}")
    return delta.reshape(shape)


def as_pair(factors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(down (R, in), up (out, R)) whose product is the factors' own, float32; None where no such pair is smaller.

    LoHa of rank r is a LoRA of rank r * r; a LoKr whose second factor is a product of rank r is one of rank r * (the
    inputs of the first).
    """
    if "hada_w1_a" in factors:
        a1, b1, a2, b2 = (factors[name].float() for name in _LOHA)
        up = (a1[:, :, None] * a2[:, None, :]).flatten(1)
        down = (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)
    elif "lokr_w2_a" in factors and factors["lokr_w2_b"].ndim == 2:
        first, a2, b2 = _half(factors, "lokr_w1"), factors["lokr_w2_a"].float(), factors["lokr_w2_b"].float()
        up = torch.kron(first, a2)
        down = torch.kron(torch.eye(first.shape[1]), b2)
    else:
        return None
    rank, smaller = down.shape[0], min(up.shape[0], down.shape[1])
    return (down, up) if rank < smaller else None
