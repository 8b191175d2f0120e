"""The loss on images that are not trained on: the same noise and time steps each time, by band of time steps.

A training loss is drawn at random time steps and says little of one run against another. Here each held-out image is
looked at in every band with noise of its own, which depends on nothing but the image's number, so two measurements
differ by the weights alone. Every measurement is the same to the bit on any number of processes: an image's bands are
one batch, whoever computes it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from sana_kit.encodings.dataset import EncodedDataset
from sana_kit.training.config import TrainConfig
from sana_kit.training.ema import WeightAverage
from sana_kit.training.engine import Engine
from sana_kit.training.export import write_weights
from sana_kit.training.plan import Plan
from sana_kit.training.recipes import FlowMatching, sample_generator
from sana_kit.training.state import TrainState
from sana_kit.training.stream import collate
from sana_kit.training.validation import is_due

logger = logging.getLogger("sana")

# Of the noisiest to the least noisy time steps, a quarter each.
BANDS = 4
# Apart from every seed of a run: a held-out image's noise belongs to the image.
_SEED = 0x4E1D0
_NORMAL_95 = 1.96


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A held-out loss.

    Attributes:
        loss: mean over images and bands; half_width: of its 95 % confidence interval over images.
        bands: mean per band, the noisiest time steps first.
    """

    loss: float
    half_width: float
    bands: tuple[float, ...]

    def figures(self) -> dict[str, object]:
        """For log and trackers."""
        return {"loss": self.loss, "half_width": self.half_width, "bands": list(self.bands)}


def summarise(losses: Sequence[Sequence[float]]) -> Measurement:
    """The measurement of per-image losses, one row of BANDS numbers an image."""
    means = [statistics.fmean(row) for row in losses]
    spread = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.inf
    bands = tuple(statistics.fmean(column) for column in zip(*losses, strict=True))
    return Measurement(statistics.fmean(means), _NORMAL_95 * spread, bands)


class HeldOut:
    """Measures the held-out loss when validation is due, keeps the best weights, knows when to stop for good."""

    def __init__(
        self,
        config: TrainConfig,
        plan: Plan,
        engine: Engine,
        encoded: EncodedDataset,
        indices: Sequence[int],
        recipe: FlowMatching,
        average: WeightAverage,
    ):
        """`indices` are the held-out images' in `encoded`; none of them switches everything here off."""
        self.config, self.plan, self.engine, self.encoded = config, plan, engine, encoded
        self.indices, self.recipe, self.average = list(indices), recipe, average

    def due(self, state: TrainState) -> bool:
        """Whether a measurement belongs after this update; the last one always has one."""
        if not self.indices:
            return False
        return state.global_step >= self.plan.steps or is_due(self.config, self.plan, state)

    def over(self, state: TrainState) -> bool:
        """Whether --early_stopping ends the run now."""
        return self.config.early_stopping is not None and state.since_best >= self.config.early_stopping

    def measure(self, state: TrainState) -> dict[str, Measurement]:
        """{"raw": ..., and with an average "ema": ...}; keeps the weights in best/ where they are the best so far."""
        with self.engine.result_weights():
            found = {"raw": self._measure()}
        if self.average:
            with self.average.in_model():
                found["ema"] = self._measure()
        chosen = found["ema" if self.average else "raw"]
        if state.best_loss is None or chosen.loss < state.best_loss:
            state.best_loss, state.best_step, state.since_best = chosen.loss, state.global_step, 0
            if state.global_step:
                with self.average.in_model():
                    write_weights(self.config, self.engine, Path(self.config.output_dir, "best"))
        else:
            state.since_best += 1
        return found

    def _measure(self) -> Measurement:
        engine, model = self.engine, self.engine.transformer
        ranks, together = engine.ranks, engine.partitioned
        mine = self.indices if together else self.indices[ranks.rank :: ranks.world_size]
        model.eval()
        with torch.no_grad():
            losses = {index: self._losses(model, index) for index in mine}
        model.train()
        rows = {index: row for part in ranks.gather(losses) for index, row in part.items()}
        return summarise([rows[index] for index in self.indices])

    def _losses(self, model: torch.nn.Module, index: int) -> list[float]:
        """The losses of one image, a band each."""
        item = self.encoded[index]
        batch = collate([[self._sample(item, index, band)] for band in range(BANDS)])
        return self.recipe.losses(model, self.engine.on_device(batch), self.engine.compute_dtype).tolist()

    def _sample(self, item: dict[str, torch.Tensor], index: int, band: int) -> dict[str, torch.Tensor]:
        generator = sample_generator(_SEED, index * BANDS + band)
        u = (band + torch.rand(1, generator=generator)) / BANDS
        return {**item, "noise": torch.randn(item["latents"].shape, generator=generator), "u": u}
