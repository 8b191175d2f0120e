"""The denoising loop of SanaPipeline, with noise of each image's own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch

from sana_kit.generation.jobs import Job


def initial_noise(job: Job, shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Generator]:
    """The image's noise (1, C, h, w) float32 and its generator, which stochastic schedulers go on drawing from."""
    generator = torch.Generator("cpu").manual_seed(job.seed)
    return torch.randn((1, *shape), generator=generator, dtype=torch.float32), generator


@torch.no_grad()
def denoise(
    transformer: torch.nn.Module,
    scheduler: Any,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    prompt_mask: torch.Tensor,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    dtype: torch.dtype,
    generators: list[torch.Generator],
    on_step: Callable[[], None] | None = None,
) -> torch.Tensor:
    """SanaPipeline's loop over the scheduler's time steps, with nothing else around it.

    As SanaPipeline, it neither scales the noise by `init_noise_sigma` nor the input by `scale_model_input`, which flow
    schedulers need not have.

    Args:
        latents: (N, C, h, w) float32 noise on the device.
        prompt_embeds: (2N, T, D) with guidance (negative prompts first), else (N, T, D).
        prompt_mask: bool, True where a token counts; (2N, T) or (N, T).
        dtype: what the transformer computes in; the scheduler works in float32.

    Returns:
        (N, C, h, w) float32.
    """
    scheduler = copy.deepcopy(scheduler)  # it keeps the history of a run: every group has its own
    scheduler.set_timesteps(num_inference_steps, device=latents.device)
    guided = guidance_scale > 1.0
    step_arguments = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        step_arguments["generator"] = generators
    channels = latents.shape[1]
    prompt_embeds = prompt_embeds.to(dtype)
    for t in scheduler.timesteps:
        model_input = torch.cat([latents] * 2) if guided else latents
        timestep = t.expand(model_input.shape[0]) * getattr(transformer.config, "timestep_scale", 1.0)
        prediction = transformer(
            model_input.to(dtype),
            encoder_hidden_states=prompt_embeds,
            encoder_attention_mask=prompt_mask,
            timestep=timestep,
            return_dict=False,
        )[0].float()
        if guided:
            negative, positive = prediction.chunk(2)
            prediction = negative + guidance_scale * (positive - negative)
        if transformer.config.out_channels // 2 == channels:  # learned sigma
            prediction = prediction.chunk(2, dim=1)[0]
        latents = scheduler.step(prediction, t, latents, **step_arguments, return_dict=False)[0]
        if on_step is not None:
            on_step()
    return latents
