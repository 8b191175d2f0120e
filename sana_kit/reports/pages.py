"""report.html of a training run and gallery.html of an inference run: one self-contained file each."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sana_kit.files import write_atomic
from sana_kit.reports.charts import chart_series, format_seconds, marks_and_events, shorten, smooth
from sana_kit.reports.thumbnails import Thumbnails
from sana_kit.runlog import JsonLinesLog, RunLog, finite_number, load_run, read_log


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
    return environment.get_template("template.html").render(footer=footer, written=written, **context).encode()


_SECRET = re.compile(r"(^|_)(token|secret|password|passwd|api_?key|access_?key)$", re.IGNORECASE)


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


_IMAGES = {".png", ".jpg", ".jpeg", ".webp"}


def _folder_images(folder: Path) -> dict[tuple, dict]:
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
        if path.suffix.lower() in _IMAGES and path.stem not in ("contact_sheet", "sheet"):
            found[(path.name,)] = {"path": path, "title": path.stem.replace("_", " "), "seed": None, "line": {}}
    return found


def _pairs(output_dir: Path, rows: dict, before: Path | None, after: Path | None) -> tuple[list[dict], str]:
    """Images to lay over one another: from folders before/ and after/ where both are there, else the first and the
    last validation of each prompt."""
    before, after = before or output_dir / "before", after or output_dir / "after"
    if before.is_dir() and after.is_dir():
        old, new = _folder_images(before), _folder_images(after)
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
        speed, speed_note = shorten(steady), "steady state"
    elif speeds:
        speed, speed_note = shorten(sorted(speeds)[len(speeds) // 2]), "median of the log"
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
            "value": shorten(smoothed[-1]) if smoothed else "–",
            "note": f"smoothed; last logged {shorten(losses[-1])}" if smoothed else "",
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
    """Write `output_dir/report.html` from train_log.jsonl, the validation images and, where there are any, the
    folders `before` and `after`; returns its path.

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
    rows = _validation_cells(run, output_dir)
    shown_rows = dict(list(rows.items())[:16])
    strips = {key: _spread(cells, 12) for key, cells in shown_rows.items() if cells}
    pairs, pairs_note = _pairs(output_dir, rows, Path(before) if before else None, Path(after) if after else None)

    thumbnails = Thumbnails(output_dir / ".report_cache")
    paths = [path for pair in pairs for path in (pair["before_path"], pair["after_path"])]
    paths += [cell["path"] for cells in strips.values() for cell in cells]
    images = thumbnails.embed(paths)
    pairs = [
        {**pair, "before": images[pair["before_path"]], "after": images[pair["after_path"]]}
        for pair in pairs
        if pair["before_path"] in images and pair["after_path"] in images
    ]
    table = []
    for (prompt, seed), cells in strips.items():
        cells = [{"step": cell["step"], "image": images[cell["path"]]} for cell in cells if cell["path"] in images]
        if cells:
            table.append({"prompt": prompt, "seed": seed, "cells": cells})
    if run.validations:
        no_rows = "The run made validation images, but none of them is in its folder or can be read."
    else:
        no_rows = "No validation images: the run made none" + ("." if run.end is not None else " so far.")
    rows_notes = []
    if len(rows) > len(shown_rows):
        rows_notes.append(f"The first {len(shown_rows)} of {len(rows)} prompts and seeds.")
    if any(len(cells) > 12 for cells in shown_rows.values()):
        rows_notes.append("12 steps of each, evenly spread; all images are in the folder validation/.")

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
        alerts.append({"kind": "", "text": f"{len(thumbnails.unreadable)} image(s) cannot be read: {names}"})

    headings, charts, notes = chart_series(run)
    marks, legend, events, events_left_out = marks_and_events(run)
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


def write_gallery(output_dir: str | os.PathLike, base_dir: str | os.PathLike | None = None) -> Path:
    """Write `output_dir/gallery.html` from its manifest.jsonl; returns its path.

    Args:
        output_dir: an inference script's output folder.
        base_dir: another such folder, made without the LoRA; its images of the same prompt and seed stand beside.

    Raises:
        ValueError: a folder has no manifest, or a manifest lists no image that is there.
    """
    from urllib.parse import quote

    output_dir = Path(output_dir)
    folders = {"": output_dir} | ({"base_dir: ": Path(base_dir)} if base_dir else {})
    for name, folder in folders.items():
        if not (folder / "manifest.jsonl").is_file():
            raise ValueError(f"{name}{folder}/manifest.jsonl: not there. Name an inference script's output folder.")
    found = _folder_images(output_dir)
    listed, damaged = read_log(output_dir / "manifest.jsonl")
    if not found:
        raise ValueError(f"{output_dir}/manifest.jsonl lists {len(listed)} image(s), none of which is there.")
    base = _folder_images(Path(base_dir)) if base_dir else {}
    partners = {key: base[key]["path"] for key in found if key in base}

    thumbnails = Thumbnails()  # written once, at the end of a run: nothing to keep
    paths = [path for key, item in found.items() for path in (item["path"], partners.get(key)) if path]
    images = thumbnails.embed(paths)
    alerts = []
    if not images and len(thumbnails.unreadable) < len(paths):
        # More images than one page can hold: it then shows the files beside it.
        text = f"{len(paths)} images are too many to embed: the page shows the files themselves; keep it beside them."
        alerts.append({"kind": "", "text": text})
        for path in paths:
            line = next((item["line"] for item in found.values() if item["path"] == path), {})
            size = {"width": line.get("width") or 512, "height": line.get("height") or 512}
            images[path] = {"src": quote(os.path.relpath(path, output_dir).replace(os.sep, "/")), **size}
    missing = len(listed) - len(found)
    if missing > 0:
        alerts.append({"kind": "", "text": f"{missing} image(s) of the manifest are not in the folder."})
    if damaged:
        alerts.append({"kind": "", "text": f"{damaged} line(s) of the manifest cannot be read and are left out."})
    if thumbnails.unreadable:
        names = ", ".join(path.name for path in thumbnails.unreadable[:3])
        alerts.append({"kind": "", "text": f"{len(thumbnails.unreadable)} image(s) cannot be read: {names}"})

    items = []
    for key, item in found.items():
        if item["path"] not in images:
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
                "image": images[item["path"]],
                "base": images.get(partners.get(key)),
                "kind": "LoRA" if line.get("lora_weights") else "this run",
                "details": " · ".join(details),
                "href": quote(os.path.relpath(item["path"], output_dir).replace(os.sep, "/")),
                "name": item["path"].name,
            }
        )
    seconds = [value for item in found.values() if (value := finite_number(item["line"].get("seconds"))) is not None]
    first = next(iter(found.values()))["line"]
    parts = [f"{len(items)} images", str(first.get("model") or "")]
    if first.get("lora_weights"):
        parts.append(f"LoRA {first['lora_weights']}")
    if seconds:
        parts.append(f"{format_seconds(sum(seconds) / len(seconds))} an image on average")
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
