"""What a run tells: losses that are not finite, the last lines on the console."""

from __future__ import annotations

import logging
import math

logger = logging.getLogger("sana")


def check_finite(losses, skipped, samples_seen, stream, samples_per_step, global_step, last_good, args, engine, log):
    """Stop on a loss or a gradient that is not finite: names the step, its images and the last good checkpoint.

    Args:
        losses: mean over all ranks of each update since the last call, newest last; as long as `skipped`.
        skipped: whether each of these updates was left out, since its gradient was not finite (`UpdateGuard.read`).
        last_good: the newest checkpoint in words.

    Raises:
        FloatingPointError: on every rank, since all ranks have the same losses and decide alike.
    """
    for offset, (value, left_out) in enumerate(zip(losses, skipped, strict=True)):
        finite = math.isfinite(value)
        if finite and (not left_out or engine.scales_loss):
            continue
        step = global_step - len(losses) + offset + 1
        start = samples_seen - (len(losses) - offset) * samples_per_step
        indices = [stream.image_index(position) for position in range(start, start + samples_per_step)]
        what = f"loss {value}" if not finite else f"the gradient is not finite (loss {value:.4g})"
        message = f"{what} at step {step}, images {indices[:64]}"
        if args.on_nan == "skip":
            logger.warning("%s: update skipped", message)
            log.write("warning", step=step, message=message + ": update skipped")
            continue
        log.write("warning", step=step, message=f"{message}; last good checkpoint: {last_good}")
        raise FloatingPointError(
            f"{message}. The weights do not hold it. Last good checkpoint: {last_good}. Lower --learning_rate, look at"
            " those images, or use --on_nan=skip."
        )
    if engine.guard.in_a_row >= args.max_skipped_updates:
        message = f"{engine.guard.in_a_row} updates in a row were skipped, the last at step {global_step}"
        log.write("warning", step=global_step, message=message)
        raise FloatingPointError(
            f"{message}: nothing is learnt any more. Last good checkpoint: {last_good}. Lower --learning_rate and go"
            " on from it, or raise --max_skipped_updates."
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
