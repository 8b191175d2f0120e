"""What a run tells: losses that are not finite, the last lines on the console."""

from __future__ import annotations

import logging
import math

logger = logging.getLogger("sana")


def check_finite(losses, samples_seen, stream, samples_per_step, global_step, last_saved, args, log) -> None:
    """Stop on a loss that is not finite: names the step, its images and the last good checkpoint.

    Raises:
        FloatingPointError: on every rank, since the losses were averaged over all of them.
    """
    for offset, value in enumerate(losses):
        if math.isfinite(value):
            continue
        step = global_step - len(losses) + offset + 1
        start = samples_seen - (len(losses) - offset) * samples_per_step
        indices = [stream.image_index(position) for position in range(start, start + samples_per_step)]
        message = f"loss {value} at step {step}, images {indices[:64]}"
        if args.on_nan == "skip":
            logger.warning("%s: update skipped", message)
            log.write("warning", step=step, message=message + ": update skipped")
            continue
        good = f"checkpoint-{last_saved}" if last_saved else "none was written"
        log.write("warning", step=step, message=f"{message}; last good checkpoint: {good}")
        raise FloatingPointError(
            f"{message}. Last good checkpoint: {good}. Lower --learning_rate, look at those images, or use"
            " --on_nan=skip."
        )


def print_summary(summary: dict) -> None:
    """The last lines on the console."""
    rate = summary["images_per_second"]
    shown = f"{rate:.2f} images/s" if rate else f"no steady state ({summary['steady_state_note']})"
    loss = summary["final_loss"]
    print(
        f"steps {summary['global_step']}, {shown}, final loss {loss if loss is None else round(loss, 4)}, duration"
        f" {summary['duration_seconds']:.1f} s (encoding {summary['encode_seconds']:.1f} s)",
        flush=True,
    )
