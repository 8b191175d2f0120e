"""Bytes that a block's passes move under torch.compile, by the compiler's own count."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping

import torch


@contextlib.contextmanager
def counting() -> Iterator[object]:
    """torch._inductor.metrics (read in torch 2.13), counting: it does while its own log is on, not from a cache."""
    from torch._inductor import compile_fx, config, metrics

    torch._dynamo.reset()
    log = compile_fx.inductor_metrics_log
    before = log.level, log.propagate
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        with config.patch(force_disable_caches=True):
            metrics.reset()
            yield metrics
    finally:
        log.setLevel(before[0])
        log.propagate = before[1]
        torch._dynamo.reset()


def compiled_bytes(config: Mapping, block: str, *, images: int, side: int, tokens: int) -> tuple[int, int]:
    """(bytes of the forward pass, of the backward pass) of one block of a SanaTransformer2DModel on the CPU, bf16.

    LoRA of rank 4; the pass is run, so that what was counted is what works.

    Args:
        block: of step_table.BLOCKS.
        side: of the latents, in patches; tokens: of the captions.
    """
    from diffusers import SanaTransformer2DModel

    from sana_kit.models.fused import compile_blocks, fuse_blocks
    from sana_kit.step_table import prepare

    torch.manual_seed(0)
    model = SanaTransformer2DModel(**{**config, "num_layers": 1})
    prepare(model, "lora4", block, torch.bfloat16)
    if block == "fused":
        fuse_blocks(model, compiled=True)
    compile_blocks(model.train())
    width = model.config.num_attention_heads * model.config.attention_head_dim
    x = torch.randn(images, side**2, width).bfloat16().requires_grad_()
    captions = torch.randn(images, tokens, width).bfloat16()
    modulation = 0.1 * torch.randn(images, 6 * width).bfloat16()
    mask = torch.ones(images, 1, 1, tokens, dtype=torch.bool)
    with counting() as metrics:
        out = model.transformer_blocks[0](x, None, captions, mask, modulation, side, side)
        forward = metrics.num_bytes_accessed
        out.backward(torch.randn_like(out))
        return forward, metrics.num_bytes_accessed - forward
