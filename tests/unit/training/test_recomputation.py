"""The choice of recomputed blocks by bytes, and its closed form against counted steps."""

import math

import pytest
import torch
from diffusers import SanaTransformer2DModel

from sana_kit.errors import UserError
from sana_kit.models.folder import find_model
from sana_kit.models.lora import recompute_blocks
from sana_kit.roofline import KeptBytes
from sana_kit.step_table import count_step, prepare
from sana_kit.training.budget import budget_problems
from sana_kit.training.config import parse_args
from sana_kit.training.recomputation import (
    ActivationBytes,
    choose_recomputation,
    count_run_step,
    fit_memory,
    held_bytes,
    recomputations,
)

ACTIVATIONS = ActivationBytes(blocks=20, kept=2000, block=90, passing=100, passing_recomputed=190)


def test_the_least_recomputation_that_fits_is_chosen():
    choices = list(recomputations(ACTIVATIONS, images=1))
    assert [(c.interval, c.blocks) for c in choices[:3]] == [(None, 0), (20, 1), (19, 2)]
    assert (choices[-1].interval, choices[-1].blocks, choices[-1].peak) == (1, 20, 2000 - 20 * 90 + 190)
    assert choose_recomputation(2100, images=1, activations=ACTIVATIONS).interval is None
    assert choose_recomputation(2099, images=1, activations=ACTIVATIONS).blocks == 2  # one block's own bytes pass
    for budget in range(390, 2100, 37):
        choice = choose_recomputation(2 * budget, images=2, activations=ACTIVATIONS)
        faster = [c for c in recomputations(ACTIVATIONS, 2) if c.blocks < choice.blocks]
        assert choice.peak <= 2 * budget and all(c.peak > 2 * budget for c in faster)


def test_what_does_not_fit_is_told_with_the_batch_that_does():
    with pytest.raises(UserError, match="batch of 3 or less"):
        choose_recomputation(1200, images=4, activations=ACTIVATIONS)
    with pytest.raises(UserError, match="smaller resolution"):
        choose_recomputation(389, images=1, activations=ACTIVATIONS)


def test_weights_and_optimizer_are_part_of_the_budget():
    assert choose_recomputation(2600, images=1, activations=ACTIVATIONS, held_bytes=500).interval is None
    assert choose_recomputation(2599, images=1, activations=ACTIVATIONS, held_bytes=500).blocks == 2
    with pytest.raises(UserError, match="batch of 1 or less"):
        choose_recomputation(900, images=2, activations=ACTIVATIONS, held_bytes=500)


@pytest.mark.parametrize(
    ("value", "flags", "device", "field"),
    [
        ("auto", [], "cpu", "memory_budget"),
        ("much", [], "cuda", "memory_budget"),
        ("-3", [], "cpu", "memory_budget"),
        ("nan", [], "cpu", "memory_budget"),
        ("8", ["--gradient_checkpointing"], "cpu", "gradient_checkpointing"),
        ("8", ["--gradient_checkpointing_interval=2"], "cpu", "gradient_checkpointing_interval"),
        ("8", [], "cpu", None),
        ("auto", [], "npu", None),
    ],
)
def test_what_is_wrong_with_a_budget(value, flags, device, field):
    config = parse_args(["--pretrained_model_name_or_path=x", f"--memory_budget={value}", *flags])
    assert [problem.field for problem in budget_problems(config, device)] == ([field] if field else [])


def test_the_run_recomputes_what_the_budget_needs(tiny_model):
    """Of the free memory 94 percent are used; what was chosen takes the budget's place among the settings."""
    model, problems = find_model(str(tiny_model))
    assert not problems
    flags = [f"--pretrained_model_name_or_path={tiny_model}", "--resolution=64", "--mixed_precision=bf16"]
    assert fit_memory(parse_args(flags), model, 1, None)[1] is None
    config = parse_args([*flags, "--memory_budget=auto", "--train_batch_size=2"])
    held = sum(held_bytes(config, model, 1).values())
    blocks = model.transformer_config["num_layers"]

    def count(interval):
        return count_run_step(config, model, side=64 // model.vae_factor, tokens=300, interval=interval)

    activations = ActivationBytes.counted(count, blocks)
    for interval, checkpointing in ((None, False), (blocks, True), (1, True)):
        # a bit more than that choice needs
        free = math.ceil((held + 2 * activations.peak(interval)) / 0.94) + 2
        chosen, told = fit_memory(config, model, 1, free)
        assert (chosen.gradient_checkpointing, chosen.memory_budget) == (checkpointing, None)
        assert chosen.gradient_checkpointing_interval == (interval or 1)
        assert told.startswith(f"{0 if interval is None else math.ceil(blocks / interval)} of {blocks} blocks")
    with pytest.raises(UserError, match="weights and optimizer"):
        fit_memory(config, model, 1, held)


@pytest.mark.parametrize("block", ["kit", "fused"])
def test_bytes_are_those_of_counted_steps(block):
    """From two counted steps the peak of another interval follows, within 2 percent."""
    config = {"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 32, "caption_channels": 16}
    config |= {"num_cross_attention_heads": 2, "cross_attention_head_dim": 64, "cross_attention_dim": 128}

    def count(interval):
        return count_step(config, "lora4", block, latent_hw=(16, 16), images=2, tokens=8, interval=interval)

    activations = ActivationBytes.counted(count, 4)
    assert activations.peak(2) == pytest.approx(count(2).peak / 2, rel=0.02)
    assert activations.peak(1) < activations.peak(2) < activations.peak(None)


def test_a_step_at_4096_px_keeps_what_was_counted():
    """LoRA on latents of 128 x 128 with fused blocks, every one recomputed: real tensors keep the counted bytes."""
    config = {"in_channels": 4, "out_channels": 4, "num_layers": 3, "num_attention_heads": 2}
    config |= {"attention_head_dim": 32, "caption_channels": 16, "num_cross_attention_heads": 2}
    config |= {
        "cross_attention_head_dim": 32,
        "cross_attention_dim": 64,
        "sample_size": 128,
        "interpolation_scale": 2.0,
    }
    torch.manual_seed(0)
    model = SanaTransformer2DModel(**config).to(torch.bfloat16)
    prepare(model, "lora4", "fused", torch.bfloat16)
    recompute_blocks(model, 1)
    latents, captions = torch.randn(1, 4, 128, 128).bfloat16(), torch.randn(1, 8, 16).bfloat16()
    mask = torch.ones(1, 1, 1, 8, dtype=torch.bool)
    kept = KeptBytes([*model.parameters(), *model.buffers()])
    with kept.hooks():
        time = torch.tensor([500.0])
        out = model(latents, captions, time, encoder_attention_mask=mask, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(out.float(), torch.zeros(out.shape))
    loss.backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "lora_B" in name]
    assert len(gradients) == 18 and all(bool(gradient.any() & gradient.isfinite().all()) for gradient in gradients)
    counted = count_step(config, "lora4", "fused", latent_hw=(128, 128), images=1, tokens=8, interval=1)
    assert kept.total == pytest.approx(counted.kept, rel=0.02)
