"""report.html of a training run and gallery.html of an inference run: one self-contained file each, without network.

Used by the trainer and the inference scripts through sana_kit.reports; by hand:
    python -m sana_kit.reports OUTPUT_DIR               report.html
    python -m sana_kit.reports OUTPUT_DIR --gallery     gallery.html
Jinja2 fills report_template.html; uPlot (MIT, sana_kit/uplot) draws the charts; pictures are WebP thumbnails.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .run_log import JsonLinesLog, RunLog, finite_number, load_run, read_log, write_atomic

# ---------------------------------------------------------------------------------------------------------------------
# Pictures

# A page stays under 10 MB: pictures get 6 MB, a third more in base64.
_PICTURE_BUDGET_BYTES = 6_000_000
_LADDER = ((512, 82), (384, 80), (320, 75), (256, 70), (192, 65), (128, 60))  # (longest side in pixels, WebP quality)


class _Thumbnails:
    """WebP thumbnails of pictures; kept in `folder`, if one is given, so that a page is rewritten in no time."""

    def __init__(self, folder: Path | None = None):
        self.folder, self.used, self.unreadable = folder, set(), []

    def _bytes(self, path: Path, side: int, quality: int) -> bytes:
        import hashlib
        import io

        from PIL import Image

        cached = None
        if self.folder is not None:
            status = path.stat()
            key = f"{path.resolve()}|{status.st_mtime_ns}|{status.st_size}|{side}|{quality}"
            cached = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.webp"
            self.used.add(cached.name)
            if cached.exists():
                return cached.read_bytes()
        with Image.open(path) as image:
            image = image.convert("RGB")
            image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", quality=quality, method=2)
        if cached is not None:
            write_atomic(cached, lambda file: file.write(buffer.getvalue()))
        return buffer.getvalue()

    def embed(self, paths: Sequence[Path]) -> dict[Path, dict]:
        """{path: {"src": data URI, "width", "height"}}, as large as fits the page's budget together.

        Pictures that cannot be read are left out and listed in `unreadable`; {} when even the smallest size is
        too much.
        """
        import base64
        import io

        from PIL import Image

        paths, budget = list(dict.fromkeys(paths)), _PICTURE_BUDGET_BYTES
        for rung in _LADDER:
            self.used, self.unreadable = set(), []
            data, total = {}, 0
            for number, path in enumerate(paths, 1):
                try:
                    data[path] = self._bytes(path, *rung)
                except OSError:
                    self.unreadable.append(path)
                    continue
                total += len(data[path])
                if total > budget or (number >= 8 and total / number * len(paths) > 1.5 * budget):
                    break  # a smaller size is needed: the rest of this one need not be made
            else:
                embedded = {}
                for path, raw in data.items():
                    width, height = Image.open(io.BytesIO(raw)).size
                    source = "data:image/webp;base64," + base64.b64encode(raw).decode()
                    embedded[path] = {"src": source, "width": width, "height": height}
                self._prune()
                return embedded
        return {}

    def _prune(self) -> None:
        """Forget thumbnails that the page no longer shows."""
        if self.folder is not None and self.folder.is_dir():
            for file in self.folder.iterdir():
                if file.name not in self.used:
                    file.unlink(missing_ok=True)


def _render(**context) -> bytes:
    """The page as UTF-8; everything in it is escaped but the vendored chart library."""
    import jinja2
    from markupsafe import Markup

    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    for name, file in (("js", "uPlot.iife.min.js"), ("css", "uPlot.min.css"), ("license", "LICENSE")):
        context[f"uplot_{name}"] = Markup((here / "uplot" / file).read_text(encoding="utf-8"))
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    footer = f"Written by sana_kit.reports on {written}. Charts: uPlot (MIT licence). This page needs no network."
    return environment.get_template("report_template.html").render(footer=footer, written=written, **context).encode()


# ---------------------------------------------------------------------------------------------------------------------
# Training report

_SECRET = re.compile(r"(^|_)(token|secret|password|passwd|api_?key|access_?key)$", re.IGNORECASE)
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


def _short(value: float | None, digits: int = 4) -> str:
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


def _charts(run: RunLog) -> tuple[list[dict], list[dict], list[str]]:
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
        return f"{len(line.get('files') or [])} validation picture(s)"
    if kind == "resume":
        return f"on {line.get('world_size', '?')} process(es)"
    return "the loss was not finite"


def _marks_and_events(run: RunLog) -> tuple[list[dict], list[dict], list[dict], int]:
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


def _validation_cells(run: RunLog, output_dir: Path) -> dict[tuple[str, object], list[dict]]:
    """{(prompt, seed): [{"step", "path"}] by step}; a step validated twice counts once, the later time."""
    rows: dict[tuple[str, object], dict[int, Path]] = {}
    for line in run.validations:
        files, prompts, seeds = (line.get(key) or [] for key in ("files", "prompts", "seeds"))
        if len(prompts) == len(files):
            labels = [(prompts[i], seeds[i] if len(seeds) == len(files) else None) for i in range(len(files))]
        elif prompts and len(prompts) * max(1, len(seeds)) == len(files):
            labels = [(prompt, seed) for prompt in prompts for seed in (seeds or [None])]
        else:
            labels = [(Path(file).stem, None) for file in files]
        seen: dict[tuple, int] = {}
        for file, (prompt, seed) in zip(files, labels, strict=True):
            key = (str(prompt), seed)
            seen[key] = seen.get(key, 0) + 1
            if seen[key] > 1:  # the same prompt and seed twice in one validation are two rows
                key = (f"{prompt} ({seen[key]})", seed)
            rows.setdefault(key, {})[line["step"]] = output_dir / file
    return {
        key: [{"step": step, "path": path} for step, path in sorted(cells.items()) if path.is_file()]
        for key, cells in rows.items()
    }


def _spread(items: Sequence, limit: int) -> list:
    """At most `limit` items, evenly spread, first and last among them."""
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


_PICTURES = {".png", ".jpg", ".jpeg", ".webp"}


def _folder_pictures(folder: Path) -> dict[tuple, dict]:
    """{(prompt, seed, occurrence) or (file name,): {"path", "title", "seed"}} of a folder, by its manifest if any."""
    manifest, found = folder / "manifest.jsonl", {}
    if manifest.is_file():
        for line in read_log(manifest)[0]:
            path = folder / str(line.get("file", ""))
            if path.is_file():
                key, occurrence = (line.get("prompt"), line.get("seed")), 0
                while (*key, occurrence) in found:
                    occurrence += 1
                title = str(line.get("prompt") or path.stem)
                found[(*key, occurrence)] = {"path": path, "title": title, "seed": line.get("seed"), "line": line}
        return found
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() in _PICTURES and path.stem not in ("contact_sheet", "sheet"):
            found[(path.name,)] = {"path": path, "title": path.stem.replace("_", " "), "seed": None, "line": {}}
    return found


def _pairs(output_dir: Path, rows: dict, before: Path | None, after: Path | None) -> tuple[list[dict], str]:
    """Pictures to lay over one another: from folders before/ and after/ where both are there, else the first and the
    last validation of each prompt."""
    before, after = before or output_dir / "before", after or output_dir / "after"
    if before.is_dir() and after.is_dir():
        old, new = _folder_pictures(before), _folder_pictures(after)
        pairs = [
            {
                "before_path": old[key]["path"],
                "after_path": item["path"],
                "title": item["title"],
                "seed": item["seed"],
                "before_label": "before",
                "after_label": "after",
            }
            for key, item in new.items()
            if key in old
        ]
        if pairs:
            return _spread(pairs, 12), "The same prompts and seeds without (left) and with (right) the fine-tuning."
    pairs = []
    for (prompt, seed), cells in rows.items():
        if len(cells) >= 2:
            first, last = cells[0], cells[-1]
            labels = {"before_label": f"step {first['step']}", "after_label": f"step {last['step']}"}
            pairs.append(
                {"before_path": first["path"], "after_path": last["path"], "title": prompt, "seed": seed, **labels}
            )
    return _spread(pairs, 12), "The first (left) and the last (right) validation of each prompt."


def _config_items(configs: list[dict]) -> list[dict]:
    """Rows of the configuration table; what a resume changed carries the value before."""

    def shown(name, value):
        if _SECRET.search(name) and value not in (None, ""):
            return "(removed)"
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)

    if not configs:
        return []
    first, last = configs[0], configs[-1]
    return [
        {
            "name": name,
            "value": shown(name, last[name]),
            "changed": shown(name, first[name])
            if name in first and name != "resume_from_checkpoint" and first[name] != last[name]
            else "",
        }
        for name in sorted(last)
        if last[name] is not None or first.get(name) is not None
    ]


def _figures(run: RunLog, config: dict) -> list[dict]:
    """The key figures at the top of the page."""
    summary = (run.end or {}).get("summary") or {}
    last = run.steps[-1] if run.steps else {}
    losses = [finite_number(line.get("loss")) for line in run.steps]
    smoothed = [value for value in smooth(losses, max(5.0, len(losses) / 40)) if value is not None]
    speeds = [value for line in run.steps[1:] if (value := finite_number(line.get("images_per_second"))) is not None]
    steady = finite_number(summary.get("images_per_second"))
    if steady is not None:
        speed, speed_note = _short(steady), "steady state"
    elif speeds:
        speed, speed_note = _short(sorted(speeds)[len(speeds) // 2]), "median of the log"
    else:
        speed, speed_note = "–", str(summary.get("steady_state_note") or "not known yet")
    memory = max(
        (value for line in run.steps if (value := finite_number(line.get("peak_memory_bytes")))), default=None
    )
    mfus = [value for line in run.steps[1:] if (value := finite_number(line.get("mfu"))) is not None]
    step, total = last.get("step", 0), config.get("max_train_steps")
    figures = [
        {"name": "Step", "value": f"{step:,}", "note": f"of {total:,}" if isinstance(total, int) else ""},
        {
            "name": "Loss",
            "value": _short(smoothed[-1]) if smoothed else "–",
            "note": f"smoothed; last logged {_short(losses[-1])}" if smoothed else "",
        },
        {"name": "Images per second", "value": speed, "note": speed_note},
        {
            "name": "Peak memory",
            "value": f"{memory / 2**30:.2f} GiB" if memory else "–",
            "note": "per process" if memory else "",
        },
    ]
    if mfus:
        figures.append({"name": "MFU", "value": f"{100 * sorted(mfus)[len(mfus) // 2]:.1f} %", "note": "median"})
    device = summary.get("device") or ""
    figures.append({"name": "Processes", "value": str(run.world_size or "–"), "note": str(device)})
    figures.append(
        {
            "name": "Duration",
            "value": format_seconds(run.duration_seconds),
            "note": f"in {len(run.resumes) + 1} sessions" if run.resumes else "",
        }
    )
    return figures


def write_report(
    output_dir: str | os.PathLike, before: str | os.PathLike | None = None, after: str | os.PathLike | None = None
) -> Path:
    """Write `output_dir/report.html` from train_log.jsonl, the validation pictures and, where there are any, the
    folders `before` and `after`; returns its path.

    One self-contained file; replaced atomically, so it may be open in a browser while the run goes on.

    Args:
        output_dir: a training run's output folder.
        before, after: folders of pictures of the same prompts and seeds (with manifest.jsonl) or of the same file
            names; default `output_dir/before` and `output_dir/after`.

    Raises:
        ValueError: no log there.
    """
    output_dir = Path(output_dir)
    run = load_run(output_dir / "train_log.jsonl")
    config = run.configs[-1] if run.configs else {}
    rows = _validation_cells(run, output_dir)
    shown_rows = dict(list(rows.items())[:16])
    strips = {key: _spread(cells, 12) for key, cells in shown_rows.items() if cells}
    pairs, pairs_note = _pairs(output_dir, rows, Path(before) if before else None, Path(after) if after else None)

    thumbnails = _Thumbnails(output_dir / ".report_cache")
    paths = [path for pair in pairs for path in (pair["before_path"], pair["after_path"])]
    paths += [cell["path"] for cells in strips.values() for cell in cells]
    pictures = thumbnails.embed(paths)
    pairs = [
        {**pair, "before": pictures[pair["before_path"]], "after": pictures[pair["after_path"]]}
        for pair in pairs
        if pair["before_path"] in pictures and pair["after_path"] in pictures
    ]
    table = []
    for (prompt, seed), cells in strips.items():
        cells = [{"step": cell["step"], "image": pictures[cell["path"]]} for cell in cells if cell["path"] in pictures]
        if cells:
            table.append({"prompt": prompt, "seed": seed, "cells": cells})
    if run.validations:
        no_rows = "The run made validation pictures, but none of them is in its folder or can be read."
    else:
        no_rows = "No validation pictures: the run made none" + ("." if run.end is not None else " so far.")
    rows_notes = []
    if len(rows) > len(shown_rows):
        rows_notes.append(f"The first {len(shown_rows)} of {len(rows)} prompts and seeds.")
    if any(len(cells) > 12 for cells in shown_rows.values()):
        rows_notes.append("12 steps of each, evenly spread; all pictures are in the folder validation/.")

    alerts = []
    broken = sum(1 for line in run.steps if finite_number(line.get("loss")) is None)
    if broken:
        text = (
            f"The loss was not finite in {broken} of {len(run.steps)} logged steps."
            " A lower learning rate or bf16 instead of fp16 usually cures it."
        )
        alerts.append({"kind": "bad", "text": text})
    if run.warnings:
        latest = run.warnings[-1]
        text = f"{len(run.warnings)} warning(s); the latest, at step {latest['step']}: {latest.get('message', '')}"
        alerts.append({"kind": "", "text": text})
    if run.damaged_lines:
        alerts.append({"kind": "", "text": f"{run.damaged_lines} line(s) of the log cannot be read and are left out."})
    if thumbnails.unreadable:
        names = ", ".join(path.name for path in thumbnails.unreadable[:3])
        alerts.append({"kind": "", "text": f"{len(thumbnails.unreadable)} picture(s) cannot be read: {names}"})

    headings, charts, notes = _charts(run)
    marks, legend, events, events_left_out = _marks_and_events(run)
    if run.repeated_steps:
        notes.append(f"{run.repeated_steps} logged step(s) were made again after a resume; the later run is shown.")
    parts = [
        str(config.get("pretrained_model_name_or_path") or ""),
        str(config.get("dataset_name") or config.get("instance_data_dir") or ""),
    ]
    page = _render(
        page="report",
        title=f"Training report: {output_dir.resolve().name}",
        subtitle=" · ".join(part for part in parts if part),
        ended=run.end is not None,
        figures=_figures(run, config),
        alerts=alerts,
        charts=headings,
        chart_notes=notes,
        mark_kinds=legend,
        data={"charts": charts, "marks": marks},
        pairs=pairs,
        pairs_note=pairs_note,
        rows=table,
        rows_note=" ".join(rows_notes),
        no_rows=no_rows,
        events=events,
        events_left_out=events_left_out,
        config=_config_items(run.configs),
        unset=", ".join(sorted(name for name, value in config.items() if value is None)),
        compared=False,
    )
    return write_atomic(output_dir / "report.html", lambda file: file.write(page))


_told: set[str] = set()


def refresh_report(output_dir: str | os.PathLike, log: JsonLinesLog | None = None, step: int = 0) -> Path | None:
    """`write_report` for a run that must not die of its report: an error becomes a warning, on standard error and in
    the log, once per message; None is returned then."""
    try:
        return write_report(output_dir)
    except Exception as error:  # whatever it is, the training matters more
        message = f"report.html could not be written: {type(error).__name__}: {error}"
        if message not in _told:
            _told.add(message)
            print(f"warning: {message}", file=sys.stderr)
            if log is not None:
                log.write("warning", step=step, message=message)
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Gallery


def write_gallery(output_dir: str | os.PathLike, base_dir: str | os.PathLike | None = None) -> Path:
    """Write `output_dir/gallery.html` from its manifest.jsonl; returns its path.

    Args:
        output_dir: an inference script's output folder.
        base_dir: another such folder, made without the LoRA; its pictures of the same prompt and seed stand beside.

    Raises:
        ValueError: a folder has no manifest, or a manifest lists no picture that is there.
    """
    from urllib.parse import quote

    output_dir = Path(output_dir)
    folders = {"": output_dir} | ({"base_dir: ": Path(base_dir)} if base_dir else {})
    for name, folder in folders.items():
        if not (folder / "manifest.jsonl").is_file():
            raise ValueError(f"{name}{folder}/manifest.jsonl: not there. Name an inference script's output folder.")
    found = _folder_pictures(output_dir)
    listed, damaged = read_log(output_dir / "manifest.jsonl")
    if not found:
        raise ValueError(f"{output_dir}/manifest.jsonl lists {len(listed)} picture(s), none of which is there.")
    base = _folder_pictures(Path(base_dir)) if base_dir else {}
    partners = {key: base[key]["path"] for key in found if key in base}

    thumbnails = _Thumbnails()  # written once, at the end of a run: nothing to keep
    paths = [path for key, item in found.items() for path in (item["path"], partners.get(key)) if path]
    pictures = thumbnails.embed(paths)
    alerts = []
    if not pictures and len(thumbnails.unreadable) < len(paths):
        # More pictures than one page can hold: it then shows the files beside it.
        text = (
            f"{len(paths)} pictures are too many to embed: the page shows the files themselves; keep it beside them."
        )
        alerts.append({"kind": "", "text": text})
        for path in paths:
            line = next((item["line"] for item in found.values() if item["path"] == path), {})
            size = {"width": line.get("width") or 512, "height": line.get("height") or 512}
            pictures[path] = {"src": quote(os.path.relpath(path, output_dir).replace(os.sep, "/")), **size}
    missing = len(listed) - len(found)
    if missing > 0:
        alerts.append({"kind": "", "text": f"{missing} picture(s) of the manifest are not in the folder."})
    if damaged:
        alerts.append({"kind": "", "text": f"{damaged} line(s) of the manifest cannot be read and are left out."})
    if thumbnails.unreadable:
        names = ", ".join(path.name for path in thumbnails.unreadable[:3])
        alerts.append({"kind": "", "text": f"{len(thumbnails.unreadable)} picture(s) cannot be read: {names}"})

    items = []
    for key, item in found.items():
        if item["path"] not in pictures:
            continue
        line, details = item["line"], []
        if line.get("seed") is not None:
            details.append(f"seed {line['seed']}")
        if line.get("width") and line.get("height"):
            details.append(f"{line['width']} × {line['height']}")
        if line.get("num_inference_steps") is not None:
            details.append(f"{line['num_inference_steps']} steps")
        if finite_number(line.get("guidance_scale")) is not None:
            details.append(f"guidance {finite_number(line['guidance_scale']):g}")
        if finite_number(line.get("seconds")) is not None:
            details.append(format_seconds(finite_number(line["seconds"])))
        items.append(
            {
                "prompt": item["title"],
                "image": pictures[item["path"]],
                "base": pictures.get(partners.get(key)),
                "kind": "LoRA" if line.get("lora_weights") else "this run",
                "details": " · ".join(details),
                "href": quote(os.path.relpath(item["path"], output_dir).replace(os.sep, "/")),
                "name": item["path"].name,
            }
        )
    seconds = [value for item in found.values() if (value := finite_number(item["line"].get("seconds"))) is not None]
    first = next(iter(found.values()))["line"]
    parts = [f"{len(items)} pictures", str(first.get("model") or "")]
    if first.get("lora_weights"):
        parts.append(f"LoRA {first['lora_weights']}")
    if seconds:
        parts.append(f"{format_seconds(sum(seconds) / len(seconds))} a picture on average")
    page = _render(
        page="gallery",
        title=f"Gallery: {output_dir.resolve().name}",
        subtitle=" · ".join(part for part in parts if part),
        alerts=alerts,
        items=items,
        compared=bool(base_dir),
        charts=[],
    )
    return write_atomic(output_dir / "gallery.html", lambda file: file.write(page))
