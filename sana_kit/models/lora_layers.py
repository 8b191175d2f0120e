"""The layers that an adapter trains, by their names: for checks, which need no heavy library."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Kinds of adapter beside LoRA that are trained: name -> how it is written.
FACTOR_KINDS = {"lokr": "LoKr", "loha": "LoHa"}
DEFAULT_LORA_LAYERS = ("to_k", "to_q", "to_v")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FFN = ("ff.conv_inverted", "ff.conv_point")
DEPTHWISE = "conv_depth"  # its filters have one input each
_REST = ("linear_1", "linear_2", "time_embed.linear", "patch_embed.proj", "proj_out")
PRESETS = {"attention": _ATTENTION, "attention+ffn": (*_ATTENTION, *_FFN), "all": (*_ATTENTION, *_FFN, *_REST)}


def parse_layers(text: str | None) -> str | list[str]:
    """The layers that a text asks for, as peft takes them: ends of their names, or a regular expression.

    Args:
        text: a name of PRESETS, names with commas between, or a regular expression, which holds one of ()[]*?|^$ or a
            backslash and matches whole names; None for DEFAULT_LORA_LAYERS.
    """
    if text is None:
        return list(DEFAULT_LORA_LAYERS)
    if text in PRESETS:
        return list(PRESETS[text])
    return text if re.search(r"[()\[\]*?|^$\\]", text) else [part.strip() for part in text.split(",")]


def unmatched_layers(layers: str | list[str], names: Iterable[str]) -> list[tuple[str, str]]:
    """(layer asked for, why) for what of `parse_layers` finds no layer in `names`, or one that peft cannot train."""
    names = list(names)
    told = []
    for layer in [layers] if isinstance(layers, str) else layers:
        if isinstance(layers, str):
            try:
                found = [name for name in names if re.fullmatch(layer, name)]
            except re.error as error:
                return [(layer, f"is no regular expression ({error})")]
            whole = "whole name of a "
        else:
            found, whole = [name for name in names if name == layer or name.endswith("." + layer)], ""
        if not found:
            told.append((layer, f"matches no {whole}linear or convolution layer of the transformer"))
        elif any(name.endswith(DEPTHWISE) for name in found):
            told.append((layer, f"takes in {DEPTHWISE}, whose filters have one input each: peft has no LoRA for such"))
    return told
