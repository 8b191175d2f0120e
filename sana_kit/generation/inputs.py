"""What an image is drawn from and along beside its prompt: an image to begin from, a mask, an image that guides."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps

from sana_kit.data.decode import decode_image
from sana_kit.data.transform import ENCODE_STRIDE, ENCODE_TILE, WHOLE_ENCODE_SIDE, to_unit_range


@dataclasses.dataclass(frozen=True)
class InputImage:
    """An image file as it was when the jobs were planned; `width` and `height` are upright pixels."""

    path: str
    sha256: str
    width: int
    height: int

    def read(self) -> Image.Image:
        """The upright RGB image.

        Raises:
            ValueError: the file has changed since; ImageError: it cannot be decoded.
        """
        data = Path(self.path).read_bytes()
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise ValueError(f"{self.path} has changed since the run began; start it again")
        return decode_image(data, self.path)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Of one job.

    Attributes:
        init_image: the image to begin from; None: noise alone.
        strength: share of the steps that are done, above 0 to 1; the others are replaced by the init image.
        mask_image: white where the init image is drawn anew, black where it is kept.
        control_image: what the ControlNet sees, control_scale how much its residuals count.
        pag_scale: of perturbed attention guidance; 0: none.
    """

    init_image: InputImage | None = None
    strength: float = 1.0
    mask_image: InputImage | None = None
    control_image: InputImage | None = None
    control_scale: float = 1.0
    pag_scale: float = 0.0

    @property
    def kind(self) -> tuple:
        """What jobs that share a call of the transformer have in common."""
        images = (self.init_image, self.mask_image, self.control_image)
        return (*(image is not None for image in images), self.strength, self.control_scale, self.pag_scale)

    def identity(self) -> dict[str, object]:
        """By name, what makes an image another one than its prompt alone does; images by their bytes."""
        changed = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: value.sha256 if isinstance(value, InputImage) else value
            for name, value in changed.items()
            if value != getattr(NO_INPUTS, name)
        }

    def told(self) -> dict[str, object]:
        """The same for people: images by their paths."""
        return {
            name: getattr(self, name).path if isinstance(getattr(self, name), InputImage) else value
            for name, value in self.identity().items()
        }


NO_INPUTS = Inputs()


@dataclasses.dataclass(frozen=True)
class Source:
    """What a group of images begins from.

    Attributes:
        latents: (N, C, h, w) float32 on the device, scaled as the transformer's are.
        first_step: the step that is done first; those before it are left out.
        mask: (N, 1, h, w) float32, 1 where it is drawn anew, 0 where the latents are kept; None: drawn everywhere.
    """

    latents: torch.Tensor
    first_step: int
    mask: torch.Tensor | None = None


def first_step(num_inference_steps: int, strength: float) -> int:
    """The step at which an image of that strength begins, as diffusers' image-to-image pipelines count."""
    done = min(num_inference_steps * strength, num_inference_steps)
    return int(max(num_inference_steps - done, 0))


def fit_image(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scaled to cover (height, width) and cut at the centre."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def fit_mask(mask: Image.Image, height: int, width: int) -> torch.Tensor:
    """bool (height, width) of an RGB mask, fitted as the image is: True where it is more white than black."""
    fitted = ImageOps.fit(mask.convert("L"), (width, height), Image.Resampling.NEAREST)
    return torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).view(height, width) >= 128


def image_pixels(image: Image.Image) -> torch.Tensor:
    """An RGB image as float32 (3, H, W) in [-1, 1]."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return to_unit_range(pixels.view(image.height, image.width, 3))


@torch.no_grad()
def encode_image(vae: torch.nn.Module, image: Image.Image, height: int, width: int) -> torch.Tensor:
    """Latents (1, C, height / factor, width / factor) of an image fitted to that size, scaled, float32, on the device.

    Computed in the VAE's dtype; in tiles above the side from which kernels cannot index a whole stage.
    """
    parameter = next(vae.parameters())
    pixels = image_pixels(fit_image(image, height, width))[None].to(parameter.device, parameter.dtype)
    tiled = vae.use_tiling
    if max(height, width) > WHOLE_ENCODE_SIDE:
        vae.enable_tiling(ENCODE_TILE, ENCODE_TILE, ENCODE_STRIDE, ENCODE_STRIDE)
    try:
        latents = vae.encode(pixels).latent
    finally:
        vae.use_tiling = tiled
    return latents.float() * vae.config.scaling_factor


def encode_each(vae: torch.nn.Module, images: Sequence[InputImage | None], size: tuple[int, int]) -> torch.Tensor:
    """(N, C, h, w): `encode_image` of each, those that are the same once."""
    distinct = {image.sha256: image for image in images if image is not None}
    latents = {key: encode_image(vae, image.read(), *size) for key, image in distinct.items()}
    return torch.cat([latents[image.sha256] for image in images if image is not None])


def latent_mask(mask: torch.Tensor, factor: int) -> torch.Tensor:
    """bool (H, W) -> float32 (1, H / factor, W / factor): 1 where any pixel of a latent is drawn anew."""
    return torch.nn.functional.max_pool2d(mask[None, None].float(), factor)[0]


def load_source(
    inputs: Sequence[Inputs], vae: torch.nn.Module, size: tuple[int, int], num_inference_steps: int, factor: int
) -> Source | None:
    """What a group of one kind begins from, None for noise alone; each image is encoded alone.

    Args:
        size: (height, width) in pixels at which the transformer works.
        factor: pixels per latent.
    """
    if inputs[0].init_image is None:
        return None
    latents = encode_each(vae, [entry.init_image for entry in inputs], size)
    mask = None
    if inputs[0].mask_image is not None:
        masks = [latent_mask(fit_mask(entry.mask_image.read(), *size), factor) for entry in inputs]
        mask = torch.stack(masks).to(latents[0].device)
    return Source(latents, first_step(num_inference_steps, inputs[0].strength), mask)


def keep_outside(drawn: Image.Image, inputs: Inputs) -> Image.Image:
    """The drawn image where the mask is white; elsewhere the init image's own pixels, which no VAE has seen."""
    if inputs.init_image is None or inputs.mask_image is None:
        return drawn
    kept = fit_image(inputs.init_image.read(), drawn.height, drawn.width)
    anew = fit_mask(inputs.mask_image.read(), drawn.height, drawn.width)
    return Image.composite(drawn, kept, Image.fromarray(anew.to(torch.uint8).mul(255).numpy()))
