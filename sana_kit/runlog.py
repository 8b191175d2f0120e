"""A run's own account: throughput meter, phases, JSON-lines log, progress bars.

Used by the trainer and the inference scripts; sana_kit/reports/ reads the log back. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path


class PhaseClock:
    """Seconds of the phases of a start, one after the other.

    Args:
        started: the clock's reading when the first phase began.
        clock: seconds as a float, never going back.
    """

    def __init__(self, started: float, clock: Callable[[], float] = time.perf_counter):
        self.clock, self._last = clock, started
        self.seconds: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        """End the current phase under this name; a name used again adds up."""
        now = self.clock()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        """e.g. '9.1 s: imports 4.0, images 1.1, model 4.0'."""
        parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s: {parts}"


class ThroughputMeter:
    """Images per second of a training run, without its pauses and without its first lap.

    It reads a host clock and never touches the device. A kernel's time therefore counts where the host waits for it,
    so call `lap()` right after the host has read a value of the step (the logged loss): laps then hold whole steps.

    Args:
        images_per_step: images that one optimizer step consumes over all processes
            (batch size x processes x accumulation).
        clock: seconds as a float, never going back.
    """

    def __init__(self, images_per_step: int, clock: Callable[[], float] = time.perf_counter):
        if images_per_step < 1:
            raise ValueError(f"images_per_step={images_per_step}: must be at least 1.")
        self.images_per_step, self.clock = images_per_step, clock
        self.steps = 0
        self._begin: float | None = None
        self._paused_seconds, self._paused_since, self._pause_depth = 0.0, 0.0, 0
        self._marks: list[tuple[int, float]] = []  # (steps, active seconds) at start and at the ends of laps
        self._last_step_seconds = 0.0

    def start(self) -> None:
        """Begin to measure; steps before it are an error."""
        self._begin = self.clock()
        self.steps, self._paused_seconds, self._pause_depth, self._last_step_seconds = 0, 0.0, 0, 0.0
        self._marks = [(0, 0.0)]

    @property
    def active_seconds(self) -> float:
        """Seconds since `start()` without the pauses."""
        if self._begin is None:
            raise RuntimeError("ThroughputMeter: call start() first.")
        now = self._paused_since if self._pause_depth else self.clock()
        return now - self._begin - self._paused_seconds

    def step(self, n: int = 1) -> None:
        """Count n optimizer steps that have just been issued."""
        self._last_step_seconds = self.active_seconds
        self.steps += n

    @contextmanager
    def paused(self):
        """What happens inside (a checkpoint, a validation) counts as no training time; may be nested."""
        if self._begin is None:
            raise RuntimeError("ThroughputMeter: call start() first.")
        if self._pause_depth == 0:
            self._paused_since = self.clock()
        self._pause_depth += 1
        try:
            yield
        finally:
            self._pause_depth -= 1
            if self._pause_depth == 0:
                self._paused_seconds += self.clock() - self._paused_since

    def lap(self) -> float | None:
        """End the current lap; images per second within it, None when it held no step."""
        steps, seconds = self.steps, self.active_seconds
        lap_steps, lap_seconds = steps - self._marks[-1][0], seconds - self._marks[-1][1]
        if lap_steps == 0:
            return None
        self._marks.append((steps, seconds))
        return lap_steps * self.images_per_step / lap_seconds if lap_seconds > 0 else None

    def steady_images_per_second(self) -> float | None:
        """Images per second from the end of the first lap to the end of the last one.

        The first lap holds what happens once (compiling kernels, filling caches, starting workers). None when the run
        has fewer than two laps with steps in them: `steady_reason` then says why, and nothing stands in for it.
        """
        rate = self.steady_steps_per_second()
        return None if rate is None else rate * self.images_per_step

    def steady_steps_per_second(self) -> float | None:
        """Optimizer steps per second of the same stretch as `steady_images_per_second`."""
        if self.steady_reason is not None:
            return None
        (first_steps, first_seconds), (last_steps, last_seconds) = self._marks[1], self._marks[-1]
        return (last_steps - first_steps) / (last_seconds - first_seconds)

    @property
    def steady_reason(self) -> str | None:
        """Why there is no steady-state figure; None when there is one."""
        laps = len(self._marks) - 1
        if laps < 2:
            return (
                f"the run is too short for a steady state: {self.steps} step(s) in {max(laps, 0)} lap(s), of which"
                " the first (warm-up) is left out. Run more steps, or log more often."
            )
        if self._marks[-1][1] <= self._marks[1][1]:
            return "the clock did not move between the first and the last lap"
        return None

    @property
    def steps_per_second(self) -> float | None:
        """Optimizer steps per active second of the whole run, warm-up included; None before the first step."""
        seconds = max(self._last_step_seconds, self._marks[-1][1]) if self._marks else 0.0
        return self.steps / seconds if self.steps and seconds > 0 else None

    @property
    def images_per_second(self) -> float | None:
        """Images per active second of the whole run, warm-up included; None before the first step."""
        return None if self.steps_per_second is None else self.steps_per_second * self.images_per_step


def finite(value, name: str = "", found: dict | None = None):
    """`value` with every NaN or infinity replaced by None (JSON has neither); `found` collects {name: "nan"}."""
    if isinstance(value, float) and not math.isfinite(value):
        if found is not None:
            found[name] = repr(value)
        return None
    if isinstance(value, dict):
        return {key: finite(item, f"{name}.{key}" if name else str(key), found) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item, f"{name}[{index}]", found) for index, item in enumerate(value)]
    return value


class JsonLinesLog:
    """A log of one JSON object a line; each line is written whole, at once, by the main process only.

    A half-written last line (the process was killed, the disk was full) is cut off when the log is opened again and
    goes into a warning line instead. NaN and infinities become null, named under "non_finite", so that every line is
    JSON for every reader.

    Args:
        path: the file; its folder is made.
        main_process: False makes every call a no-op.
    """

    def __init__(self, path: str | os.PathLike, main_process: bool = True):
        self.path, self._file = Path(path), None
        if not main_process:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut = self._cut_half_line()
        self._file = open(self.path, "ab", buffering=0)
        if cut is not None:
            step, text = cut
            message = f"The last line of {self.path.name} was half-written and was cut off: {text[:200]!r}"
            self.write("warning", step=step, message=message)

    def _cut_half_line(self) -> tuple[int, str] | None:
        """Remove what follows the last newline unless it is a whole JSON object; (last step, removed text) or None."""
        if not self.path.exists() or self.path.stat().st_size == 0:
            return None
        with open(self.path, "r+b") as file:
            size, tail = file.seek(0, os.SEEK_END), b""
            while size and b"\n" not in tail:  # lines are short; read blocks from the end until one newline is seen
                block = min(65536, size)
                size -= block
                file.seek(size)
                tail = file.read(block) + tail
            half = tail.rpartition(b"\n")[2]
            if not half:
                return None
            try:
                whole = isinstance(json.loads(half), dict)
            except ValueError:
                whole = False
            file.seek(0, os.SEEK_END)
            if whole:
                file.write(b"\n")
                return None
            file.truncate(file.tell() - len(half))
        step = max((line["step"] for line in read_log(self.path)[0] if isinstance(line.get("step"), int)), default=0)
        return step, half.decode("utf-8", "replace")

    def write(self, event: str, **fields) -> None:
        """Append one line: {"event": event, "time": now in unix seconds, **fields}."""
        if self._file is None:
            return
        non_finite: dict[str, str] = {}
        line = finite({"event": event, "time": round(time.time(), 3), **fields}, found=non_finite)
        if non_finite:
            line["non_finite"] = non_finite
        self._file.write((json.dumps(line, ensure_ascii=False, default=str) + "\n").encode())

    def close(self) -> None:
        """Close the file; further writes do nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> JsonLinesLog:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def read_log(path: str | os.PathLike) -> tuple[list[dict], int]:
    """The objects of a JSON-lines file, and the number of lines that are none (cut off, damaged)."""
    lines, damaged = [], 0
    with open(path, "rb") as file:
        for raw in file:
            if not raw.strip():
                continue
            try:
                line = json.loads(raw)
            except ValueError:
                line = None
            if isinstance(line, dict):
                lines.append(line)
            else:
                damaged += 1
    return lines, damaged


@dataclasses.dataclass
class RunLog:
    """A training log as the run stands: where a resumed run repeated steps, the later run counts."""

    steps: list[dict]  # step lines, in order of step
    validations: list[dict]
    checkpoints: list[dict]
    held_out: list[dict]
    buckets: list[dict]  # of the run as it stands: width, height, images, lost, enlarged of each
    warnings: list[dict]
    resumes: list[dict]
    configs: list[dict]  # one per start or resume of the run as it stands
    end: dict | None
    duration_seconds: float  # of all sessions, without the time between them
    world_size: int | None
    damaged_lines: int
    repeated_steps: int  # logged steps that a resumed run made again


def load_run(path: str | os.PathLike) -> RunLog:
    """Read train_log.jsonl.

    A "start" line begins anew: what the file holds before it belongs to an earlier run in the same folder. A "resume"
    at step N takes back what was logged after step N, since the resumed run repeats it.

    Raises:
        ValueError: the file is missing or holds no event.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: not there. Name the output folder of a training run (it holds train_log.jsonl).")
    lines, damaged = read_log(path)
    if not lines:
        raise ValueError(f"{path}: holds no event.")
    repeatable = ("validation", "held_out", "checkpoint")
    kinds: dict[str, list[dict]] = {kind: [] for kind in (*repeatable, "warning", "resume")}
    steps: dict[int, dict] = {}
    configs, buckets, end, world_size, repeated = [], [], None, None, 0
    duration, begin, last = 0.0, None, None
    for line in lines:
        event, now = line.get("event"), line.get("time")
        step = line["step"] if isinstance(line.get("step"), int) else 0
        if event in ("start", "resume"):
            if begin is not None and last is not None:
                duration += max(0.0, last - begin)
            begin = last = now
            if event == "start":
                steps, configs, repeated, duration = {}, [], 0, 0.0
                for kind in kinds.values():
                    kind.clear()
            else:
                repeated += sum(1 for number in steps if number > step)
                steps = {number: item for number, item in steps.items() if number <= step}
                for kind in repeatable:
                    kinds[kind] = [item for item in kinds[kind] if item.get("step", 0) <= step]
                kinds["resume"].append({**line, "step": step})
            end, world_size = None, line.get("world_size", world_size)
            if isinstance(line.get("config"), dict):
                configs.append(line["config"])
        elif event == "step":
            steps[step] = line
        elif event in kinds:
            kinds[event].append({**line, "step": step})
        elif event == "buckets":
            buckets = line.get("rows") or []
        elif event == "end":
            end = line
        if isinstance(now, (int, float)):
            begin = now if begin is None else begin
            last = now
    if begin is not None and last is not None:
        duration += max(0.0, last - begin)
    return RunLog(
        steps=[steps[number] for number in sorted(steps)],
        validations=kinds["validation"],
        checkpoints=kinds["checkpoint"],
        held_out=kinds["held_out"],
        buckets=buckets,
        warnings=kinds["warning"],
        resumes=kinds["resume"],
        configs=configs,
        end=end,
        duration_seconds=duration,
        world_size=world_size,
        damaged_lines=damaged,
        repeated_steps=repeated,
    )


def finite_number(value) -> float | None:
    """A finite float, or None for what a log may hold instead (null, "nan", a bare NaN)."""
    try:
        value = float(value)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


@lru_cache(maxsize=1)
def _bar_class():
    from tqdm import tqdm

    class Bar(tqdm):
        """tqdm with images/s beside steps, and with whole lines instead of a redrawn one without a terminal."""

        images_per_unit = None

        @property
        def format_dict(self):
            figures = super().format_dict
            rate = figures["rate"]
            if rate is None and figures["elapsed"] > 0:
                rate = (figures["n"] - figures["initial"]) / figures["elapsed"]
            images = rate * self.images_per_unit if rate and self.images_per_unit else None
            unit, speed = self.unit, "-"
            if rate:
                speed = f"{rate:.3g} {unit}s/s" if rate >= 1 else f"{1 / rate:.3g} s/{unit}"
            return {**figures, "speed": speed, "images": f", {images:.3g} images/s" if images else ""}

        @staticmethod
        def status_printer(file):
            if file.isatty():
                return tqdm.status_printer(file)
            last = []

            def print_line(text):
                text = text.strip()
                if text and last != [text]:  # closing repeats the last state
                    last[:] = [text]
                    file.write(text + "\n")
                    file.flush()

            return print_line

        @contextmanager
        def paused(self):
            """What happens inside (a validation, a checkpoint) counts neither in the rate nor in the time left."""
            begin = time.time()  # the clock of tqdm itself
            try:
                yield
            finally:
                if not self.disable:
                    self.start_t += time.time() - begin
                    self.last_print_t += time.time() - begin

        def set_postfix(self, ordered_dict=None, refresh=True, **kwargs):
            # A refresh would write a line of its own each time; without a terminal the interval decides.
            if not self.disable:
                super().set_postfix(ordered_dict, refresh=refresh and self.fp.isatty(), **kwargs)

        def moveto(self, n):
            if self.fp.isatty():  # a bar inside another has its own line on a terminal; a log has no cursor to move
                super().moveto(n)

        def close(self):
            if not self.disable and not self.fp.isatty():
                self._ema_dt = lambda: None  # the last line tells the average of the whole phase, as tqdm's own does
                self.display()
                self.delay = math.inf  # tqdm then closes without moving the cursor
            super().close()

        def display(self, msg=None, pos=None):
            if msg == "":  # tqdm's way to wipe a finished bar; lines of a log stay
                if not self.fp.isatty():
                    return True
            return super().display(msg, pos)

    return Bar


def console_bar(
    total: int | None,
    description: str,
    *,
    unit: str = "step",
    initial: int = 0,
    images_per_unit: float | None = None,
    main_process: bool = True,
    leave: bool = True,
    plain_interval: float = 10.0,
    file=None,
):
    """A tqdm bar for one phase (encoding, training, validation, saving): `.update(n)`, `.set_postfix()`, `.close()`;
    `with bar.paused():` around what is no part of the phase.

    Silent on every process but the main one. On a terminal a redrawn bar; elsewhere (a log file, nohup) one whole
    line at most every `plain_interval` seconds, and one at the end.

    Args:
        total: units to do; initial: units done before (resume), which the rate leaves out.
        unit: what is counted. With "image" the rate itself is in images/s; with steps give `images_per_unit`
            (images of one step over all processes) to see images/s and the time left as well.
        file: default standard error.
    """
    file = sys.stderr if file is None else file
    plain = not file.isatty()
    count = "{desc}: {n_fmt}/{total_fmt} " + unit + "s" if total is not None else "{desc}: {n_fmt} " + unit + "s"
    times = "[{elapsed}<{remaining}, {speed}{images}{postfix}]"
    bar_class = _bar_class()
    bar = bar_class(
        total=total,
        desc=description,
        unit=unit,
        initial=initial,
        disable=not main_process,
        leave=leave,
        file=file,
        mininterval=plain_interval if plain else 0.2,
        maxinterval=plain_interval if plain else 10.0,
        miniters=1,
        dynamic_ncols=not plain,
        delay=1e-9 if plain else 0,  # a plain log needs no line "0 of N"
        bar_format=f"{count} {times}"
        if plain or total is None
        else "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} " + times,
    )
    bar.images_per_unit = images_per_unit
    return bar
