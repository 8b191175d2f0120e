"""A run's own account: its log of JSON lines, written by the trainer, and read back for reports and cards.

Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any


def finite(value: Any, name: str = "", found: dict[str, str] | None = None) -> Any:
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

    def write(self, event: str, **fields: Any) -> None:
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

    def __exit__(self, *exception: object) -> None:
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
    memorisation: dict | None  # the comparison with training images at the end, see training/memorisation.py
    warnings: list[dict]
    resumes: list[dict]
    configs: list[dict]  # one per start or resume of the run as it stands
    end: dict | None
    duration_seconds: float  # of all sessions, without the time between them
    world_size: int | None
    damaged_lines: int
    repeated_steps: int  # logged steps that a resumed run made again

    @property
    def was_stopped(self) -> bool:
        """Whether the run ended because a signal asked it to, before its last step."""
        return ((self.end or {}).get("summary") or {}).get("interrupted_by_signal") is not None


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
    reader = _Reader()
    for line in lines:
        reader.take(line)
    return reader.result(damaged)


_REPEATABLE = ("validation", "held_out", "checkpoint")  # what a resumed run makes again


@dataclasses.dataclass
class _Reader:
    """The run as it stands after the lines that `take` was given, in their order."""

    steps: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    kinds: dict[str, list[dict[str, Any]]] = dataclasses.field(
        default_factory=lambda: {kind: [] for kind in (*_REPEATABLE, "warning", "resume")}
    )
    configs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    buckets: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    memorisation: dict[str, Any] | None = None
    end: dict[str, Any] | None = None
    world_size: int | None = None
    repeated: int = 0
    duration: float = 0.0  # of the sessions before this one
    begin: float | None = None  # when this session began and when it wrote its last line
    last: float | None = None

    def take(self, line: dict[str, Any]) -> None:
        event, now = line.get("event"), line.get("time")
        step = line["step"] if isinstance(line.get("step"), int) else 0
        if event in ("start", "resume"):
            self._end_session(now)
            if event == "start":
                self._begin_anew()
            else:
                self._go_back_to(step)
                self.kinds["resume"].append({**line, "step": step})
            self.end = self.memorisation = None
            self.world_size = line.get("world_size", self.world_size)
            if isinstance(line.get("config"), dict):
                self.configs.append(line["config"])
        elif event == "step":
            self.steps[step] = line
        elif event in self.kinds:
            self.kinds[event].append({**line, "step": step})
        elif event == "buckets":
            self.buckets = line.get("rows") or []
        elif event == "memorisation":
            self.memorisation = line
        elif event == "end":
            self.end = line
        if isinstance(now, (int, float)):
            self.begin = now if self.begin is None else self.begin
            self.last = now

    def _end_session(self, now: float | None) -> None:
        if self.begin is not None and self.last is not None:
            self.duration += max(0.0, self.last - self.begin)
        self.begin = self.last = now

    def _begin_anew(self) -> None:
        self.steps, self.configs, self.repeated, self.duration = {}, [], 0, 0.0
        for lines in self.kinds.values():
            lines.clear()

    def _go_back_to(self, step: int) -> None:
        self.repeated += sum(number > step for number in self.steps)
        self.steps = {number: line for number, line in self.steps.items() if number <= step}
        for kind in _REPEATABLE:
            self.kinds[kind] = [line for line in self.kinds[kind] if line.get("step", 0) <= step]

    def result(self, damaged_lines: int) -> RunLog:
        self._end_session(None)
        return RunLog(
            steps=[self.steps[number] for number in sorted(self.steps)],
            validations=self.kinds["validation"],
            checkpoints=self.kinds["checkpoint"],
            held_out=self.kinds["held_out"],
            buckets=self.buckets,
            memorisation=self.memorisation,
            warnings=self.kinds["warning"],
            resumes=self.kinds["resume"],
            configs=self.configs,
            end=self.end,
            duration_seconds=self.duration,
            world_size=self.world_size,
            damaged_lines=damaged_lines,
            repeated_steps=self.repeated,
        )


def finite_number(value: Any) -> float | None:
    """A finite float, or None for what a log may hold instead (null, "nan", a bare NaN)."""
    try:
        value = float(value)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None
