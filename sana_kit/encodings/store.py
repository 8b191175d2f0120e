"""The store of encodings: safetensors shards, found by key, read by offset, written beside and renamed.

A shard never changes once it has its name. Its header holds a CRC-32 of every tensor.
"""

from __future__ import annotations

import json
import os
import time
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from safetensors.torch import save_file

from sana_kit.encodings.keys import KEY_BYTES, sortable
from sana_kit.errors import StoreError
from sana_kit.files import apply_umask, read_layout, sync_path

# A shard is written when any of these is reached.
SHARD_ITEMS, SHARD_BYTES, SHARD_SECONDS = 512, 64 * 2**20, 60.0

STALE_SECONDS = 3600.0  # age at which an unfinished shard of a killed run is removed

OPEN_SHARDS = 64  # file handles that a reading process keeps

DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}


class ShardIndex:
    """Where the tensors of wanted keys lie: 14 bytes per row, for any number of rows.

    Attributes:
        files: names of the shards that hold something wanted.
        shard: (R,) int32, index into `files`; -1 where no shard holds the row.
        offset: (R,) uint32, the first byte in the shard.
        shape: (R,) uint16, index into `shapes`: the rows need not be of one size.
        crc: (R,) uint32, CRC-32 of the tensor's bytes.
        shapes: the distinct shapes, as tuples.
        dtype: of all rows, as a header spells it ("BF16"); "" while none is found.
    """

    def __init__(self, folder: str | os.PathLike, count: int):
        self.folder, self.files, self.shapes, self.dtype = str(folder), [], [], ""
        self.shard, self.offset = np.full(count, -1, np.int32), np.zeros(count, np.uint32)
        self.shape, self.crc = np.zeros(count, np.uint16), np.zeros(count, np.uint32)
        self._reset()

    def _reset(self) -> None:
        self._handles: OrderedDict[int, int] = OrderedDict()
        self._pid = os.getpid()

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_handles", "_pid")}

    def __setstate__(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self._reset()

    def missing(self) -> np.ndarray:
        """Rows that no shard holds."""
        return np.flatnonzero(self.shard < 0)

    def _by_shape(self, value: Callable[[tuple], int]) -> np.ndarray:
        return np.array([value(shape) for shape in self.shapes] or [0], np.int64)

    def tokens(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """(R,) int32: the first dimension of each row's tensor."""
        return self._by_shape(lambda shape: shape[0])[self.shape[rows]].astype(np.int32)

    def total_bytes(self) -> int:
        """Bytes of all rows' tensors that are there."""
        sizes = self._by_shape(lambda shape: int(np.prod(shape, dtype=np.int64)))
        width = torch.finfo(DTYPES[self.dtype]).bits // 8 if self.dtype else 0
        return int(sizes[self.shape[self.shard >= 0]].sum()) * width

    def read(self, row: int) -> torch.Tensor:
        """The tensor of a row, read by offset: a memory map's pages would count as resident memory of every worker.

        Raises:
            StoreError: the shard vanished or its bytes changed.
        """
        number, shape, dtype = int(self.shard[row]), self.shapes[self.shape[row]], DTYPES[self.dtype]
        path = os.path.join(self.folder, self.files[number])
        buffer, view = bytearray(int(np.prod(shape)) * (torch.finfo(dtype).bits // 8)), 0
        try:
            handle = self._handle(number, path)
            while view < len(buffer):
                piece = os.pread(handle, len(buffer) - view, int(self.offset[row]) + view)
                if not piece:
                    break
                buffer[view : view + len(piece)] = piece
                view += len(piece)
        except OSError as error:
            raise StoreError(
                f"{path}: cannot be read ({error.strerror}); start again to encode what it held."
            ) from None
        if view < len(buffer) or zlib.crc32(buffer) != int(self.crc[row]):
            raise StoreError(f"{path}: its bytes changed on disk (checksum); delete this file and start again.")
        return torch.frombuffer(buffer, dtype=dtype).view(shape)

    def _handle(self, number: int, path: str) -> int:
        if self._pid != os.getpid():  # after a fork the handles stay valid, but each process closes its own
            self._reset()
        if number not in self._handles:
            while len(self._handles) >= OPEN_SHARDS:
                os.close(self._handles.popitem(last=False)[1])
            self._handles[number] = os.open(path, os.O_RDONLY)
        self._handles.move_to_end(number)
        return self._handles[number]

    def close(self) -> None:
        """Close the shards of this process."""
        while self._pid == os.getpid() and self._handles:
            os.close(self._handles.popitem()[1])

    def __del__(self) -> None:
        with suppress(Exception):  # the interpreter may be shutting down
            self.close()


class _Shard:
    """The header of a whole shard, as arrays over its tensors; ValueError says what is wrong with a damaged one."""

    def __init__(self, path: Path):
        entries, metadata, start = read_layout(path)
        try:
            checksums = json.loads(metadata["crc32"])
            self.keys = np.frombuffer(bytes.fromhex("".join(entries)), np.uint8).reshape(-1, KEY_BYTES)
            self.crc = np.array([checksums[name] for name in entries], np.uint32)
            self.offset = np.array([start + offsets[0] for _, _, offsets in entries.values()], np.uint32)
        except (ValueError, KeyError, TypeError, OverflowError):
            raise ValueError("it is not a shard of this kit") from None
        kinds = {dtype for dtype, _, _ in entries.values()}
        if len(kinds) != 1 or not kinds <= set(DTYPES) or len(self.keys) != len(entries):
            raise ValueError("it is not a shard of this kit")
        (self.dtype,) = kinds
        self.shapes = [shape for _, shape, _ in entries.values()]


def scan_store(folder: Path, wanted: np.ndarray, warn: Callable[[str], None] | None = None) -> ShardIndex:
    """Find keys in a folder of shards. Damaged shards are set aside as *.damaged and named.

    Args:
        wanted: (R, 32) uint8, all different.
        warn: called with a sentence about each damaged shard.
    """
    index = ShardIndex(folder, len(wanted))
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):  # `Peers.find` makes the folder or says why it cannot
        return index
    except OSError as error:
        raise StoreError(f"Encodings: {folder} cannot be read ({error.strerror}).") from None
    order = np.argsort(sortable(wanted), kind="stable").astype(np.int32)
    sorted_keys = sortable(wanted)[order]
    shape_ids: dict[tuple, int] = {}
    for name in names:
        if not name.endswith(".safetensors") or name.startswith("."):
            continue
        path = Path(folder) / name
        try:
            shard = _Shard(path)
            _note(index, name, shard, order, sorted_keys, shape_ids)
        except FileNotFoundError:  # another rank has just set it aside
            continue
        except ValueError as error:
            set_aside = _set_aside(path)
            if warn is not None:
                warn(f"Encodings: {path} is damaged ({error}); {set_aside}. What it held is encoded again.")
    index.shapes = list(shape_ids)
    return index


def _note(
    index: ShardIndex,
    name: str,
    shard: _Shard,
    order: np.ndarray,
    sorted_keys: np.ndarray,
    shape_ids: dict[tuple, int],
) -> None:
    """Enter a shard's wanted rows that no earlier shard holds."""
    if not len(sorted_keys):
        return
    keys = sortable(shard.keys)
    place = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    entries = np.flatnonzero(sorted_keys[place] == keys)
    entries = entries[index.shard[order[place[entries]]] < 0]
    if not len(entries):
        return
    if index.dtype not in ("", shard.dtype):
        raise ValueError(f"it holds {shard.dtype} under keys of {index.dtype}")
    rows = order[place[entries]]
    index.dtype = shard.dtype
    index.shard[rows], index.offset[rows] = len(index.files), shard.offset[entries]
    index.crc[rows] = shard.crc[entries]
    index.shape[rows] = [shape_ids.setdefault(shard.shapes[entry], len(shape_ids)) for entry in entries]
    index.files.append(name)


def _set_aside(path: Path) -> str:
    """Rename a damaged shard; returns what was done as part of a sentence."""
    for attempt in range(1000):
        target = path.with_name(path.name + ".damaged" + (f"-{attempt}" if attempt else ""))
        if not target.exists():
            try:
                os.replace(path, target)
            except FileNotFoundError:  # another rank was faster
                return "it was set aside"
            except OSError as error:
                return f"it could not be renamed ({error.strerror}) and is left unused"
            return f"it was renamed to {target.name}"
    return "it is left unused"


class ShardWriter:
    """Collects tensors and writes them as shards: written beside, synced, then renamed."""

    def __init__(self, folder: str | os.PathLike, prefix: str):
        self.folder, self.prefix = Path(folder), prefix
        self._clear()

    def _clear(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.checksums: dict[str, int] = {}
        self.bytes, self.since = 0, time.monotonic()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the rest, also when the encoding is stopped or fails: work that is done is kept."""
        if kind is None or not issubclass(kind, StoreError):
            self.flush()

    def add(self, key: Sequence[int] | np.ndarray, tensor: torch.Tensor) -> None:
        """Take a CPU tensor under a key of 32 bytes; call `flush_if_due` where a group of items is whole."""
        name, tensor = bytes(key).hex(), tensor.contiguous()
        raw = tensor.view(torch.uint8).numpy()
        self.tensors[name], self.checksums[name] = tensor, zlib.crc32(raw)
        self.bytes += raw.nbytes

    def flush_if_due(self) -> None:
        """Write a shard if enough was collected, or enough time has passed."""
        late = time.monotonic() - self.since > SHARD_SECONDS
        if len(self.tensors) >= SHARD_ITEMS or self.bytes >= SHARD_BYTES or (self.tensors and late):
            self.flush()

    def flush(self) -> None:
        """Write what was collected.

        Raises:
            StoreError: the disk is full or the folder cannot be written; nothing half-written stays behind.
        """
        if self.tensors:
            name = uuid.uuid4().hex
            temporary = self.folder / f".unfinished-{name}"
            try:
                save_file(self.tensors, temporary, metadata={"crc32": json.dumps(self.checksums)})
                apply_umask([temporary])
                sync_path(temporary)
                os.replace(temporary, self.folder / f"{self.prefix}-{name}.safetensors")
                sync_path(self.folder)
            except Exception as error:
                temporary.unlink(missing_ok=True)
                raise StoreError(
                    f"Encodings: {self.bytes / 2**20:.1f} MiB could not be written to {self.folder} ({error}). Free"
                    " some space or choose another folder for the encodings; what was written before is kept."
                ) from None
        self._clear()


def remove_stale(folder: Path) -> None:
    """Remove unfinished shards that a killed run left; a live one is renamed within seconds."""
    for path in Path(folder).glob(".*"):
        if path.name.startswith((".unfinished-", ".probe-", ".failed-")):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()


def refresh_listing(folder: Path) -> None:
    """Make a network file system look at a folder anew: its clients do so after a change of their own."""
    path = folder / f".probe-{uuid.uuid4().hex}"
    with suppress(OSError):
        path.touch()
        path.unlink()
