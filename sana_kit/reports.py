"""What a run tells: throughput, the JSON-lines log, progress bars, contact sheets, the result block, report pages.

Used by the trainer and the inference scripts. By hand, from an output folder:
    python -m sana_kit.reports OUTPUT_DIR                   writes OUTPUT_DIR/report.html (training)
    python -m sana_kit.reports OUTPUT_DIR --gallery         writes OUTPUT_DIR/gallery.html (inference)
    python -m sana_kit.reports --result-block OUTPUT_DIR    prints and saves the result block (the bash launcher does)
Nothing here imports torch, so that these commands start at once.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

# ---------------------------------------------------------------------------------------------------------------------
# Throughput


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


# ---------------------------------------------------------------------------------------------------------------------
# JSON lines


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


# ---------------------------------------------------------------------------------------------------------------------
# Console


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
            return {**figures, "images": f", {images:.3g} images/s" if images else ""}

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
    """A tqdm bar for one phase (encoding, training, validation, saving): `.update(n)`, `.set_postfix()`, `.close()`.

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
    times = "[{elapsed}<{remaining}, {rate_fmt}{images}{postfix}]"
    bar_class = _bar_class()
    bar = bar_class(
        total=total,
        desc=description,
        unit=unit if unit.startswith(" ") else " " + unit,
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


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_atomic(path: str | os.PathLike, write: Callable) -> Path:
    """Call `write(binary file)` on a temporary neighbour, then rename it to `path`: never half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Contact sheets

# Fonts with more than ASCII, as distributions, macOS and Windows install them; Pillow's own font is the fallback and
# lacks even accents. Prompts may be Chinese: where no CJK font is installed its characters are drawn as boxes.
_WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "PingFang.ttc",
    "msyh.ttc",
    "Arial Unicode.ttf",
    "DejaVuSans.ttf",
)


@lru_cache(maxsize=16)
def _font(size: int, wide: bool):
    from PIL import ImageFont

    for name in _WIDE_FONTS if wide else ():
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _font_for(texts: Sequence[str], size: int):
    return _font(size, any(ord(character) > 0x7E for text in texts for character in text))


def wrap_text(text: str, font, width: int, max_lines: int) -> list[str]:
    """`text` in lines of at most `width` pixels, broken at spaces, else inside words; "…" where it was cut."""
    lines, line = [], ""
    for word in text.split():
        candidate = f"{line} {word}" if line else word
        if font.getlength(candidate) <= width:
            line = candidate
            continue
        if line:
            lines.append(line)
        line = ""
        for character in word:  # a word longer than a line, or a script without spaces
            if line and font.getlength(line + character) > width:
                lines.append(line)
                line = ""
            line += character
    lines.append(line)
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = lines[: max_lines - 1] + [last.rstrip() + "…"]
    return lines


def contact_sheet(
    images: Sequence,
    labels: Sequence[str] | None,
    path: str | os.PathLike,
    columns: int,
    title: str | None = None,
    row_labels: Sequence[str] | None = None,
    cell_size: int | None = None,
) -> Path:
    """One picture of all pictures, row by row, each over its label; written atomically.

    Args:
        images: PIL images or paths, of any sizes; each is scaled to fit its cell, never cropped.
        labels: one text per image, wrapped to at most three lines; None for none.
        path: .png, .jpg or .webp.
        columns: pictures per row.
        row_labels: one text per row, to the left of it (a prompt whose seeds fill the row).
        cell_size: pixels of the longer side of a cell; default the largest picture's, at most 512.

    Raises:
        ValueError: no image, or numbers of labels, rows and images that do not fit one another.
    """
    from PIL import Image, ImageDraw

    rows = math.ceil(len(images) / columns) if columns > 0 else 0
    problems = []
    if not images:
        problems.append("no image was given")
    if columns < 1:
        problems.append(f"columns={columns}: must be at least 1")
    if labels is not None and len(labels) != len(images):
        problems.append(f"{len(labels)} labels for {len(images)} images")
    if row_labels is not None and columns > 0 and len(row_labels) != rows:
        problems.append(f"{len(row_labels)} row labels for {rows} rows")
    if problems:
        raise ValueError("contact_sheet: " + "; ".join(problems) + ".")
    columns = min(columns, len(images))

    def opened(image):
        if isinstance(image, Image.Image):
            return image
        return Image.open(image)  # lazily: only the header is read here

    sizes = [opened(image).size for image in images]
    cell = cell_size or min(512, max(max(size) for size in sizes))
    scales = [cell / max(size) for size in sizes]
    cell_width = max(max(1, round(size[0] * scale)) for size, scale in zip(sizes, scales, strict=True))
    cell_height = max(max(1, round(size[1] * scale)) for size, scale in zip(sizes, scales, strict=True))
    cell_width = max(cell_width, 96)  # room for a word of a label under a very small picture

    text_size = max(12, round(cell_width / 22))
    gap = max(8, cell_width // 32)
    font = _font_for([*(labels or []), *(row_labels or [])], text_size)
    line_height = round(text_size * 1.35)
    wrapped = [wrap_text(label, font, cell_width, 3) for label in labels] if labels is not None else []
    side = max(140, cell_width * 3 // 4) if row_labels is not None else 0
    label_heights = [
        max((len(lines) for lines in wrapped[row * columns : (row + 1) * columns]), default=0) * line_height
        for row in range(rows)
    ]
    row_heights = [cell_height + (height + gap // 2 if height else 0) for height in label_heights]

    width = gap + (side + gap if side else 0) + columns * (cell_width + gap)
    title_font = _font_for([title or ""], round(text_size * 1.5))
    title_lines = wrap_text(title, title_font, width - 2 * gap, 3) if title else []
    title_height = len(title_lines) * round(line_height * 1.5) + (gap if title_lines else 0)
    height = gap + title_height + sum(row_heights) + gap * rows

    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    y = gap
    for line in title_lines:
        draw.text((gap, y), line, fill="#111", font=title_font)
        y += round(line_height * 1.5)
    y = gap + title_height
    for row in range(rows):
        x = gap
        if side:
            for number, line in enumerate(wrap_text(row_labels[row], font, side, max(1, cell_height // line_height))):
                draw.text((x, y + number * line_height), line, fill="#111", font=font)
            x += side + gap
        for index in range(row * columns, min((row + 1) * columns, len(images))):
            picture = opened(images[index]).convert("RGB")
            size = tuple(max(1, round(side_length * scales[index])) for side_length in sizes[index])
            if size != picture.size:
                enlarge = size[0] > picture.size[0]
                picture = picture.resize(size, Image.Resampling.BICUBIC if enlarge else Image.Resampling.LANCZOS)
            sheet.paste(picture, (x + (cell_width - size[0]) // 2, y + (cell_height - size[1]) // 2))
            for number, line in enumerate(wrapped[index] if wrapped else ()):
                draw.text((x, y + cell_height + gap // 2 + number * line_height), line, fill="#444", font=font)
            x += cell_width + gap
        y += row_heights[row] + gap
    kind = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(Path(path).suffix.lower())
    if kind is None:
        raise ValueError(f"contact_sheet: {path}: the name must end in .png, .jpg or .webp.")
    return write_atomic(path, lambda file: sheet.save(file, kind, quality=90))


# ---------------------------------------------------------------------------------------------------------------------
# The result block of the bash launcher


def _result_line(value, digits: int, reason: str | None) -> str:
    if isinstance(value, (int, float)) and math.isfinite(value):
        return f"{value:.{digits}f}"
    return f"n/a ({reason})" if reason else "n/a"


def case_name(summary: dict) -> str:
    """`Sana_lora_bs8_8p_npu`: train mode, batch size per process, processes and device kind of a run's summary.

    Raises:
        ValueError: the summary lacks one of them.
    """
    missing = [key for key in ("batch_size", "world_size", "device") if summary.get(key) is None]
    if missing:
        raise ValueError(f"the summary lacks {', '.join(missing)}: it was not written by this kit's trainer.")
    mode, device = summary.get("train_mode") or "lora", str(summary["device"]).partition(":")[0]
    return f"Sana_{mode}_bs{summary['batch_size']}_{summary['world_size']}p_{device}"


def format_result_block(summary: dict, case_name: str) -> str:
    """The figures that the reference kit's launcher ends with, from the trainer's own summary.

    Args:
        summary: the content of summary.json: images_per_second and iterations_per_second of the steady state (with
            `steady_reason` where they are null), final_loss, duration_seconds.
        case_name: see `case_name()`.
    """
    reason = summary.get("steady_reason")
    lines = [
        "------------------ Final result ------------------",
        f"Average it/s: {_result_line(summary.get('iterations_per_second'), 4, reason)}",
        f"Final Performance images/sec: {_result_line(summary.get('images_per_second'), 3, reason)}",
        f"Final Train Loss: {_result_line(summary.get('final_loss'), 6, None)}",
        f"E2E Training Duration sec: {_result_line(summary.get('duration_seconds'), 1, None)}",
        f"CaseName: {case_name}",
    ]
    return "\n".join(lines) + "\n"


def write_result_block(output_dir: str | os.PathLike) -> Path:
    """Print the result block of the run in `output_dir` and save it there as `{CaseName}.log`; returns that path.

    Raises:
        ValueError: no summary.json (the run did not end), or one that is not a run's.
    """
    path = Path(output_dir) / "summary.json"
    if not path.is_file():
        raise ValueError(f"{path}: not there. The trainer writes it at its end; the run did not get so far.")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}).") from error
    try:
        name = case_name(summary)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    block = format_result_block(summary, name)
    print(block, end="")
    return write_atomic(Path(output_dir) / f"{name}.log", lambda file: file.write(block.encode()))


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main(arguments: Sequence[str] | None = None) -> int:
    import argparse

    parser = argparse.ArgumentParser(prog="python -m sana_kit.reports", description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", help="output folder of a training run or of an inference script")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--result-block", action="store_true", help="print and save the run's result block")
    options = parser.parse_args(arguments)
    try:
        if options.result_block:
            write_result_block(options.output_dir)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
