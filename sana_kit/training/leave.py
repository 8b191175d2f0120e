"""The end of a run: its summary, the model card, the upload, the last words."""

from __future__ import annotations

import os

from sana_kit.data.image_set import ImageSet
from sana_kit.distributed import StopSignal
from sana_kit.training.config import TrainConfig
from sana_kit.training.engine import Engine
from sana_kit.training.export import final_weights, upload, write_card
from sana_kit.training.recorder import Recorder, made_lines, summary_line
from sana_kit.training.state import TrainState


def leave(
    config: TrainConfig,
    engine: Engine,
    images: ImageSet,
    state: TrainState,
    recorder: Recorder,
    stop: StopSignal | None,
) -> int:
    """Summary, card, upload and the last words; the exit code. `stop` is the signal that ended the run, if one did."""
    if stop is not None:
        recorder.warn(
            f"stopped by signal {stop.signal} after step {state.global_step}; --resume_from_checkpoint=latest goes on"
            " from there",
            state.global_step,
        )
    elif engine.ranks.is_main:
        write_card(config, images)
    made = made_lines(config, final_weights(config)) if stop is None else []
    summary = recorder.end(None if stop is None else stop.signal, made)
    if engine.ranks.is_main and stop is None:
        upload(config)
    engine.close()
    if engine.ranks.is_main:
        later = os.environ.get("SANA_LAST_WORDS") == "later"  # the launcher shows them behind what it prints itself
        print("\n".join([summary_line(summary), *([] if later else made)]), flush=True)
    return 0 if stop is None else stop.exit_code
