"""SANA-Sprint's steps: few of them, along a trigonometric path, with the guidance scale as an input.

Sprint (arXiv 2503.09641) mixes image and noise as cos(t) x0 + sin(t) z, t from nearly pi/2 to 0, both of standard
deviation sigma_data; its transformer was trained for the linear mixture of flow matching, so that its input, its time
and its output are turned from one into the other around each call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from sana_kit.generation.inputs import Source
from sana_kit.models.fused import one_timestep

# Of SanaSprintPipeline: the first time, and the second one where there are two steps. Other numbers of steps have
# their times at equal distances, for which that pipeline has to be called with intermediate_timesteps=None.
FIRST_TIME = 1.57080
SECOND_OF_TWO = 1.3


def set_times(scheduler: Any, num_inference_steps: int, device: torch.device) -> None:
    """Set an SCMScheduler to SanaSprintPipeline's times for any number of steps."""
    second = SECOND_OF_TWO if num_inference_steps == 2 else None
    scheduler.set_timesteps(
        num_inference_steps, device=device, max_timesteps=FIRST_TIME, intermediate_timesteps=second
    )
    scheduler.set_begin_index(0)


@torch.no_grad()
def _begin(scheduler: Any, noise: torch.Tensor, source: Source | None) -> tuple[torch.Tensor, int]:
    """(latents to begin with, number of the first step): the noise, or a source's latents turned towards it."""
    if source is None:
        return noise, 0
    scheduler.set_begin_index(source.first_step)
    begin = scheduler.timesteps[source.first_step]
    kept = begin.cos() * source.latents * scheduler.config.sigma_data
    return kept + begin.sin() * noise, source.first_step


def denoise_sprint(
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
) -> torch.Tensor:
    """SanaSprintPipeline's loop, for any number of steps; each step but the last draws new noise.

    Args:
        scheduler: an SCMScheduler; it is copied, never changed.
        latents: (N, C, h, w) float32 noise on the device.
        prompt_embeds: (N, T, D); prompt_mask: bool (N, T), True where a token counts.
        generators: one per image, which the noise between the steps is drawn from.
        dtype: what the transformer computes in; everything else is float32.
        source: latents to begin from instead of noise alone (SanaSprintImg2ImgPipeline); its mask is not used.

    Returns:
        (N, C, h, w) float32.
    """
    scheduler = copy.deepcopy(scheduler)
    set_times(scheduler, num_inference_steps, latents.device)
    sigma_data = scheduler.config.sigma_data
    latents, first = _begin(scheduler, latents * sigma_data, source)
    # rounded as the pipeline rounds it
    guidance = torch.full((len(latents),), guidance_scale, device=latents.device).to(dtype)
    guidance = guidance * transformer.config.guidance_embeds_scale
    prompt_embeds = prompt_embeds.to(dtype)
    once = slice(0, 1) if one_timestep(transformer) else slice(None)
    for time in scheduler.timesteps[first:-1]:
        times = time.expand(len(latents))
        flow_time = times.sin() / (times.cos() + times.sin())
        share = flow_time.view(-1, 1, 1, 1)
        length = (share**2 + (1 - share) ** 2).sqrt()
        flow_input = latents / sigma_data * length
        prediction = transformer(
            flow_input.to(dtype),
            encoder_hidden_states=prompt_embeds,
            encoder_attention_mask=prompt_mask,
            guidance=guidance[once],
            timestep=flow_time[once],
            return_dict=False,
        )[0]
        turned = ((1 - 2 * share) * flow_input + (1 - 2 * share + 2 * share**2) * prediction) / length
        latents, clean = scheduler.step(
            turned.float() * sigma_data, times, latents, generator=generators, return_dict=False
        )
        if on_step is not None:
            on_step()
    return clean / sigma_data
