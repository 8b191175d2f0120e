"""Curves, marks and events of a training log, as the report page draws them."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence

from sana_kit.runlog import RunLog, finite_number

_CHART_POINTS = 1600  # per chart; more cannot be seen on any screen


@dataclasses.dataclass(frozen=True)
class Chart:
    """One chart of a logged figure.

    Attributes:
        key: the figure's name in the log; scale: what its values are multiplied by.
        unit: of the vertical axis, as it is labelled.
        zero: whether the axis begins at zero; log: whether it is logarithmic where the values span a decade.
    """

    key: str
    title: str
    note: str
    unit: str
    color: str
    scale: float = 1.0
    zero: bool = True
    log: bool = False


CHARTS = (
    Chart("loss", "Loss", "", "mean squared error", "--accent", zero=False, log=True),
    Chart("learning_rate", "Learning rate", "", "learning rate", "--blue"),
    Chart("images_per_second", "Images per second", "all processes together", "images/s", "--green"),
    Chart("peak_memory_bytes", "Peak memory", "per process", "GiB", "--amber", scale=2.0**-30),
    Chart("mfu", "Model FLOPs utilisation", "of the devices' peak", "%", "--blue", scale=100.0),
    Chart("grad_norm", "Gradient norm", "before clipping", "L2 norm", "--accent"),
)

# event -> (label, CSS colour, dashed, tick at the bottom only, lane): marks of one step stand in lanes of their own
_MARKS = {
    "resume": ("resume", "--blue", True, False, 0),
    "warning": ("warning", "--amber", False, False, 1),
    "non_finite": ("loss not finite", "--red", False, False, 2),
    "validation": ("validation", "--soft", False, True, 0),
    "checkpoint": ("checkpoint", "--green", False, True, 1),
}


def smooth(values: Sequence[float | None], window: float | None = None) -> list[float | None]:
    """Moving average over about `window` values around each (default a fortieth of all, at least 3); gaps stay gaps.

    Centred, so that the line follows the raw values: an average of the past alone lies above a falling loss.
    """
    half = int((max(3.0, len(values) / 40) if window is None else window) // 2)
    sums, counts = [0.0], [0]
    for value in values:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    result: list[float | None] = []
    for index, value in enumerate(values):
        reach = min(half, index, len(values) - 1 - index)
        first, last = index - reach, index + reach + 1
        mean = (sums[last] - sums[first]) / max(1, counts[last] - counts[first])
        result.append(None if value is None else mean)
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


def thin_series(chart: Chart, steps: Sequence[int], series: list[dict]) -> dict:
    """The data of one chart for the page's script: at most about `_CHART_POINTS` points, six digits each.

    Args:
        steps: the global steps of the values.
        series: [{"label", "y", "color", "width"}]; the first one decides which points are kept.
    """
    keep = thin(series[0]["y"], _CHART_POINTS)
    for item in series:
        item["y"] = [None if item["y"][i] is None else float(f"{item['y'][i]:.6g}") for i in keep]
    values = [value for item in series for value in item["y"] if value is not None]
    log = chart.log and min(values) > 0 and max(values) >= 10 * min(values)
    kept = [steps[i] for i in keep]
    return {"id": chart.key, "x": kept, "series": series, "zero": chart.zero, "log": log, "unit": chart.unit}


def chart_series(run: RunLog) -> tuple[list[dict], list[dict], list[str]]:
    """(chart headings for the page, chart data for its script, notes on what is not shown)."""
    headings, charts, notes = [], [], []
    steps = [line.get("step", 0) for line in run.steps]
    for chart in CHARTS:
        found = [finite_number(line.get(chart.key)) for line in run.steps]
        values = [None if value is None else value * chart.scale for value in found]
        if all(value is None for value in values):
            continue
        label, note = chart.title.lower(), chart.note
        series = [{"label": label, "y": values, "color": chart.color, "width": 1.5}]
        if chart.key == "loss":
            raw = {"label": label, "y": values, "color": "--faint", "width": 1}
            line = {"label": "smoothed", "y": smooth(values), "color": chart.color, "width": 2.25, "span": True}
            series, note = [raw, line], "raw, and a moving average"
        headings.append({"id": chart.key, "title": chart.title, "note": note})
        charts.append(thin_series(chart, steps, series))
    for heading, held_out in held_out_charts(run):
        headings.append(heading)
        charts.append(held_out)
    shown = {chart["id"] for chart in charts}
    if charts and len(steps) > _CHART_POINTS:
        notes.append(f"Drawn: about {_CHART_POINTS} of {len(steps)} logged points, highest and lowest kept.")
    if charts and "mfu" not in shown:
        notes.append("Model FLOPs utilisation is not shown: the peak of this device is not known and none was given.")
    return headings, charts, notes


_BAND_COLORS = ("--red", "--amber", "--green", "--blue")  # the noisiest time steps first


def held_out_charts(run: RunLog) -> list[tuple[dict, dict]]:
    """(heading, data) of the held-out loss, whole and by band of time steps; none for a run without one."""
    if not run.held_out:
        return []
    steps = [line["step"] for line in run.held_out]

    def column(part: str, band: int | None = None) -> list[float | None]:
        found = [line.get(part) or {} for line in run.held_out]
        values = [part.get("loss") if band is None else (part.get("bands") or [])[band : band + 1] for part in found]
        return [finite_number(value[0] if isinstance(value, list) and value else value) for value in values]

    def series(label: str, values: list[float | None], color: str) -> dict:
        return {"label": label, "y": values, "color": color, "width": 2, "span": True}

    unit, found = "mean squared error", []
    lines = [series("weights", column("raw"), "--accent")]
    if any("ema" in line for line in run.held_out):
        lines.append(series("their average", column("ema"), "--blue"))
    for key, title, note, shown in (
        ("held_out", "Held-out loss", "images that are not trained on, the same noise each time", lines),
        (
            "held_out_bands",
            "Held-out loss by time steps",
            "a quarter of them each, the noisiest first",
            [series(f"quarter {band + 1}", column("raw", band), color) for band, color in enumerate(_BAND_COLORS)],
        ),
    ):
        if any(value is not None for line in shown for value in line["y"]):
            chart = Chart(key, title, note, unit, "--accent", zero=False)
            found.append(({"id": key, "title": title, "note": note}, thin_series(chart, steps, shown)))
    return found


def over_fitting(run: RunLog) -> str | None:
    """A sentence where the held-out loss has risen beyond chance since its lowest value; None otherwise."""
    part = "ema" if run.held_out and "ema" in run.held_out[-1] else "raw"
    found = [(line["step"], line.get(part) or {}) for line in run.held_out]
    losses = [(loss, step) for step, entry in found if (loss := finite_number(entry.get("loss"))) is not None]
    if len(losses) < 3:
        return None
    (best, step), (last, _) = min(losses), losses[-1]
    margin = finite_number(found[-1][1].get("half_width"))
    if margin is None or last - best <= margin:
        return None
    return (
        f"The held-out loss was lowest at step {step} ({shorten(best)}) and is {shorten(last)} now, more than chance"
        " explains: the run learns its images by heart. The weights of that step are in best/."
    )


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
        label, color, dash, tick, lane = _MARKS[kind]
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
                "lane": lane,
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
