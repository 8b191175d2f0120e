"""comparison.html: two training runs side by side, curves over one another, settings that differ, last images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sana_kit.files import write_atomic
from sana_kit.reports.charts import CHARTS, thin_series
from sana_kit.reports.pages import render, unreadable_alert
from sana_kit.reports.report import config_items, figures, validation_cells
from sana_kit.reports.thumbnails import Thumbnails
from sana_kit.runlog import RunLog, finite_number, load_run

_COLORS = ("--accent", "--blue")


def _names(folders: list[Path]) -> list[str]:
    """Short names that tell the two runs apart."""
    names = [folder.resolve().name for folder in folders]
    return names if names[0] != names[1] else [str(folder) for folder in folders]


def _charts(runs: list[RunLog], names: list[str]) -> tuple[list[dict], list[dict]]:
    """(headings, data) of the charts that at least one of the runs has values for."""
    headings: list[dict] = []
    charts: list[dict] = []
    for chart in CHARTS:
        values: list[dict[int, float | None]] = []
        for run in runs:
            found = {line.get("step", 0): finite_number(line.get(chart.key)) for line in run.steps}
            values.append({step: None if value is None else value * chart.scale for step, value in found.items()})
        steps = sorted(set(values[0]) | set(values[1]))
        series: list[dict[str, Any]] = [
            {"label": name, "y": [found.get(step) for step in steps], "color": color, "width": 1.5, "span": True}
            for name, found, color in zip(names, values, _COLORS, strict=True)
        ]
        if any(value is not None for item in series for value in item["y"]):
            headings.append({"id": chart.key, "title": chart.title, "note": chart.note})
            charts.append(thin_series(chart, steps, series))
    return headings, charts


def _rows(folders: list[Path], runs: list[RunLog], names: list[str]) -> tuple[list[dict], list[Path]]:
    """(last validation image of each prompt and seed that both runs drew, images that cannot be read)."""
    last = [
        {key: cells[-1] for key, cells in validation_cells(run, folder).items() if cells}
        for folder, run in zip(folders, runs, strict=True)
    ]
    common = [key for key in last[0] if key in last[1]]
    thumbnails = Thumbnails()
    images = thumbnails.embed([found[key]["path"] for key in common for found in last])
    rows = []
    for prompt, seed in common:
        cells = [found[prompt, seed] for found in last]
        if all(cell["path"] in images for cell in cells):
            shown = [
                {"step": f"{cell['step']}, {name}", "image": images[cell["path"]]}
                for cell, name in zip(cells, names, strict=True)
            ]
            rows.append({"prompt": prompt, "seed": seed, "cells": shown})
    return rows, thumbnails.unreadable


def write_comparison(first: str | os.PathLike, second: str | os.PathLike) -> Path:
    """Write `second/comparison.html`, the two runs' curves, figures, settings and last images; returns its path.

    Raises:
        ValueError: a folder holds no training log.
    """
    folders = [Path(first), Path(second)]
    runs = [load_run(folder / "train_log.jsonl") for folder in folders]
    names = _names(folders)
    configs = [run.configs[-1] if run.configs else {} for run in runs]
    headings, charts = _charts(runs, names)
    rows, unreadable = _rows(folders, runs, names)
    settings = [{item["name"]: item["value"] for part in config_items([c]) for item in part} for c in configs]
    different = [
        name for name in sorted({*settings[0], *settings[1]}) if settings[0].get(name) != settings[1].get(name)
    ]
    both = [{row["name"]: row for row in figures(run, config)} for run, config in zip(runs, configs, strict=True)]
    page = render(
        page="comparison",
        title=f"{names[0]} and {names[1]}",
        subtitle="Two training runs side by side.",
        names=names,
        alerts=unreadable_alert(unreadable),
        figure_rows=[(name, [found.get(name, {"value": "–"})["value"] for found in both]) for name in both[0]],
        setting_rows=[(name, [found.get(name, "–") for found in settings]) for name in different],
        rows=rows,
        rows_note="",
        no_rows="The runs have no validation prompt and seed in common.",
        charts=headings,
        chart_notes=[],
        mark_kinds=[],
        data={"charts": charts, "marks": []},
        compared=True,
    )
    return write_atomic(folders[1] / "comparison.html", lambda file: file.write(page))
