"""The transformer of a training run: dtype, LoRA layers or all weights, attention, recomputation."""

from __future__ import annotations

import logging

import torch

from sana_kit.models.attention import set_attention
from sana_kit.models.fused import fuse_blocks
from sana_kit.models.loading import load_transformer
from sana_kit.models.lora import DEFAULT_LORA_LAYERS, lora_config, recompute_blocks
from sana_kit.training.engine import Engine

logger = logging.getLogger("sana")


def prepare_transformer(args, engine: Engine, model) -> torch.nn.Module:
    """The transformer in the dtype of the run, on the device, with LoRA layers or all weights trainable."""
    transformer = load_transformer(model, device=engine.device, dtype=engine.weight_dtype)
    if args.train_mode == "lora":
        layers = [part.strip() for part in args.lora_layers.split(",")] if args.lora_layers else DEFAULT_LORA_LAYERS
        transformer.add_adapter(
            lora_config(rank=args.rank, alpha=args.lora_alpha, dropout=args.lora_dropout, layers=layers)
        )
        if engine.under_deepspeed:
            transformer.to(engine.weight_dtype)  # ZeRO keeps the float32 masters
        else:
            for parameter in transformer.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
    else:
        transformer.requires_grad_(True)
    transformer.to(engine.device)
    kernel = set_attention(transformer, args.attention, engine.device)
    logger.info("cross-attention: %s with a boolean mask built once per forward pass", kernel)
    autocast = engine.weight_dtype != engine.compute_dtype
    logger.info("blocks: %s", fuse_blocks(transformer, args.fused_blocks, autocast=autocast, compiled=args.compile))
    if args.gradient_checkpointing:
        recompute_blocks(transformer, args.gradient_checkpointing_interval)
    if args.compile:
        for block in transformer.transformer_blocks:
            block.compile()  # block by block: one compilation serves all blocks, and parameter names stay
    return transformer
