"""The adapter that a training begins with, made of one or several files of any layout.

    lora, problems = read_start("a.safetensors:0.8,b.safetensors", transformer_config)

Several add up exactly: a layer's factors stand beside one another, so its rank is the sum of theirs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from sana_kit.errors import Problem, UserError
from sana_kit.models.adapter import FIELD, Lora, parse_adapters, read_lora
from sana_kit.models.factors import as_pair, shaped_pair
from sana_kit.models.lora_layers import DEPTHWISE
from sana_kit.models.weights import some_of


def read_start(value: str, transformer_config: dict[str, Any]) -> tuple[Lora | None, list[Problem]]:
    """(the LoRA or DoRA that `value` names, problems): PATH, PATH:FACTOR, or several with commas between them.

    LyCORIS' factors are made a LoRA where that is exact. A factor goes into B, so that alpha / rank, which the
    learning rate was chosen for, stays what it is.
    """
    loras, problems = [], []
    try:
        named = parse_adapters([value])
    except UserError as error:
        return None, list(error.problems)
    for path, factor in named:
        lora, found = read_lora(path, transformer_config)
        problems += found
        if lora is None:
            continue
        problems += [Problem(FIELD, path, reason, remedy) for reason, remedy in _untrainable(lora, len(named), factor)]
        loras.append((lora, factor))
    if problems:
        return None, problems
    return _together(loras), []


def _untrainable(lora: Lora, count: int, factor: float) -> list[tuple[str, str]]:
    """(reason, remedy) for all that a training cannot begin with."""
    told = []
    whole = sorted(name for name, factors in lora.factors.items() if as_pair(factors) is None)
    if whole:
        reason = f"what LyCORIS adds to {some_of(whole)} is no LoRA of a smaller rank than the layer"
        told.append((reason, "Give a LoRA or DoRA."))
    depthwise = sorted(name for name in lora.rank if name.endswith(DEPTHWISE))
    if depthwise:
        reason = f"it changes {some_of(depthwise)}, whose filters have one input each: peft trains no LoRA of such"
        told.append((reason, "Give an adapter of the other layers."))
    if lora.bias:
        told.append(("it adds to biases, which are not trained here", "Give a LoRA or DoRA without them."))
    if lora.per_input:
        reason = "its DoRA magnitudes have one value for each input, and peft trains one for each output"
        told.append((reason, "Give a LoRA, or a DoRA with one for each output."))
    elif lora.magnitude and (count > 1 or factor != 1 or lora.factors):
        told.append(("a DoRA can only be begun with alone, as it is", "Leave the others and the factor out."))
    if factor == 0:
        told.append(("the factor is 0, so nothing of it would be left", "Leave it out."))
    return told


def _as_pairs(lora: Lora) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """layer -> (A, B, alpha / rank)."""
    pairs = {}
    for name, scaling in lora.scaling.items():
        if name in lora.factors:
            pair = as_pair(lora.factors[name])
            assert pair is not None, name
            pairs[name] = (*shaped_pair(name, *pair), scaling)
        else:
            pairs[name] = (lora.weights[f"{name}.lora_A.weight"], lora.weights[f"{name}.lora_B.weight"], scaling)
    return pairs


def _together(loras: list[tuple[Lora, float]]) -> Lora:
    """One LoRA that adds what all of them add, each times its factor."""
    (first, factor), *others = loras
    if not others and factor == 1 and not first.factors:
        return first
    layers: dict[str, list[tuple[torch.Tensor, torch.Tensor, float]]] = {}
    for lora, factor in loras:
        for name, (down, up, scaling) in _as_pairs(lora).items():
            layers.setdefault(name, []).append((down.float(), up.float() * factor, scaling))
    weights, rank, scalings = {}, {}, {}
    for name, parts in layers.items():
        scalings[name] = parts[0][2]
        down = torch.cat([part[0] for part in parts])
        up = torch.cat([part[1] * (part[2] / scalings[name]) for part in parts], dim=1)
        weights |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        rank[name] = down.shape[0]
    return dataclasses.replace(first, weights=weights, rank=rank, scaling=scalings, factors={})
