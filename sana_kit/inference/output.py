"""The output folder of an inference run: images, manifest, contact sheet; a kill costs the images under way only."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sana_kit.files import file_sha256, write_atomic
from sana_kit.generation.jobs import Job
from sana_kit.reports.contact_sheet import contact_sheet
from sana_kit.runlog import read_log

MANIFEST = "manifest.jsonl"

CONTACT_SHEET_LIMIT = 200  # images: more make a sheet that no viewer opens

PNG_LEVEL = 1  # zlib: 2.4 times as fast as Pillow's default 6 for 14 % more bytes (measured at 2048 px)


class OutputFolder:
    """Images, and what is known of them: manifest.jsonl, and one part of it per rank while a run goes on.

    An image is written beside and renamed, then its line is appended to the rank's part; an image counts as finished
    when a line names it and its bytes have that line's SHA-256. So a kill at any moment costs the images under way.
    """

    def __init__(self, path: str, rank: int):
        self.path = Path(path)
        self.part = self.path / f".manifest-rank{rank:05d}.jsonl"

    def open(self) -> None:
        """Main process, holding the lock: remove half-written files, merge parts that a killed run left."""
        for leftover in self.path.glob(".*.png.*.tmp"):
            leftover.unlink(missing_ok=True)
        self.merge_parts({})

    def merge_parts(self, order: dict[str, int]) -> list[dict]:
        """Main process, when no rank writes: parts into manifest.jsonl, the latest line of each file; returns lines.

        `order`: file name -> place; named files come last, in this order, after what was there before.
        """
        manifest = self.path / MANIFEST
        parts = sorted(self.path.glob(".manifest-rank*.jsonl"))
        known: dict[str, dict] = {}
        for source in [manifest, *parts]:
            if source.is_file():
                for line in read_log(source)[0]:
                    if isinstance(line.get("file"), str):
                        known[line["file"]] = line
        lines = sorted(known.values(), key=lambda line: order.get(line["file"], -1))
        if parts or (lines and order):
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_atomic(manifest, lambda file: file.write(text.encode("utf-8", "backslashreplace")))
        for part in parts:
            part.unlink(missing_ok=True)
        return lines

    def finished(self, jobs: Sequence) -> tuple[set[str], list[str]]:
        """(file names of jobs that are done and whole, file names that the manifest names but that are damaged)."""
        manifest = self.path / MANIFEST
        lines = read_log(manifest)[0] if manifest.is_file() else []
        hashes = {line.get("file"): line.get("sha256") for line in lines}
        whole, damaged = set(), []
        for job in jobs:
            if job.file_name in hashes:
                path = self.path / job.file_name
                if path.is_file() and file_sha256(path) == hashes[job.file_name]:
                    whole.add(job.file_name)
                else:
                    damaged.append(job.file_name)
        return whole, damaged

    def save(self, job: Job, image: Image.Image, facts: dict) -> dict:
        """Write one image and its line; returns the line. Bytes depend on image and job alone (no time stamps)."""
        data = encode_png(image, job)
        line = {
            "file": job.file_name,
            "prompt": job.prompt,
            "negative_prompt": job.negative_prompt,
            "seed": job.seed,
            "height": job.height,
            "width": job.width,
            "num_inference_steps": job.num_inference_steps,
            "guidance_scale": job.guidance_scale,
            **job.inputs.told(),
            **facts,
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        write_atomic(self.path / job.file_name, lambda file: file.write(data), durable=False)
        with open(self.part, "a", encoding="utf-8", errors="backslashreplace") as part:
            part.write(json.dumps(line, ensure_ascii=False) + "\n")
        return line


def encode_png(image: Image.Image, job: Job) -> bytes:
    """PNG bytes with the job's settings in a text chunk, so that an image tells how it was made."""
    settings = {
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "seed": job.seed,
        "num_inference_steps": job.num_inference_steps,
        "guidance_scale": job.guidance_scale,
        "size": [job.width, job.height],
        **job.inputs.told(),
    }
    info = PngInfo()
    info.add_text("sana", json.dumps(settings))  # ASCII: json escapes every other letter
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info, compress_level=PNG_LEVEL)
    return buffer.getvalue()


class Writer:
    """Encodes and writes images in a thread, while the device works on the next ones."""

    def __init__(self, folder: OutputFolder, on_error: Callable):
        self.folder, self.on_error = folder, on_error
        self.lines: list[dict] = []
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._waiting: list = []

    def submit(self, job: Job, image: Image.Image, facts: dict) -> None:
        while len(self._waiting) >= 4:  # bounds the memory of finished images (50 MB each at 4096 px)
            self._take()
        self._waiting.append((job, self._pool.submit(self.folder.save, job, image, facts)))

    def _take(self) -> None:
        job, future = self._waiting.pop(0)
        try:
            self.lines.append(future.result())
        except Exception as error:
            self.on_error([job], error)

    def close(self) -> None:
        while self._waiting:
            self._take()
        self._pool.shutdown()


def make_contact_sheet(folder: Path, jobs: Sequence, made: set[str]) -> Path | None:
    """contact_sheet.png of a run: a row per prompt where each has the same seeds, else rows of six."""
    rows: dict[tuple[str, str], list] = {}
    for job in jobs:
        rows.setdefault((job.prompt, job.negative_prompt), []).append(job)
    widths = {len(row) for row in rows.values()}
    regular = len(widths) == 1 and 2 <= max(widths) <= 8
    shown = list(jobs[:CONTACT_SHEET_LIMIT])
    if regular:
        columns = max(widths)
        shown = shown[: max(columns, len(shown) // columns * columns)]
    if not any(job.file_name in made for job in shown):
        return None
    images = [
        folder / job.file_name if job.file_name in made else Image.new("RGB", (job.width, job.height), (200, 200, 200))
        for job in shown
    ]
    state = ["" if job.file_name in made else " (failed)" for job in shown]
    if regular:
        labels = [f"seed {job.seed}{note}" for job, note in zip(shown, state, strict=True)]
        prompts = [shown[start].prompt for start in range(0, len(shown), columns)]
        return contact_sheet(images, labels, folder / "contact_sheet.png", columns, row_labels=prompts)
    labels = [f"{job.prompt} | seed {job.seed}{note}" for job, note in zip(shown, state, strict=True)]
    return contact_sheet(images, labels, folder / "contact_sheet.png", min(6, len(shown)))
