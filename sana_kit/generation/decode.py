"""Latents to images: whole where it fits, else in blended tiles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from PIL import Image

from sana_kit.generation.sizes import vae_factor

# A whole decode of 4096 x 4096 px peaks at 28 GB in bf16 and holds a tensor of more than 2**31 elements (calculated on
# meta tensors for the DC-AE f32c32 of SANA). Tiles up to these many pixels stay under 10 GB, by bytes per element.
MAX_TILE_PIXELS = {2: 2176 * 2176, 4: 2176 * 1536}

MAX_TILES = 32  # along an axis

TILE_OVERLAP = 256  # pixels in which two neighbours are blended: 8 latents, about as far as a tile's edge is felt


def axis_tiles(size: int, count: int, overlap: int) -> list[tuple[int, int]]:
    """`count` tiles of equal length, as (start, stop), that cover `size`, neighbours sharing at least `overlap`.

    Equal lengths, so a compiling backend sees one shape. All in latents.
    """
    if count == 1:
        return [(0, size)]
    length = min(size, math.ceil((size + (count - 1) * overlap) / count))
    starts = [round(index * (size - length) / (count - 1)) for index in range(count)]
    return [(start, start + length) for start in starts]


def plan_tiles(
    height: int, width: int, factor: int, max_pixels: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(rows, columns) of tiles, each a list of (start, stop) in latents, for an image of height x width px.

    Of all grids whose tiles have at most `max_pixels`, the one that decodes the fewest pixels: a single tile where the
    whole image fits.
    """
    shared = max(1, TILE_OVERLAP // factor)
    h, w = height // factor, width // factor
    best = None
    for count_h, count_w in itertools.product(range(1, MAX_TILES + 1), repeat=2):
        if count_h > h or count_w > w:
            continue
        rows, columns = axis_tiles(h, count_h, shared), axis_tiles(w, count_w, shared)
        area = (rows[0][1] - rows[0][0]) * (columns[0][1] - columns[0][0])
        if area * factor**2 > max_pixels:
            continue
        cost = (area * count_h * count_w, count_h * count_w)
        if best is None or cost < best[0]:
            best = cost, rows, columns
    if best is None:
        raise ValueError(
            f"an image of {width}x{height} px is too large to be decoded in {MAX_TILES}x{MAX_TILES} tiles."
        )
    return best[1], best[2]


def check_decodable(height: int, width: int, factor: int) -> None:
    """ValueError for an image that no grid of tiles covers, in any dtype."""
    plan_tiles(height, width, factor, min(MAX_TILE_PIXELS.values()))


def blend(before: torch.Tensor, after: torch.Tensor, extent: int, dim: int) -> torch.Tensor:
    """Fade from the last `extent` slices of `before` to the first of `after` along `dim`; returns those slices.

    The weights are y / extent, rounded once to the tensors' dtype as a Python scalar is: bit-equal to diffusers' loop
    over rows, in one kernel each instead of `extent`.
    """
    shape = [1] * after.ndim
    shape[dim] = extent
    weights = [index / extent for index in range(extent)]
    # diffusers multiplies by Python scalars, which CPU and GPU kernels take in float32 for bf16 tensors
    rising = torch.tensor(weights, dtype=torch.float32, device=after.device).view(shape)
    falling = torch.tensor([1 - weight for weight in weights], dtype=torch.float32, device=after.device).view(shape)
    tail = before.narrow(dim, before.shape[dim] - extent, extent)
    head = after.narrow(dim, 0, extent)
    return (tail * falling).to(after.dtype) + (head * rising).to(after.dtype)


def decode_tiles(
    decoder: Callable,
    latents: torch.Tensor,
    rows: Sequence[tuple[int, int]],
    columns: Sequence[tuple[int, int]],
    factor: int,
) -> torch.Tensor:
    """Decode latents (N, C, h, w) tile by tile, blended where neighbours overlap: (N, 3, h * factor, w * factor).

    `rows` and `columns` are lists of (start, stop) in latents. Two rows of decoded tiles are held beside the result.
    """
    result = None
    above: list[torch.Tensor] = []  # the row of tiles above, blended
    for i, (top, bottom) in enumerate(rows):
        row = []
        for j, (left, right) in enumerate(columns):
            tile = decoder(latents[:, :, top:bottom, left:right])
            if result is None:
                size = (tile.shape[0], tile.shape[1], latents.shape[2] * factor, latents.shape[3] * factor)
                result = tile.new_empty(size)
            if i > 0:
                extent = (rows[i - 1][1] - top) * factor
                tile[:, :, :extent] = blend(above[j], tile, extent, dim=2)
            if j > 0:
                extent = (columns[j - 1][1] - left) * factor
                tile[:, :, :, :extent] = blend(row[j - 1], tile, extent, dim=3)
            result[:, :, top * factor : bottom * factor, left * factor : right * factor] = tile
            row.append(tile)
        above = row
    return result


def decode_latents(vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Latents (N, C, h, w) as the scheduler leaves them -> images (N, 3, H, W) float32 in [-1, 1], nearly.

    One image at a time; whole where it fits, else in tiles (`plan_tiles`). Computes in the VAE's dtype.
    """
    factor = vae_factor(vae)
    scaled = latents.to(vae.dtype) / vae.config.scaling_factor
    height, width = latents.shape[2] * factor, latents.shape[3] * factor
    limit = MAX_TILE_PIXELS[2 if vae.dtype.itemsize <= 2 else 4]
    rows, columns = plan_tiles(height, width, factor, limit)
    images = []
    for image in scaled.split(1):
        if len(rows) * len(columns) == 1:
            images.append(vae.decoder(image).float())
        else:
            images.append(decode_tiles(vae.decoder, image, rows, columns, factor).float())
    return torch.cat(images)


def to_pil(image: torch.Tensor) -> Image.Image:
    """(3, H, W) float in [-1, 1] -> 8-bit RGB PIL.Image, rounded to nearest. FloatingPointError on NaN or inf."""
    if not bool(torch.isfinite(image).all()):
        raise FloatingPointError("the decoded image holds NaN or infinite values; decode in bf16 or fp32")
    pixels = image.float().mul(0.5).add(0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())
