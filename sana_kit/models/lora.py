"""LoRA layers as the trainer runs them: compute dtype, the update inside the matrix product, recomputation."""

from __future__ import annotations

import functools

import torch

DEFAULT_LORA_LAYERS = ("to_k", "to_q", "to_v")


def lean_lora(transformer, device_type: str, dtype: torch.dtype) -> None:
    """Let LoRA layers compute in `dtype` and touch their large input and output once.

    peft casts a layer's whole input to the adapter's float32 (or needs an autocast around the model), then writes the
    update, scales it and adds it in passes over the whole output. Here the small matrices are cast instead, and
    y + s * (x A^T) B^T is one addmm; rounded once, not three times.
    """
    from peft.tuners import lora

    for module in transformer.modules():
        if not isinstance(module, lora.LoraLayer):
            continue
        forward = module.forward
        (name,) = module.active_adapters
        plain = not (getattr(module, "lora_variant", {}) or module.use_dora.get(name)) and not module.merged
        if type(module) is lora.Linear and plain and module.lora_B[name].bias is None:
            forward = functools.partial(_lora_forward, module, name)
        if module.lora_A[name].weight.dtype != dtype:
            module.cast_input_dtype_enabled = False
            forward = torch.autocast(device_type, dtype=dtype)(forward)
        module.forward = forward


def _lora_forward(module, name: str, hidden_states: torch.Tensor) -> torch.Tensor:
    """base(x) + scaling * B(A(dropout(x))) of a peft.tuners.lora.Linear, the sum within the product."""
    base = module.base_layer(hidden_states)
    down = module.lora_A[name](module.lora_dropout[name](hidden_states))
    up = module.lora_B[name].weight
    total = torch.addmm(base.flatten(0, -2), down.flatten(0, -2), up.t(), alpha=module.scaling[name])
    return total.view_as(base)


def checkpoint_blocks(transformer, interval: int) -> None:
    """Recompute every `interval`-th block in the backward pass instead of keeping its activations."""
    from torch.utils.checkpoint import checkpoint

    def recomputed(forward):
        def run(*args, **kwargs):
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        return run

    for index, block in enumerate(transformer.transformer_blocks):
        if index % interval == 0:
            block.forward = recomputed(block.forward)
