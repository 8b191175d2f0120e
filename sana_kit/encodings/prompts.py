"""Prompts to prompt embeddings, by the rule of SanaPipeline.encode_prompt (diffusers, pipeline_sana.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sana_kit.encodings.instruction import parse_instruction as parse_instruction
from sana_kit.encodings.keys import preprocess_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKEN_MULTIPLE = 32  # padded caption lengths while encoding: few shapes for the device's compilers


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], instruction: list[str] | None, max_sequence_length: int
) -> list[tuple[list[int], list[int]]]:
    """Per prompt: (token ids without padding, positions whose embeddings the transformer gets).

    SanaPipeline pads to the instruction's length + max_sequence_length - 2, keeps position 0 and the last
    max_sequence_length - 1 positions, and masks the padding; here the masked positions are left out from the start.
    """
    texts = [preprocess_prompt(p) for p in prompts]
    length = max_sequence_length
    if instruction:
        text = "\n".join(instruction)
        texts = [text + t for t in texts]
        length = len(tokenizer.encode(text)) + max_sequence_length - 2
    tokenizer.padding_side = "right"
    ids = tokenizer(texts, padding=False, max_length=length, truncation=True, add_special_tokens=True)["input_ids"]
    kept = [0] + list(range(length - max_sequence_length + 1, length))
    return [(list(row), [p for p in kept if p < len(row)]) for row in ids]


@torch.no_grad()
def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: torch.nn.Module,
    prompts: list[str],
    instruction: list[str] | None,
    max_sequence_length: int = 300,
    device: torch.device | None = None,
    batch: int = 16,
) -> list[torch.Tensor]:
    """Embeddings of the valid tokens of each prompt: list of (T, D) in the text encoder's dtype, on the CPU.

    Equal to SanaPipeline.encode_prompt's embeddings where its attention mask is 1: padding stands on the right and the
    encoder is causal, so it does not reach the valid tokens. Only the rounding of matrix products may differ with the
    shape of the batch (bf16). A negative prompt is encoded with instruction None, as the pipeline does.

    Args:
        instruction: complex human instruction put before each prompt; None or [] for none.
        batch: prompts per forward pass; they are grouped by length.
    """
    if not prompts:
        return []
    device = device or next(text_encoder.parameters()).device
    tokens = tokenize_prompts(tokenizer, prompts, instruction, max_sequence_length)
    order = sorted(range(len(prompts)), key=lambda i: (len(tokens[i][0]), i))
    results: list[torch.Tensor | None] = [None] * len(prompts)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        for i, embeds in zip(
            rows, _forward_text([tokens[i] for i in rows], tokenizer, text_encoder, device), strict=True
        ):
            results[i] = embeds
    return results


def _forward_text(
    tokens: list[tuple[list[int], list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: torch.nn.Module,
    device: torch.device | None,
) -> list[torch.Tensor]:
    """One forward pass over tokenised prompts."""
    longest = max(len(ids) for ids, _ in tokens)
    longest += -longest % TOKEN_MULTIPLE
    pad = tokenizer.pad_token_id or 0
    ids = torch.full((len(tokens), longest), pad, dtype=torch.long)
    mask = torch.zeros((len(tokens), longest), dtype=torch.long)
    for row, (line, _) in enumerate(tokens):
        ids[row, : len(line)] = torch.tensor(line, dtype=torch.long)
        mask[row, : len(line)] = 1
    hidden = text_encoder(ids.to(device), attention_mask=mask.to(device), use_cache=False)[0]  # (B, L, D)
    return [
        hidden[row, torch.tensor(kept, device=device, dtype=torch.long)].to("cpu").contiguous()
        for row, (_, kept) in enumerate(tokens)
    ]


def collate_prompt_embeds(embeds: list[torch.Tensor], multiple: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad (T_i, D) to the longest, rounded up to `multiple`: (B, T, D) with zeros behind, and a mask bool (B, T)."""
    longest = max(e.shape[0] for e in embeds)
    longest += -longest % multiple
    out = embeds[0].new_zeros((len(embeds), longest, embeds[0].shape[1]))
    mask = torch.zeros((len(embeds), longest), dtype=torch.bool)
    for row, e in enumerate(embeds):
        out[row, : e.shape[0]] = e
        mask[row, : e.shape[0]] = True
    return out, mask
