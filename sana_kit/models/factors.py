"""LyCORIS' other ways to say what is added to a weight, and the LoRA that equals it where there is one.

LoKr adds scale * kron(w1, w2), LoHa scale * (w1_a @ w1_b) * (w2_a @ w2_b) (element by element); each of LoKr's w1, w2
may be a product of two itself. scale is alpha / rank, and 1 for a LoKr of two whole factors. A convolution's factors
may be Tucker's: a core (rank, rank, kh, kw) between two matrices, of LoHa and LoKr (`hada_t1`, `lokr_t2`) and of a
LoRA (`lora_mid`). `diff` is the whole difference, added as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOHA_CORES = ("hada_t1", "hada_t2")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_TUCKER_LORA = ("lora_mid.weight", "lora_down.weight", "lora_up.weight")
_WHOLE = ("diff",)
FACTORS = (*_LOHA, *_LOHA_CORES, *_LOKR, _TUCKER_LORA[0], *_WHOLE)  # names that tell a layer of this room
KINDS = {"hada": "LoHa", "lokr": "LoKr", "lora": "Tucker LoRA", "diff": "whole differences"}  # by a name's beginning


def check_factors(factors: Mapping[str, torch.Tensor]) -> str | None:
    """What of a layer's factors is missing or does not go together, None where all is well."""
    names = set(factors)
    if len({name.split("_")[0] for name in names}) > 1:
        return f"{', '.join(sorted(names))} are of several kinds"
    if names & {*_LOHA, *_LOHA_CORES}:
        return None if names - {*_LOHA_CORES} == {*_LOHA} else f"LoHa needs {', '.join(_LOHA)}"
    if names & {*_TUCKER_LORA}:
        return None if names == {*_TUCKER_LORA} else f"a Tucker LoRA needs {', '.join(_TUCKER_LORA)}"
    if names & {*_WHOLE}:
        return None
    for half in ("lokr_w1", "lokr_w2"):
        if not ({half} <= names or {f"{half}_a", f"{half}_b"} <= names):
            return f"LoKr needs {half}, or {half}_a and {half}_b"
    return None


def factor_rank(factors: Mapping[str, torch.Tensor]) -> int | None:
    """The rank that alpha is divided by; None for a LoKr of two whole factors and a whole difference (scale 1)."""
    for name in ("lokr_w2_b", "lokr_w1_b", "hada_w1_b", "lora_mid.weight"):
        if name in factors:
            return factors[name].shape[0]
    return None


def _tucker(core: torch.Tensor, outputs: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """core (r, r, ...), outputs (r, out), inputs (r, in) -> (out, in, ...), float32."""
    return torch.einsum("ij...,ip,jq->pq...", core.float(), outputs.float(), inputs.float())


def _half(factors: Mapping[str, torch.Tensor], half: str) -> torch.Tensor:
    """A factor of LoKr, whole, in float32."""
    if half in factors:
        return factors[half].float()
    first, second = factors[f"{half}_a"], factors[f"{half}_b"]
    if half == "lokr_w2" and "lokr_t2" in factors:
        return _tucker(factors["lokr_t2"], first, second)
    return first.float() @ second.float().flatten(1)


def _hadamard(factors: Mapping[str, torch.Tensor], number: int) -> torch.Tensor:
    """One of LoHa's two matrices, float32."""
    first, second = factors[f"hada_w{number}_a"], factors[f"hada_w{number}_b"]
    core = factors.get(f"hada_t{number}")
    return first.float() @ second.float() if core is None else _tucker(core, first, second)


def factor_delta(factors: Mapping[str, torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """What the factors add to a weight of that shape before scaling, float32; ValueError where they do not fit."""
    if "diff" in factors:
        delta = factors["diff"].float()
    elif "lora_mid.weight" in factors:
        down, up = _tucker_pair(factors)
        delta = torch.einsum("pi,iq...->pq...", up.flatten(1), down)
    elif "hada_w1_a" in factors:
        delta = _hadamard(factors, 1) * _hadamard(factors, 2)
    else:
        second = _half(factors, "lokr_w2")
        first = _half(factors, "lokr_w1")
        delta = torch.kron(first.view(*first.shape, *(1 for _ in second.shape[2:])), second)
    if delta.numel() != shape.numel():
        raise ValueError(f"their product has {tuple(delta.shape)}, the weight {tuple(shape)}")
    return delta.reshape(shape)


def _tucker_pair(factors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(down (r, in, kh, kw), up (out, r, 1, 1)) of a Tucker LoRA, float32: the core goes into down."""
    core, down, up = (factors[name].float() for name in _TUCKER_LORA)
    return torch.einsum("ij...,jq->iq...", core, down.flatten(1)), up


def as_pair(factors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(down (R, in, ...), up (out, R, ...)) whose product is the factors' own, float32; None where none is smaller.

    LoHa of rank r is a LoRA of rank r * r; a LoKr whose second factor is a product of rank r is one of rank r * (the
    inputs of the first); a Tucker LoRA is one of its own rank.
    """
    if "lora_mid.weight" in factors:
        return _tucker_pair(factors)
    if "hada_w1_a" in factors and "hada_t1" not in factors:
        down, up = hadamard_pair(*(factors[name].float() for name in _LOHA))
    elif "lokr_w2_a" in factors and "lokr_t2" not in factors and factors["lokr_w2_b"].ndim == 2:
        first, a2, b2 = _half(factors, "lokr_w1"), factors["lokr_w2_a"].float(), factors["lokr_w2_b"].float()
        up = torch.kron(first, a2)
        down = torch.kron(torch.eye(first.shape[1]), b2)
    else:
        return None
    rank, smaller = down.shape[0], min(up.shape[0], down.shape[1])
    return (down, up) if rank < smaller else None


def hadamard_pair(
    a1: torch.Tensor, b1: torch.Tensor, a2: torch.Tensor, b2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(down (r * r, in), up (out, r * r)) whose product is (a1 b1) * (a2 b2), of a (out, r) and b (r, in)."""
    return (b1[:, None, :] * b2[None, :, :]).flatten(0, 1), (a1[:, :, None] * a2[:, None, :]).flatten(1)


def shaped_pair(module: str, down: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A pair of `as_pair` in the shapes that a LoRA of the layer has: the mix-FFN's are of convolutions."""
    if ".ff.conv_" not in module or down.ndim > 2:
        return down, up
    side = 3 if module.endswith("conv_depth") else 1
    return down.view(down.shape[0], -1, side, side), up[..., None, None]
