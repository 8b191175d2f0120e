"""What tests of models, generation and inference draw with: jobs, LoRA files, images and their distance."""

from __future__ import annotations

import hashlib
import json
from inspect import signature

import numpy as np
import torch
from PIL import Image

from sana_kit.generation.generate import generate, tokens_to_pixels
from sana_kit.generation.inputs import InputImage
from sana_kit.generation.jobs import group_jobs, plan_jobs
from sana_kit.generation.texts import encode_texts, split_texts
from sana_kit.models.adapter import LORA_FILE

CPU = torch.device("cpu")


def plan(prompts, seeds, height=64, width=96, steps=3, guidance=2.0, **kwargs):
    return plan_jobs(
        prompts, seeds, height=height, width=width, num_inference_steps=steps, guidance_scale=guidance, **kwargs
    )


def load_plain(model):
    """A model as diffusers itself loads it, float32."""
    from diffusers import DiffusionPipeline

    loaded = DiffusionPipeline.from_pretrained(model)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def encode_few(pipeline):
    """(prompt -> (T, D), negative prompt -> (T, D)) of a few prompts, without instruction."""
    texts = [("a red square", False), ("a small green dog", False), ("", True), ("blue", True)]
    return split_texts(encode_texts(pipeline.tokenizer, pipeline.text_encoder, texts, None, device=CPU))


def draw(pipeline, embeds, jobs, *, batch_size="auto", **kwargs):
    """The images of `jobs`, in float32 at exactly their size unless told otherwise."""
    pixels = tokens_to_pixels(pipeline.transformer, pipeline.vae)
    settings = {"device": CPU, "dtype": torch.float32, "use_resolution_binning": False, **kwargs}
    drawn = generate(
        group_jobs(jobs, batch_size, device=CPU, pixels_per_token=pixels),
        transformer=pipeline.transformer,
        vae=pipeline.vae,
        scheduler=pipeline.scheduler,
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        **settings,
    )
    return [image for _, image, _ in drawn]


def input_image(path, size=(96, 64), seed=0, mask=False):
    """Write a PNG of `size` (width, height): coloured noise in blocks, or a mask that is white in its right half."""
    blocks = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    pixels = blocks.repeat(8, axis=0).repeat(8, axis=1)
    if mask:
        pixels[:, : size[0] // 2], pixels[:, size[0] // 2 :] = 0, 255
    Image.fromarray(pixels).save(path)
    return InputImage(str(path), hashlib.sha256(path.read_bytes()).hexdigest(), *size)


def levels(a, b):
    """Largest difference of two images in 8-bit steps."""
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


def diffusers_keeps_alpha():
    """Whether diffusers writes and reads a LoRA's metadata; before 0.34 it took the rank for alpha."""
    from diffusers import SanaPipeline

    return "transformer_lora_adapter_metadata" in signature(SanaPipeline.save_lora_weights).parameters


def write_lora(model, folder, rank=4, alpha=8, seed=0, strength=0.3, **changes):
    """A LoRA file with metadata, as diffusers 0.34 and newer write it, with random weights; returns its path."""
    from diffusers import SanaPipeline, SanaTransformer2DModel
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    transformer = SanaTransformer2DModel.from_pretrained(model / "transformer")
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=["to_q", "to_k", "to_v"], init_lora_weights="gaussian"
    )
    transformer.add_adapter(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * strength
    settings = {**config.to_dict(), "target_modules": sorted(config.target_modules), **changes}
    keep = {key: value for key, value in settings.items() if isinstance(value, (int, float, str, list, dict, bool))}
    weights, path = get_peft_model_state_dict(transformer), folder / LORA_FILE
    if diffusers_keeps_alpha():
        SanaPipeline.save_lora_weights(folder, weights, transformer_lora_adapter_metadata=keep)
    else:
        SanaPipeline.save_lora_weights(folder, weights)
        metadata = json.dumps({f"transformer.{key}": value for key, value in keep.items()})
        save_file(load_file(path), path, metadata={"format": "pt", "lora_adapter_metadata": metadata})
    return path


def reference_image(pipeline, job, use_resolution_binning=False, **kwargs):
    """What a pipeline of diffusers itself makes of a job, alone and without instruction."""
    return pipeline(
        job.prompt,
        negative_prompt=job.negative_prompt,
        height=job.height,
        width=job.width,
        num_inference_steps=job.num_inference_steps,
        guidance_scale=job.guidance_scale,
        generator=torch.Generator().manual_seed(job.seed),
        use_resolution_binning=use_resolution_binning,
        complex_human_instruction=None,
        **kwargs,
    ).images[0]
