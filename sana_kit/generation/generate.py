"""Images from prompt embeddings: the one path of validation, class images and the inference scripts.

A seed belongs to an image, never to a rank: each image's noise comes from a CPU generator of its own, so a job
gives the same image on every rank, with every number of processes. Jobs that share one call of the transformer
(a group) are fixed by the job list alone, because bf16 rounds differently with another batch size.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sana_kit.encodings.prompts import collate_prompt_embeds
from sana_kit.generation.decode import decode_latents, to_pil
from sana_kit.generation.denoise import Control, denoise, initial_noise
from sana_kit.generation.inputs import encode_each, keep_outside, load_source
from sana_kit.generation.jobs import Job
from sana_kit.generation.sizes import generation_size, resize_and_crop, vae_factor
from sana_kit.generation.sprint import denoise_sprint

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What `generate` was given to draw with."""

    transformer: torch.nn.Module
    vae: torch.nn.Module
    scheduler: Any
    prompt_embeds: Mapping[str, torch.Tensor]
    negative_prompt_embeds: Mapping[str, torch.Tensor]
    device: torch.device
    dtype: torch.dtype
    use_resolution_binning: bool | str
    controlnet: Callable | None
    pag_layers: Sequence[int]
    caption_multiple: int
    on_step: Callable[[], None] | None


@torch.no_grad()
def _generate_group(group: Sequence[Job], parts: _Parts) -> list[Image]:
    """The images of one group (equal size, steps, guidance, kind of inputs) as PIL images, in the group's order."""
    first, transformer, vae = group[0], parts.transformer, parts.vae
    inputs = [job.inputs for job in group]
    factor = vae_factor(vae)
    sample_size = transformer.config.sample_size
    height, width = generation_size(first.height, first.width, sample_size, parts.use_resolution_binning)
    shape = (transformer.config.in_channels, height // factor, width // factor)
    noises, generators = zip(*(initial_noise(job, shape) for job in group), strict=True)
    together = collate_prompt_embeds(_group_embeds(group, parts), parts.caption_multiple)
    embeds, mask = (tensor.to(parts.device) for tensor in together)
    settings: dict[str, Any] = {
        "num_inference_steps": first.num_inference_steps,
        "guidance_scale": first.guidance_scale,
        "dtype": parts.dtype,
        "generators": list(generators),
        "on_step": parts.on_step,
        "source": load_source(inputs, vae, (height, width), first.num_inference_steps, factor),
    }
    draw = denoise
    if getattr(transformer.config, "guidance_embeds", False):
        draw = denoise_sprint
    else:
        settings |= {"pag_scale": first.inputs.pag_scale, "pag_layers": parts.pag_layers}
        if first.inputs.control_image is not None:
            control = encode_each(vae, [entry.control_image for entry in inputs], (height, width))
            settings["control"] = _control(parts, control, embeds, mask, first.inputs.control_scale)
    latents = draw(transformer, parts.scheduler, torch.cat(noises).to(parts.device), embeds, mask, **settings)
    images = []
    for latent, job in zip(latents.split(1), group, strict=True):
        decoded = resize_and_crop(decode_latents(vae, latent), job.height, job.width)
        images.append(keep_outside(to_pil(decoded[0]), job.inputs))
    return images


def _group_embeds(group: Sequence[Job], parts: _Parts) -> list[torch.Tensor]:
    """Prompt embeddings in the order of a call: negative prompts, prompts, prompts again for perturbed attention."""
    positive = [parts.prompt_embeds[job.prompt] for job in group]
    embeds = [parts.negative_prompt_embeds[job.negative_prompt] for job in group] if group[0].guided else []
    return embeds + positive + (positive if group[0].inputs.pag_scale else [])


def _control(parts: _Parts, latents: torch.Tensor, embeds: torch.Tensor, mask: torch.Tensor, scale: float) -> Control:
    """What a ControlNet adds to a call of the transformer, as SanaControlNetPipeline calls it."""
    controlnet = parts.controlnet
    if controlnet is None:
        raise ValueError("a job has a control image, and no ControlNet was given")
    copies = len(embeds) // len(latents)
    latents, embeds = torch.cat([latents] * copies).to(parts.dtype), embeds.to(parts.dtype)

    def residuals(model_input: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(
            controlnet(
                model_input,
                encoder_hidden_states=embeds,
                encoder_attention_mask=mask,
                timestep=timestep,
                controlnet_cond=latents,
                conditioning_scale=scale,
                return_dict=False,
            )[0]
        )

    return residuals


def tokens_to_pixels(transformer: torch.nn.Module, vae: torch.nn.Module) -> int:
    """Pixels of an image that one token of the transformer stands for; `group_jobs` sizes its groups by it."""
    return (vae_factor(vae) * (transformer.config.patch_size or 1)) ** 2


def generate(
    groups: Iterable[Sequence[Job]],
    *,
    transformer: torch.nn.Module,
    vae: torch.nn.Module,
    scheduler: Any,
    prompt_embeds: Mapping[str, torch.Tensor],
    negative_prompt_embeds: Mapping[str, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    use_resolution_binning: bool | str = "auto",
    controlnet: Callable | None = None,
    pag_layers: Sequence[int] = (),
    caption_multiple: int = 16,
    on_step: Callable[[], None] | None = None,
    on_error: Callable[[Sequence[Job], Exception], None] | None = None,
) -> Iterator[tuple[Job, Image, float]]:
    """Yield (job, image, seconds) of the groups' jobs, in their order, from prompt embeddings.

    `seconds` is the image's share of its group's time. Reads no global random state and leaves none changed; a
    transformer in training mode is put to eval for each group and back.

    Args:
        groups: what `group_jobs` made, or lists of one job each.
        transformer: a SanaTransformer2DModel on `device`, bare (unwrapped), with or without an active adapter.
        vae: an AutoencoderDC on `device`; decodes in its own dtype.
        scheduler: the checkpoint's own, e.g. DPMSolverMultistepScheduler, or SCMScheduler with a transformer of
            SANA-Sprint; it is copied, never changed.
        prompt_embeds: prompt -> (T, D), encoded with the complex human instruction that the run uses.
        negative_prompt_embeds: negative prompt -> (T, D), encoded without it; read only for jobs that are `guided`.
        dtype: what the transformer computes in.
        use_resolution_binning: "auto" as `generation_size` says, or False.
        controlnet: a SanaControlNetModel on `device` in `dtype`, or what is called like one, for jobs that have a
            control image.
        pag_layers: blocks whose self-attention is perturbed for jobs that have a pag_scale.
        caption_multiple: of tokens, which prompts are padded to.
        on_step: called after each denoising step of a group.
        on_error: called as on_error(group, exception) when a group fails, which is then left out; without it the
            exception is raised.
    """
    parts = _Parts(
        transformer=transformer,
        vae=vae,
        scheduler=scheduler,
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
        device=device,
        dtype=dtype,
        use_resolution_binning=use_resolution_binning,
        controlnet=controlnet,
        pag_layers=pag_layers,
        caption_multiple=caption_multiple,
        on_step=on_step,
    )
    for group in groups:
        start, training = time.perf_counter(), transformer.training
        transformer.eval()
        try:
            images = _generate_group(group, parts)
        except Exception as error:
            if on_error is None:
                raise
            on_error(group, error)
            continue
        finally:
            transformer.train(training)
        seconds = (time.perf_counter() - start) / len(group)
        for job, image in zip(group, images, strict=True):
            yield job, image, seconds
