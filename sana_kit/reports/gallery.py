"""gallery.html of an inference run: every image with its settings, beside the base model's where those are given."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

from sana_kit.files import write_atomic
from sana_kit.reports.charts import format_seconds
from sana_kit.reports.pages import folder_images, render, unreadable_alert
from sana_kit.reports.thumbnails import Thumbnails
from sana_kit.runlog import finite_number, read_log


def _href(path: Path, folder: Path) -> str:
    return quote(os.path.relpath(path, folder).replace(os.sep, "/"))


def _details(line: dict) -> str:
    """The settings of one image in a line: seed, size, steps, guidance, seconds."""
    parts = []
    if line.get("seed") is not None:
        parts.append(f"seed {line['seed']}")
    if line.get("width") and line.get("height"):
        parts.append(f"{line['width']} × {line['height']}")
    if line.get("num_inference_steps") is not None:
        parts.append(f"{line['num_inference_steps']} steps")
    if finite_number(line.get("guidance_scale")) is not None:
        parts.append(f"guidance {finite_number(line['guidance_scale']):g}")
    if finite_number(line.get("seconds")) is not None:
        parts.append(format_seconds(finite_number(line["seconds"])))
    return " · ".join(parts)


def _subtitle(found: dict, shown: int) -> str:
    first = next(iter(found.values()))["line"]
    parts = [f"{shown} images", str(first.get("model") or "")]
    if first.get("lora_weights"):
        parts.append(f"LoRA {first['lora_weights']}")
    seconds = [value for item in found.values() if (value := finite_number(item["line"].get("seconds"))) is not None]
    if seconds:
        parts.append(f"{format_seconds(sum(seconds) / len(seconds))} an image on average")
    return " · ".join(part for part in parts if part)


def _embed(paths: list[Path], found: dict, output_dir: Path) -> tuple[dict, list[dict]]:
    """({path: image of the page}, alerts); more images than one page can hold are shown from the files beside it."""
    thumbnails = Thumbnails()  # written once, at the end of a run: nothing to keep
    images, alerts = thumbnails.embed(paths), []
    if not images and len(thumbnails.unreadable) < len(paths):
        text = f"{len(paths)} images are too many to embed: the page shows the files themselves; keep it beside them."
        alerts.append({"kind": "", "text": text})
        lines = {item["path"]: item["line"] for item in found.values()}
        for path in paths:
            line = lines.get(path, {})
            size = {"width": line.get("width") or 512, "height": line.get("height") or 512}
            images[path] = {"src": _href(path, output_dir), "small": False, **size}
    return images, alerts + unreadable_alert(thumbnails.unreadable)


def write_gallery(output_dir: str | os.PathLike, base_dir: str | os.PathLike | None = None) -> Path:
    """Write `output_dir/gallery.html` from its manifest.jsonl; returns its path.

    Args:
        output_dir: an inference script's output folder.
        base_dir: another such folder, made without the LoRA; its images of the same prompt and seed stand beside.

    Raises:
        ValueError: a folder has no manifest, or a manifest lists no image that is there.
    """
    output_dir = Path(output_dir)
    folders = {"": output_dir} | ({"base_dir: ": Path(base_dir)} if base_dir else {})
    for name, folder in folders.items():
        if not (folder / "manifest.jsonl").is_file():
            raise ValueError(f"{name}{folder}/manifest.jsonl: not there. Name an inference script's output folder.")
    found, (listed, damaged) = folder_images(output_dir), read_log(output_dir / "manifest.jsonl")
    if not found:
        raise ValueError(f"{output_dir}/manifest.jsonl lists {len(listed)} image(s), none of which is there.")
    base = folder_images(Path(base_dir)) if base_dir else {}
    partners = {key: base[key]["path"] for key in found if key in base}
    paths = [path for key, item in found.items() for path in (item["path"], partners.get(key)) if path]
    images, alerts = _embed(paths, found, output_dir)
    if len(listed) > len(found):
        missing = f"{len(listed) - len(found)} image(s) of the manifest are not in the folder."
        alerts.append({"kind": "", "text": missing})
    if damaged:
        alerts.append({"kind": "", "text": f"{damaged} line(s) of the manifest cannot be read and are left out."})
    items = [
        {
            "prompt": item["title"],
            "image": images[item["path"]],
            "base": images.get(partners.get(key)),
            "kind": "LoRA" if item["line"].get("lora_weights") else "this run",
            "details": _details(item["line"]),
            "href": _href(item["path"], output_dir),
            "name": item["path"].name,
        }
        for key, item in found.items()
        if item["path"] in images
    ]
    page = render(
        page="gallery",
        title=f"Gallery: {output_dir.resolve().name}",
        subtitle=_subtitle(found, len(items)),
        alerts=alerts,
        items=items,
        compared=bool(base_dir),
        charts=[],
    )
    return write_atomic(output_dir / "gallery.html", lambda file: file.write(page))
