"""Prompt embeddings: SanaPipeline's, padded to the longest."""

import inspect

import pytest
import torch

from sana_kit.encodings.prompts import collate_prompt_embeds, encode_prompts

# Matrix products of other shapes than in the pipeline's batch of 300 tokens may round otherwise; bf16 keeps 8 bits.
TEXT_TOLERANCE = 1e-2
INSTRUCTION = ["Given a prompt, describe it.", "User Prompt: "]
CAPTIONS = ["a red dog", "  A Photo of a CAT 😀 ", "", "שלום עולם", "a " * 2000, "drawing of a small square " * 20]


@pytest.mark.parametrize("instruction", [None, INSTRUCTION, "default", ["x"]], ids=["none", "own", "default", "short"])
@pytest.mark.parametrize("length", [300, 16, 2])
def test_prompts_are_encoded_as_by_the_pipeline(pipeline, instruction, length):
    if instruction == "default":
        instruction = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
    reference, mask, _, _ = pipeline.encode_prompt(
        CAPTIONS,
        do_classifier_free_guidance=False,
        max_sequence_length=length,
        complex_human_instruction=instruction,
    )
    for batch in (16, 1):
        ours = encode_prompts(pipeline.tokenizer, pipeline.text_encoder, CAPTIONS, instruction, length, batch=batch)
        for row, embeds in enumerate(ours):
            expected = reference[row][mask[row].bool()]
            assert embeds.shape == expected.shape and embeds.dtype == torch.bfloat16
            assert (embeds.float() - expected.float()).norm() <= TEXT_TOLERANCE * expected.float().norm()
        assert batch != 16 or len({e.shape[0] for e in ours}) > 1 or length == 2


def test_negative_prompt_is_encoded_as_by_the_pipeline(pipeline):
    _, _, reference, mask = pipeline.encode_prompt(
        "x", True, negative_prompt="Ugly, blurry", complex_human_instruction=INSTRUCTION
    )
    (ours,) = encode_prompts(pipeline.tokenizer, pipeline.text_encoder, ["Ugly, blurry"], None)
    expected = reference[0][mask[0].bool()]
    assert (
        ours.shape == expected.shape
        and (ours.float() - expected.float()).norm() <= TEXT_TOLERANCE * expected.float().norm()
    )


def test_collate_pads_to_the_longest_rounded_up():
    rows = [torch.randn(t, 3, dtype=torch.bfloat16) for t in (1, 17, 5)]
    embeds, mask = collate_prompt_embeds(rows)
    assert embeds.shape == (3, 32, 3) and embeds.dtype == torch.bfloat16 and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [1, 17, 5] and embeds[~mask].abs().sum() == 0
    assert all(torch.equal(embeds[k][mask[k]], row) for k, row in enumerate(rows))
    assert collate_prompt_embeds(rows, multiple=1)[0].shape == (3, 17, 3)
