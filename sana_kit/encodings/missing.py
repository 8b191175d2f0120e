"""The encoding of missing prompts and images: groups fixed by the data set, halved when memory runs out."""

from __future__ import annotations

import time

import numpy as np
import torch

from sana_kit import devices
from sana_kit.data.image_set import prefetch, progress_bar
from sana_kit.data.transform import apply_transform, plan_transform, to_unit_range
from sana_kit.devices import is_out_of_memory
from sana_kit.encodings.prompts import encode_prompts
from sana_kit.encodings.ranks import check_stop
from sana_kit.encodings.store import ShardWriter
from sana_kit.models.loading import open_text_encoder, open_vae

# Above this side a tensor of the VAE's first stage (128 channels) passes 2^31 elements for one image, which many
# kernels cannot index, so the image is encoded in overlapping tiles of the size below.
WHOLE_ENCODE_SIDE, ENCODE_TILE, ENCODE_STRIDE = 3072, 2048, 1536


def encode_missing_prompts(
    plan, folder, model, dtype, max_sequence_length, batch, device, team, should_stop
) -> tuple[int, float]:
    """Encode this rank's share of the missing prompts; (how many, seconds)."""
    started = time.monotonic()
    keys, prompts, missing = list(plan.prompt_keys), plan.prompts, set(plan.texts.missing().tolist())

    def by_length(row):
        prompt, instruction = prompts[row]
        return "\n".join(instruction or []), len(prompt), prompt

    # Groups of alike length; made from all prompts so that a group is the same whatever is already there.
    order = sorted(range(len(keys)), key=by_length)
    groups, current = [], []
    for row in order:
        if current and (len(current) == batch or prompts[current[0]][1] != prompts[row][1]):
            groups.append(current)
            current = []
        current.append(row)
    groups += [current] if current else []
    share = [g for g in team.share(groups) if missing.intersection(g)]
    if not share:
        return 0, 0.0
    check_stop(team, should_stop)
    tokenizer, text_encoder = open_text_encoder(model, dtype, device)
    done, total = 0, sum(len(missing.intersection(g)) for g in share)
    with ShardWriter(folder, "prompts") as writer, progress_bar(total, "Encoding captions", "caption") as bar:
        for group in share:
            check_stop(team, should_stop)
            embeds = _text_group(
                tokenizer,
                text_encoder,
                [prompts[r][0] for r in group],
                prompts[group[0]][1],
                max_sequence_length,
                device,
            )
            for row, tensor in zip(group, embeds, strict=True):
                if row not in missing:
                    continue
                if not torch.isfinite(tensor).all():
                    raise ValueError(
                        f"The text encoder gave NaN or infinite values for the caption {prompts[row][0][:80]!r}; use"
                        " --text_encoder_dtype=fp32."
                    )
                writer.add(keys[row], tensor)
                done += 1
                bar.update()
            writer.flush_if_due()
    del text_encoder, tokenizer
    devices.empty_cache(device)
    return done, time.monotonic() - started


def _text_group(tokenizer, text_encoder, prompts, instruction, max_sequence_length, device):
    """One group of prompts, in halves when the device's memory does not suffice."""
    try:
        return encode_prompts(
            tokenizer, text_encoder, prompts, instruction, max_sequence_length, device, batch=len(prompts)
        )
    except RuntimeError as error:
        if not is_out_of_memory(error) or len(prompts) == 1:
            raise
    devices.empty_cache(device)
    half = len(prompts) // 2
    arguments = (instruction, max_sequence_length, device)
    return _text_group(tokenizer, text_encoder, prompts[:half], *arguments) + _text_group(
        tokenizer, text_encoder, prompts[half:], *arguments
    )


def group_size(vae_batch_size: int | str, resolution: int, device: torch.device) -> int:
    """Images per group: fixed by flag, resolution and kind of device alone, so that groups never depend on chance.

    'auto' is 8 images of 1024 px on an accelerator, where the device is busy with that, and one on a CPU.
    """
    if vae_batch_size != "auto":
        return int(vae_batch_size)
    whole = 8 if device.type != "cpu" else 1
    return max(1, min(64, int(whole * (1024 / resolution) ** 2)))


def images_that_fit(group: int, resolution: int, channels: int, dtype: torch.dtype, device: torch.device) -> int:
    """The largest halving of `group` whose activations take at most half of the free memory.

    The first stage works at full resolution with `channels` channels. A pass holds up to 5.1 such tensors at once in
    fp32 and 7.1 in bf16 (resident memory, DC-AE f32c32 of a quarter of the width at 512 px, on a CPU); 8 are reserved.
    """
    free = devices.free_memory_bytes(device)
    each = 8 * channels * resolution * resolution * (torch.finfo(dtype).bits // 8)
    while free is not None and group > 1 and group * each > free / 2:
        group = (group + 1) // 2
    return group


@torch.no_grad()
def encode_pixels(vae, pixels: torch.Tensor) -> torch.Tensor:
    """float32 (B, 3, H, W) in [-1, 1] to latents (B, C, H/f, W/f) * scaling_factor in the VAE's dtype, on the CPU."""
    parameter = next(vae.parameters())
    latents = vae.encode(pixels.to(parameter.device, parameter.dtype)).latent
    return (latents * vae.config.scaling_factor).to("cpu")


def encode_missing_images(
    plan, folder, model, dtype, vae_batch_size, transform, workers, device, team, should_stop, tell
) -> tuple[int, float]:
    """Encode this rank's share of the missing images; (how many, seconds)."""
    started = time.monotonic()
    resolution = transform["resolution"]
    size = group_size(vae_batch_size, resolution, device)
    images, first_sample, keys = plan.images, plan.first_sample, list(plan.latent_keys)
    missing = set(plan.latents.missing().tolist())
    groups = [list(range(k, min(k + size, len(keys)))) for k in range(0, len(keys), size)]
    share = [g for g in team.share(groups) if missing.intersection(g)]
    if not share:
        return 0, 0.0
    check_stop(team, should_stop)
    vae = open_vae(model, dtype, device)
    if resolution > WHOLE_ENCODE_SIDE:
        vae.enable_tiling(ENCODE_TILE, ENCODE_TILE, ENCODE_STRIDE, ENCODE_STRIDE)
    fit = images_that_fit(size, min(resolution, ENCODE_TILE), vae.config.encoder_block_out_channels[0], dtype, device)

    def pixels_of(group):
        """uint8 (B, resolution, resolution, 3)"""
        batch = []
        for row in group:
            i = first_sample[row]
            decision = plan_transform(images.size(i), index=images.position(i), **transform)
            batch.append(apply_transform(images.load(i), decision))
        return torch.from_numpy(np.stack(batch))

    done, total = 0, sum(len(missing.intersection(g)) for g in share)
    with ShardWriter(folder, "latents") as writer, progress_bar(total, "Encoding images") as bar:
        for group, pixels in zip(share, prefetch(pixels_of, share, workers, workers + 1), strict=True):
            check_stop(team, should_stop)
            pixels = to_unit_range(pixels.to(device))
            latents, position = [], 0
            while position < len(group):
                try:
                    latents.append(encode_pixels(vae, pixels[position : position + fit]))
                    position += fit
                    continue
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    if fit == 1:
                        raise RuntimeError(
                            f"The VAE cannot encode one image of {resolution} px in the memory of {device}; lower"
                            f" --resolution, use --vae_dtype=bf16 or free memory ({error})."
                        ) from None
                devices.empty_cache(device)  # outside the except block, so that the failed tensors are gone
                fit = max(1, fit // 2)
                tell(f"Encoding: out of memory, going on with {fit} image(s) at a time.")
            latents = torch.cat(latents)
            finite = torch.isfinite(latents.flatten(1)).all(dim=1).tolist()
            for row, tensor, good in zip(group, latents, finite, strict=True):
                if row not in missing:
                    continue
                if not good:
                    raise ValueError(
                        f"The VAE gave NaN or infinite latents for {images.name(first_sample[row])}; use"
                        " --vae_dtype=bf16 or fp32."
                    )
                writer.add(keys[row], tensor)
                done += 1
                bar.update()
            writer.flush_if_due()
    del vae
    devices.empty_cache(device)
    return done, time.monotonic() - started
