"""Class images for prior preservation."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch

from sana_kit import devices
from sana_kit.data.folders import free_class_names, image_files
from sana_kit.distributed import Ranks, StopSignal
from sana_kit.errors import EncodingStopped, Problem, UserError
from sana_kit.files import expand, write_atomic
from sana_kit.generation.generate import generate, tokens_to_pixels
from sana_kit.generation.jobs import Job, group_jobs
from sana_kit.generation.texts import encode_job_prompts
from sana_kit.models.folder import Model
from sana_kit.models.loading import load_pipeline
from sana_kit.progress import console_bar
from sana_kit.training.config import TrainConfig

logger = logging.getLogger("sana")


def generate_class_images(
    config: TrainConfig, base_model: Model, instruction: list[str] | None, ranks: Ranks, stop: StopSignal
) -> None:
    """Fill --class_data_dir up to --num_class_images with images of --class_prompt, each rank its share.

    Raises:
        UserError: this machine's folder does not hold them all afterwards.
        EncodingStopped: on all ranks, after a signal; what was drawn is kept, and a new start goes on from there.
    """
    folder = expand(config.class_data_dir)
    if ranks.is_local_main:
        folder.mkdir(parents=True, exist_ok=True)
    ranks.barrier()
    present = len(image_files(folder))
    missing = config.num_class_images - present
    # a deleted image's gap is filled, none is overwritten
    names = free_class_names(folder, max(0, missing))
    # every rank has counted before one adds
    if ranks.largest(missing) <= 0:
        return
    logger.info("prior preservation: %d images in %s, generating %d", present, folder, missing)
    _draw(config, base_model, instruction, names[ranks.rank :: ranks.world_size], folder, ranks, stop)
    if stop.agreed():
        raise EncodingStopped("stopped while class images were drawn")
    there = len(image_files(folder))
    if there < config.num_class_images:
        reason = f"holds {there} of {config.num_class_images} class images on this machine"
        remedy = "The machines of a run must share this folder, or each must have all class images beforehand."
        raise UserError(Problem("class_data_dir", folder, reason, remedy))


def _draw(
    config: TrainConfig,
    base_model: Model,
    instruction: list[str] | None,
    names: list[str],
    folder: Path,
    ranks: Ranks,
    stop: StopSignal,
) -> None:
    """Draw and save this rank's images; leaves early where a stop is asked for."""
    dtype = torch.float32 if config.mixed_precision == "no" else torch.bfloat16
    pipeline = load_pipeline(base_model, device=ranks.device, dtype=dtype, attention=config.attention)
    jobs = [
        Job(
            index=number,
            prompt=config.class_prompt,
            negative_prompt="",
            seed=config.seed + int(name.removeprefix("class-").removesuffix(".png")),
            height=config.side,
            width=config.side,
            num_inference_steps=config.validation_inference_steps,
            guidance_scale=config.validation_guidance_scale,
            file_name=name,
        )
        for number, name in enumerate(names)
    ]
    embeddings, negative_embeddings = encode_job_prompts(
        pipeline, jobs, instruction, device=ranks.device, max_sequence_length=config.max_sequence_length
    )
    pixels = tokens_to_pixels(pipeline.transformer, pipeline.vae)
    drawn = generate(
        group_jobs(jobs, config.sample_batch_size, device=ranks.device, pixels_per_token=pixels),
        transformer=pipeline.transformer,
        vae=pipeline.vae,
        scheduler=pipeline.scheduler,
        prompt_embeds=embeddings,
        negative_prompt_embeds=negative_embeddings,
        device=ranks.device,
        dtype=pipeline.transformer.dtype,
    )
    bar = console_bar(len(jobs), "class images", unit="image", main_process=ranks.is_main, leave=False)
    for job, image, _ in drawn:
        write_atomic(folder / job.file_name, partial(image.save, format="PNG"))
        bar.update(1)
        if stop.requested:
            break
    bar.close()
    del pipeline
    devices.empty_cache(ranks.device)
