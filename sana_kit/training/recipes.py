"""Flow matching as SANA is trained: time-step sampling, noising, loss, all in float32.

Used by train_dreambooth_lora_sana.py. A latent x0 and noise x1 ~ N(0, 1) are mixed as x_t = (1 - sigma) x0 + sigma x1
and the transformer learns the velocity x1 - x0. The draws for one training sample come from a generator of its own,
keyed by (seed, position in the stream of samples): the same sample gets the same noise and time step on every kind of
device, with any number of processes and after every resume.
"""

from __future__ import annotations

import inspect

import torch

from sana_kit.training.engine import compute_dtype

WEIGHTING_SCHEMES = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none")


NUM_TRAIN_TIMESTEPS = 1000


def read_flow_shift(scheduler_config) -> float:
    """The checkpoint's own time-step shift from its scheduler's config (a mapping).

    A DPMSolver config calls it `flow_shift`, a FlowMatchEuler config `shift`; 1.0, no shift, where neither is named.
    diffusers' trainer reads the DPMSolver config of the SANA checkpoints as FlowMatchEuler and silently trains with
    1.0.
    """
    for key in ("flow_shift", "shift"):
        if scheduler_config.get(key) is not None:
            return float(scheduler_config[key])
    return 1.0


def shifted_sigma(u: torch.Tensor, flow_shift: float) -> torch.Tensor:
    """Map draws u in [0, 1) to sigmas in (0, 1], float32, on the grid of 1000 training time steps.

    u = 0 is the noisiest step, as in diffusers' trainers, which index FlowMatchEulerDiscreteScheduler's descending
    table.
    """
    index = (u * NUM_TRAIN_TIMESTEPS).long().clamp_(max=NUM_TRAIN_TIMESTEPS - 1)
    sigma = (NUM_TRAIN_TIMESTEPS - index).to(torch.float32) / NUM_TRAIN_TIMESTEPS
    return flow_shift * sigma / (1.0 + (flow_shift - 1.0) * sigma)


def sample_generator(seed: int, position: int) -> torch.Generator:
    """The CPU generator of one training sample: `seed` of the run, `position` in the stream of samples."""
    # torch seeds its Mersenne twister with 32 bits of the number; numpy's SeedSequence mixes both into one
    # well-spread key.
    import numpy as np

    key = int(np.random.SeedSequence([seed & 0xFFFFFFFF, seed >> 32, position]).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(key & 0x7FFFFFFFFFFFFFFF)


def draw(
    shape: tuple[int, ...],
    *,
    seed: int,
    position: int,
    weighting_scheme: str,
    logit_mean: float,
    logit_std: float,
    mode_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise of `shape`, float32, and the density draw u in [0, 1), shape (1,), of the training sample at
    `position`.
    """
    from diffusers.training_utils import compute_density_for_timestep_sampling

    assert "generator" in inspect.signature(compute_density_for_timestep_sampling).parameters
    generator = sample_generator(seed, position)
    u = compute_density_for_timestep_sampling(
        weighting_scheme=weighting_scheme,
        batch_size=1,
        logit_mean=logit_mean,
        logit_std=logit_std,
        mode_scale=mode_scale,
        generator=generator,
    )
    return torch.randn(shape, generator=generator, dtype=torch.float32), u.to(torch.float32)


def add_noise(latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x_t and the velocity target, both float32 of shape (B, C, H, W), from latents and noise (B, C, H, W), sigma
    (B,).
    """
    latents = latents.float()
    sigma = sigma.view(-1, 1, 1, 1)
    return (1.0 - sigma) * latents + sigma * noise, noise - latents


def loss_per_sample(prediction: torch.Tensor, target: torch.Tensor, sigma: torch.Tensor, scheme: str) -> torch.Tensor:
    """Weighted mean squared error of each sample, float32 (B,); the weights are those of diffusers' SD3 trainers."""
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    weights = compute_loss_weighting_for_sd3(weighting_scheme=scheme, sigmas=sigma.view(-1, 1, 1, 1)).float()
    return (weights * (prediction.float() - target) ** 2).flatten(1).mean(1)


def flow_matching_loss(model, batch: dict, args, with_prior: bool) -> torch.Tensor:
    """The loss of one micro-batch, float32 scalar: mean over instance samples, plus the weighted prior loss."""
    sigma = shifted_sigma(batch["u"], args.flow_shift)  # (B,)
    noisy, target = add_noise(batch["latents"], batch["noise"], sigma)  # (B, C, h, w), float32
    dtype = compute_dtype(args)
    prediction = model(
        hidden_states=noisy.to(dtype),
        encoder_hidden_states=batch["prompt_embeds"].to(dtype),
        encoder_attention_mask=batch["prompt_mask"],
        timestep=sigma * NUM_TRAIN_TIMESTEPS,
        return_dict=False,
    )[0]
    losses = loss_per_sample(prediction, target, sigma, args.weighting_scheme)  # (B,)
    if not with_prior:
        return losses.mean()
    instance, prior = losses.chunk(2)
    return instance.mean() + args.prior_loss_weight * prior.mean()
