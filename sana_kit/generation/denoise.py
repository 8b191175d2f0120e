"""The denoising loop of SanaPipeline, with noise of each image's own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sana_kit.generation.inputs import Source
from sana_kit.generation.jobs import Job
from sana_kit.models.attention import perturbed_attention
from sana_kit.models.fused import one_timestep

# (model input, time step) -> residuals of a ControlNet, one per block that takes one
Control = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]


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
    source: Source | None = None,
    control: Control | None = None,
    pag_scale: float = 0.0,
    pag_layers: Sequence[int] = (),
) -> torch.Tensor:
    """SanaPipeline's loop over the scheduler's time steps, with nothing else around it.

    As SanaPipeline, it neither scales the noise by `init_noise_sigma` nor the input by `scale_model_input`, which flow
    schedulers need not have.

    Args:
        latents: (N, C, h, w) float32 noise on the device.
        prompt_embeds: (2N, T, D) with guidance (negative prompts first), else (N, T, D); with perturbed attention the
            N prompts once more.
        prompt_mask: bool, True where a token counts; (2N, T) or (N, T).
        dtype: what the transformer computes in; the scheduler works in float32.
        source: latents to begin from instead of noise alone.
        control: a ControlNet with its image.
        pag_scale: of perturbed attention guidance (SanaPAGPipeline), in the blocks `pag_layers`; 0: none.

    Returns:
        (N, C, h, w) float32.
    """
    scheduler = copy.deepcopy(scheduler)  # it keeps the history of a run: every group has its own
    scheduler.set_timesteps(num_inference_steps, device=latents.device)
    noise, first = latents, 0
    if source is not None and source.first_step > 0:
        first = source.first_step
        scheduler.set_begin_index(first)
        latents = _mix(source.latents, noise, scheduler.sigmas[first])
    step_arguments = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        step_arguments["generator"] = generators
    copies = len(prompt_embeds) // len(latents)
    prompt_embeds = prompt_embeds.to(dtype)
    with perturbed_attention(transformer, pag_layers if pag_scale else (), copies):
        for step, t in list(enumerate(scheduler.timesteps))[first:]:
            model_input = torch.cat([latents] * copies).to(dtype)
            timestep = t.expand(model_input.shape[0]) * getattr(transformer.config, "timestep_scale", 1.0)
            residuals = {} if control is None else {"controlnet_block_samples": control(model_input, timestep)}
            prediction = transformer(
                model_input,
                encoder_hidden_states=prompt_embeds,
                encoder_attention_mask=prompt_mask,
                timestep=timestep[:1] if one_timestep(transformer) else timestep,
                return_dict=False,
                **residuals,
            )[0].float()
            prediction = _guide(prediction.chunk(copies), guidance_scale, pag_scale)
            if transformer.config.out_channels // 2 == latents.shape[1]:  # learned sigma
                prediction = prediction.chunk(2, dim=1)[0]
            latents = scheduler.step(prediction, t, latents, **step_arguments, return_dict=False)[0]
            if source is not None and source.mask is not None:
                kept = _mix(source.latents, noise, scheduler.sigmas[step + 1])
                latents = source.mask * latents + (1 - source.mask) * kept
            if on_step is not None:
                on_step()
    return latents


def _mix(latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """What flow matching's path holds at sigma: image and noise, mixed linearly."""
    sigma = sigma.to(noise)
    return (1 - sigma) * latents + sigma * noise


def _guide(parts: Sequence[torch.Tensor], guidance_scale: float, pag_scale: float) -> torch.Tensor:
    """One prediction of those of a call: negative prompt (with guidance), prompt, perturbed attention (with PAG)."""
    if pag_scale:
        *parts, perturbed = parts
        positive = parts[-1]
        away = pag_scale * (positive - perturbed)
        if len(parts) == 1:
            return positive + away
        return parts[0] + guidance_scale * (positive - parts[0]) + away
    if len(parts) == 1:
        return parts[0]
    negative, positive = parts
    return negative + guidance_scale * (positive - negative)
