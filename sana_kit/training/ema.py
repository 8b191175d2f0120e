"""The exponential moving average of the trained weights.

It lives where the optimizer's masters live, in float32: each rank averages its own share, so ZeRO shards it as it
shards the optimizer. Under ZeRO-3 the masters are visible while a step runs only; `check.py` refuses that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sana_kit.training.engine import Engine


class WeightAverage:
    """The average, or nothing at all where `decay` is None.

    The decay grows with the run, min(decay, (1 + step) / (10 + step)), as diffusers' EMAModel has it: an average that
    began at the start's weights would remember them for long.

    Attributes:
        decay: the share of the old average that stays at each update.
    """

    def __init__(self, engine: Engine, decay: float | None):
        self.engine, self.decay = engine, decay
        self._masters = engine.masters() if decay is not None else []
        self._average = [master.detach().clone() for master in self._masters]

    def __bool__(self) -> bool:
        return self.decay is not None

    def update(self, step: int) -> None:
        """After update number `step`; nothing is waited for."""
        if self.decay is None:
            return
        kept = min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(self._average, self._masters, 1 - kept)

    def begin_at_masters(self) -> None:
        """Begin anew at the weights of now."""
        with torch.no_grad():
            for average, master in zip(self._average, self._masters, strict=True):
                average.copy_(master)

    @contextmanager
    def in_masters(self) -> Iterator[None]:
        """Inside, the masters hold the average; the weights that the model computes with stay as they are."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Inside, the model computes with the average; every rank enters. Afterwards all is as before, to the bit.

        Without an average it is the optimizer that says which weights are the result (`Engine.result_weights`).
        """
        if self.decay is None:
            with self.engine.result_weights():
                yield
            return
        with self.in_masters():
            self.engine.weights_from_masters()
            yield
        self.engine.weights_from_masters()

    def _exchange(self) -> None:
        with torch.no_grad():
            for average, master in zip(self._average, self._masters, strict=True):
                kept = master.detach().clone()
                master.copy_(average)
                average.copy_(kept)
