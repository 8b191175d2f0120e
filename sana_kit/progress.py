"""Progress bars of a run's phases: tqdm's, with images/s beside steps. Nothing here imports torch."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm


class Bar(tqdm):
    """tqdm with images/s beside steps, and with whole lines instead of a redrawn one without a terminal."""

    images_per_unit: float | None = None
    delay: float

    @property
    def format_dict(self) -> dict[str, Any]:
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
    def status_printer(file: TextIO) -> Callable[[str], None]:
        if file.isatty():
            return tqdm.status_printer(file)
        last: list[str] = []

        def print_line(text: str) -> None:
            text = text.strip()
            if text and last != [text]:  # closing repeats the last state
                last[:] = [text]
                file.write(text + "\n")
                file.flush()

        return print_line

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside (a validation, a checkpoint) counts neither in the rate nor in the time left."""
        begin = time.time()  # the clock of tqdm itself
        try:
            yield
        finally:
            if not self.disable:
                self.start_t += time.time() - begin
                self.last_print_t += time.time() - begin

    def set_postfix(self, ordered_dict: Any = None, refresh: bool = True, **kwargs: Any) -> None:
        # A refresh would write a line of its own each time; without a terminal the interval decides.
        if not self.disable:
            super().set_postfix(ordered_dict, refresh=refresh and self.fp.isatty(), **kwargs)

    def moveto(self, n: int) -> None:
        if self.fp.isatty():  # a bar inside another has its own line on a terminal; a log has no cursor to move
            super().moveto(n)

    def close(self) -> None:
        if not self.disable and not self.fp.isatty() and self._time() >= self.start_t + self.delay:
            self._ema_dt = lambda: None  # the last line tells the average of the whole phase, as tqdm's own does
            self.display()
            self.delay = math.inf  # tqdm then closes without moving the cursor
        super().close()

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        if msg == "":  # tqdm's way to wipe a finished bar; lines of a log stay
            if not self.fp.isatty():
                return True
        return super().display(msg, pos)


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
    file: TextIO | None = None,
    after: float = 0.0,
) -> Bar:
    """A tqdm bar for one phase (encoding, training, validation, saving): `.update(n)`, `.set_postfix()`, `.close()`;
    `with bar.paused():` around what is no part of the phase.

    Silent on every process but the main one. On a terminal a redrawn bar; elsewhere (a log file, nohup) one whole
    line at most every `plain_interval` seconds, and one at the end.

    Args:
        total: units to do; initial: units done before (resume), which the rate leaves out.
        unit: what is counted. With "image" the rate itself is in images/s; with steps give `images_per_unit`
            (images of one step over all processes) to see images/s and the time left as well.
        file: default standard error.
        after: seconds before anything is shown; of a phase that has ended by then, nothing is.
    """
    file = sys.stderr if file is None else file
    plain = not file.isatty()
    count = "{desc}: {n_fmt}/{total_fmt} " + unit + "s" if total is not None else "{desc}: {n_fmt} " + unit + "s"
    times = "[{elapsed}<{remaining}, {speed}{images}{postfix}]"
    bar = Bar(
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
        delay=max(after, 1e-9) if plain else after,  # a plain log needs no line "0 of N"
        bar_format=f"{count} {times}"
        if plain or total is None
        else "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} " + times,
    )
    bar.images_per_unit = images_per_unit
    return bar
