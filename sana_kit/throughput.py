"""How fast a run is: seconds of a start's phases, images and steps per second. Nothing here imports torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
    def paused(self) -> Iterator[None]:
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
