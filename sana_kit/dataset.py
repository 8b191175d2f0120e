"""Where pictures and captions come from, and how a picture becomes a sample: decode, orient, resize, crop, flip.

Used by train_dreambooth_lora_sana.py and sana_kit/encodings.py. A data set is found, checked and hashed by
`load_pictures`; nothing of a picture but its hash and size stays in memory. Tested by
`python -m pytest tests/test_dataset.py`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import threading
import warnings
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
# Only these decoders are offered a file: PIL also has readers that start other programs (EPS) or follow references.
PICTURE_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
LISTED_PROBLEMS = 20  # how many bad pictures an error names; the rest are counted
ORIENTATION_TAG = 0x0112
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}


class PictureError(ValueError):
    """One picture that cannot be used; the message names it and the reason."""


# ---------------------------------------------------------------------------------------------------------------------
# One picture: open, orient, convert


def open_picture(data: bytes, name: str) -> Image.Image:
    """Open encoded bytes without decoding the pixels.

    Raises:
        PictureError: no picture of a known format, broken header, or more pixels than PIL's limit (178,956,970).
    """
    if not data:
        raise PictureError(f"{name}: the file is empty (0 bytes).")
    if data.startswith(b"version https://git-lfs"):
        raise PictureError(f"{name}: this is a Git LFS pointer, not the picture; run `git lfs pull` in the data set.")
    Image.init()
    try:
        with warnings.catch_warnings():
            # PIL warns at half its limit; the limit itself is an error below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=[f for f in PICTURE_FORMATS if f in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise PictureError(
            f"{name}: too many pixels for a picture ({error}). Scale it down or leave it out."
        ) from None
    except Image.UnidentifiedImageError:
        known = ", ".join(f for f in PICTURE_FORMATS if f in Image.OPEN)
        raise PictureError(
            f"{name}: not a picture of a known format ({known}), or its header is broken ({len(data)} bytes)."
        ) from None
    except Exception as error:  # decoders raise whatever they like on broken headers
        raise PictureError(f"{name}: the header cannot be read ({type(error).__name__}: {error}).") from None


def orientation(image: Image.Image, data: bytes) -> int:
    """The EXIF orientation 1 to 8 (1 where there is none or the EXIF block is unreadable, as viewers do)."""
    try:
        if image.format == "PNG":
            # PIL decodes the whole picture to find a late eXIf chunk, so the chunks are walked here.
            block = image.info.get("exif") or _png_exif(data)
            if block is None and "Raw profile type exif" not in image.info:
                return 1
            if block is not None:
                exif = Image.Exif()
                exif.load(block)
            else:
                exif = image.getexif()
        else:
            exif = image.getexif()
        value = exif.get(ORIENTATION_TAG, 1)
    except Exception:  # broken EXIF is common and harmless
        return 1
    return value if value in TRANSPOSITIONS else 1


def _png_exif(data: bytes) -> bytes | None:
    """The eXIf chunk of a PNG file with the header that PIL's parser expects."""
    position = 8
    while position + 8 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] == b"eXIf":
            return b"Exif\x00\x00" + data[position + 8 : position + 8 + length]
        position += 12 + length
    return None


def decode_picture(data: bytes, name: str) -> Image.Image:
    """Decode encoded bytes to an 8-bit RGB picture, upright; of an animation the first frame.

    Transparency is laid over white; 16-bit grey is scaled to 8 bits; CMYK goes through PIL's conversion. ICC profiles
    are not applied, as in diffusers.

    Raises:
        PictureError: corrupt or truncated data, or pixels without a known range (float, 32-bit integer).
    """
    image = open_picture(data, name)
    try:
        image.load()
    except Exception as error:  # OSError for truncation, but also SyntaxError, struct.error, ValueError ...
        raise PictureError(f"{name}: corrupt or truncated picture ({type(error).__name__}: {error}).") from None
    turn = TRANSPOSITIONS.get(orientation(image, data))
    if turn is not None:
        image = image.transpose(turn)
    try:
        return to_rgb(image, png=image.format == "PNG" or data.startswith(b"\x89PNG"))
    except PictureError:
        raise
    except Exception as error:
        raise PictureError(f"{name}: mode {image.mode} cannot be turned into RGB ({error}).") from None


def to_rgb(image: Image.Image, png: bool = False) -> Image.Image:
    """RGB, 8 bits: alpha over white, 16 bits divided by 257. `png`: mode I holds 16 bits (older PIL opens PNG so)."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and png):
        pixels = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((pixels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have no known range; save it with 8 or 16 bits a channel")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def inspect_picture(data: bytes, name: str) -> tuple[bytes, int, int, bool]:
    """(SHA-256 of the bytes, width and height when upright, animated) from the header alone.

    Raises:
        PictureError: as `open_picture`, and for PNG files whose chunks fail their checksums.
    """
    image = open_picture(data, name)
    animated = bool(getattr(image, "is_animated", False)) and image.format != "MPO"
    if image.format == "TIFF":
        # Whether PIL turns a TIFF by itself, and when, differs between its versions; the decoded picture tells.
        width, height = decode_picture(data, name).size
    else:
        width, height = image.size
        if orientation(image, data) >= 5:
            width, height = height, width
    if image.format == "PNG":
        try:
            image.verify()  # checksums of all chunks, without decompressing them
        except Exception as error:
            raise PictureError(f"{name}: corrupt or truncated picture ({type(error).__name__}: {error}).") from None
    return hashlib.sha256(data).digest(), width, height, animated


# ---------------------------------------------------------------------------------------------------------------------
# The transform


@dataclass(frozen=True)
class TransformPlan:
    """Scale to `scaled` (width, height), take the square of side `resolution` at `crop` (left, top), flip or not."""

    scaled: tuple[int, int]
    crop: tuple[int, int]
    flip: bool
    resolution: int


def plan_transform(
    size: tuple[int, int], *, resolution: int, center_crop: bool, random_flip: bool, seed: int, index: int
) -> TransformPlan:
    """The transform's decision for an upright picture of `size` (width, height), without its pixels.

    The random numbers come from a hash of (seed, index) alone: no rank, worker, order or library version matters.
    """
    width, height = size
    short = min(width, height)
    scaled = tuple(max(resolution, int(resolution * side / short)) for side in size)
    room = (scaled[0] - resolution, scaled[1] - resolution)
    digest = hashlib.sha256(f"{int(seed)}:{int(index)}".encode()).digest()
    if center_crop:
        crop = (int(round(room[0] / 2.0)), int(round(room[1] / 2.0)))
    else:
        crop = tuple(int.from_bytes(digest[8 * k : 8 * k + 8], "big") % (room[k] + 1) for k in (0, 1))
    return TransformPlan(scaled, crop, bool(random_flip and digest[16] & 1), resolution)


def apply_transform(image: Image.Image, plan: TransformPlan) -> np.ndarray:
    """Scale (bilinear, antialiased), crop and flip an RGB picture: uint8 (resolution, resolution, 3).

    Only the part inside the crop is computed, so a 1 x 10000 picture costs no more than a square one.
    """
    x_step, y_step = image.width / plan.scaled[0], image.height / plan.scaled[1]
    left, top = plan.crop
    box = (
        left * x_step,
        top * y_step,
        min((left + plan.resolution) * x_step, image.width),
        min((top + plan.resolution) * y_step, image.height),
    )
    image = image.resize((plan.resolution, plan.resolution), Image.Resampling.BILINEAR, box=box)
    if plan.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(image)


def to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (..., H, W, 3) to float32 (..., 3, H, W) in [-1, 1]."""
    return pixels.movedim(-1, -3).to(torch.float32).div(255.0).sub(0.5).div(0.5)


def transform(
    image: Image.Image, *, resolution: int, center_crop: bool, random_flip: bool, seed: int, index: int
) -> torch.Tensor:
    """A training sample of an RGB picture: float32 (3, resolution, resolution) in [-1, 1].

    The short side is scaled to `resolution`; crop and flip follow from (seed, index) alone, see `plan_transform`.
    """
    plan = plan_transform(
        image.size,
        resolution=resolution,
        center_crop=center_crop,
        random_flip=random_flip,
        seed=seed,
        index=index,
    )
    return to_unit_range(torch.from_numpy(apply_transform(image, plan)))


# ---------------------------------------------------------------------------------------------------------------------
# Sources: encoded bytes by row number


class _FileSource:
    """Picture files on disk."""

    def __init__(self, paths: list[Path], names: list[str]):
        self.paths, self.names = [str(p) for p in paths], names

    def __len__(self):
        return len(self.paths)

    def name(self, row: int) -> str:
        return self.names[row]

    def read(self, row: int) -> bytes:
        try:
            with open(self.paths[row], "rb") as file:
                return file.read()
        except OSError as error:
            raise PictureError(f"{self.names[row]}: cannot be read ({error.strerror or error}).") from None


class _ParquetSource:
    """One column of one or more parquet files, read by row group; at most two groups are held in memory."""

    def __init__(self, files: list[Path], column: str, split: str, root: Path):
        import pyarrow.parquet as pq

        self.files, self.column, self.split, self.root = [str(f) for f in files], column, split, str(root)
        starts, groups, total = [], [], 0
        for number, file in enumerate(self.files):
            meta = pq.read_metadata(file)
            for group in range(meta.num_row_groups):
                starts.append(total)
                groups.append((number, group))
                total += meta.row_group(group).num_rows
        self.starts, self.groups, self.total = np.array(starts, dtype=np.int64), groups, total
        self._reset()

    def _reset(self):
        self._lock, self._readers, self._held = threading.Lock(), {}, OrderedDict()

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_readers", "_held")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._reset()

    def __len__(self):
        return self.total

    def name(self, row: int) -> str:
        return f"{self.split}[{row}]"

    def read(self, row: int) -> bytes:
        group = int(np.searchsorted(self.starts, row, side="right")) - 1
        with self._lock:
            value = self._column(group)[row - int(self.starts[group])].as_py()
        return _cell_bytes(value, self.name(row), self.root)

    def _column(self, group: int):
        """The Arrow column of a row group; the caller holds the lock."""
        import pyarrow.parquet as pq

        if group not in self._held:
            number, inner = self.groups[group]
            key = (os.getpid(), number)  # a forked worker must not share the parent's file position
            if key not in self._readers:
                # With a buffer the pages are streamed; without, the row group would be in memory twice.
                self._readers = {key: pq.ParquetFile(self.files[number], buffer_size=2**20)}
            while len(self._held) >= 2:
                self._held.popitem(last=False)
            self._held[group] = self._readers[key].read_row_group(inner, columns=[self.column]).column(0)
        self._held.move_to_end(group)
        return self._held[group]

    def release(self):
        """Give the row groups in memory back, to the system as well."""
        import pyarrow as pa

        with self._lock:
            self._held.clear()
        pa.default_memory_pool().release_unused()


class _DatasetSource:
    """A `datasets.Dataset` whose image column is kept encoded.

    Its rows lie in uncompressed Arrow files. They are read by offset where possible: read through the memory map,
    every picture ever touched would count as resident memory of the process.
    """

    def __init__(self, dataset, column: str, split: str, root: Path | None):
        self.dataset, self.column, self.split = dataset.select_columns([column]), column, split
        self.root = None if root is None else str(root)
        plain = dataset._indices is None  # otherwise rows were selected or shuffled
        self.files = [entry["filename"] for entry in dataset.cache_files] if plain else []
        self.spans = _arrow_spans(self.files, column, len(dataset))

    def __len__(self):
        return len(self.dataset)

    def name(self, row: int) -> str:
        return f"{self.split}[{row}]"

    def read(self, row: int) -> bytes:
        if self.spans is not None and self.spans[row, 2] >= 0:
            number, offset, length = (int(v) for v in self.spans[row])
            with open(self.files[number], "rb") as file:
                file.seek(offset)
                return file.read(length)
        return _cell_bytes(self.dataset[row][self.column], self.name(row), self.root)


def _arrow_spans(files: list[str], column: str, rows: int) -> np.ndarray | None:
    """(rows, 3) int64: file number, offset and length of each picture's bytes in Arrow files; length -1: null.

    None where the files are not what is expected (compressed, other types, more rows): they are then read as tables.
    """
    import pyarrow as pa

    parts = []
    for number, name in enumerate(files):
        with pa.memory_map(name) as mapped:
            base = mapped.read_buffer(mapped.size()).address
            end = base + mapped.size()
            mapped.seek(0)
            try:
                batches = pa.ipc.open_stream(mapped)
            except pa.ArrowInvalid:
                return None
            for batch in batches:
                if column not in batch.schema.names:
                    return None
                cells = batch.column(column)
                valid = np.asarray(cells.is_valid())
                if pa.types.is_struct(cells.type):
                    cells = cells.field("bytes") if cells.type.get_field_index("bytes") >= 0 else None
                if cells is None or not (pa.types.is_binary(cells.type) or pa.types.is_large_binary(cells.type)):
                    return None
                valid &= np.asarray(cells.is_valid())
                kind = np.int64 if pa.types.is_large_binary(cells.type) else np.int32
                _, offsets, data = cells.buffers()
                spans = np.full((len(cells), 3), -1, np.int64)
                if data is not None and len(cells):
                    if not base <= data.address < end:  # decompressed into other memory
                        return None
                    bounds = np.frombuffer(offsets, kind)[cells.offset : cells.offset + len(cells) + 1].astype(
                        np.int64
                    )
                    spans[valid, 0] = number
                    spans[valid, 1] = (data.address - base + bounds[:-1])[valid]
                    spans[valid, 2] = np.diff(bounds)[valid]
                parts.append(spans)
                del batch, cells, data, offsets
    spans = np.concatenate(parts) if parts else np.zeros((0, 3), np.int64)
    return spans if len(spans) == rows else None


class _JoinedSource:
    """Two sources one behind the other."""

    def __init__(self, first, second):
        self.first, self.second = first, second

    def __len__(self):
        return len(self.first) + len(self.second)

    def _part(self, row):
        return (self.first, row) if row < len(self.first) else (self.second, row - len(self.first))

    def name(self, row: int) -> str:
        part, row = self._part(row)
        return part.name(row)

    def read(self, row: int) -> bytes:
        part, row = self._part(row)
        return part.read(row)

    def release(self):
        for part in (self.first, self.second):
            if hasattr(part, "release"):
                part.release()


def _cell_bytes(value, name: str, root: str | None) -> bytes:
    """The encoded bytes in a cell of an image column: bytes, {"bytes", "path"}, or a path inside `root`."""
    if isinstance(value, dict):
        inner, path = value.get("bytes"), value.get("path")
    elif isinstance(value, str):
        inner, path = None, value
    else:
        inner, path = value, None
    if inner is not None:
        return bytes(inner)
    if path is None:
        raise PictureError(f"{name}: the picture is null.")
    if "://" in path:
        raise PictureError(
            f"{name}: the picture is an address ({path[:80]}), not bytes; nothing is downloaded by row."
        )
    if root is None:
        raise PictureError(f"{name}: the row holds only a path ({path[:200]}) and no bytes.")
    file = _inside(Path(root), path)
    if file is None:
        raise PictureError(f"{name}: the path {path[:200]} leads out of the data set's folder.")
    return _FileSource([file], [f"{name} ({path})"]).read(0)


def _inside(root: Path, relative: str) -> Path | None:
    """`root / relative` unless that lies outside root."""
    file = Path(os.path.normpath(root / relative))
    try:
        file.relative_to(os.path.normpath(root))
    except ValueError:
        return None
    return file


# ---------------------------------------------------------------------------------------------------------------------
# The set of pictures


class PictureSet:
    """Captioned pictures, opened one at a time. Picklable; safe to use from several threads.

    Attributes:
        captions: one string per sample.
        names: file name relative to the folder, or "train[17]" for row 17 of a table, per sample.
        report: counts of what was found and skipped, for the log and the summary.
        notes: the same as sentences, each told once by the trainer.
    """

    def __init__(self, source, rows, captions, positions, digests, sizes, report, notes):
        self._source = source
        self._rows = rows  # (N,) int64, the source's row of each sample
        self._positions = positions  # (N,) int64, the index that random decisions are keyed by
        self._digests = digests  # (rows of the source, 32) uint8
        self._sizes = sizes  # (rows of the source, 2) int32: width, height when upright
        self.captions: list[str] = captions
        self.report: dict[str, int] = report
        self.notes: list[str] = notes

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def names(self) -> list[str]:
        return [self.name(i) for i in range(len(self))]

    def name(self, i: int) -> str:
        """The picture's name in messages."""
        return self._source.name(int(self._rows[i]))

    def read(self, i: int) -> bytes:
        """The encoded source bytes. Raises PictureError when they cannot be read or changed since they were hashed."""
        data = self._source.read(int(self._rows[i]))
        if hashlib.sha256(data).digest() != self._digests[self._rows[i]].tobytes():
            raise PictureError(f"{self.name(i)}: the picture changed while the run was using it; start again.")
        return data

    def load(self, i: int) -> Image.Image:
        """The picture, 8-bit RGB and upright (see `decode_picture`). Raises PictureError when it is corrupt."""
        return decode_picture(self.read(i), self.name(i))

    def source_hash(self, i: int) -> str:
        """Hex SHA-256 of the encoded source bytes."""
        return self._digests[self._rows[i]].tobytes().hex()

    def size(self, i: int) -> tuple[int, int]:
        """(width, height) in pixels when upright."""
        width, height = self._sizes[self._rows[i]]
        return int(width), int(height)

    def position(self, i: int) -> int:
        """The index for `plan_transform`: it stays when other samples are skipped."""
        return int(self._positions[i])

    def row(self, i: int) -> int:
        """The source's row number: equal for repeats of one picture."""
        return int(self._rows[i])

    def without(self, indices) -> PictureSet:
        """A set without these samples and the other repeats of their pictures; the rest keep their decisions."""
        bad = {int(self._rows[i]) for i in indices}
        keep = np.array([row not in bad for row in self._rows.tolist()], dtype=bool)
        report = {**self.report, "bad pictures skipped": self.report.get("bad pictures skipped", 0) + len(bad)}
        return PictureSet(
            self._source,
            self._rows[keep],
            [c for c, k in zip(self.captions, keep, strict=True) if k],
            self._positions[keep],
            self._digests,
            self._sizes,
            report,
            list(self.notes),
        )

    def release(self) -> None:
        """Give source data held in memory back; the set stays usable."""
        if hasattr(self._source, "release"):
            self._source.release()


def concat(first: PictureSet, second: PictureSet) -> PictureSet:
    """The samples of both, in this order; each keeps its random decisions (prior preservation: instance, class)."""
    report = {k: first.report.get(k, 0) + second.report.get(k, 0) for k in {**first.report, **second.report}}
    return PictureSet(
        _JoinedSource(first._source, second._source),
        np.concatenate([first._rows, second._rows + len(first._source)]),
        first.captions + second.captions,
        np.concatenate([first._positions, second._positions]),
        np.concatenate([first._digests, second._digests]),
        np.concatenate([first._sizes, second._sizes]),
        report,
        first.notes + second.notes,
    )


def prefetch(function, items, workers: int, window: int):
    """Yield function(item) in order, computed ahead by threads; at most `window` results wait. workers 0: no threads.

    PIL releases the interpreter lock while it decodes and resizes, so threads scale without a copy between processes.
    """
    if workers <= 0:
        yield from map(function, items)
        return
    pending: deque = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= max(1, window):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def default_workers() -> int:
    """Threads for decoding: this process's share of the host's cores, 1 to 16."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min(16, cores // max(1, local)))


def progress_bar(total: int, description: str, unit: str = "picture"):
    """A tqdm bar, on the first rank only."""
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=description, unit=unit, disable=int(os.environ.get("RANK", "0") or 0) != 0)


def check_pictures(
    pictures: PictureSet, indices=None, *, rank: int = 0, world_size: int = 1, num_workers: int | None = None
) -> list[tuple[int, str]]:
    """Decode every picture of this rank's share completely: [(sample index, message)] of the bad ones.

    JPEG files are decoded at an eighth of their size, which still reads all their data, so truncation shows at a
    fraction of the cost. Each distinct picture is decoded once. No model is needed, so it runs before weights load.
    """
    first_of_row: dict[int, int] = {}
    for i in range(len(pictures)) if indices is None else indices:
        first_of_row.setdefault(pictures.row(i), i)
    share = list(first_of_row.values())[rank::world_size]
    workers = default_workers() if num_workers is None else num_workers
    bad = []

    def check(i):
        try:
            data, name = pictures.read(i), pictures.name(i)
            image = open_picture(data, name)
            if image.format == "JPEG" and image.mode in ("RGB", "L"):
                image.draft(image.mode, (max(1, image.width // 8), max(1, image.height // 8)))
                try:
                    image.load()
                except Exception as error:
                    raise PictureError(
                        f"{name}: corrupt or truncated picture ({type(error).__name__}: {error})."
                    ) from None
            else:
                decode_picture(data, name)
        except PictureError as error:
            return i, str(error)
        return None

    with progress_bar(len(share), "Checking pictures") as bar:
        for result in prefetch(check, share, workers, 4 * max(1, workers)):
            bar.update()
            if result is not None:
                bad.append(result)
    pictures.release()
    return bad


def bad_picture_problems(messages: list[str]) -> str:
    """One text for an error that names bad pictures and the remedy."""
    shown = "".join(f"\n    {m}" for m in messages[:LISTED_PROBLEMS])
    more = f"\n    ... and {len(messages) - LISTED_PROBLEMS} more" if len(messages) > LISTED_PROBLEMS else ""
    return (
        f"{len(messages)} picture(s) cannot be used; repair or remove them, or pass --skip_bad_images to go on without"
        f" them:{shown}{more}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Finding a data set


@dataclass
class _Table:
    """A found data set: its pictures and, per row, the raw caption cell (`captions` None: no caption column)."""

    source: object
    captions: list | None
    problems: list[str]
    notes: list[str]
    counts: dict[str, int]


def _refuse(problem: str) -> _Table:
    """No data set, for this reason."""
    return _Table(None, None, [problem], [], {})


def load_pictures(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    instance_data_dir: str | None = None,
    image_column: str | None = "image",
    caption_column: str | None = None,
    instance_prompt: str | None = None,
    cache_dir: str | None = None,
    repeats: int = 1,
    skip_bad_images: bool = False,
) -> PictureSet:
    """Find, check and hash the training pictures.

    Args:
        dataset_name: a local folder (parquet files at its top or under data/, metadata.jsonl or metadata.csv beside
            pictures, a folder written by `save_to_disk`, .jsonl or .csv tables that name files, or just pictures), one
            such file, or the name of a data set on the hub. Of several splits 'train' is taken, else the only one.
        dataset_config_name: the hub configuration, or a subfolder of the local folder.
        instance_data_dir: a folder of pictures, each with an optional caption in a .txt file of the same name.
        image_column: column of the pictures; None takes the first that holds pictures.
        caption_column: column of the captions; None gives every picture of `dataset_name` the instance prompt. Where a
            cell lists several captions, the r-th repeat of the picture takes caption r modulo their number, so without
            --repeats the first.
        instance_prompt: the caption of pictures that have none (null, empty or only spaces).
        cache_dir: where `datasets` keeps what it downloads.
        repeats: how many times each picture appears, consecutively.
        skip_bad_images: leave unreadable pictures out and count them, instead of an error.

    Raises:
        ValueError: all problems found, each with flag, value and remedy; bad pictures are named.
    """
    problems = []
    if (dataset_name is None) == (instance_data_dir is None):
        found = "both" if dataset_name is not None else "neither"
        problems.append(f"--dataset_name and --instance_data_dir: {found} given; give exactly one of them.")
    if repeats < 1:
        problems.append(f"--repeats={repeats}: must be at least 1.")
    if instance_data_dir is not None and caption_column is not None:
        problems.append(
            f"--caption_column={caption_column}: only tables (--dataset_name) have columns; with --instance_data_dir"
            " put captions into .txt files beside the pictures."
        )
    if problems:
        _raise(problems)
    if instance_data_dir is not None:
        table = _find_in_picture_folder(Path(instance_data_dir), "--instance_data_dir")
        flag = f"--instance_data_dir={instance_data_dir}"
    else:
        table = _find_dataset(dataset_name, dataset_config_name, image_column, caption_column, cache_dir)
        flag = f"--dataset_name={dataset_name}"
    if table.problems:
        _raise(table.problems)
    if len(table.source) == 0:
        _raise([f"{flag}: the data set has no pictures."])
    return _assemble(table, flag, instance_prompt, repeats, skip_bad_images)


def load_class_pictures(class_data_dir: str, class_prompt: str, num_class_images: int | None) -> PictureSet:
    """The first `num_class_images` pictures (by name) of a folder of class pictures; None or fewer there: all of them.

    Raises:
        ValueError: no such folder, no pictures, or unreadable ones, which are named.
    """
    table = _find_in_picture_folder(Path(class_data_dir), "--class_data_dir", captions=False)
    if not table.problems and len(table.source) == 0:
        table.problems.append(f"--class_data_dir={class_data_dir}: no pictures in it.")
    if table.problems:
        _raise(table.problems)
    source = table.source
    if num_class_images is not None:
        source = _FileSource(source.paths[:num_class_images], source.names[:num_class_images])
    table = _Table(source, None, [], table.notes, table.counts)
    return _assemble(table, f"--class_data_dir={class_data_dir}", class_prompt, 1, False)


def _raise(problems: list[str]):
    raise ValueError("The training pictures cannot be used:" + "".join(f"\n- {p}" for p in problems))


def _assemble(table: _Table, flag: str, instance_prompt: str | None, repeats: int, skip_bad: bool) -> PictureSet:
    """Check every header, settle every caption, and build the set."""
    source, count = table.source, len(table.source)
    digests, sizes = np.zeros((count, 32), np.uint8), np.zeros((count, 2), np.int32)
    bad: dict[int, str] = {}
    animated = 0

    def look(row):
        try:
            return inspect_picture(source.read(row), source.name(row))
        except PictureError as error:
            return str(error)

    workers = default_workers()
    with progress_bar(count, "Reading pictures") as bar:
        for row, result in enumerate(prefetch(look, range(count), workers, 4 * workers)):
            bar.update()
            if isinstance(result, str):
                bad[row] = result
                continue
            digest, width, height, moving = result
            digests[row] = np.frombuffer(digest, np.uint8)
            sizes[row] = width, height
            animated += moving
    if hasattr(source, "release"):
        source.release()
    problems = []
    if bad and not skip_bad:
        problems.append(f"{flag}: " + bad_picture_problems(list(bad.values())))

    rows, captions, positions = [], [], []
    empty, several, fallback = [], 0, (instance_prompt or "").strip()
    for row in range(count):
        if row in bad:
            continue
        try:
            choices = _caption_choices(None if table.captions is None else table.captions[row])
        except TypeError as error:
            problems.append(f"{flag}: caption of {source.name(row)}: {error}")
            if len(problems) >= LISTED_PROBLEMS:
                break
            continue
        if not choices:
            if table.captions is not None:
                empty.append(row)
            choices = [fallback]
        several += len(choices) > 1
        for repeat in range(repeats):
            rows.append(row)
            captions.append(choices[repeat % len(choices)])
            positions.append(row * repeats + repeat)
    if not fallback and table.captions is None:
        problems.append(
            f"{flag}: no captions: give --instance_prompt, or --caption_column for a table with captions, or .txt"
            " files beside the pictures of --instance_data_dir."
        )
    elif not fallback and empty:
        shown = ", ".join(source.name(row) for row in empty[:LISTED_PROBLEMS]) + (
            " ..." if len(empty) > LISTED_PROBLEMS else ""
        )
        problems.append(
            f"{flag}: {len(empty)} picture(s) have no caption (null, empty or only spaces) and there is no"
            f" --instance_prompt to take instead: {shown}"
        )
    if not problems and not rows:
        problems.append(f"{flag}: all {count} pictures are bad: " + bad_picture_problems(list(bad.values())))
    if problems:
        _raise(problems)
    report = {
        "pictures": count - len(bad),
        "samples": len(rows),
        "bad pictures skipped": len(bad),
        "captions from instance_prompt": len(empty) if table.captions is not None else count - len(bad),
        "animations, first frame taken": animated,
        "pictures with several captions": several,
        **table.counts,
    }
    notes = list(table.notes)
    if bad:
        notes.append("--skip_bad_images: " + bad_picture_problems(list(bad.values())))
    if table.captions is None:
        notes.append(f"{flag}: no captions in use; every picture gets the instance prompt.")
    elif empty:
        notes.append(f"{flag}: {len(empty)} picture(s) without a caption get the instance prompt.")
    if animated:
        notes.append(f"{flag}: {animated} animation(s); the first frame is taken.")
    return PictureSet(
        source, np.array(rows, np.int64), captions, np.array(positions, np.int64), digests, sizes, report, notes
    )


def _caption_choices(cell) -> list[str]:
    """The captions in a cell, those that are only spaces left out. Raises TypeError for anything but text."""
    if cell is None:
        return []
    if isinstance(cell, str):
        return [cell.strip()] if cell.strip() else []
    if isinstance(cell, (list, tuple)) or type(cell).__name__ in ("ndarray", "Column"):
        return [text for item in cell for text in _caption_choices(item)]
    raise TypeError(f"it holds {type(cell).__name__} ({str(cell)[:60]!r}), not text; name a text column.")


# --- a folder of pictures


def _find_in_picture_folder(folder: Path, flag: str, captions: bool = True) -> _Table:
    """The pictures directly in a folder, each with the caption of its .txt file."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        return _refuse(f"{flag}={folder}: {what}.")
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        return _refuse(f"{flag}={folder}: cannot be listed ({error.strerror}).")
    files = [e for e in entries if e.is_file() and not e.name.startswith(".")]
    pictures = [f for f in files if f.suffix.lower() in PICTURE_SUFFIXES]
    stems = {f.stem for f in pictures}
    texts = {f.stem: f for f in files if f.suffix.lower() == ".txt" and f.stem in stems} if captions else {}
    used = set(pictures) | set(texts.values())
    others = [f.name for f in files if f not in used]
    folders = [e.name for e in entries if e.is_dir()]
    problems, notes, cells = [], [], []
    if not pictures:
        hint = (
            f" (it has the subfolders {', '.join(folders[:5])}; pictures are looked for at the top)" if folders else ""
        )
        problems.append(f"{flag}={folder}: no pictures in it{hint}. Known endings: {', '.join(PICTURE_SUFFIXES)}.")
    for picture in pictures:
        text = texts.get(picture.stem)
        try:
            cells.append(None if text is None else text.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{flag}={folder}: caption {text.name} cannot be read as UTF-8 text ({error}).")
    shared = len([p for p in pictures if p.stem in texts]) - len(texts)
    if shared:
        notes.append(f"{flag}={folder}: {shared} caption file(s) serve several pictures of the same name.")
    if others:
        shown = ", ".join(others[:10]) + (" ..." if len(others) > 10 else "")
        notes.append(f"{flag}={folder}: {len(others)} other file(s) skipped by name: {shown}")
    if any(name.startswith("metadata.") for name in others):
        notes.append(f"{flag}={folder}: to use its metadata file give the folder as --dataset_name.")
    counts = {"other files skipped": len(others), "captions shared by pictures of one name": shared}
    return _Table(_FileSource(pictures, [p.name for p in pictures]), cells if texts else None, problems, notes, counts)


# --- a named data set


def _find_dataset(name, config, image_column, caption_column, cache_dir) -> _Table:
    """A local folder or file in one of the known layouts, else a data set of the hub."""
    path = Path(name).expanduser()
    if not path.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
            return _refuse(
                f"--dataset_name={name}: no such folder or file. Check the path, or give the"
                " name of a data set on the hub."
            )
        return _from_hub(name, config, image_column, caption_column, cache_dir)
    columns = (image_column, caption_column)
    if path.is_file():
        return _from_files(name, {"train": [path]}, path.parent, *columns)
    if config is not None:
        if not (path / config).is_dir():
            present = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir())) or "none"
            return _refuse(f"--dataset_config_name={config}: no such subfolder in {name}; present: {present}.")
        path = path / config
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _from_saved(name, path, *columns)
    splits = _splits(path, (".parquet",))
    metadata = {**_splits(path, (".jsonl", ".csv", ".parquet"), stem="metadata")}
    if metadata:
        return _from_files(name, metadata, path, *columns)
    for found in (splits, _splits(path, (".arrow",)), _splits(path, (".jsonl", ".csv"))):
        if found:
            return _from_files(name, found, path, *columns)
    table = _find_in_picture_folder(path, "--dataset_name")
    if table.problems:
        present = ", ".join(sorted(p.name for p in path.iterdir())[:20]) or "nothing"
        table.problems = [
            f"--dataset_name={name}: no data set recognised in this folder. Looked for *.parquet (at its top or under"
            " data/), metadata.jsonl or metadata.csv beside pictures, a save_to_disk folder, *.jsonl or *.csv tables,"
            f" and pictures. Present: {present}."
        ]
    elif caption_column is not None:
        table.problems.append(
            f"--caption_column={caption_column}: {name} is a folder of pictures without a metadata file, so it has no"
            " columns. Columns present: image."
        )
    return table


def _splits(folder: Path, suffixes: tuple[str, ...], stem: str | None = None) -> dict[str, list[Path]]:
    """Files by split: at the top, under data/, or in a folder named like a split; a file name may hold the split."""
    places = [folder, folder / "data"] + [p for p in sorted(folder.iterdir()) if p.is_dir() and p.name in SPLIT_WORDS]
    splits: dict[str, list[Path]] = {}
    for place in places:
        if not place.is_dir():
            continue
        for file in sorted(place.iterdir()):
            if file.suffix.lower() not in suffixes or not file.is_file() or file.name.startswith("."):
                continue
            if stem is not None and file.stem != stem:
                continue
            words = re.split(r"[^a-z]+", file.stem.lower())
            split = next((SPLIT_WORDS[w] for w in words if w in SPLIT_WORDS), None)
            split = split or SPLIT_WORDS.get(place.name, "train")
            splits.setdefault(split, []).append(file)
    return splits


def _choose_split(names, flag_value: str) -> str:
    """'train', else the only one. Raises ValueError naming them all."""
    names = list(names)
    if "train" in names:
        return "train"
    if len(names) == 1:
        return names[0]
    raise ValueError(f"--dataset_name={flag_value}: several splits and none is 'train': {', '.join(names)}.")


def _missing_column(flag: str, value: str, name: str, columns) -> str:
    return f"{flag}={value}: no such column in {name}; columns present: {', '.join(columns)}."


def _from_files(name, splits: dict[str, list[Path]], root: Path, image_column, caption_column) -> _Table:
    """Parquet, Arrow, jsonl or csv files of the chosen split."""
    try:
        split = _choose_split(splits, name)
    except ValueError as error:
        return _refuse(str(error))
    files = splits[split]
    for file in files:
        with open(file, "rb") as handle:
            if handle.read(23) == b"version https://git-lfs":
                return _refuse(f"--dataset_name={name}: {file.name} is a Git LFS pointer; run `git lfs pull` there.")
    kinds = {f.suffix.lower() for f in files}
    if len(kinds) > 1:
        return _refuse(f"--dataset_name={name}: files of several kinds: {', '.join(f.name for f in files)}.")
    kind = kinds.pop()
    if kind == ".parquet":
        return _from_parquet(name, files, split, root, image_column, caption_column)
    if kind == ".arrow":
        return _from_arrow(name, files, split, root, image_column, caption_column)
    if kind in (".jsonl", ".json", ".csv"):
        return _from_text_tables(name, files, image_column, caption_column)
    return _refuse(f"--dataset_name={name}: unknown kind of file; use .parquet, .arrow, .jsonl or .csv.")


def _holds_pictures(kind) -> bool:
    """Whether an Arrow type can be a column of encoded pictures: binary, or a struct with a field 'bytes'."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(kind.field(k).name == "bytes" for k in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _check_columns(name, schema, image_column, caption_column) -> tuple[str | None, list[str]]:
    """(image column, problems) for an Arrow schema."""
    import pyarrow as pa

    columns, problems = list(schema.names), []
    if image_column is None:
        image_column = next((c for c in columns if _holds_pictures(schema.field(c).type)), None)
        if image_column is None:
            problems.append(
                f"--image_column: no column of {name} holds pictures; columns present: {', '.join(columns)}."
            )
    elif image_column not in columns:
        problems.append(_missing_column("--image_column", image_column, name, columns))
    elif not _holds_pictures(schema.field(image_column).type) and not pa.types.is_string(
        schema.field(image_column).type
    ):
        problems.append(
            f"--image_column={image_column}: it holds {schema.field(image_column).type}, not pictures; columns"
            f" present: {', '.join(columns)}."
        )
    if caption_column is not None and caption_column not in columns:
        problems.append(_missing_column("--caption_column", caption_column, name, columns))
    elif caption_column is not None and not _holds_text(schema.field(caption_column).type):
        problems.append(
            f"--caption_column={caption_column}: it holds {schema.field(caption_column).type}, not text; columns"
            f" present: {', '.join(columns)}."
        )
    return image_column, problems


def _holds_text(kind) -> bool:
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _from_parquet(name, files, split, root, image_column, caption_column) -> _Table:
    import pyarrow.parquet as pq

    schema = None
    problems, captions = [], []
    for file in files:
        try:
            this = pq.read_schema(file)
        except Exception as error:
            problems.append(f"--dataset_name={name}: {file.name} is not a readable parquet file ({error}).")
            continue
        if "file_name" in this.names and image_column not in this.names:
            return _from_text_tables(name, files, image_column, caption_column)
        column, found = _check_columns(f"{name} ({file.name})", this, image_column, caption_column)
        problems += found
        schema = schema or this
        if not found and caption_column is not None:
            try:
                captions += pq.read_table(file, columns=[caption_column]).column(0).to_pylist()
            except Exception as error:
                problems.append(f"--dataset_name={name}: {file.name} cannot be read ({error}).")
    if problems:
        return _Table(None, None, problems, [], {})
    source = _ParquetSource(files, column, split, root)
    return _Table(source, captions if caption_column is not None else None, [], [], {})


def _from_dataset(name, dataset, split, root, image_column, caption_column) -> _Table:
    """A `datasets.Dataset`: its image column is cast so that pictures stay encoded."""
    import datasets

    schema = dataset.features.arrow_schema
    column, problems = _check_columns(name, schema, image_column, caption_column)
    if problems:
        return _Table(None, None, problems, [], {})
    captions = list(dataset[caption_column]) if caption_column is not None else None
    dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return _Table(_DatasetSource(dataset, column, split, root), captions, [], [], {})


def _pick_loaded_split(name, loaded):
    """(split name, Dataset) of what `datasets` returned. Raises ValueError naming the splits."""
    if hasattr(loaded, "keys"):
        split = _choose_split(loaded.keys(), name)
        return split, loaded[split]
    return str(loaded.split or "train"), loaded


def _from_saved(name, path, image_column, caption_column) -> _Table:
    """A folder written by `save_to_disk`."""
    import datasets

    try:
        split, dataset = _pick_loaded_split(name, datasets.load_from_disk(str(path)))
    except Exception as error:
        return _refuse(f"--dataset_name={name}: cannot be read as a save_to_disk folder ({error}).")
    return _from_dataset(name, dataset, split, path, image_column, caption_column)


def _from_arrow(name, files, split, root, image_column, caption_column) -> _Table:
    import datasets

    try:
        dataset = datasets.concatenate_datasets([datasets.Dataset.from_file(str(f)) for f in files])
    except Exception as error:
        return _refuse(f"--dataset_name={name}: the Arrow files cannot be read ({error}).")
    return _from_dataset(name, dataset, split, root, image_column, caption_column)


def _from_hub(name, config, image_column, caption_column, cache_dir) -> _Table:
    """A data set of the hub, from the cache when offline. Its scripts are never executed."""
    import inspect

    try:
        import datasets
    except ImportError:
        return _refuse("--dataset_name: needs the package `datasets`: pip install datasets.")
    # Old versions of datasets would run a data set's own script; new ones know neither scripts nor this flag.
    known = inspect.signature(datasets.load_dataset).parameters
    guard = {"trust_remote_code": False} if "trust_remote_code" in known else {}
    try:
        loaded = datasets.load_dataset(name, config, cache_dir=cache_dir, **guard)
        split, dataset = _pick_loaded_split(name, loaded)
    except Exception as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else ""
        return _refuse(
            f"--dataset_name={name}: neither a folder here ({Path(name).absolute()}) nor to be had from the hub"
            f" ({type(error).__name__}: {text})."
        )
    return _from_dataset(name, dataset, split, None, image_column, caption_column)


def _read_text_table(file: Path) -> tuple[list[str], list[dict]]:
    """(columns, rows) of a .jsonl, .csv or small .parquet table. Raises ValueError naming the line."""
    if file.suffix.lower() == ".parquet":
        import pyarrow.parquet as pq

        table = pq.read_table(file)
        return table.column_names, table.to_pylist()
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.name} cannot be read as UTF-8 text ({error})") from None
    if file.suffix.lower() == ".csv":
        csv.field_size_limit(2**24)
        reader = csv.DictReader(io.StringIO(text, newline=""))
        try:
            rows = list(reader)
        except csv.Error as error:
            raise ValueError(f"{file.name}, line {reader.line_num}: {error}") from None
        return list(reader.fieldnames or []), rows
    columns: dict[str, None] = {}
    rows = []
    # Not str.splitlines: JSON strings may hold line separators that it would split at.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file.name}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{file.name}, line {number}: a JSON object is expected, not {type(row).__name__}")
        columns.update(dict.fromkeys(row))
        rows.append(row)
    return list(columns), rows


def _from_text_tables(name, files, image_column, caption_column) -> _Table:
    """Tables that name picture files in the column file_name, or in --image_column, relative to the table's folder."""
    problems, paths, names, captions = [], [], [], []
    root = files[0].parent
    for file in files:
        try:
            columns, rows = _read_text_table(file)
        except ValueError as error:
            problems.append(f"--dataset_name={name}: {error}.")
            continue
        column = image_column if image_column in columns else "file_name"
        # The pictures are addressed as in `datasets`: the column file_name becomes the column image.
        shown = ["image (from file_name)" if c == "file_name" else c for c in columns]
        if column not in columns or (image_column not in (None, "image", "file_name") and image_column not in columns):
            problems.append(_missing_column("--image_column", image_column, f"{name} ({file.name})", shown))
        if caption_column is not None and caption_column not in columns:
            problems.append(_missing_column("--caption_column", caption_column, f"{name} ({file.name})", shown))
        if problems:
            continue
        for number, row in enumerate(rows, start=1):
            value = row.get(column)
            if not isinstance(value, str) or not value.strip():
                problems.append(
                    f"--dataset_name={name}: {file.name}, row {number}: no file name in '{column}' ({value!r})."
                )
            else:
                picture = _inside(file.parent, value)
                if picture is None:
                    problems.append(
                        f"--dataset_name={name}: {file.name}, row {number}: {value} leads out of the folder."
                    )
                else:
                    paths.append(picture)
                    names.append(os.path.relpath(picture, root))
                    captions.append(row.get(caption_column) if caption_column is not None else None)
            if len(problems) >= LISTED_PROBLEMS:
                break
    return _Table(_FileSource(paths, names), captions if caption_column is not None else None, problems, [], {})
