"""Names of SANA's layers in diffusers and in NVlabs' own layout, and the way between them.

diffusers has one layer for each of query, key and value; NVlabs stacks query, key and value of the self-attention in
`attn.qkv`, key and value of the cross-attention in `cross_attn.kv_linear`, along the outputs. All other layers have
one partner each. Which layer is meant is told by its name alone; only the time embedding needs to be told whether the
model is SANA-Sprint (`sprint`), whose names differ in diffusers and not at NVlabs.
"""

from __future__ import annotations

import dataclasses
import re
from functools import lru_cache

BLOCKS, NVLABS_BLOCKS = "transformer_blocks", "blocks"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a layer of diffusers stands in NVlabs' layout: the `part`-th of `parts` stacked ones in layer `name`."""

    name: str
    part: int = 0
    parts: int = 1


# Within a block: diffusers' layer -> its place. "" is the block's own table.
_IN_BLOCK = {
    "attn1.to_q": Place("attn.qkv", 0, 3),
    "attn1.to_k": Place("attn.qkv", 1, 3),
    "attn1.to_v": Place("attn.qkv", 2, 3),
    "attn1.norm_q": Place("attn.q_norm"),
    "attn1.norm_k": Place("attn.k_norm"),
    "attn1.to_out.0": Place("attn.proj"),
    "attn2.to_q": Place("cross_attn.q_linear"),
    "attn2.to_k": Place("cross_attn.kv_linear", 0, 2),
    "attn2.to_v": Place("cross_attn.kv_linear", 1, 2),
    "attn2.norm_q": Place("cross_attn.q_norm"),
    "attn2.norm_k": Place("cross_attn.k_norm"),
    "attn2.to_out.0": Place("cross_attn.proj"),
    "ff.conv_inverted": Place("mlp.inverted_conv.conv"),
    "ff.conv_depth": Place("mlp.depth_conv.conv"),
    "ff.conv_point": Place("mlp.point_conv.conv"),
}
_OUTSIDE = {
    "patch_embed.proj": "x_embedder.proj",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "caption_norm": "attention_y_norm",
    "time_embed.linear": "t_block.1",
    "proj_out": "final_layer.linear",
}
_TIME = {
    "time_embed.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_embed.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
}
_SPRINT_TIME = {
    "time_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_embed.guidance_embedder.linear_1": "cfg_embedder.mlp.0",
    "time_embed.guidance_embedder.linear_2": "cfg_embedder.mlp.2",
}
_BLOCK_NAME = re.compile(rf"{BLOCKS}\.(\d+)\.(.+)")
_NVLABS_BLOCK_NAME = re.compile(rf"{NVLABS_BLOCKS}\.(\d+)\.(.+)")


def to_nvlabs(module: str) -> Place | None:
    """Where diffusers' layer `module` stands in NVlabs' layout; None for what is no layer of SANA."""
    if match := _BLOCK_NAME.fullmatch(module):
        place = _IN_BLOCK.get(match[2])
        return place and dataclasses.replace(place, name=f"{NVLABS_BLOCKS}.{match[1]}.{place.name}")
    name = _OUTSIDE.get(module) or _TIME.get(module) or _SPRINT_TIME.get(module)
    return Place(name) if name else None


@lru_cache(maxsize=2)
def _backwards(sprint: bool) -> tuple[dict[str, list[str]], dict[str, str]]:
    """({layer within a block at NVlabs: diffusers' layers in their order}, {the other layers})."""
    inside: dict[str, list[str]] = {}
    for module, place in _IN_BLOCK.items():
        inside.setdefault(place.name, []).append(module)  # _IN_BLOCK has the parts in their order
    outside = {**_OUTSIDE, **(_SPRINT_TIME if sprint else _TIME)}
    return inside, {name: module for module, name in outside.items()}


def from_nvlabs(name: str, sprint: bool = False) -> list[str]:
    """diffusers' layers that NVlabs' layer `name` holds, in the order of the stack; none for what is no layer."""
    inside, outside = _backwards(sprint)
    if match := _NVLABS_BLOCK_NAME.fullmatch(name):
        return [f"{BLOCKS}.{match[1]}.{module}" for module in inside.get(match[2], [])]
    return [outside[name]] if name in outside else []


@lru_cache(maxsize=1)
def _flat() -> tuple[dict[str, str], dict[str, str]]:
    """({name in a block with _ for dots: name}, {other names}) of both layouts."""
    inside = {name.replace(".", "_"): name for name in _IN_BLOCK}
    inside |= {place.name.replace(".", "_"): place.name for place in _IN_BLOCK.values()}
    outside = {}
    for table in (_OUTSIDE, _TIME, _SPRINT_TIME):
        for pair in table.items():
            outside |= {name.replace(".", "_"): name for name in pair}
    return inside, outside


def unflatten(flat: str) -> str | None:
    """The layer whose name is `flat` with dots for underscores, in either layout; None where there is none.

    kohya's names (`transformer_blocks_0_attn1_to_q`) can be read in one way only with the list of the layers at hand.
    """
    inside, outside = _flat()
    match = re.fullmatch(rf"({BLOCKS}|{NVLABS_BLOCKS})_(\d+)_(.+)", flat)
    if match is None:
        return outside.get(flat)
    name = inside.get(match[3])
    known = name is not None and (name in _IN_BLOCK) == (match[1] == BLOCKS)
    return f"{match[1]}.{match[2]}.{name}" if known else None


def is_nvlabs(name: str) -> bool:
    """Whether a layer's name is one of NVlabs' layout."""
    return bool(from_nvlabs(name) or from_nvlabs(name, sprint=True))
