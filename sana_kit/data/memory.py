"""What was learnt of a data set's images, remembered between runs: digest and size of each, settled captions.

Image files are known again by path, size and times of change, tables by those of their files, so a warm start reads
no image. The arrays lie in mapped Arrow files: all processes of a machine share their pages.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol, TypeGuard, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sana_kit.data.captions import Choices
from sana_kit.data.texts import Texts
from sana_kit.files import write_atomic

if TYPE_CHECKING:
    from sana_kit.data.decode import ImageFacts
    from sana_kit.data.sources import FileSource, ImageSource

FORMAT = 1
# A file that changed less than this before it was looked at may change again within one tick of the clock.
SETTLED_NS = 2 * 10**9


@dataclasses.dataclass
class Headers:
    """What the headers of a source's rows say.

    Attributes:
        digests: (rows, 32) uint8, SHA-256 of the encoded bytes.
        sizes: (rows, 2) int32, width and height when upright.
        kinds: (rows,) uint8, ANIMATED and OPEN_ENDED; UNKNOWN for rows that were not looked at.
        bad: row -> why it cannot be used.
    """

    digests: np.ndarray
    sizes: np.ndarray
    kinds: np.ndarray
    bad: dict[int, str]

    @classmethod
    def unknown(cls, count: int) -> Headers:
        """Of so many rows, none of which was looked at."""
        kinds = np.full(count, UNKNOWN, np.uint8)
        return cls(np.zeros((count, 32), np.uint8), np.zeros((count, 2), np.int32), kinds, {})

    @classmethod
    def of(cls, found: Iterable[ImageFacts | str], count: int) -> Headers:
        """Of `count` rows what was found of each, or why it cannot be used; those rows stay UNKNOWN."""
        headers = cls.unknown(count)
        for row, facts in enumerate(found):
            if isinstance(facts, str):
                headers.bad[row] = facts
                continue
            headers.digests[row] = np.frombuffer(facts.sha256, np.uint8)
            headers.sizes[row] = facts.width, facts.height
            headers.kinds[row] = ANIMATED * facts.animated + OPEN_ENDED * facts.open_ended
        return headers


ANIMATED, OPEN_ENDED, UNKNOWN = 1, 2, 128


def file_identity(paths: list[str]) -> str | None:
    """What changes when one of these files does; None for files that changed a moment ago, or are not there."""
    found, now = [], time.time_ns()
    try:
        for path in paths:
            stat = os.stat(path)
            if now - max(stat.st_mtime_ns, stat.st_ctime_ns) < SETTLED_NS:
                return None
            found.append([os.path.abspath(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    except OSError:
        return None
    return json.dumps(found)


@runtime_checkable
class Identified(Protocol):
    """A source that says what stands for all its rows; None where nothing does."""

    def identity(self) -> str | None: ...


def _are_files(source: ImageSource) -> TypeGuard[FileSource]:
    """Whether each row is a file of its own."""
    return hasattr(source, "names")


class Memory:
    """A folder of remembered facts; None: nothing is remembered. A folder that cannot be written is no error."""

    def __init__(self, folder: str | os.PathLike | None = None, writes: bool = True):
        """`writes`: False on the ranks of a machine that leave the writing to its first."""
        self.folder, self.writes = None if folder is None else Path(folder), writes

    def _path(self, *parts: object) -> Path:
        return self.folder / f"{hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()}.arrow"

    def _read(self, path: Path) -> tuple[dict[str, pa.Array], dict] | None:
        """(columns, notes) of a file, mapped; None where there is none or it is damaged."""
        try:
            with pa.memory_map(str(path)) as mapped:
                table = pa.ipc.open_file(mapped).read_all()
            notes = json.loads(table.schema.metadata[b"notes"])
            with suppress(OSError):
                os.utime(path)  # used now, for the pruning of the store
            return {name: _single(table.column(name)) for name in table.column_names}, notes
        except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError):
            return None

    def _write(self, path: Path, columns: dict[str, pa.Array], notes: dict) -> None:
        table = pa.table(columns).replace_schema_metadata({"notes": json.dumps(notes)})

        def write(file: IO[bytes]) -> None:
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)

        with suppress(OSError):
            write_atomic(path, write, durable=False)

    # ------------------------------------------------------------------------------------------------------- headers

    def recall_headers(self, source: ImageSource) -> Headers:
        """What is known of a source's rows."""
        if self.folder is not None:
            if _are_files(source):
                return self._recall_files(source)
            identity = source.identity() if isinstance(source, Identified) else None
            found = self._read(self._path("table", identity)) if identity else None
            if found is not None and len(found[0]["kind"]) == len(source):
                return _headers(found[0])
        return Headers.unknown(len(source))

    def keep_headers(self, source: ImageSource, headers: Headers) -> None:
        """Remember them; bad rows are looked at again next time."""
        if self.folder is None or not self.writes or not len(source):
            return
        columns = {
            "digest": pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(32), len(source), [None, pa.py_buffer(np.ascontiguousarray(headers.digests))]
            ),
            "size": pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(8), len(source), [None, pa.py_buffer(np.ascontiguousarray(headers.sizes))]
            ),
            "kind": pa.array(headers.kinds),
        }
        if _are_files(source):
            bytes_, changed = stat_files(source)
            unsettled = time.time_ns() - changed < SETTLED_NS
            columns["kind"] = pa.array(np.where(unsettled, UNKNOWN, headers.kinds).astype(np.uint8))
            columns |= {"name": source.names.array, "bytes": pa.array(bytes_), "changed": pa.array(changed)}
            self._write(self._path(source.remembered_as, source.root), columns, {})
            return
        identity = source.identity() if isinstance(source, Identified) else None
        if identity:
            self._write(self._path("table", identity), columns, {})

    def _recall_files(self, source: FileSource) -> Headers:
        found = self._read(self._path(source.remembered_as, source.root))
        headers = Headers.unknown(len(source))
        if found is None:
            return headers
        columns, known = found[0], _headers(found[0])
        bytes_, changed = stat_files(source)
        if source.names.array.equals(columns["name"]):
            place = np.arange(len(source))
        else:
            place = pc.index_in(source.names.array, value_set=columns["name"]).fill_null(-1)
            place = as_numbers(place, np.int32)
        same = (place >= 0) & (bytes_ == as_numbers(columns["bytes"], np.int64)[place])
        same &= changed == as_numbers(columns["changed"], np.int64)[place]
        if same.all() and len(place) == len(known.kinds):
            return known
        for name in ("digests", "sizes", "kinds"):
            getattr(headers, name)[same] = getattr(known, name)[place[same]]
        return headers

    # ------------------------------------------------------------------------------------------------------ captions

    def recall_captions(self, identity: str | None, *parts: object) -> tuple[Texts, Choices | None, dict] | None:
        """(captions by sample, all of them where some have several, notes) of a table that is still the same."""
        if self.folder is None or identity is None:
            return None
        found = self._read(self._path("captions", identity, *parts))
        if found is None:
            return None
        choices = Choices.of_columns(found[0]) if "choices" in found[0] else None
        return Texts(found[0]["caption"]), choices, found[1]

    def keep_captions(
        self, identity: str | None, *parts: object, captions: Texts, choices: Choices | None, notes: dict
    ) -> None:
        """Remember what `recall_captions` gives back."""
        if self.folder is not None and self.writes and identity is not None:
            columns = {"caption": captions.array, **({} if choices is None else choices.columns())}
            self._write(self._path("captions", identity, *parts), columns, notes)


def stat_files(source: FileSource) -> tuple[np.ndarray, np.ndarray]:
    """((rows,) int64 bytes, (rows,) int64 last change in ns) of the files of a source; -1 for those that are gone."""
    sizes, changed = np.full(len(source), -1, np.int64), np.full(len(source), -1, np.int64)
    stat, prefix = os.stat, os.path.join(source.root, "")
    for row, name in enumerate(source.names):
        try:
            found = stat(prefix + name)
        except OSError:
            continue
        sizes[row], changed[row] = found.st_size, max(found.st_mtime_ns, found.st_ctime_ns)
    return sizes, changed


def all_settled(changed: np.ndarray) -> bool:
    """Whether none of these last changes, (N,) int64 in ns, was a moment ago."""
    return not len(changed) or time.time_ns() - int(changed.max()) >= SETTLED_NS


def as_numbers(column: pa.Array, kind: type) -> np.ndarray:
    """A column of numbers without nulls, not copied (`to_numpy` would import pandas, which takes a second)."""
    return np.frombuffer(column.buffers()[1], kind)[column.offset : column.offset + len(column)]


def _single(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _headers(columns: dict[str, pa.Array]) -> Headers:
    """The arrays of a remembered file, not copied."""
    count = len(columns["kind"])
    digests = np.frombuffer(columns["digest"].buffers()[1], np.uint8)[: 32 * count].reshape(count, 32)
    sizes = np.frombuffer(columns["size"].buffers()[1], np.int32)[: 2 * count].reshape(count, 2)
    return Headers(digests, sizes, as_numbers(columns["kind"], np.uint8), {})
