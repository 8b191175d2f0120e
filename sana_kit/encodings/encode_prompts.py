"""The encoding of missing prompts, in groups that depend on the data set alone."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from sana_kit import devices
from sana_kit.data.image_set import progress_bar
from sana_kit.encodings.encoders import Encoders
from sana_kit.encodings.peers import Peers
from sana_kit.encodings.plan import EncodingPlan, ExtraPrompts
from sana_kit.encodings.prompts import encode_prompts
from sana_kit.encodings.settings import DTYPE_NAMES
from sana_kit.encodings.store import ShardWriter
from sana_kit.errors import Problem, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_groups(prompts: ExtraPrompts, batch: int) -> list[list[int]]:
    """Rows of prompts in groups of alike length and one instruction; made from all, whatever is already there."""

    def by_length(row: int) -> tuple:
        prompt, instruction = prompts[row]
        return "\n".join(instruction or []), len(prompt), prompt

    groups: list[list[int]] = []
    for row in sorted(range(len(prompts)), key=by_length):
        if not groups or len(groups[-1]) == batch or prompts[groups[-1][0]][1] != prompts[row][1]:
            groups.append([])
        groups[-1].append(row)
    return groups


def encode_missing_prompts(
    plan: EncodingPlan, encoders: Encoders, device: torch.device, peers: Peers
) -> tuple[int, float]:
    """Encode this rank's share of the missing prompts; (how many, seconds)."""
    started, settings, needs = time.monotonic(), plan.settings, plan.needs
    missing = set(plan.texts.missing().tolist())
    groups = prompt_groups(needs.prompts, settings.text_batch_size)
    share = [group for group in peers.share(groups) if missing.intersection(group)]
    if not share:
        return 0, 0.0
    peers.check()
    done, total = 0, sum(len(missing.intersection(group)) for group in share)
    with (
        encoders.text(device, settings.text_encoder_dtype) as (tokenizer, text_encoder),
        ShardWriter(plan.store / "prompts", "prompts") as writer,
        progress_bar(total, "Encoding captions", "caption") as bar,
    ):
        for group in share:
            peers.check()
            texts, instruction = [needs.prompts[row][0] for row in group], needs.prompts[group[0]][1]
            embeds = _encode_group(tokenizer, text_encoder, texts, instruction, settings.max_sequence_length, device)
            for row, text, tensor in zip(group, texts, embeds, strict=True):
                if row not in missing:
                    continue
                _check_finite(tensor, text, settings.text_encoder_dtype)
                writer.add(needs.prompt_keys[row], tensor)
                done += 1
                bar.update()
            writer.flush_if_due()
    return done, time.monotonic() - started


def _check_finite(tensor: torch.Tensor, text: str, dtype: torch.dtype) -> None:
    """Raise UserError for embeddings that hold NaN or infinite values."""
    if torch.isfinite(tensor).all():
        return
    # The text encoder's dtype follows from --mixed_precision; in bf16 and fp32 only broken weights give such values.
    raise UserError(
        Problem(
            "pretrained_model_name_or_path",
            None,
            f"the text encoder gave NaN or infinite values in {DTYPE_NAMES[dtype]} for the caption {text[:80]!r}",
            "Check that the folder's text_encoder/ is whole, or fetch it again.",
        )
    )


def _encode_group(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: torch.nn.Module,
    prompts: list[str],
    instruction: list[str] | None,
    length: int,
    device: torch.device,
) -> list[torch.Tensor]:
    """One group of prompts, in halves when the device's memory does not suffice."""
    try:
        return encode_prompts(tokenizer, text_encoder, prompts, instruction, length, device, batch=len(prompts))
    except RuntimeError as error:
        if not devices.is_out_of_memory(error) or len(prompts) == 1:
            raise
    devices.empty_cache(device)  # outside the except block, so that the failed tensors are gone
    half = len(prompts) // 2
    parts = (prompts[:half], prompts[half:])
    return [e for part in parts for e in _encode_group(tokenizer, text_encoder, part, instruction, length, device)]
