"""A run that ends where training would begin: its images and captions are encoded."""

from __future__ import annotations

import sys

from sana_kit import devices
from sana_kit.distributed import Ranks, StopSignal, distributed_state
from sana_kit.errors import EncodingStopped, UserError
from sana_kit.training.check import check, tell_all_ranks
from sana_kit.training.config import TrainConfig
from sana_kit.training.recorder import configure_logging
from sana_kit.training.samples import load_samples


class _Notes:
    """Tells what a user should know of the data, where a training's recorder would."""

    def __init__(self, is_main: bool):
        self._is_main = is_main

    def warn(self, text: str, step: int | None = None) -> None:
        """A line on the console of the first process."""
        if self._is_main:
            print(f"note: {text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """What the log has told already."""


def encode_only(config: TrainConfig) -> int:
    """Encode what a training with these settings would; returns the exit code: 0, or 143 / 130 after a signal.

    Raises:
        UserError: all problems with the settings, before a weight is loaded; images or captions that cannot be used.
    """
    try:
        checked = check(config)
    except UserError as error:
        tell_all_ranks(error)
    ranks = Ranks.of(distributed_state())
    ranks.run_on_all(lambda: None)  # what another rank found wrong is raised here
    configure_logging(ranks.is_main)
    devices.prepare_backend(ranks.device, allow_tf32=config.allow_tf32)
    stop = StopSignal(ranks)
    notes = _Notes(ranks.is_main)
    for text in checked.base_model.notes:
        notes.warn(text)
    try:
        samples = load_samples(checked.config, checked.base_model, ranks, stop, notes)
    except EncodingStopped:
        notes.warn("stopped; what is encoded is kept, the same command goes on from it")
        return stop.exit_code
    ranks.close()
    if ranks.is_main:
        print(f"encoded: {len(samples.encoded)} samples in {config.encodings_dir}", flush=True)
    return 0
