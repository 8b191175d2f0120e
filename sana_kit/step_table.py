"""The roofline table of one step: what is trained or drawn, through which block, counted on meta tensors.

Printed by `python -m sana_kit.flops --step` and by tests/benchmarks/bench_roofline.py, seconds per line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig

from sana_kit import roofline
from sana_kit.models import attention, fused, lora

STEPS = ("lora4", "lora16", "full", "denoise")
BLOCKS = ("diffusers", "kit", "fused")
BLOCK_HELP = (
    "diffusers: as its transformer comes; kit: the kit's attention and LoRA layers; fused: --fused_blocks auto"
)


def add_adapter(model: torch.nn.Module, rank: int, kit: bool) -> None:
    """Freeze the model and add LoRA to q, k and v of both attentions, by the kit's layers or by peft's."""
    model.requires_grad_(False)
    settings = {"init_lora_weights": "gaussian", "target_modules": ["to_q", "to_k", "to_v"]}
    plain = LoraConfig(r=rank, lora_alpha=rank, **settings)
    model.add_adapter(lora.lora_config(rank=rank, alpha=rank) if kit else plain)


def prepare(model: torch.nn.Module, step: str, block: str, dtype: torch.dtype) -> None:
    """Make what `step` (of STEPS, or another LoRA rank) trains trainable and give the model the block's code."""
    if step.startswith("lora"):
        add_adapter(model, int(step.removeprefix("lora")), kit=block != "diffusers")
        model.to(dtype)
    else:
        model.requires_grad_(step == "full")
    if block != "diffusers":
        attention.set_attention(model, "auto", torch.device("cpu"))
    if block == "fused":
        fused.fuse_blocks(model)


def count_step(
    config: Mapping,
    step: str,
    block: str,
    *,
    latent_hw: tuple[int, int],
    images: int,
    tokens: int,
    interval: int | None = None,
) -> roofline.StepCount:
    """One counted step in bf16.

    Args:
        config: of a SanaTransformer2DModel.
        step: of STEPS; block: of BLOCKS.
        images: batch size; tokens: caption tokens.
        interval: every so many blocks are recomputed in the backward pass; None: none.
    """

    def build(model: torch.nn.Module) -> None:
        prepare(model, step, block, torch.bfloat16)
        if interval is not None:
            lora.recompute_blocks(model, interval)

    model = roofline.build_on_meta(dict(config), torch.bfloat16, build)
    if step == "denoise":
        once = fused.one_timestep(model)
        return roofline.count_denoising_step(model, images, latent_hw, tokens, one_timestep=once)
    return roofline.count_training_step(model, images, latent_hw, tokens)


def count_steps(
    config: Mapping,
    steps: Sequence[str],
    blocks: Sequence[str],
    *,
    latent_hw: tuple[int, int],
    images: int,
    tokens: int,
) -> dict[str, roofline.StepCount]:
    """Title -> counted step, for every step and block."""
    shape: dict[str, Any] = {"latent_hw": latent_hw, "images": images, "tokens": tokens}
    return {f"{step}, {block} block": count_step(config, step, block, **shape) for step in steps for block in blocks}


def format_changes(counts: Mapping[str, roofline.StepCount]) -> str:
    """What each block brings against the first one of the same step, by kind of operator, per image."""
    chip = next(reversed(roofline.CHIPS))
    lines = []
    for title, count in counts.items():
        step = title.split(",")[0]
        first = next(name for name in counts if name.startswith(f"{step},"))
        if title == first:
            continue
        lines.append(f"{title} instead of {first.split(', ')[1]}: GB, kernels, roofline ms on {chip}")
        ours, theirs = count.by_kind(), counts[first].by_kind()
        for kind in dict.fromkeys([*theirs, *ours]):
            one, other = ours.get(kind, roofline.Row()), theirs.get(kind, roofline.Row())
            gigabytes = (one.bytes - other.bytes) / count.images / 1e9
            milliseconds = (one.seconds[chip] - other.seconds[chip]) / count.images * 1e3
            lines.append(f"  {kind:14}{gigabytes:+8.2f}{one.kernels - other.kernels:+9,d}{milliseconds:+8.2f}")
    return "\n".join(lines)
