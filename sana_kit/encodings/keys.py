"""What an encoding depends on: the SHA-256 keys under which latents and prompt embeddings are stored.

A key is the SHA-256 of a line of JSON with sorted names. Millions of them are made at a start, so the line is put
together by hand; tests hold it against `json.dumps`. Arrays of keys are (N, 32) uint8; shards name them in hex.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

import numpy as np

from sana_kit.data.transform import TransformPlan

FORMAT_VERSION = 1  # raise it when the value stored under a key changes its meaning
KEY_BYTES = 32


def latents_keys(plans: Iterable[TransformPlan], sources: np.ndarray, *, vae: str, vae_dtype: str) -> np.ndarray:
    """Keys of the latents of images that are transformed like `plans`.

    Args:
        plans: one per image.
        sources: (N, 32) uint8, the SHA-256 of each image's encoded bytes.
        vae: the VAE's `component_identity`.
        vae_dtype: such as "bf16".

    Returns: (N, 32) uint8.
    """
    keys = bytearray()
    dtype, vae, sha256 = json.dumps(vae_dtype), json.dumps(vae), hashlib.sha256
    for plan, source in zip(plans, sources, strict=True):
        (left, top), (width, height) = plan.crop, plan.scaled
        # squares are named as they always were
        side = plan.size[0] if plan.size[0] == plan.size[1] else list(plan.size)
        line = (
            f'{{"crop": [{left}, {top}], "dtype": {dtype}, "flip": {"true" if plan.flip else "false"},'
            f' "format": {FORMAT_VERSION}, "kind": "latents", "resolution": {side},'
            f' "scaled": [{width}, {height}], "source": "{source.tobytes().hex()}", "vae": {vae}}}'
        )
        keys += sha256(line.encode()).digest()
    return np.frombuffer(bytes(keys), np.uint8).reshape(-1, KEY_BYTES)


def preprocess_prompt(prompt: str) -> str:
    """What SanaPipeline does to a prompt with clean_caption=False: lower case, outer spaces off."""
    return prompt.lower().strip()


class PromptKeys:
    """Makes the key of (prompt, instruction) for one text encoder; an object, so that the data set stays picklable.

    Args:
        tokenizer, text_encoder: their `component_identity`.
        dtype: of the text encoder, such as "bf16".
    """

    def __init__(self, *, max_sequence_length: int, tokenizer: str, text_encoder: str, dtype: str):
        self.parts = {
            "max_sequence_length": max_sequence_length,
            "tokenizer": tokenizer,
            "text_encoder": text_encoder,
            "dtype": dtype,
        }

    def __call__(self, prompt: str, instruction: Sequence[str] | None) -> bytes:
        """32 bytes: the SHA-256 of all that the prompt's embeddings depend on."""
        parts = {
            **self.parts,
            "format": FORMAT_VERSION,
            "kind": "prompt",
            "text": preprocess_prompt(prompt),
            "instruction": list(instruction) if instruction else None,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).digest()

    def many(self, prompts: Iterable[str], instruction: Sequence[str] | None) -> np.ndarray:
        """Keys of prompts with one instruction, as `__call__` makes them: (N, 32) uint8."""
        head, tail = json.dumps(
            {
                **self.parts,
                "format": FORMAT_VERSION,
                "kind": "prompt",
                "text": "\0",
                "instruction": list(instruction) if instruction else None,
            },
            sort_keys=True,
            ensure_ascii=True,
        ).rsplit(json.dumps("\0"), 1)
        start, end, encode, keys = hashlib.sha256(head.encode()), tail.encode(), json.dumps, bytearray()
        for prompt in prompts:
            digest = start.copy()
            digest.update(encode(preprocess_prompt(prompt)).encode() + end)
            keys += digest.digest()
        return np.frombuffer(bytes(keys), np.uint8).reshape(-1, KEY_BYTES)


def sortable(keys: np.ndarray) -> np.ndarray:
    """(N, 32) uint8 as (N,) byte strings, which numpy sorts and searches."""
    return np.ascontiguousarray(keys).view(f"S{KEY_BYTES}").ravel()


def distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(first, rows): where each distinct key occurs first, in that order, and which of them each key is.

    Args:
        keys: (N, 32) uint8.

    Returns: (R,) and (N,) int32.
    """
    _, first, inverse = np.unique(sortable(keys), return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return first[order].astype(np.int32), rank[inverse.ravel()]
