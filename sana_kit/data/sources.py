"""Encoded image bytes by row number: files, parquet, `datasets` tables."""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from sana_kit.data.memory import file_identity
from sana_kit.data.texts import Texts
from sana_kit.errors import ImageError, NoImageError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa


class ImageSource(Protocol):
    """Encoded image bytes by row number. Some can also give memory back (`release`) or name their `identity`."""

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """What a row is called in messages."""

    def read(self, row: int) -> bytes:
        """The encoded image of a row. Raises ImageError."""


class FileSource:
    """Image files on disk.

    Args:
        root: their folder.
        names: of the files, relative to it.
    """

    remembered_as = "files"

    def __init__(self, root: str | os.PathLike, names: Sequence[str]):
        self.root, self.names = os.path.abspath(root), Texts(names)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, row: int) -> str:
        return self.names[row]

    def path(self, row: int) -> str:
        """The file of a row."""
        return os.path.normpath(os.path.join(self.root, self.names[row]))

    def read(self, row: int) -> bytes:
        return read_file(self.path(row), self.names[row])


def read_file(path: str | os.PathLike, name: str) -> bytes:
    """The bytes of a file. Raises ImageError, which calls it `name`."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ImageError(f"{name}: cannot be read ({error.strerror or error}).") from None


class ParquetSource:
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

    def identity(self) -> str | None:
        """What changes when the files or the column do; None for files that changed a moment ago."""
        files = file_identity(self.files)
        return files and json.dumps(["parquet", self.column, self.split, self.root, files])

    def _reset(self) -> None:
        self._lock, self._readers, self._held = threading.Lock(), {}, OrderedDict()

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_readers", "_held")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        return self.total

    def name(self, row: int) -> str:
        return f"{self.split}[{row}]"

    def read(self, row: int) -> bytes:
        group = int(np.searchsorted(self.starts, row, side="right")) - 1
        with self._lock:
            value = self._column(group)[row - int(self.starts[group])].as_py()
        return cell_bytes(value, self.name(row), self.root)

    def _column(self, group: int) -> pa.ChunkedArray:
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

    def release(self) -> None:
        """Give the row groups in memory back, to the system as well."""
        import pyarrow as pa

        with self._lock:
            self._held.clear()
        pa.default_memory_pool().release_unused()


class DatasetSource:
    """A `datasets.Dataset` whose image column is kept encoded.

    Its rows lie in uncompressed Arrow files. They are read by offset where possible: read through the memory map,
    every image ever touched would count as resident memory of the process.
    """

    def __init__(self, dataset: datasets.Dataset, column: str, split: str, root: Path | None):
        self.dataset, self.column, self.split = dataset.select_columns([column]), column, split
        self.root = None if root is None else str(root)
        plain = dataset._indices is None  # otherwise rows were selected or shuffled
        self.files = [entry["filename"] for entry in dataset.cache_files] if plain else []
        self.spans = _arrow_spans(self.files, column, len(dataset))

    def identity(self) -> str | None:
        """What changes when the files or the column do; None where rows were selected or lie in memory."""
        files = file_identity(self.files) if self.files else None
        return files and json.dumps(["arrow", self.column, self.split, self.root, len(self), files])

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, row: int) -> str:
        return f"{self.split}[{row}]"

    def read(self, row: int) -> bytes:
        if self.spans is not None and self.spans[row, 2] >= 0:
            number, offset, length = (int(v) for v in self.spans[row])
            with open(self.files[number], "rb") as file:
                file.seek(offset)
                return file.read(length)
        return cell_bytes(self.dataset[row][self.column], self.name(row), self.root)


def _arrow_spans(files: list[str], column: str, rows: int) -> np.ndarray | None:
    """(rows, 3) int64: file number, offset and length of each image's bytes in Arrow files; length -1: null.

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


class JoinedSource:
    """Two sources one behind the other."""

    def __init__(self, first: ImageSource, second: ImageSource):
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def _part(self, row: int) -> tuple[ImageSource, int]:
        return (self.first, row) if row < len(self.first) else (self.second, row - len(self.first))

    def name(self, row: int) -> str:
        part, row = self._part(row)
        return part.name(row)

    def read(self, row: int) -> bytes:
        part, row = self._part(row)
        return part.read(row)

    def release(self) -> None:
        for part in (self.first, self.second):
            if hasattr(part, "release"):
                part.release()


def cell_bytes(value: object, name: str, root: str | None) -> bytes:
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
        raise NoImageError(f"{name}: the image is null.")
    if "://" in path:
        raise ImageError(f"{name}: the image is an address ({path[:80]}), not bytes; nothing is downloaded by row.")
    if root is None:
        raise ImageError(f"{name}: the row holds only a path ({path[:200]}) and no bytes.")
    file = inside(Path(root), path)
    if file is None:
        raise ImageError(f"{name}: the path {path[:200]} leads out of the data set's folder.")
    return read_file(file, f"{name} ({path})")


def inside(root: Path, relative: str) -> Path | None:
    """`root / relative`, absolute, unless that lies outside root; both may be named relatively or absolutely."""
    file = Path(os.path.abspath(root / relative))
    try:
        file.relative_to(os.path.abspath(root))
    except ValueError:
        return None
    return file
