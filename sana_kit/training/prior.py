"""Class images for prior preservation."""

from __future__ import annotations

import logging

import torch

from sana_kit import devices
from sana_kit.data.folders import free_class_names, image_files
from sana_kit.encodings.prompts import parse_instruction
from sana_kit.files import expand, write_atomic
from sana_kit.generation.generate import generate, tokens_to_pixels
from sana_kit.generation.jobs import Job, group_jobs
from sana_kit.generation.texts import encode_job_prompts
from sana_kit.models.loading import load_pipeline

logger = logging.getLogger("sana")


def generate_class_images(args, accelerator, base) -> None:
    """Fill --class_data_dir up to --num_class_images with images of --class_prompt, each rank its share."""

    folder = expand(args.class_data_dir)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    present = len(image_files(folder))
    missing = args.num_class_images - present
    names = free_class_names(folder, max(0, missing))  # a deleted image's gap is filled, none is overwritten
    accelerator.wait_for_everyone()  # every rank has counted before one adds
    if missing <= 0:
        return
    logger.info("prior preservation: %d images in %s, generating %d", present, folder, missing)
    pipeline = load_pipeline(
        base,
        device=accelerator.device,
        dtype=torch.float32 if args.mixed_precision == "no" else torch.bfloat16,
        attention=args.attention,
    )
    jobs = [
        Job(
            index=number,
            prompt=args.class_prompt,
            negative_prompt="",
            seed=(args.seed or 0) + int(name.removeprefix("class-").removesuffix(".png")),
            height=args.resolution,
            width=args.resolution,
            num_inference_steps=args.validation_inference_steps,
            guidance_scale=args.validation_guidance_scale,
            file_name=name,
        )
        for number, name in enumerate(names)
    ][accelerator.process_index :: accelerator.num_processes]
    instruction = parse_instruction(args.complex_human_instruction)
    embeddings, negative_embeddings = encode_job_prompts(
        pipeline, jobs, instruction, device=accelerator.device, max_sequence_length=args.max_sequence_length
    )
    pixels = tokens_to_pixels(pipeline.transformer, pipeline.vae)
    drawn = generate(
        group_jobs(jobs, args.sample_batch_size, device=accelerator.device, pixels_per_token=pixels),
        transformer=pipeline.transformer,
        vae=pipeline.vae,
        scheduler=pipeline.scheduler,
        prompt_embeds=embeddings,
        negative_prompt_embeds=negative_embeddings,
        device=accelerator.device,
        dtype=pipeline.transformer.dtype,
    )
    for job, image, _ in drawn:
        write_atomic(folder / job.file_name, lambda target, image=image: image.save(target, format="PNG"))
    del pipeline
    devices.empty_cache(accelerator.device)
    accelerator.wait_for_everyone()
    there = len(image_files(folder))
    if there < args.num_class_images:
        raise ValueError(
            f"--class_data_dir={folder}: holds {there} of {args.num_class_images} class images on this machine. The"
            " machines of a run must share this folder, or each must have all class images beforehand."
        )
