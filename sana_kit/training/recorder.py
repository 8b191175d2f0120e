"""What a run tells while it trains: log, trackers, progress bar, throughput, report page, summary.

The recorder reads the device only where figures are due (`--logging_steps`), before a checkpoint and at a stop; in
between losses stay on the device, since reading one would wait for it.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import shlex
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sana_kit import devices
from sana_kit.distributed import StopSignal
from sana_kit.encodings.dataset import EncodedDataset
from sana_kit.environment import KIT, python_word, short_path
from sana_kit.errors import ImageError
from sana_kit.files import write_atomic
from sana_kit.model_card import package_versions, this_command
from sana_kit.progress import console_bar
from sana_kit.reports.report import DRAW_WITH_IT, PagePace, refresh_report
from sana_kit.reports.training_images import CroppedImages, write_training_images
from sana_kit.runlog import JsonLinesLog
from sana_kit.throughput import PhaseClock, ThroughputMeter
from sana_kit.training.config import RUN_FILE, TrainConfig
from sana_kit.training.engine import Engine
from sana_kit.training.held_out import Measurement
from sana_kit.training.memorisation import compare_with_training_images
from sana_kit.training.plan import Plan, flops_per_image
from sana_kit.training.state import TrainState
from sana_kit.training.stream import SampleStream
from sana_kit.training.trackers import TRACKERS

if TYPE_CHECKING:
    from sana_kit.progress import Bar

logger = logging.getLogger("sana")

PROJECT = "sana-dreambooth-lora"


class Recorder:
    """The account of one run; made before anything is loaded, `begin` once the run stands.

    Every method may be called on every rank; the main one writes.

    Attributes:
        phases: seconds of the start, by phase.
        final_loss: mean of the newest interval of `--logging_steps`, None before the first.
        memorisation: what of the last validation images is a copy of a training image, None where none was looked at.
        last_good: the newest whole checkpoint in words, for messages.
    """

    def __init__(self, config: TrainConfig, engine: Engine, phases: PhaseClock):
        self.config, self.engine, self.phases = config, engine, phases
        self.output_dir = Path(config.output_dir)
        self.final_loss: float | None = None
        self.memorisation: dict | None = None
        self.last_good = "none was written"
        self._log: JsonLinesLog | None = None
        self._early: list[str] = []  # told before the log is open: a run that has nothing to do leaves it as it is
        self._started = phases.clock()
        self._losses: list[torch.Tensor] = []  # not read yet
        self._interval: list[float] = []  # read, not told yet
        self._bar: Bar | None = None
        self._pace = PagePace()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._log is not None:
            self._log.close()
            self._encoded.close()

    def warn(self, message: str, step: int = 0) -> None:
        """Tell the user on the console, and in the log; the first of every machine's ranks tells for the others."""
        if self.engine.ranks.is_local_main:
            logger.warning(message)
        self.note(message, step)

    def note(self, message: str, step: int = 0) -> None:
        """Into the log alone, for what has been told already."""
        if self._log is None:
            self._early.append(message)
        else:
            self._log.write("warning", step=step, message=message)

    # ---------------------------------------------------------------------------------------------------------- start

    def begin(
        self,
        config: TrainConfig,
        plan: Plan,
        state: TrainState,
        stream: SampleStream,
        encoded: EncodedDataset,
        lines: Iterable[str],
    ) -> None:
        """Open the log and the trackers and start the clock; the run is whole and stands at `state`.

        Args:
            config: the settings that hold, every default and every drawn number filled in.
            lines: the plan in words.
        """
        self.config, self.plan, self.state, self.stream = config, plan, state, stream
        engine, main = self.engine, self.engine.ranks.is_main
        self._log = JsonLinesLog(self.output_dir / "train_log.jsonl", main)
        told = {
            **config.public(),
            "given": sorted(config.given),
            "command": this_command(),
            "device": devices.device_name(engine.device),
            "world_size": engine.ranks.world_size,
            "host": platform.node(),
            "versions": package_versions(),
        }
        event = "resume" if state.global_step else "start"
        self._log.write(event, step=state.global_step, world_size=engine.ranks.world_size, config=told, plan=lines)
        for message in self._early:
            self.note(message, state.global_step)
        if main:
            config.save(self.output_dir)
        if config.report_to != "none":
            shown = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in told.items()}
            kwargs = {name: kind.settings(self.output_dir) for name, kind in TRACKERS.items()}
            engine.accelerator.init_trackers(PROJECT, config=shown, init_kwargs=kwargs)
        for line in lines:
            logger.info(line)
        if main:
            self._show_training_images(encoded)
        self._tell_buckets(encoded)
        shapes = encoded.latent_shapes()[: stream.num_instance]
        tokens = float(encoded.prompt_tokens().mean())
        self.flops_per_image = flops_per_image(config, plan, dict(engine.transformer.config), shapes, tokens)
        self._encoded = encoded  # a stream's seconds grow
        self.meter = ThroughputMeter(plan.samples_per_step)
        self.meter.start()
        self._first_step = state.global_step + 1

    def _show_training_images(self, encoded: EncodedDataset) -> None:
        """Some images with captions and crops beside the log, for the report; a run does not die of them."""
        try:
            write_training_images(CroppedImages(encoded.images, encoded.transform), self.output_dir)
        except Exception as error:  # whatever it is, the training matters more
            self.warn(f"training_images could not be written: {type(error).__name__}: {error}", self.state.global_step)

    def _tell_buckets(self, encoded: EncodedDataset) -> None:
        """How many images each bucket has, and how much of them is cropped away."""
        buckets = encoded.transform.buckets
        if buckets is None:
            return
        rows = buckets.rows()
        self._log.write("buckets", step=self.state.global_step, rows=rows)
        for row in rows:
            enlarged = f", {row['enlarged']} enlarged" if row["enlarged"] else ""
            lost = f"{100 * row['lost']:.0f} % cropped away"
            logger.info(f"bucket {row['width']} x {row['height']}: {row['images']} images, {lost}{enlarged}")

    def start_clock(self) -> None:
        """From here on it is training: the bar appears, and throughput and peak memory are measured."""
        self._bar = console_bar(
            self.plan.steps,
            "training",
            initial=self.state.global_step,
            images_per_unit=self.plan.samples_per_step,
            main_process=self.engine.ranks.is_main,
        )
        devices.reset_peak_memory(self.engine.device)
        self.meter.start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside (a checkpoint, a validation) counts as no training time."""
        with ExitStack() as pauses:
            pauses.enter_context(self.meter.paused())
            if self._bar is not None:
                pauses.enter_context(self._bar.paused())
            yield

    # --------------------------------------------------------------------------------------------------------- updates

    def update(self, loss: torch.Tensor, learning_rate: float, stopping: bool) -> None:
        """After an update: `loss` is a scalar on the device; figures are read and told where they are due.

        Raises:
            FloatingPointError: as `settle`.
        """
        step = self.state.global_step
        self._losses.append(loss)
        self.meter.step()
        self._bar.update(1)
        if step == self._first_step:
            devices.synchronize(self.engine.device)
            self.phases.mark("first step")
            logger.info("first step after %s", self.phases)
        if step % self.config.logging_steps == 0 or step == self.plan.steps or stopping:
            self.settle()
            self._tell(learning_rate)
            if step <= self._first_step + self.config.logging_steps or self._pace.due(time.monotonic()):
                self.refresh_page()

    def settle(self) -> None:
        """Read the losses since the last call, means over all ranks, and see that all were finite.

        Raises:
            FloatingPointError: on every rank alike, where one was not and the run is to stop for it, or where too many
                updates in a row were skipped.
        """
        if not self._losses:
            return
        losses = self.engine.accelerator.reduce(torch.stack(self._losses), reduction="mean").tolist()
        self._losses.clear()
        self._interval += losses
        skipped = self.engine.guard.read()
        for offset, (value, left_out) in enumerate(zip(losses, skipped, strict=True)):
            if not math.isfinite(value) or (left_out and not self.engine.scales_loss):
                self._not_finite(value, len(losses) - 1 - offset)
        self._check_skips()

    def _not_finite(self, loss: float, updates_ago: int) -> None:
        """One update whose loss or gradient was not finite: names its step, its images and the last checkpoint."""
        state, size = self.state, self.plan.samples_per_step
        step, start = state.global_step - updates_ago, state.samples_seen - (updates_ago + 1) * size
        indices = [self.stream.image_index(position) for position in range(start, start + size)]
        what = f"loss {loss}" if not math.isfinite(loss) else f"the gradient is not finite (loss {loss:.4g})"
        message = f"{what} at step {step}, images {indices[:64]}"
        if self.config.on_nan == "skip":
            self.warn(f"{message}: update skipped", step)
            return
        self.note(f"{message}; last good checkpoint: {self.last_good}", step)
        raise FloatingPointError(
            f"{message}. The weights do not hold it. Last good checkpoint: {self.last_good}. Lower --learning_rate,"
            " look at those images, or use --on_nan=skip."
        )

    def _check_skips(self) -> None:
        skipped = self.engine.guard.in_a_row
        if skipped < self.config.max_skipped_updates:
            return
        message = f"{skipped} updates in a row were skipped, the last at step {self.state.global_step}"
        self.note(message, self.state.global_step)
        raise FloatingPointError(
            f"{message}: nothing is learnt any more. Last good checkpoint: {self.last_good}. Lower --learning_rate and"
            " go on from it, or raise --max_skipped_updates."
        )

    def _tell(self, learning_rate: float) -> None:
        """One line of figures for log, trackers and bar: of all updates since the last one."""
        engine, finite = self.engine, [value for value in self._interval if math.isfinite(value)]
        self._interval.clear()
        self.final_loss = sum(finite) / len(finite) if finite else float("nan")
        rate, norm, peak = self.meter.lap(), engine.guard.grad_norm, self._peak_flops()
        whole_peak = peak * engine.ranks.world_size if peak else None
        figures = {
            "loss": self.final_loss,
            # a spike of one step would drown in the mean of the interval
            "loss_max": max(finite, default=None),
            "learning_rate": learning_rate,
            "images_per_second": rate,
            "peak_memory_bytes": devices.peak_memory_bytes(engine.device),
            "mfu": rate * self.flops_per_image / whole_peak if whole_peak and rate else None,
            "grad_norm": None if norm is None else float(norm),
        }
        step = self.state.global_step
        self._log.write("step", step=step, epoch=self.plan.epoch(self.state.samples_seen), **figures)
        engine.accelerator.log({k: v for k, v in figures.items() if v is not None}, step=step)
        memory = f"{figures['peak_memory_bytes'] / 2**30:.2f}GiB"
        self._bar.set_postfix(loss=f"{self.final_loss:.4f}", lr=f"{learning_rate:.1e}", memory=memory)

    def _peak_flops(self) -> float | None:
        if self.config.peak_tflops:
            return self.config.peak_tflops * 1e12
        return devices.peak_flops(devices.device_name(self.engine.device))

    # --------------------------------------------------------------------------------------------- checkpoints, images

    def checkpoint(self, folder: Path, seconds: float) -> None:
        """A checkpoint was written."""
        self.last_good = folder.name
        self._log.write("checkpoint", step=self.state.global_step, path=folder.name, seconds=round(seconds, 3))
        self.refresh_page()

    def held_out(self, measured: dict[str, Measurement]) -> None:
        """The held-out loss was measured: {"raw": ..., "ema": ...}."""
        step, raw = self.state.global_step, measured["raw"]
        self._log.write("held_out", step=step, **{name: found.figures() for name, found in measured.items()})
        figures = {f"held_out_loss_{name}": found.loss for name, found in measured.items()}
        figures |= {f"held_out_loss_band_{number}": loss for number, loss in enumerate(raw.bands)}
        self.engine.accelerator.log(figures, step=step)
        told = ", ".join(f"{name} {found.loss:.4f} ± {found.half_width:.4f}" for name, found in measured.items())
        logger.info("held-out loss at step %d: %s (lowest at step %d)", step, told, self.state.best_step)

    def validation(self, images: list[dict]) -> None:
        """Validation images were drawn: [{"file", "prompt", "seed"}, ...]."""
        lists = {f"{key}s": [image[key] for image in images] for key in ("file", "prompt", "seed")}
        self._log.write("validation", step=self.state.global_step, **lists)
        self.refresh_page()

    def compare(self, encoded: EncodedDataset, num_instance: int, drawn: list[dict], stop: StopSignal) -> None:
        """Say which of the last validation images are copies of training images; see `training/memorisation.py`.

        A run does not die of it: what cannot be read any more becomes a warning.
        """
        step = self.state.global_step
        if self.config.streaming:
            self.warn("memorisation: not looked for: the images of a stream are gone once they were trained on", step)
            return
        try:
            found = compare_with_training_images(
                encoded, num_instance, drawn, self.output_dir, self.engine.ranks, stop
            )
        except ImageError as error:
            self.warn(f"memorisation: not looked for: {error}", step)
            return
        if found is None:
            return
        self.memorisation = found.figures()
        self._log.write("memorisation", step=step, **self.memorisation)
        # not `warn`: the log has a line of its own of it, which the report shows
        logger.log(logging.WARNING if found.unexpected else logging.INFO, found.told())

    def refresh_page(self) -> None:
        """Write report.html anew."""
        if self.engine.ranks.is_main:
            began = time.monotonic()
            refresh_report(self.output_dir, self._log, self.state.global_step)
            self._pace.written(began, time.monotonic())

    # ------------------------------------------------------------------------------------------------------------- end

    def end(self, stop_signal: int | None, made: list[str]) -> dict:
        """Close the bar, write summary.json and the log's last line; returns the summary.

        Args:
            made: the last lines of the run, for who shows them later.
        """
        self._bar.close()
        config, engine = self.config, self.engine
        summary = {
            "images_per_second": self.meter.steady_images_per_second(),
            "iterations_per_second": self.meter.steady_steps_per_second(),
            "steady_state_note": self.meter.steady_reason,
            "final_loss": self.final_loss,
            "duration_seconds": time.perf_counter() - self._started,
            "encode_seconds": self._encoded.facts.seconds,
            "start_seconds": {phase: round(seconds, 3) for phase, seconds in self.phases.seconds.items()},
            "global_step": self.state.global_step,
            "world_size": engine.ranks.world_size,
            "batch_size": config.train_batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "resolution": config.side,
            "mixed_precision": config.mixed_precision,
            "train_mode": config.train_mode,
            "device": devices.device_name(engine.device),
            "device_type": engine.device.type,
            "peak_memory_bytes": devices.peak_memory_bytes(engine.device),
            "flops_per_image": self.flops_per_image,
            "skipped_updates": engine.guard.total,
            "memorisation": self.memorisation,
            "interrupted_by_signal": stop_signal,
            "made": made,
        }
        if engine.ranks.is_main:
            text = json.dumps(summary, indent=1).encode()
            write_atomic(self.output_dir / "summary.json", lambda handle: handle.write(text))
            self._log.write("end", step=self.state.global_step, summary=summary)
            self.refresh_page()
        return summary


def configure_logging(main: bool) -> None:
    """One line a message with its time; other ranks than the first tell warnings only."""
    level = logging.INFO if main else logging.WARNING
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=level, force=True)
    for noisy in ("httpx", "DeepSpeed", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def made_lines(config: TrainConfig, result: Path) -> list[str]:
    """The last lines of a run that was not stopped: what it made, and how to draw with it."""
    output_dir, mode = Path(config.output_dir), config.train_mode
    script = "infer_sana_text2img_lora_bf16.py" if mode == "lora" else "infer_sana_text2img_bf16.py"
    model = str(output_dir) if mode == "full" else config.pretrained_model_name_or_path
    words = [python_word(), short_path(KIT / script), "--model_path", model]
    words += ["--lora_weights", str(output_dir)] if mode == "lora" else []
    if mode == "controlnet":
        words += ["--controlnet", str(output_dir), "--control_image"]
        words += [next(iter(config.validation_control_image), "CONTROL_IMAGE.png")]
    if mode != "lora":
        words += ["--height", str(config.side), "--width", str(config.side)]
        if config.complex_human_instruction != "default":
            words += ["--complex_human_instruction", config.complex_human_instruction]
    words += ["--prompt", next(iter(config.validation.prompts), None) or config.instance_prompt or "YOUR PROMPT"]
    return [
        f"{ {'lora': config.adapter.kind, 'full': 'model', 'controlnet': 'ControlNet'}[mode] }: {result}",
        f"report: {output_dir / 'report.html'}",
        f"model card: {output_dir / 'README.md'}   settings: {output_dir / RUN_FILE}",
        f"{DRAW_WITH_IT}{shlex.join(words)}",
    ]


def summary_line(summary: dict) -> str:
    """A run's figures in one line."""
    rate, loss = summary["images_per_second"], summary["final_loss"]
    shown = f"{rate:.2f} images/s" if rate else f"no steady state ({summary['steady_state_note']})"
    return (
        f"steps {summary['global_step']}, {shown}, final loss {loss if loss is None else round(loss, 4)}, duration"
        f" {summary['duration_seconds']:.1f} s (encoding {summary['encode_seconds']:.1f} s)"
    )
