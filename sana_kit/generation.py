"""Pictures from prompts: jobs, denoising, tiled decoding.

Used by the three infer_sana_text2img_*.py scripts and, through `generate_from_embeddings`, by the trainer.

A seed belongs to a picture, never to a rank: each picture's noise comes from a CPU generator of its own, so a job
gives the same picture on every rank, with every number of processes. Jobs that share one call of the transformer
(a group) are fixed by the job list alone, because bf16 rounds differently with another batch size.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import inspect
import itertools
import json
import math
import re
import time
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from sana_kit import devices
from sana_kit.encodings import collate_prompt_embeds, encode_prompts, tokenize_prompts
from sana_kit.models import load_pipeline

__all__ = [
    "Job",
    "Prompt",
    "decode_latents",
    "encode_job_prompts",
    "generate_from_embeddings",
    "generate_groups",
    "generation_size",
    "group_jobs",
    "load_pipeline",
    "parse_instruction",
    "plan_jobs",
    "slug",
]

# A whole decode of 4096 x 4096 px peaks at 28 GB in bf16 and holds a tensor of more than 2**31 elements (calculated on
# meta tensors for the DC-AE f32c32 of SANA). Tiles up to these many pixels stay under 10 GB, by bytes per element.
MAX_TILE_PIXELS = {2: 2176 * 2176, 4: 2176 * 1536}
MAX_TILES = 32  # along an axis
TILE_OVERLAP = 256  # pixels in which two neighbours are blended: 8 latents, about as far as a tile's edge is felt
AUTO_BATCH_TOKENS = 8192  # image tokens per call (twice that with guidance) that keep a big matrix unit busy


# ---------------------------------------------------------------------------------------------------------------------
# Jobs


@dataclasses.dataclass(frozen=True)
class Job:
    """One picture. `height`, `width` in pixels; `index` is its place in the job list; `file_name` without folder."""

    prompt: str
    negative_prompt: str
    seed: int
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    index: int
    file_name: str


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One entry of a prompt list; what is None comes from the flags."""

    prompt: str
    negative_prompt: str | None = None
    seeds: tuple[int, ...] | None = None
    height: int | None = None
    width: int | None = None


def slug(text: str, length: int = 40) -> str:
    """A readable file name part: ASCII letters, digits and single hyphens, at most `length` of them, never empty."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    words = re.sub(r"[^a-z0-9]+", "-", ascii_text.lower()).strip("-")
    return words[:length].rstrip("-") or "picture"


def job_hash(**values) -> str:
    """Eight hexadecimal digits that stand for everything that makes a picture what it is."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def plan_jobs(
    prompts: Iterable[str | Prompt],
    seeds: Sequence[int],
    *,
    height: int,
    width: int,
    num_inference_steps: int,
    guidance_scale: float,
    negative_prompt: str | None = None,
    fingerprint: str = "",
) -> list[Job]:
    """Prompts x seeds as a list of jobs, prompt by prompt, each distinct one once.

    Args:
        negative_prompt: for every prompt; None keeps each prompt's own (the empty text where it has none).
        fingerprint: stands for model, LoRA and dtypes in the file names, so that runs of two models in one folder keep
            their pictures apart.

    File names are `slug-hash-seedN-WIDTHxHEIGHT.png`: made of ASCII letters, digits, hyphens and one dot, so they
    cannot leave the folder that they are put into.
    """
    jobs: dict[str, Job] = {}
    for entry in prompts:
        entry = Prompt(entry) if isinstance(entry, str) else entry
        negative = negative_prompt if negative_prompt is not None else (entry.negative_prompt or "")
        h, w = entry.height or height, entry.width or width
        for seed in entry.seeds if entry.seeds is not None else seeds:
            digest = job_hash(
                prompt=entry.prompt,
                negative=negative,
                steps=num_inference_steps,
                guidance=float(guidance_scale),
                fingerprint=fingerprint,
            )
            file_name = f"{slug(entry.prompt)}-{digest}-seed{seed}-{w}x{h}.png"
            jobs.setdefault(
                file_name,
                Job(
                    prompt=entry.prompt,
                    negative_prompt=negative,
                    seed=int(seed),
                    height=int(h),
                    width=int(w),
                    num_inference_steps=int(num_inference_steps),
                    guidance_scale=float(guidance_scale),
                    index=len(jobs),
                    file_name=file_name,
                ),
            )
    return list(jobs.values())


def resolve_batch_size(batch_size: int | str, height: int, width: int, *, device: torch.device, pixels_per_token: int):
    """The number of pictures per call for `--batch_size auto|N`.

    'auto' depends on the size and the kind of device alone, never on free memory or the number of processes: the
    number decides how bf16 rounds. It is 1 on CPU; on accelerators up to 8, by the number of image tokens.
    """
    if batch_size != "auto":
        return int(batch_size)
    if device.type == "cpu":
        return 1
    tokens = max(1, height * width // pixels_per_token)
    return max(1, min(8, AUTO_BATCH_TOKENS // tokens))


def group_jobs(
    jobs: Sequence[Job], batch_size: int | str, *, device: torch.device, pixels_per_token: int
) -> list[list[Job]]:
    """Jobs that share one call of the transformer: neighbours of equal size, steps and guidance, a batch at most.

    Fixed by the job list alone. Whole groups go to a rank, never parts of them.
    """

    def same(job: Job):
        return job.height, job.width, job.num_inference_steps, job.guidance_scale

    groups = []
    for (height, width, *_), run in itertools.groupby(jobs, key=same):
        run = list(run)
        size = resolve_batch_size(batch_size, height, width, device=device, pixels_per_token=pixels_per_token)
        groups += [run[start : start + size] for start in range(0, len(run), size)]
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# Size


def vae_factor(vae) -> int:
    """Pixels per latent along an axis (32 for SANA's DC-AE)."""
    return 2 ** (len(vae.config.encoder_block_out_channels) - 1)


def nearest_bin(height: int, width: int, sample_size: int) -> tuple[int, int] | None:
    """(height, width) of the trained size of nearest aspect ratio, in SanaPipeline's table for a `sample_size`.

    None where SanaPipeline has no table (it has them for 16, 32, 64 and 128).
    """
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN, ASPECT_RATIO_1024_BIN
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN
    from diffusers.pipelines.sana.pipeline_sana import ASPECT_RATIO_4096_BIN

    tables = {
        16: ASPECT_RATIO_512_BIN,
        32: ASPECT_RATIO_1024_BIN,
        64: ASPECT_RATIO_2048_BIN,
        128: ASPECT_RATIO_4096_BIN,
    }
    table = tables.get(sample_size)
    if table is None:
        return None
    nearest = min(table, key=lambda ratio: abs(float(ratio) - height / width))
    return int(table[nearest][0]), int(table[nearest][1])


def generation_size(height: int, width: int, sample_size: int, use_resolution_binning: bool | str = "auto"):
    """(height, width) in pixels at which the transformer works for a picture of the size asked for.

    SanaPipeline's resolution binning moves a size to the nearest aspect ratio that the checkpoint was trained on and
    resizes the picture afterwards. "auto" (or True) does so where that bin is within a factor of 2 of the pixels asked
    for; False never.
    """
    if not use_resolution_binning:
        return height, width
    trained = nearest_bin(height, width, sample_size)
    if trained is not None and 0.5 <= (trained[0] * trained[1]) / (height * width) <= 2.0:
        return trained
    return height, width


def resize_and_crop(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """images (N, C, h, w) float32, scaled to cover (height, width) and cut at the centre; exactly that size.

    As SanaPipeline does it, except that a rounded-down side never leaves the picture a pixel too small.
    """
    if images.shape[-2:] == (height, width):
        return images
    ratio = max(height / images.shape[2], width / images.shape[3])
    covered = max(height, int(images.shape[2] * ratio)), max(width, int(images.shape[3] * ratio))
    images = torch.nn.functional.interpolate(images, size=covered, mode="bilinear", align_corners=False)
    top, left = (covered[0] - height) // 2, (covered[1] - width) // 2
    return images[:, :, top : top + height, left : left + width]


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def axis_tiles(size: int, count: int, overlap: int) -> list[tuple[int, int]]:
    """`count` tiles of equal length, as (start, stop), that cover `size`, neighbours sharing at least `overlap`.

    Equal lengths, so a compiling backend sees one shape. All in latents.
    """
    if count == 1:
        return [(0, size)]
    length = min(size, math.ceil((size + (count - 1) * overlap) / count))
    starts = [round(index * (size - length) / (count - 1)) for index in range(count)]
    return [(start, start + length) for start in starts]


def plan_tiles(height: int, width: int, factor: int, max_pixels: int):
    """(rows, columns) of tiles, each a list of (start, stop) in latents, for a picture of height x width px.

    Of all grids whose tiles have at most `max_pixels`, the one that decodes the fewest pixels: a single tile where the
    whole picture fits.
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
            f"a picture of {width}x{height} px is too large to be decoded in {MAX_TILES}x{MAX_TILES} tiles."
        )
    return best[1], best[2]


def check_decodable(height: int, width: int, factor: int) -> None:
    """ValueError for a picture that no grid of tiles covers, in any dtype."""
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


def decode_tiles(decoder: Callable, latents: torch.Tensor, rows, columns, factor: int) -> torch.Tensor:
    """Decode latents (N, C, h, w) tile by tile, blended where neighbours overlap: (N, 3, h * factor, w * factor).

    `rows` and `columns` are lists of (start, stop) in latents. Two rows of decoded tiles are held beside the result.
    """
    result = None
    above = None  # the row of tiles above, blended
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


def decode_latents(vae, latents: torch.Tensor) -> torch.Tensor:
    """Latents (N, C, h, w) as the scheduler leaves them -> pictures (N, 3, H, W) float32 in [-1, 1], nearly.

    One picture at a time; whole where it fits, else in tiles (`plan_tiles`). Computes in the VAE's dtype.
    """
    factor = vae_factor(vae)
    scaled = latents.to(vae.dtype) / vae.config.scaling_factor
    height, width = latents.shape[2] * factor, latents.shape[3] * factor
    limit = MAX_TILE_PIXELS[2 if vae.dtype.itemsize <= 2 else 4]
    rows, columns = plan_tiles(height, width, factor, limit)
    pictures = []
    for picture in scaled.split(1):
        if len(rows) * len(columns) == 1:
            pictures.append(vae.decoder(picture).float())
        else:
            pictures.append(decode_tiles(vae.decoder, picture, rows, columns, factor).float())
    return torch.cat(pictures)


def to_pil(picture: torch.Tensor):
    """(3, H, W) float in [-1, 1] -> 8-bit RGB PIL.Image, rounded to nearest. FloatingPointError on NaN or inf."""
    from PIL import Image

    if not bool(torch.isfinite(picture).all()):
        raise FloatingPointError("the decoded picture holds NaN or infinite values; try --dtype bf16 or fp32")
    pixels = picture.float().mul(0.5).add(0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def job_texts(jobs: Iterable[Job]) -> list[tuple[str, bool]]:
    """The distinct (text, whether it is a negative prompt) that jobs need; negatives only where guidance uses them.

    A text that serves as both is two: only prompts get the complex human instruction.
    """
    texts: dict[tuple[str, bool], None] = {}
    for job in jobs:
        texts[job.prompt, False] = None
        if job.guidance_scale > 1.0:
            texts[job.negative_prompt, True] = None
    return list(texts)


def texts_cut(tokenizer, texts: Sequence[tuple[str, bool]], max_sequence_length: int) -> list[str]:
    """The texts that have more tokens than count; what a tokenizer cannot read is left to `encode_texts`."""
    cut = []
    for text, _ in texts:
        with contextlib.suppress(Exception):
            if len(tokenize_prompts(tokenizer, [text], None, 100_000)[0][0]) > max_sequence_length:
                cut.append(text)
    return cut


def encode_texts(
    tokenizer,
    text_encoder,
    texts: Sequence[tuple[str, bool]],
    instruction: list[str] | None,
    *,
    device: torch.device,
    max_sequence_length: int = 300,
    on_error: Callable | None = None,
) -> dict[tuple[str, bool], torch.Tensor]:
    """(text, negative) -> (T, D) on the CPU, T the valid tokens; each text once, and alone.

    Alone, because bf16 rounds differently in another batch: a picture must not depend on the other prompts of a run.
    A text that fails goes to on_error(text, negative, exception) and is left out; without on_error it is raised.
    """
    encoded = {}
    for text, negative in texts:
        lines = None if negative else instruction
        try:
            embeds = encode_prompts(tokenizer, text_encoder, [text], lines, max_sequence_length, device, batch=1)[0]
        except Exception as error:
            if on_error is None:
                raise
            on_error(text, negative, error)
            continue
        encoded[text, negative] = embeds
    return encoded


def encode_job_prompts(
    pipeline,
    jobs: Iterable[Job],
    instruction: list[str] | None,
    *,
    device: torch.device,
    max_sequence_length: int = 300,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(prompt_embeds, negative_prompt_embeds) for `generate_from_embeddings`; frees the pipeline's text encoder."""
    encoded = encode_texts(
        pipeline.tokenizer,
        pipeline.text_encoder,
        job_texts(jobs),
        instruction,
        device=device,
        max_sequence_length=max_sequence_length,
    )
    pipeline.text_encoder = pipeline.tokenizer = None
    devices.empty_cache(device)
    return split_texts(encoded)


def split_texts(encoded: dict[tuple[str, bool], torch.Tensor]):
    """(text, negative) -> embeds, as the two dictionaries (prompts, negative prompts) that generation takes."""
    prompts = {text: embeds for (text, negative), embeds in encoded.items() if not negative}
    negatives = {text: embeds for (text, negative), embeds in encoded.items() if negative}
    return prompts, negatives


# ---------------------------------------------------------------------------------------------------------------------
# Denoising


def initial_noise(job: Job, shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Generator]:
    """The picture's noise (1, C, h, w) float32 and its generator, which stochastic schedulers go on drawing from."""
    generator = torch.Generator("cpu").manual_seed(job.seed)
    return torch.randn((1, *shape), generator=generator, dtype=torch.float32), generator


@torch.no_grad()
def denoise(
    transformer,
    scheduler,
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
    latents = latents * scheduler.init_noise_sigma
    prompt_embeds = prompt_embeds.to(dtype)
    for t in scheduler.timesteps:
        model_input = torch.cat([latents] * 2) if guided else latents
        model_input = scheduler.scale_model_input(model_input, t)
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


@torch.no_grad()
def generate_group(
    group: Sequence[Job],
    *,
    transformer,
    vae,
    scheduler,
    prompt_embeds: dict[str, torch.Tensor],
    negative_prompt_embeds: dict[str, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
    use_resolution_binning: bool | str = "auto",
    on_step: Callable[[], None] | None = None,
) -> list:
    """The pictures of one group (equal size, steps, guidance) as PIL images, in the group's order."""
    first = group[0]
    factor = vae_factor(vae)
    height, width = generation_size(first.height, first.width, transformer.config.sample_size, use_resolution_binning)
    shape = (transformer.config.in_channels, height // factor, width // factor)
    noises, generators = zip(*(initial_noise(job, shape) for job in group), strict=True)
    latents = torch.cat(noises).to(device)
    embeds = [prompt_embeds[job.prompt] for job in group]
    if first.guidance_scale > 1.0:
        embeds = [negative_prompt_embeds[job.negative_prompt] for job in group] + embeds
    padded, mask = (tensor.to(device) for tensor in collate_prompt_embeds(embeds))
    latents = denoise(
        transformer,
        scheduler,
        latents,
        padded,
        mask,
        num_inference_steps=first.num_inference_steps,
        guidance_scale=first.guidance_scale,
        dtype=dtype,
        generators=list(generators),
        on_step=on_step,
    )
    pictures = []
    for latent, job in zip(latents.split(1), group, strict=True):
        decoded = resize_and_crop(decode_latents(vae, latent), job.height, job.width)
        pictures.append(to_pil(decoded[0]))
    return pictures


def generate_groups(
    groups: Sequence[Sequence[Job]],
    *,
    transformer,
    on_picture: Callable,
    on_error: Callable | None = None,
    **parts,
) -> None:
    """Run groups one after the other; `parts` go to `generate_group`.

    Args:
        on_picture: called as on_picture(job, image, seconds) for each picture of a group that is done; seconds is its
            share of the group's time.
        on_error: called as on_error(group, exception) when a group fails, which is then left out; without it the
            exception is raised.
    """
    training = transformer.training
    transformer.eval()
    try:
        for group in groups:
            start = time.perf_counter()
            try:
                images = generate_group(group, transformer=transformer, **parts)
            except Exception as error:
                if on_error is None:
                    raise
                on_error(group, error)
                continue
            seconds = (time.perf_counter() - start) / len(group)
            for job, image in zip(group, images, strict=True):
                on_picture(job, image, seconds)
    finally:
        transformer.train(training)


def generate_from_embeddings(
    *,
    transformer,
    vae,
    scheduler,
    jobs: Sequence[Job],
    prompt_embeds: dict[str, torch.Tensor],
    negative_prompt_embeds: dict[str, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    batch_size: int | str = "auto",
    use_resolution_binning: bool | str = "auto",
    on_picture: Callable | None = None,
    on_step: Callable[[], None] | None = None,
    on_error: Callable | None = None,
) -> list:
    """Pictures of `jobs` from prompt embeddings, without text encoder, with the parts that the caller holds.

    Reads no global random state and leaves none changed; a transformer in training mode is put to eval and back.

    Args:
        transformer: a SanaTransformer2DModel on `device`, bare (unwrapped), with or without an active adapter.
        vae: an AutoencoderDC on `device`; decodes in its own dtype.
        scheduler: the checkpoint's own, e.g. DPMSolverMultistepScheduler; it is copied, never changed.
        prompt_embeds: prompt -> (T, D), encoded with the complex human instruction that the run uses.
        negative_prompt_embeds: negative prompt -> (T, D), encoded without it; read only where guidance_scale > 1.
        dtype: what the transformer computes in.
        batch_size: pictures per call, or "auto" (`resolve_batch_size`).
        use_resolution_binning: "auto" as `generation_size` says, or False.
        on_picture: called as on_picture(job, image, seconds) as each picture is ready.
        on_step: called after each denoising step of a group.
        on_error: called as on_error(group, exception) when a group fails, which is then left out; without it the
            exception is raised.

    Returns:
        PIL images in the order of `jobs` (without those that failed) if `on_picture` is None, else an empty list.
    """
    multiple = vae_factor(vae) * (transformer.config.patch_size or 1)
    pictures: list = []
    generate_groups(
        group_jobs(jobs, batch_size, device=device, pixels_per_token=multiple**2),
        transformer=transformer,
        vae=vae,
        scheduler=scheduler,
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
        device=device,
        dtype=dtype,
        use_resolution_binning=use_resolution_binning,
        on_step=on_step,
        on_picture=on_picture or (lambda job, image, seconds: pictures.append(image)),
        on_error=on_error,
    )
    return pictures


# ---------------------------------------------------------------------------------------------------------------------
# Instruction


def parse_instruction(value: str | None) -> list[str] | None:
    """`--complex_human_instruction`: the lines that go before a prompt, or None.

    'default' is SanaPipeline's own; 'none' is no instruction; else a file (a JSON list, or text whose lines are taken
    one by one) or a JSON list of strings.

    Raises:
        ValueError: neither a file nor a JSON list of strings.
    """
    if value is None or value.strip().lower() in ("none", ""):
        return None
    if value.strip().lower() == "default":
        from diffusers import SanaPipeline

        return list(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)
    text, source = value, "the value"
    if not value.lstrip().startswith("["):
        path = Path(value)
        if not path.is_file():
            raise ValueError(
                f"--complex_human_instruction={value}: no such file. Give 'default' (SanaPipeline's own), 'none', a"
                ' file, or a JSON list such as \'["Describe the picture:", "User Prompt: "]\'.'
            )
        text, source = path.read_text(encoding="utf-8"), f"the file {value}"
        if not text.lstrip().startswith("["):
            return text.splitlines() or None
    try:
        lines = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--complex_human_instruction: {source} is not a JSON list: {error}.") from error
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"--complex_human_instruction: {source} must be a JSON list of strings.")
    return lines or None
