"""Flow matching against diffusers' own scheduler and training utilities, and the independence of a sample's draws."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from sana_kit.models.folder import read_flow_shift
from sana_kit.models.members import MEMBERS, TRAINED
from sana_kit.training.recipes import (
    NUM_TRAIN_TIMESTEPS,
    RECIPES,
    FlowMatching,
    add_noise,
    loss_per_sample,
    shifted_sigma,
)
from sana_kit.training.settings import WEIGHTING_SCHEMES


def draw_at(position, scheme="none", seed=3, shape=(4, 8, 8)):
    return FlowMatching(flow_shift=3.0, weighting_scheme=scheme).draw(shape, seed, position)


def test_what_the_trainer_takes_has_a_recipe():
    """TRAINED stands with the members, since the launcher's checks import no recipe."""
    assert set(TRAINED) == set(RECIPES) <= set(MEMBERS)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_sigmas_are_those_of_the_flow_match_scheduler(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    u = torch.tensor([0.0, 0.0004, 0.25, 0.5, 0.77, 0.9999])
    index = (u * 1000).long()
    torch.testing.assert_close(shifted_sigma(u, shift), scheduler.sigmas[index], rtol=1e-6, atol=1e-7)
    timesteps = shifted_sigma(u, shift) * NUM_TRAIN_TIMESTEPS
    torch.testing.assert_close(timesteps, scheduler.timesteps[index], rtol=1e-6, atol=1e-4)


def test_a_draw_of_exactly_one_stays_on_the_grid():
    assert shifted_sigma(torch.tensor([1.0]), 3.0).item() == pytest.approx(
        shifted_sigma(torch.tensor([0.9999]), 3.0).item()
    )


@pytest.mark.parametrize(
    "config, shift", [({"flow_shift": 3.0, "shift": 1.0}, 3.0), ({"shift": 2.0}, 2.0), ({"flow_shift": None}, 1.0)]
)
def test_the_checkpoints_own_shift_is_read(config, shift):
    assert read_flow_shift(config) == shift


def test_a_samples_draws_depend_on_seed_and_position_alone():
    torch.manual_seed(0)
    noise, u = draw_at(5)
    torch.manual_seed(99)
    again, u_again = draw_at(5)
    assert torch.equal(noise, again) and torch.equal(u, u_again)
    for other in (draw_at(6), draw_at(5, seed=4), draw_at(5, seed=3 + 2**32)):
        assert not torch.equal(noise, other[0]) and not torch.equal(u, other[1])
    assert noise.dtype == torch.float32 and u.shape == (1,)


def test_draws_are_standard_normal_and_uniform():
    pairs = [draw_at(position) for position in range(400)]
    noise = torch.stack([n for n, _ in pairs])
    u = torch.cat([u for _, u in pairs])
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert abs(u.mean() - 0.5) < 0.05 and u.min() >= 0 and u.max() < 1 and abs(u.std() - 12**-0.5) < 0.03
    flat = noise.flatten(1)
    correlation = (flat[:-1] * flat[1:]).mean(1)
    assert correlation.abs().max() < 0.3  # neighbouring positions share nothing


@pytest.mark.parametrize("scheme", WEIGHTING_SCHEMES)
def test_every_weighting_scheme_gives_a_finite_float32_loss(scheme):
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    pairs = [draw_at(position, scheme) for position in range(3)]
    noise, u = torch.stack([n for n, _ in pairs]), torch.cat([u for _, u in pairs])
    sigma = shifted_sigma(u, 3.0)
    noisy, target = add_noise(latents, noise, sigma)
    assert noisy.dtype == target.dtype == torch.float32
    loss = loss_per_sample(torch.zeros_like(latents), target, sigma, scheme)
    assert loss.shape == (3,) and loss.dtype == torch.float32 and torch.isfinite(loss).all() and (loss > 0).all()
    expected = (target**2).flatten(1).mean(1)
    if scheme == "sigma_sqrt":
        expected = expected * sigma**-2
    elif scheme == "cosmap":
        expected = expected * 2 / (torch.pi * (1 - 2 * sigma + 2 * sigma**2))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_noising_ends_at_noise_and_starts_near_the_latents():
    latents, noise = torch.ones(2, 1, 2, 2), torch.full((2, 1, 2, 2), 5.0)
    noisy, target = add_noise(latents, noise, torch.tensor([1.0, 0.0]))
    assert torch.equal(noisy[0], noise[0]) and torch.equal(noisy[1], latents[1])
    assert torch.equal(target, torch.full_like(latents, 4.0))
