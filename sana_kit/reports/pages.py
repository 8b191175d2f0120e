"""What the report pages share: the template, folders of images, thumbnails that could not be made."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from sana_kit.runlog import read_log

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


def render(**context: object) -> bytes:
    """The page as UTF-8; everything in it is escaped but the vendored chart library."""
    here = Path(__file__).parent
    loader = jinja2.FileSystemLoader(here)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    for name, file in (("js", "uPlot.iife.min.js"), ("css", "uPlot.min.css"), ("license", "LICENSE")):
        context[f"uplot_{name}"] = Markup((here / "uplot" / file).read_text(encoding="utf-8"))
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    footer = f"Written by sana_kit.reports on {written}. Charts: uPlot (MIT licence). This page needs no network."
    return environment.get_template("template.html").render(footer=footer, written=written, **context).encode()


def spread(items: Sequence, limit: int) -> list:
    """At most `limit` items, evenly spread, first and last among them."""
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(1, limit - 1))] for i in range(limit)]


def folder_images(folder: Path) -> dict[tuple, dict]:
    """{(prompt, seed, occurrence) or (file name,): {"path", "title", "seed"}} of a folder, by its manifest if any."""
    manifest = folder / "manifest.jsonl"
    found: dict[tuple, dict] = {}
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
        if path.suffix.lower() in _SUFFIXES and path.stem not in ("contact_sheet", "sheet"):
            found[(path.name,)] = {"path": path, "title": path.stem.replace("_", " "), "seed": None, "line": {}}
    return found


def unreadable_alert(paths: Sequence[Path]) -> list[dict]:
    """An alert that names images that could not be read; none without them."""
    if not paths:
        return []
    names = ", ".join(path.name for path in paths[:3])
    return [{"kind": "", "text": f"{len(paths)} image(s) cannot be read: {names}"}]
