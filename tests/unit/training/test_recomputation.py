"""The choice of recomputed blocks by bytes, and its closed form against counted steps."""

import pytest

from sana_kit.errors import UserError
from sana_kit.step_table import count_step
from sana_kit.training.recomputation import ActivationBytes, choose_recomputation, recomputations

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
