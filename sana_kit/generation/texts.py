"""The texts of jobs, each encoded once and alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from sana_kit import devices
from sana_kit.encodings.prompts import encode_prompts, tokenize_prompts
from sana_kit.generation.jobs import Job


def job_texts(jobs: Iterable[Job]) -> list[tuple[str, bool]]:
    """The distinct (text, whether it is a negative prompt) that jobs need; negatives only where guidance uses them.

    A text that serves as both is two: only prompts get the complex human instruction.
    """
    texts: dict[tuple[str, bool], None] = {}
    for job in jobs:
        texts[job.prompt, False] = None
        if job.guided and job.negative_prompt is not None:
            texts[job.negative_prompt, True] = None
    return list(texts)


def texts_cut(tokenizer: Any, texts: Sequence[tuple[str, bool]], max_sequence_length: int) -> list[str]:
    """The texts that have more tokens than count; what a tokenizer cannot read is left to `encode_texts`."""
    cut = []
    for text, _ in texts:
        with contextlib.suppress(Exception):
            if len(tokenize_prompts(tokenizer, [text], None, 100_000)[0][0]) > max_sequence_length:
                cut.append(text)
    return cut


def encode_texts(
    tokenizer: Any,
    text_encoder: torch.nn.Module,
    texts: Sequence[tuple[str, bool]],
    instruction: list[str] | None,
    *,
    device: torch.device,
    max_sequence_length: int = 300,
    on_error: Callable | None = None,
) -> dict[tuple[str, bool], torch.Tensor]:
    """(text, negative) -> (T, D) on the CPU, T the valid tokens; each text once, and alone.

    Alone, because bf16 rounds differently in another batch: an image must not depend on the other prompts of a run.
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
    pipeline: Any,
    jobs: Iterable[Job],
    instruction: list[str] | None,
    *,
    device: torch.device,
    max_sequence_length: int = 300,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(prompt_embeds, negative_prompt_embeds) for `generate`; frees the pipeline's text encoder."""
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


def split_texts(
    encoded: dict[tuple[str, bool], torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(text, negative) -> embeds, as the two dictionaries (prompts, negative prompts) that generation takes."""
    prompts = {text: embeds for (text, negative), embeds in encoded.items() if not negative}
    negatives = {text: embeds for (text, negative), embeds in encoded.items() if negative}
    return prompts, negatives
