"""The transformer of a training run: dtype, LoRA layers or all weights, attention, recomputation."""

from __future__ import annotations

import logging

import torch

from sana_kit.errors import UserError
from sana_kit.models.attention import set_attention
from sana_kit.models.controlnet import ControlledTransformer, begin_controlnet
from sana_kit.models.folder import Model
from sana_kit.models.fused import compile_blocks, fuse_blocks
from sana_kit.models.graphs import record_graphs
from sana_kit.models.loading import load_transformer
from sana_kit.models.lora import recompute_blocks
from sana_kit.models.parts import find_controlnet, load_controlnet
from sana_kit.training.adapter import put_adapter, quantize_base
from sana_kit.training.config import TrainConfig
from sana_kit.training.engine import Engine
from sana_kit.training.settings import AdapterConfig, SpeedConfig

logger = logging.getLogger("sana")


def prepare_transformer(config: TrainConfig, engine: Engine, base_model: Model) -> torch.nn.Module:
    """The transformer in the dtype of the run, on the device, with LoRA layers or all weights trainable, and tuned."""
    few_bits = config.base_quantization
    # quantised on the host: the card never holds the whole weights
    device = engine.device if few_bits is None else torch.device("cpu")
    transformer = load_transformer(base_model, device=device, dtype=engine.weight_dtype)
    if config.train_mode == "controlnet":
        return _with_controlnet(config, engine, base_model, transformer)
    if config.train_mode == "lora":
        add_lora(transformer, config.adapter, engine)
        if few_bits is not None:
            quantize_base(transformer, few_bits, engine.weight_dtype)
    else:
        transformer.requires_grad_(True)
    transformer.to(engine.device)
    tune(transformer, config.speed, engine)
    return transformer.train()


def _with_controlnet(
    config: TrainConfig, engine: Engine, base_model: Model, transformer: torch.nn.Module
) -> ControlledTransformer:
    """The frozen transformer and a ControlNet, new or one to go on with, trainable but for its embeddings."""
    if config.init_controlnet is None:
        controlnet = begin_controlnet(transformer, config.controlnet_layers)
    else:
        part, problems = find_controlnet(config.init_controlnet, base_model)
        if part is None:
            raise UserError(problems)
        controlnet = load_controlnet(part, device=engine.device, dtype=engine.weight_dtype)
    masters = not engine.under_deepspeed and engine.compute_dtype != torch.float32
    model = ControlledTransformer(transformer, controlnet, engine.compute_dtype if masters else None)
    for part in model.trained_parts():
        part.requires_grad_(True)
        if masters:
            part.float()
    for part in (transformer, controlnet):
        tune(part, config.speed, engine)
    return model.train()


def add_lora(transformer: torch.nn.Module, config: AdapterConfig, engine: Engine) -> None:
    """Put trainable LoRA layers into the transformer, whose own weights stay frozen."""
    put_adapter(transformer, config)
    if engine.under_deepspeed:  # ZeRO keeps the float32 masters
        transformer.to(engine.weight_dtype)
        return
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def tune(transformer: torch.nn.Module, config: SpeedConfig, engine: Engine) -> None:
    """Attention kernel, fused blocks, recomputation, compilation, graphs."""
    kernel = set_attention(transformer, config.attention, engine.device)
    logger.info("cross-attention: %s with a boolean mask built once per forward pass", kernel)
    autocast = engine.weight_dtype != engine.compute_dtype
    blocks = fuse_blocks(
        transformer, config.fused_blocks, autocast=autocast, compiled=config.compile, graphs=config.cuda_graphs
    )
    logger.info("blocks: %s", blocks)
    if config.gradient_checkpointing:
        recompute_blocks(transformer, config.gradient_checkpointing_interval)
    if config.compile:
        compile_blocks(transformer)
    if config.cuda_graphs:
        record_graphs(transformer, training=True)
