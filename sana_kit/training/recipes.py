"""What a training sample draws and what its loss is: one recipe per pipeline class of the family, in RECIPES.

Flow matching as SANA is trained, in float32: a latent x0 and noise x1 ~ N(0, 1) are mixed as
x_t = (1 - sigma) x0 + sigma x1, and the transformer learns the velocity x1 - x0. The draws for one training sample
come from a generator of its own, keyed by (seed, position in the stream of samples): the same sample gets the same
noise and time step on every kind of device, with any number of processes and after every resume.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

if TYPE_CHECKING:
    from sana_kit.training.config import TrainConfig

NUM_TRAIN_TIMESTEPS = 1000


def shifted_sigma(u: torch.Tensor, flow_shift: float) -> torch.Tensor:
    """Map draws u in [0, 1) to sigmas in (0, 1], float32, on the grid of 1000 training time steps.

    u = 0 is the noisiest step, as in diffusers' trainers, which index the descending table of
    FlowMatchEulerDiscreteScheduler.
    """
    index = (u * NUM_TRAIN_TIMESTEPS).long().clamp_(max=NUM_TRAIN_TIMESTEPS - 1)
    sigma = (NUM_TRAIN_TIMESTEPS - index).to(torch.float32) / NUM_TRAIN_TIMESTEPS
    return flow_shift * sigma / (1.0 + (flow_shift - 1.0) * sigma)


def sample_generator(seed: int, position: int) -> torch.Generator:
    """The CPU generator of one training sample: `seed` of the run, `position` in the stream of samples."""
    # torch seeds its Mersenne twister with 32 bits of the number; numpy's SeedSequence mixes both into one well-spread
    # key.
    key = int(np.random.SeedSequence([seed & 0xFFFFFFFF, seed >> 32, position]).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(key & 0x7FFFFFFFFFFFFFFF)


def add_noise(latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_t, the velocity target), both float32 (B, C, H, W), from latents and noise (B, C, H, W) and sigma (B,)."""
    latents = latents.float()
    sigma = sigma.view(-1, 1, 1, 1)
    return (1.0 - sigma) * latents + sigma * noise, noise - latents


def loss_per_sample(
    prediction: torch.Tensor,
    target: torch.Tensor,
    sigma: torch.Tensor,
    scheme: str,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted mean squared error of each sample, float32 (B,); the weights are those of diffusers' SD3 trainers.

    Args:
        places: (B, 1, h, w) float32, weights of the places, of mean 1 in each sample; None: all alike.
    """
    weights = compute_loss_weighting_for_sd3(weighting_scheme=scheme, sigmas=sigma.view(-1, 1, 1, 1)).float()
    errors = weights * (prediction.float() - target) ** 2
    return (errors if places is None else errors * places).flatten(1).mean(1)


@dataclasses.dataclass(frozen=True)
class FlowMatching:
    """SanaPipeline's recipe.

    Attributes:
        flow_shift: shift of the time steps, 1.0 for none.
        weighting_scheme, logit_mean, logit_std, mode_scale: see training/settings.py.
        prior_loss_weight: weight of the class images' loss; None: a batch holds no class images.
    """

    flow_shift: float
    weighting_scheme: str = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    prior_loss_weight: float | None = None

    @classmethod
    def of(cls, config: TrainConfig) -> FlowMatching:
        """The recipe that a run's settings ask for; its flow_shift is known."""
        flow = dataclasses.asdict(config.flow)
        return cls(**flow, prior_loss_weight=config.prior_loss_weight if config.with_prior_preservation else None)

    def draw(self, shape: tuple[int, ...], seed: int, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(noise of `shape`, u in [0, 1) of shape (1,)), both float32, of the training sample at `position`."""
        generator = sample_generator(seed, position)
        u = compute_density_for_timestep_sampling(
            weighting_scheme=self.weighting_scheme,
            batch_size=1,
            logit_mean=self.logit_mean,
            logit_std=self.logit_std,
            mode_scale=self.mode_scale,
            generator=generator,
        )
        return torch.randn(shape, generator=generator, dtype=torch.float32), u.to(torch.float32)

    def loss(self, model: Callable, batch: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The loss of one micro-batch, a float32 scalar: mean over instance samples, plus the weighted prior loss.

        Arguments as those of `losses`.
        """
        losses = self.losses(model, batch, dtype)
        if self.prior_loss_weight is None:
            return losses.mean()
        instance, prior = losses.chunk(2)
        return instance.mean() + self.prior_loss_weight * prior.mean()

    def losses(self, model: Callable, batch: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The loss of each sample, float32 (B,).

        Args:
            model: what computes the velocity.
            batch: see `stream.collate`.
            dtype: what the model computes in.
        """
        sigma = shifted_sigma(batch["u"], self.flow_shift)  # (B,)
        noisy, target = add_noise(batch["latents"], batch["noise"], sigma)  # (B, C, h, w), float32
        prediction = model(
            hidden_states=noisy.to(dtype),
            encoder_hidden_states=batch["prompt_embeds"].to(dtype),
            encoder_attention_mask=batch["prompt_mask"],
            timestep=sigma * NUM_TRAIN_TIMESTEPS,
            return_dict=False,
            **({"control": batch["control"].to(dtype)} if "control" in batch else {}),
        )[0]
        return loss_per_sample(prediction, target, sigma, self.weighting_scheme, batch.get("loss_weights"))


# Pipeline class -> recipe; TRAINED in models/members.py names the same ones, for checks before anything is imported.
RECIPES = {"SanaPipeline": FlowMatching}
