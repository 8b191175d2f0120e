"""The encoding of missing images: groups fixed by the data set, halved when the device's memory runs out."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from sana_kit import devices
from sana_kit.data.image_set import default_workers, prefetch, progress_bar
from sana_kit.data.transform import ENCODE_STRIDE, ENCODE_TILE, WHOLE_ENCODE_SIDE, TransformPlan, to_unit_range
from sana_kit.encodings.encoders import Encoders
from sana_kit.encodings.peers import Peers
from sana_kit.encodings.plan import EncodingPlan, Needs
from sana_kit.encodings.store import ShardWriter
from sana_kit.errors import Problem, UserError


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
def encode_pixels(vae: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """float32 (B, 3, H, W) in [-1, 1] to latents (B, C, H/f, W/f) * scaling_factor in the VAE's dtype, on the CPU."""
    parameter = next(vae.parameters())
    latents = vae.encode(pixels.to(parameter.device, parameter.dtype)).latent
    return (latents * vae.config.scaling_factor).to("cpu")


def image_groups(needs: Needs, size: int) -> list[list[int]]:
    """Rows of latents in groups of one image size each; made from all rows, whatever is already there."""
    groups: list[list[int]] = []
    open_groups: dict[tuple, list[int]] = {}
    for row, sample in enumerate(needs.first_sample.tolist()):
        group = open_groups.get(key := output_size(needs.transform(sample)))
        if group is None or len(group) == size:
            groups.append(group := [])
            open_groups[key] = group
        group.append(row)
    return groups


def output_size(plan: TransformPlan) -> tuple[int, int]:
    """(width, height) of an image after its transform."""
    return plan.size


class _Encoder:
    """The VAE, and how many images fit into one pass: fewer after each time that memory ran out."""

    def __init__(
        self, vae: torch.nn.Module, plan: EncodingPlan, size: int, device: torch.device, tell: Callable[[str], None]
    ):
        settings = plan.settings
        self.device, self.tell, self.side = device, tell, settings.resolution
        self.vae = vae
        if self.side > WHOLE_ENCODE_SIDE:
            self.vae.enable_tiling(ENCODE_TILE, ENCODE_TILE, ENCODE_STRIDE, ENCODE_STRIDE)
        channels = self.vae.config.encoder_block_out_channels[0]
        self.fit = images_that_fit(size, min(self.side, ENCODE_TILE), channels, settings.vae_dtype, device)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) on the CPU of uint8 (B, H, W, 3)."""
        pixels = to_unit_range(pixels.to(self.device))
        latents, position = [], 0
        while position < len(pixels):
            try:
                latents.append(encode_pixels(self.vae, pixels[position : position + self.fit]))
                position += self.fit
                continue
            except RuntimeError as error:
                if not devices.is_out_of_memory(error):
                    raise
                if self.fit == 1:
                    raise self._too_large(error) from None
            devices.empty_cache(self.device)  # outside the except block, so that the failed tensors are gone
            self.fit = max(1, self.fit // 2)
            self.tell(f"Encoding: out of memory, going on with {self.fit} image(s) at a time.")
        return torch.cat(latents)

    def _too_large(self, error: RuntimeError) -> UserError:
        reason = f"the VAE cannot encode one image of this size in the memory of {self.device} ({error})"
        remedy = "Lower it, let the VAE compute in bf16, or free memory."
        return UserError(Problem("resolution", self.side, reason, remedy))


def encode_missing_images(
    plan: EncodingPlan, encoders: Encoders, device: torch.device, peers: Peers, tell: Callable[[str], None]
) -> tuple[int, float]:
    """Encode this rank's share of the missing images; (how many, seconds)."""
    started, settings, needs = time.monotonic(), plan.settings, plan.needs
    size = group_size(settings.vae_batch_size, settings.resolution, device)
    missing = set(plan.latents.missing().tolist())
    share = [group for group in peers.share(image_groups(needs, size)) if missing.intersection(group)]
    if not share:
        return 0, 0.0
    peers.check()
    with encoders.vae(device, settings.vae_dtype) as vae:
        done = _encode_groups(plan, share, missing, _Encoder(vae, plan, size, device, tell), peers)
    return done, time.monotonic() - started


def _encode_groups(
    plan: EncodingPlan, share: list[list[int]], missing: set[int], encode_batch: _Encoder, peers: Peers
) -> int:
    """Encode these groups of rows and write what was missing of them; how many that were."""
    settings, needs, images = plan.settings, plan.needs, plan.images

    def pixels_of(group: list[int]) -> torch.Tensor:
        """uint8 (B, H, W, 3)."""
        samples = needs.first_sample[group].tolist()
        return torch.from_numpy(np.stack([images.pixels(i, needs.transform(i)) for i in samples]))

    workers = default_workers() if settings.num_workers is None else settings.num_workers
    done, total = 0, sum(len(missing.intersection(group)) for group in share)
    with ShardWriter(plan.store / "latents", "latents") as writer, progress_bar(total, "Encoding images") as bar:
        for group, pixels in zip(share, prefetch(pixels_of, share, workers, workers + 1), strict=True):
            peers.check()
            latents = encode_batch(pixels)
            finite = torch.isfinite(latents.flatten(1)).all(dim=1).tolist()
            for row, tensor, good in zip(group, latents, finite, strict=True):
                if row not in missing:
                    continue
                if not good:
                    name = images.name(int(needs.first_sample[row]))
                    reason = f"the VAE gave NaN or infinite latents for {name}"
                    value = str(settings.vae_dtype).rsplit(".", 1)[-1]
                    raise UserError(Problem("vae_dtype", value, reason, "Use bf16 or fp32."))
                writer.add(needs.latent_keys[row], tensor)
                done += 1
                bar.update()
            writer.flush_if_due()
    return done
