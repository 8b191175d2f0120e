"""The layers that an adapter trains, by their names: for checks, which need no heavy library."""

from __future__ import annotations

import re
from collections.abc import Iterable

DEFAULT_LORA_LAYERS = ("to_k", "to_q", "to_v")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FFN = ("ff.conv_inverted", "ff.conv_point")  # not conv_depth: its filters have one input each
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
    """(layer asked for, why) for what of `parse_layers` finds no layer among `names`."""
    names = list(names)
    if isinstance(layers, str):
        try:
            found = any(re.fullmatch(layers, name) for name in names)
        except re.error as error:
            return [(layers, f"is no regular expression ({error})")]
        return [] if found else [(layers, "matches no whole name of a linear or convolution layer of the transformer")]
    return [
        (layer, "matches no linear or convolution layer of the transformer")
        for layer in layers
        if not any(name == layer or name.endswith("." + layer) for name in names)
    ]
