"""A training run as a trainer sets it up around the hooks of patch_sana, for tests in one process and for workers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import patch_sana


def reset_accelerate():
    """Forget accelerate's state of this process: every model that it ever prepared, and the engine."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def lora_transformer(folder, rank=4, alpha=4, dtype=None, layers=("to_k", "to_q", "to_v"), seed=0):
    import torch
    from diffusers import SanaTransformer2DModel
    from peft import LoraConfig

    transformer = SanaTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    transformer.requires_grad_(False)
    if dtype:
        transformer.to(dtype)
    torch.manual_seed(seed)
    transformer.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(layers))
    )
    return transformer


def bare(accelerator):
    return lambda model: getattr(accelerator.unwrap_model(model), "_orig_mod", accelerator.unwrap_model(model))


class HookedRun:
    """A training run as the trainer sets it up: hooks registered, transformer and optimizer prepared."""

    def __init__(self, folder, mixed_precision=None, accelerator=None, wrap=lambda model: model, **lora):
        import torch
        from accelerate import Accelerator

        self.accelerator = accelerator or Accelerator(cpu=True)
        self.bare = lora_transformer(folder, **lora)
        args = SimpleNamespace(mixed_precision=mixed_precision)
        parts = {"accelerator": self.accelerator, "unwrap_model": bare(self.accelerator), "transformer": self.bare}
        self.save_hook = patch_sana.create_save_model_hook(**parts)
        self.load_hook = patch_sana.create_load_model_hook(**parts, args=args)
        self.accelerator.register_save_state_pre_hook(self.save_hook)
        self.accelerator.register_load_state_pre_hook(self.load_hook)
        parameters = [parameter for parameter in self.bare.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        self.transformer, self.optimizer = self.accelerator.prepare(wrap(self.bare), optimizer)

    def inputs(self, step, rank=0):
        import torch

        generator = torch.Generator().manual_seed(100 * step + rank)
        config, dtype = self.bare.config, self.bare.dtype
        return {
            "hidden_states": torch.randn(1, config.in_channels, 8, 8, generator=generator).to(dtype),
            "encoder_hidden_states": torch.randn(1, 5, config.caption_channels, generator=generator).to(dtype),
            "encoder_attention_mask": torch.ones(1, 5),
            "timestep": torch.tensor([300.0]),
        }

    def train(self, steps, rank=0):
        for step in steps:
            loss = self.transformer(**self.inputs(step, rank), return_dict=False)[0].float().square().mean()
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def weights(self):
        tensors = patch_sana._adapter_tensors(self.bare)
        return {key: tensor.detach().clone() for key, tensor in tensors.items()}

    def save(self, folder, **kwargs):
        self.accelerator.save_state(str(folder), **kwargs)
        self.accelerator.wait_for_everyone()  # accelerate does not
        return Path(folder)


def renew(*args, **kwargs):
    """A run in a 'new process'."""
    reset_accelerate()
    return HookedRun(*args, **kwargs)
