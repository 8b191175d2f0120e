"""Thumbnails inside the pages, within a budget of bytes."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from sana_kit.files import write_atomic

# A page stays under 10 MB: images get 6 MB, a third more in base64.
_IMAGE_BUDGET_BYTES = 6_000_000
_LOSSLESS_SIDE = 256  # PNG files up to this side are embedded as they are
_SMALL_SIDE = 128  # below it an image is shown at twice its size, pixel by pixel
_LADDER = ((512, 82), (384, 80), (320, 75), (256, 70), (192, 65), (128, 60))  # (longest side in pixels, WebP quality)


class Thumbnails:
    """WebP thumbnails of images; kept in `folder`, if one is given, so that a page is rewritten in no time."""

    def __init__(self, folder: Path | None = None):
        self.folder, self.used, self.unreadable = folder, set(), []

    def _bytes(self, path: Path, side: int, quality: int) -> bytes:
        cached = None
        if self.folder is not None:
            status = path.stat()
            key = f"{path.resolve()}|{status.st_mtime_ns}|{status.st_size}|{side}|{quality}"
            cached = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.webp"
            self.used.add(cached.name)
            if cached.exists():
                return cached.read_bytes()
        with Image.open(path) as image:
            if image.format == "PNG" and max(image.size) <= _LOSSLESS_SIDE:
                return path.read_bytes()
            image = image.convert("RGB")
            image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", quality=quality, method=2)
        if cached is not None:
            write_atomic(cached, lambda file: file.write(buffer.getvalue()), durable=False)
        return buffer.getvalue()

    def embed(self, paths: Sequence[Path]) -> dict[Path, dict]:
        """{path: {"src": data URI, "width", "height"}}, as large as fits the page's budget together.

        Images that cannot be read are left out and listed in `unreadable`; {} when the smallest size is too much.
        """
        paths, budget = list(dict.fromkeys(paths)), _IMAGE_BUDGET_BYTES
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
                    with Image.open(io.BytesIO(raw)) as image:
                        (width, height), kind = image.size, image.format.lower()
                    source = f"data:image/{kind};base64," + base64.b64encode(raw).decode()
                    small = max(width, height) < _SMALL_SIDE
                    embedded[path] = {"src": source, "width": width, "height": height, "small": small}
                self._prune()
                return embedded
        return {}

    def _prune(self) -> None:
        """Forget thumbnails that the page no longer shows."""
        if self.folder is not None and self.folder.is_dir():
            for file in self.folder.iterdir():
                if file.name not in self.used:
                    file.unlink(missing_ok=True)
