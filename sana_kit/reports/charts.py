"""Curves, marks and events of a training log, as the report page draws them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from sana_kit.runlog import RunLog, finite_number

_CHART_POINTS = 1600  # per chart; more cannot be seen on any screen


_MARKS = {  # event -> (label, CSS colour, dashed, tick at the bottom only)
    "resume": ("resume", "--blue", True, False),
    "warning": ("warning", "--amber", False, False),
    "non_finite": ("loss not finite", "--red", False, False),
    "validation": ("validation", "--soft", False, True),
    "checkpoint": ("checkpoint", "--green", False, True),
}


def smooth(values: Sequence[float | None], window: float) -> list[float | None]:
    """Exponential moving average over about `window` values, without the pull of its start; gaps stay gaps."""
    decay, total, weight, result = 1.0 - 1.0 / max(1.0, window), 0.0, 0.0, []
    for value in values:
        if value is None:
            result.append(None)
            continue
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        result.append(total / weight if weight else value)
    return result


def thin(values: Sequence[float | None], limit: int) -> list[int]:
    """At most about `limit` indices of `values` that keep its look: low and high of each stretch, first, last."""
    if len(values) <= limit:
        return list(range(len(values)))
    buckets, keep = max(1, limit // 2), {0, len(values) - 1}
    for bucket in range(buckets):
        begin, stop = bucket * len(values) // buckets, (bucket + 1) * len(values) // buckets
        there = [index for index in range(begin, stop) if values[index] is not None]
        if there:
            keep.add(min(there, key=values.__getitem__))
            keep.add(max(there, key=values.__getitem__))
        else:
            keep.add(begin)  # a gap stays visible
    return sorted(keep)


def shorten(value: float | None, digits: int = 4) -> str:
    if value is None:
        return "–"
    if value == 0:
        return "0"
    return f"{value:.{digits}g}" if 1e-3 <= abs(value) < 1e6 else f"{value:.2e}"


def format_seconds(seconds: float) -> str:
    """'42 s', '3 min 20 s', '5 h 12 min'."""
    seconds = max(0.0, seconds)
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def chart_series(run: RunLog) -> tuple[list[dict], list[dict], list[str]]:
    """(chart headings for the page, chart data for its script, notes on what is not shown)."""
    headings, charts, notes = [], [], []

    def column(key: str, scale: float = 1.0) -> list[float | None]:
        values = [finite_number(line.get(key)) for line in run.steps]
        return [None if value is None else value * scale for value in values]

    numbers = [line.get("step", 0) for line in run.steps]

    def add(key: str, title: str, note: str, series: list[dict], zero: bool) -> None:
        if all(value is None for value in series[0]["y"]):
            return
        keep = thin(series[0]["y"], _CHART_POINTS)
        for item in series:
            item["y"] = [None if item["y"][i] is None else float(f"{item['y'][i]:.6g}") for i in keep]
        headings.append({"id": key, "title": title, "note": note})
        charts.append({"id": key, "x": [numbers[i] for i in keep], "series": series, "zero": zero})

    losses = column("loss")
    window = max(5.0, len(losses) / 40)
    raw = {"label": "loss", "y": losses, "color": "--faint", "width": 1}
    smoothed = {"label": "smoothed", "y": smooth(losses, window), "color": "--accent", "width": 2.25, "span": True}
    add("loss", "Loss", f"raw, and averaged over about {window:.0f} logged values", [raw, smoothed], zero=False)
    for key, scale, title, note, color, zero in (
        ("learning_rate", 1.0, "Learning rate", "", "--blue", True),
        ("images_per_second", 1.0, "Images per second", "all processes together", "--green", True),
        ("peak_memory_bytes", 2.0**-30, "Peak memory", "GiB per process", "--amber", True),
        ("mfu", 100.0, "Model FLOPs utilisation", "% of the devices' peak", "--blue", True),
        ("grad_norm", 1.0, "Gradient norm", "before clipping", "--accent", True),
    ):
        series = {"label": key.replace("_", " "), "y": column(key, scale), "color": color, "width": 1.5}
        add(key, title, note, [series], zero)
    shown = {chart["id"] for chart in charts}
    if charts and len(numbers) > _CHART_POINTS:
        notes.append(f"Drawn: about {_CHART_POINTS} of {len(numbers)} logged points, highest and lowest kept.")
    if charts and "mfu" not in shown:
        notes.append("Model FLOPs utilisation is not shown: the peak of this device is not known and none was given.")
    return headings, charts, notes


def _event_text(kind: str, line: dict) -> str:
    if kind == "warning":
        return str(line.get("message", ""))
    if kind == "checkpoint":
        seconds = finite_number(line.get("seconds"))
        return f"{line.get('path', '')}" + (f" (saved in {format_seconds(seconds)})" if seconds is not None else "")
    if kind == "validation":
        return f"{len(line.get('files') or [])} validation image(s)"
    if kind == "resume":
        return f"on {line.get('world_size', '?')} process(es)"
    return "the loss was not finite"


def marks_and_events(run: RunLog) -> tuple[list[dict], list[dict], list[dict], int]:
    """(marks for the loss chart, legend with counts, table rows newest last, table rows left out)."""
    broken = [
        line
        for line in run.steps
        if finite_number(line.get("loss")) is None and ("loss" in line or "non_finite" in line)
    ]
    sources = {
        "resume": run.resumes,
        "warning": run.warnings,
        "non_finite": broken,
        "validation": run.validations,
        "checkpoint": run.checkpoints,
    }
    marks, legend, events = [], [], []
    for kind, lines in sources.items():
        label, color, dash, tick = _MARKS[kind]
        if not lines:
            continue
        legend.append({"label": label, "color": color, "count": len(lines)})
        for line in lines:
            text = _event_text(kind, line)
            mark = {
                "step": line.get("step", 0),
                "color": color,
                "dash": dash,
                "tick": tick,
                "text": f"{label}: {text}",
            }
            marks.append(mark)
            now = line.get("time")
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now)) if isinstance(now, (int, float)) else ""
            events.append(
                {
                    "step": line.get("step", 0),
                    "kind": label,
                    "text": text,
                    "when": when,
                    "time": finite_number(now) or 0,
                }
            )
    events.sort(key=lambda event: (event["time"], event["step"]))
    left_out = max(0, len(events) - 200)
    # Thousands of equal marks would only blacken the chart; the table still tells the latest.
    by_color: dict[str, list[dict]] = {}
    for mark in marks:
        by_color.setdefault(mark["color"], []).append(mark)
    marks = [mark for group in by_color.values() for mark in group[:: max(1, math.ceil(len(group) / 150))]]
    return marks, legend, events[left_out:], left_out
