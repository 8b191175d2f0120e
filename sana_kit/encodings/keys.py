"""What an encoding depends on: the SHA-256 keys under which latents and prompt embeddings are stored."""

from __future__ import annotations

import hashlib
import json

from sana_kit.data.image_set import ImageSet
from sana_kit.data.transform import plan_transform

FORMAT_VERSION = 1  # raise it when the value stored under a key changes its meaning


def _key(**parts) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def latents_key(images: ImageSet, i: int, *, vae: str, vae_dtype: str, **transform) -> str:
    """Hex SHA-256 of all that the latents of sample i depend on; `vae` is its `component_identity`."""
    plan = plan_transform(images.size(i), index=images.position(i), **transform)
    return _key(
        format=FORMAT_VERSION,
        kind="latents",
        source=images.source_hash(i),
        scaled=plan.scaled,
        crop=plan.crop,
        flip=plan.flip,
        resolution=plan.resolution,
        vae=vae,
        dtype=vae_dtype,
    )


def prompt_key(
    prompt: str,
    instruction: list[str] | None,
    *,
    max_sequence_length: int,
    tokenizer: str,
    text_encoder: str,
    dtype: str,
) -> str:
    """Hex SHA-256 of all that a prompt's embeddings depend on."""
    return _key(
        format=FORMAT_VERSION,
        kind="prompt",
        text=preprocess_prompt(prompt),
        instruction=instruction or None,
        max_sequence_length=max_sequence_length,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        dtype=dtype,
    )


def preprocess_prompt(prompt: str) -> str:
    """What SanaPipeline does to a prompt with clean_caption=False: lower case, outer spaces off."""
    return prompt.lower().strip()


class PromptKeys:
    """Makes the key of (prompt, instruction); an object, so that the data set stays picklable."""

    def __init__(self, **parts):
        self.parts = parts

    def __call__(self, prompt, instruction):
        return prompt_key(prompt, instruction, **self.parts)
