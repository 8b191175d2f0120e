"""Optimizers."""

from __future__ import annotations

import logging

import torch

from sana_kit.devices import kind_of
from sana_kit.errors import CheckpointError

logger = logging.getLogger("sana")


def optimizer_family(class_name: str) -> str:
    """'Adam' for every implementation whose state is Adam's (fused, CPU-offloaded, ...), else the class's own name."""
    return "Adam" if class_name in ("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam", "NpuFusedAdamW") else class_name


def optimizer_scalars(optimizer) -> dict:
    """What the optimizer keeps beside per-parameter tensors: Adam's step count, and numbers of its parameter groups.

    Raises:
        CheckpointError: a state in whole numbers, such as 8-bit moments.
    """
    base = base_optimizer(optimizer)
    scalars = {}
    for key, value in first_flat_state(base).items():
        if torch.is_tensor(value) and value.numel() == 1:
            scalars[key] = value.item()
        elif isinstance(value, (int, float)):
            scalars[key] = value
        elif torch.is_tensor(value) and not value.is_floating_point():
            raise CheckpointError(
                f"{type(base).__name__} keeps '{key}' as {value.dtype}, which checkpoints of this kit do not hold: a"
                " resumed run would go on with other moments. Use --optimizer=AdamW without --use_8bit_adam."
            )
    groups = [
        {k: v for k, v in group.items() if k != "params" and isinstance(v, (int, float, bool, str))}
        for group in base.param_groups
    ]
    return {"class": type(base).__name__, "state": scalars, "groups": groups}


def create_optimizer(args, parameters: list, device: torch.device):
    """AdamW, AdamW8bit or Prodigy over `parameters`, as the flags say."""
    betas = (args.adam_beta1, args.adam_beta2)
    if args.optimizer.lower() == "prodigy":
        import prodigyopt

        if args.learning_rate <= 0.1:
            logger.warning("--learning_rate=%s is low for Prodigy, which wants about 1.0", args.learning_rate)
        return prodigyopt.Prodigy(
            parameters,
            lr=args.learning_rate,
            betas=betas,
            beta3=args.prodigy_beta3,
            weight_decay=args.adam_weight_decay,
            eps=args.adam_epsilon,
            decouple=args.prodigy_decouple,
            use_bias_correction=args.prodigy_use_bias_correction,
            safeguard_warmup=args.prodigy_safeguard_warmup,
        )
    settings = {
        "lr": args.learning_rate,
        "betas": betas,
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **settings)
    # One fused kernel on CUDA. NPU's fused AdamW forbids reallocated parameters, which ZeRO makes: torch's own there.
    return torch.optim.AdamW(parameters, **settings, fused=kind_of(device).fused_adamw)


def base_optimizer(optimizer):
    """The torch optimizer below accelerate's and DeepSpeed's wrappers."""
    seen = set()
    while hasattr(optimizer, "optimizer") and id(optimizer) not in seen:
        seen.add(id(optimizer))
        optimizer = optimizer.optimizer
    return optimizer


def first_flat_state(base) -> dict:
    """The state of the first parameter that has one: all parameters, or flat partitions, have the same keys."""
    return next((state for state in base.state.values() if state), {})
