"""report.html of a training run: one self-contained file, written anew while the run goes on."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from patch_sana import ADAPTER_FILE
from sana_kit.data.sets import data_sets
from sana_kit.files import write_atomic
from sana_kit.flags import is_secret
from sana_kit.reports.charts import chart_series, format_seconds, marks_and_events, over_fitting, shorten
from sana_kit.reports.memorisation import copies_told
from sana_kit.reports.pages import folder_images, render, spread, unreadable_alert
from sana_kit.reports.thumbnails import Thumbnails
from sana_kit.runlog import JsonLinesLog, RunLog, finite_number, load_run

DRAW_WITH_IT = "draw with it: "  # before the command, among the last lines of a run
_ROWS, _STEPS, _PAIRS, _SAMPLES = 16, 12, 12, 12  # most prompts, steps of each, pairs and training images shown
# What the page links to, where it is there: (file, what it is).
_LINKS = (
    (ADAPTER_FILE, "LoRA weights"),
    ("transformer", "transformer weights"),
    ("controlnet", "ControlNet weights"),
    ("README.md", "model card"),
    ("run.yaml", "configuration"),
    ("train_log.jsonl", "log"),
    ("summary.json", "summary"),
    ("after/gallery.html", "gallery"),
    ("before_after.png", "before and after"),
)


def validation_cells(run: RunLog, output_dir: Path) -> dict[tuple[str, object], list[dict]]:
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


def _pairs(output_dir: Path, rows: dict, before: Path | None, after: Path | None) -> tuple[list[dict], str]:
    """Images to lay over one another: from folders before/ and after/ where both are there, else the first and the
    last validation of each prompt.
    """
    before, after = before or output_dir / "before", after or output_dir / "after"
    if before.is_dir() and after.is_dir():
        old, new = folder_images(before), folder_images(after)
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
            return _choose(pairs), "The same prompts and seeds without (left) and with (right) the fine-tuning."
    pairs = []
    for (prompt, seed), cells in rows.items():
        if len(cells) >= 2:
            first, last = cells[0], cells[-1]
            labels = {"before_label": f"step {first['step']}", "after_label": f"step {last['step']}"}
            pairs.append(
                {"before_path": first["path"], "after_path": last["path"], "title": prompt, "seed": seed, **labels}
            )
    return _choose(pairs), "The first (left) and the last (right) validation of each prompt."


def _choose(pairs: list[dict]) -> list[dict]:
    """As many pairs as the page shows: all, else one of each prompt, evenly spread."""
    if len(pairs) <= _PAIRS:
        return pairs
    first: dict[str, dict] = {}
    for pair in pairs:
        first.setdefault(pair["title"], pair)
    return spread(list(first.values()), _PAIRS)


# What a run says of itself beside its settings: (key in its configuration, what the page calls it).
_CIRCUMSTANCES = (("command", "command"), ("device", "device"), ("host", "host"), ("versions", "versions"))


def circumstances(config: dict) -> list[dict]:
    """Rows of how the run was started and on what, as far as its log says so: [{"name", "value", "changed"}]."""
    rows = []
    for key, name in _CIRCUMSTANCES:
        value = config.get(key)
        if isinstance(value, dict):
            value = ", ".join(f"{package} {number}" for package, number in value.items())
        if value:
            rows.append({"name": name, "value": str(value), "changed": ""})
    return rows


def config_items(configs: list[dict]) -> tuple[list[dict], list[dict]]:
    """Rows of the configuration table: (those given by the user or changed by a resume, those left at their default).

    A log that does not say what was given ("given" in its configuration) has all rows in the first list.
    """

    def shown(name: str, value: object) -> str:
        if is_secret(name) and value not in (None, ""):
            return "(removed)"
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)

    if not configs:
        return [], []
    first, last = configs[0], configs[-1]
    given = last.get("given")
    chosen, defaults = [], []
    for name in sorted(set(last) - {"given", "world_size", *(key for key, _ in _CIRCUMSTANCES)}):
        if last[name] is None and first.get(name) is None:
            continue
        changed = name in first and name != "resume_from_checkpoint" and first[name] != last[name]
        row = {"name": name, "value": shown(name, last[name]), "changed": shown(name, first[name]) if changed else ""}
        (chosen if given is None or name in given or changed else defaults).append(row)
    return chosen, defaults


def _duration(run: RunLog) -> float:
    """Seconds of the run: its own account where it ended in one session, else the log's."""
    told = finite_number(((run.end or {}).get("summary") or {}).get("duration_seconds"))
    return told if told is not None and not run.resumes else run.duration_seconds


def _time_left(run: RunLog, total: int | None) -> float | None:
    """Seconds until the last step at the pace of the latest logged steps; None where that is not known."""
    timed = [line for line in run.steps[-21:] if isinstance(line.get("time"), (int, float))]
    if run.end is not None or not isinstance(total, int) or len(timed) < 2:
        return None
    steps = timed[-1].get("step", 0) - timed[0].get("step", 0)
    return (total - timed[-1]["step"]) * (timed[-1]["time"] - timed[0]["time"]) / steps if steps > 0 else None


def _speed(run: RunLog, summary: dict) -> tuple[str, str]:
    """(images per second, where the figure comes from)."""
    steady = finite_number(summary.get("images_per_second"))
    if steady is not None:
        return shorten(steady), "steady state"
    speeds = [value for line in run.steps[1:] if (value := finite_number(line.get("images_per_second"))) is not None]
    if speeds:
        return shorten(sorted(speeds)[len(speeds) // 2]), "median of the log"
    return "–", str(summary.get("steady_state_note") or "not known yet")


def _recently(losses: list[float]) -> str:
    """The mean of the latest logged losses in words: one value alone says little."""
    return f"{shorten(sum(losses) / len(losses))} on average of the last {len(losses)}" if len(losses) > 1 else ""


def figures(run: RunLog, config: dict) -> list[dict]:
    """The key figures at the top of the page: [{"name", "value", "note"}]."""
    summary = (run.end or {}).get("summary") or {}
    losses = [finite_number(line.get("loss")) for line in run.steps]
    recent = [value for value in losses[-max(5, len(losses) // 20) :] if value is not None]
    peaks = [value for line in run.steps if (value := finite_number(line.get("peak_memory_bytes")))]
    mfus = sorted(value for line in run.steps[1:] if (value := finite_number(line.get("mfu"))) is not None)
    step, total = (run.steps[-1] if run.steps else {}).get("step", 0), config.get("max_train_steps")
    speed, speed_note = _speed(run, summary)
    left = _time_left(run, total)
    rows = [
        ("Step", f"{step:,}", f"of {total:,}" if isinstance(total, int) else ""),
        ("Loss", shorten(losses[-1]), _recently(recent)) if recent else ("Loss", "–", ""),
        ("Images per second", speed, speed_note),
        ("Peak memory", f"{max(peaks) / 2**30:.2f} GiB", "per process") if peaks else ("Peak memory", "–", ""),
    ]
    if mfus:
        rows.append(("MFU", f"{100 * mfus[len(mfus) // 2]:.1f} %", "median"))
    rows.append(("Processes", str(run.world_size or "–"), str(summary.get("device") or "")))
    sessions = f"in {len(run.resumes) + 1} sessions" if run.resumes else ""
    rows.append(("Duration", format_seconds(_duration(run)), sessions))
    if left is not None:
        rows.append(("Time left", format_seconds(left), "at the latest pace"))
    return [{"name": name, "value": value, "note": note} for name, value, note in rows]


def _alerts(run: RunLog, unreadable: list[Path]) -> list[dict]:
    """What a reader must see first: losses that are not finite, warnings, damage."""
    alerts = []
    broken = sum(1 for line in run.steps if finite_number(line.get("loss")) is None)
    if broken:
        cure = "A lower learning rate or bf16 instead of fp16 usually cures it."
        text = f"The loss was not finite in {broken} of {len(run.steps)} logged steps. {cure}"
        alerts.append({"kind": "bad", "text": text})
    if run.warnings:
        latest = run.warnings[-1]
        text = f"{len(run.warnings)} warning(s); the latest, at step {latest['step']}: {latest.get('message', '')}"
        alerts.append({"kind": "", "text": text})
    if (text := over_fitting(run)) is not None:
        alerts.append({"kind": "", "text": text})
    copies, expected, told = _copies(run)
    if copies > expected:
        alerts.append({"kind": "", "text": f"{told}. Below they stand side by side."})
    if run.damaged_lines:
        alerts.append({"kind": "", "text": f"{run.damaged_lines} line(s) of the log cannot be read and are left out."})
    return alerts + unreadable_alert(unreadable)


def _row_notes(run: RunLog, rows: dict) -> tuple[str, str]:
    """(note above the validation images, sentence in their place where there are none)."""
    notes = []
    if len(rows) > _ROWS:
        notes.append(f"The first {_ROWS} of {len(rows)} prompts and seeds.")
    if any(len(cells) > _STEPS for cells in list(rows.values())[:_ROWS]):
        notes.append(f"{_STEPS} steps of each, evenly spread; all images are in the folder validation/.")
    if run.validations:
        return " ".join(notes), "The run made validation images, but none of them is in its folder or can be read."
    return "", "No validation images: the run made none" + ("." if run.end is not None else " so far.")


def _draw(run: RunLog) -> str:
    """The command that draws with what the run made, as its last line says it; '' where it made nothing yet."""
    made = ((run.end or {}).get("summary") or {}).get("made") or []
    return next((line.removeprefix(DRAW_WITH_IT) for line in made if line.startswith(DRAW_WITH_IT)), "")


def _charts(run: RunLog) -> dict:
    """The chart part of the page's context."""
    headings, charts, notes = chart_series(run)
    marks, legend, events, left_out = marks_and_events(run)
    if run.repeated_steps:
        notes.append(f"{run.repeated_steps} logged step(s) were made again after a resume; the later run is shown.")
    data = {"charts": charts, "marks": marks}
    shown = {"charts": headings, "chart_notes": notes, "mark_kinds": legend, "data": data}
    return {**shown, "events": events, "events_left_out": left_out}


def _images(output_dir: Path, run: RunLog, before: Path | None, after: Path | None) -> tuple[dict, list[Path]]:
    """(the image part of the page's context, images that cannot be read)."""
    rows = validation_cells(run, output_dir)
    strips = {key: spread(cells, _STEPS) for key, cells in list(rows.items())[:_ROWS] if cells}
    pairs, pairs_note = _pairs(output_dir, rows, before, after)
    samples = spread(list(folder_images(output_dir / "training_images").values()), _SAMPLES)
    thumbnails = Thumbnails(output_dir / ".report_cache")
    paths = [path for pair in pairs for path in (pair["before_path"], pair["after_path"])]
    paths += [cell["path"] for cells in strips.values() for cell in cells] + [item["path"] for item in samples]
    likes = _nearest_pairs(output_dir, run)
    paths += [path for pair in likes for path in (pair["path"], pair["nearest_path"])]
    images = thumbnails.embed(paths)
    shown_pairs = [
        {**pair, "before": images[pair["before_path"]], "after": images[pair["after_path"]]}
        for pair in pairs
        if pair["before_path"] in images and pair["after_path"] in images
    ]
    table = []
    for (prompt, seed), cells in strips.items():
        cells = [{"step": cell["step"], "image": images[cell["path"]]} for cell in cells if cell["path"] in images]
        if cells:
            table.append({"prompt": prompt, "seed": seed, "cells": cells})
    note, no_rows = _row_notes(run, rows)
    shown_samples = [
        {**item, "image": images[item["path"]], "masked": bool(item["line"].get("masked"))}
        for item in samples
        if item["path"] in images
    ]
    context = {"pairs": shown_pairs, "pairs_note": pairs_note, "rows": table, "rows_note": note, "no_rows": no_rows}
    shown_likes = [
        {**pair, "image": images[pair["path"]], "nearest_image": images[pair["nearest_path"]]}
        for pair in likes
        if pair["path"] in images and pair["nearest_path"] in images
    ]
    outside = finite_number((run.configs[-1] if run.configs else {}).get("mask_outside")) or 0.0
    masked = f"{outside:g}" if any(item["masked"] for item in shown_samples) else ""
    return {**context, "samples": shown_samples, "likes": shown_likes, "masked": masked}, thumbnails.unreadable


def _copies(run: RunLog) -> tuple[int, int, str]:
    """(copies of training images among the last validation images, those that are expected, both in words)."""
    found = run.memorisation or {}
    copies, expected = found.get("copies") or 0, found.get("expected_copies") or 0
    return copies, expected, copies_told(copies, expected, found.get("images") or 0) if copies else ""


def _nearest_pairs(output_dir: Path, run: RunLog) -> list[dict]:
    """The last validation images beside their nearest training images, as the run compared them; nearest first."""
    found = []
    for row in (run.memorisation or {}).get("rows") or []:
        path, nearest = output_dir / str(row.get("file")), output_dir / str(row.get("nearest"))
        ratio = finite_number(row.get("ratio"))
        if row.get("nearest") and ratio is not None and path.is_file() and nearest.is_file():
            found.append({"expected": False, **row, "ratio": f"{ratio:.2f}", "path": path, "nearest_path": nearest})
    return found


def write_report(
    output_dir: str | os.PathLike, before: str | os.PathLike | None = None, after: str | os.PathLike | None = None
) -> Path:
    """Write `output_dir/report.html` from train_log.jsonl and the run's images; returns its path.

    One self-contained file; replaced atomically, so it may be open in a browser while the run goes on.

    Args:
        output_dir: a training run's output folder.
        before, after: folders of images of the same prompts and seeds (with manifest.jsonl) or of the same file
            names; default `output_dir/before` and `output_dir/after`.

    Raises:
        ValueError: no log there.
    """
    output_dir = Path(output_dir)
    run = load_run(output_dir / "train_log.jsonl")
    config = run.configs[-1] if run.configs else {}
    images, unreadable = _images(output_dir, run, Path(before) if before else None, Path(after) if after else None)
    chosen, defaults = config_items(run.configs)
    names = [data_set.name for data_set in data_sets(config)]
    names[3:] = [f"and {len(names) - 3} more"] if len(names) > 3 else []
    parts = [str(part) for part in (config.get("pretrained_model_name_or_path"), *names) if part]
    page = render(
        page="report",
        title=f"Training report: {output_dir.resolve().name}",
        subtitle=" · ".join(parts),
        ended=run.end is not None,
        stopped=run.was_stopped,
        figures=figures(run, config),
        alerts=_alerts(run, unreadable),
        circumstances=circumstances(config),
        config=chosen,
        config_defaults=defaults,
        unset=", ".join(sorted(name for name, value in config.items() if value is None)),
        draw=_draw(run),
        links=[{"href": file, "text": text} for file, text in _LINKS if (output_dir / file).exists()],
        compared=False,
        buckets=run.buckets,
        memorisation=run.memorisation,
        copies_told=_copies(run)[2],
        **images,
        **_charts(run),
    )
    return write_atomic(output_dir / "report.html", lambda file: file.write(page), durable=False)


class PagePace:
    """When the page of a running training is written anew: once a minute, and seldom enough to cost a hundredth."""

    SECONDS = 60.0

    def __init__(self) -> None:
        self._due = 0.0

    def due(self, now: float) -> bool:
        """Whether it is time, by a clock in seconds."""
        return now >= self._due

    def written(self, began: float, now: float) -> None:
        """The page was written, from `began` to `now`."""
        self._due = now + max(self.SECONDS, 100 * (now - began))


_told: set[tuple] = set()


def refresh_report(output_dir: str | os.PathLike, log: JsonLinesLog | None = None, step: int = 0) -> Path | None:
    """`write_report` for a run that must not die of its report: an error becomes a warning, on standard error and in
    the log, once per message; None is returned then.
    """
    try:
        return write_report(output_dir)
    except Exception as error:  # whatever it is, the training matters more
        message = f"report.html could not be written: {type(error).__name__}: {error}"
        # the text of a failed write names a new temporary file each time
        kind = (str(output_dir), type(error), getattr(error, "errno", None) or str(error))
        if kind not in _told:
            _told.add(kind)
            print(f"warning: {message}", file=sys.stderr)
            if log is not None:
                log.write("warning", step=step, message=message)
        return None
