"""The trained adapter: its layers put into the transformer, an earlier adapter to go on from, a base in few bits."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.utils import set_peft_model_state_dict

from patch_sana import base_model_fingerprint
from sana_kit.models.adapter_start import read_start
from sana_kit.models.lora import lora_config
from sana_kit.models.lora_layers import parse_layers
from sana_kit.models.lycoris_layers import add_factors
from sana_kit.models.quantize import quantize_weights
from sana_kit.training.settings import AdapterConfig


def quantize_base(transformer: torch.nn.Module, name: str, dtype: torch.dtype) -> None:
    """Keep the blocks' frozen weights in few bits; adapters beside them stay, and files name the whole base.

    Args:
        transformer: on the CPU, with its adapter.
        name: of QUANTIZATIONS; dtype: of the products.
    """
    transformer.sana_base_model = base_model_fingerprint(transformer)
    quantize_weights(transformer.transformer_blocks, name, dtype)


def put_adapter(transformer: torch.nn.Module, config: AdapterConfig) -> None:
    """Put trainable layers of a LoRA, LoKr or LoHa into the transformer, whose own weights stay frozen.

    With `config.init_lora` they begin as that adapter, which `adapter_problems` has found to fit.
    """
    if config.adapter_type != "lora":
        add_factors(
            transformer,
            config.adapter_type,
            rank=config.rank,
            alpha=config.alpha,
            layers=parse_layers(config.lora_layers),
            factor=config.lokr_factor,
        )
        return
    settings: dict[str, Any] = {"use_rslora": config.use_rslora, "use_dora": config.use_dora}
    lora = None
    layers = parse_layers(config.lora_layers)
    start = {"kaiming": True}.get(config.init_lora_weights, config.init_lora_weights)
    if config.init_lora is not None:
        lora, _ = read_start(config.init_lora, transformer.config)
        assert lora is not None, config.init_lora
        layers = sorted(lora.rank)
        root = 0.5 if config.use_rslora else 1.0
        alphas = {name: lora.scaling[name] * rank**root for name, rank in lora.rank.items()}
        settings["rank_pattern"] = {name: rank for name, rank in lora.rank.items() if rank != config.rank}
        settings["alpha_pattern"] = {
            name: int(alpha) if alpha == int(alpha) else alpha
            for name, alpha in alphas.items()
            if not math.isclose(alpha, config.alpha, rel_tol=1e-9)
        }
    transformer.add_adapter(
        lora_config(
            rank=config.rank,
            alpha=config.alpha,
            dropout=config.lora_dropout,
            layers=layers,
            init_lora_weights=start,
            **{name: value for name, value in settings.items() if value},
        )
    )
    if lora is None or next(transformer.parameters()).is_meta:
        return
    tensors = {**lora.weights, **{f"{name}.lora_magnitude_vector": m for name, m in lora.magnitude.items()}}
    result = set_peft_model_state_dict(transformer, tensors, adapter_name="default")
    assert not result.unexpected_keys, result.unexpected_keys
