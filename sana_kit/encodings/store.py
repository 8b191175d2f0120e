"""The store of encodings: safetensors shards, found by key, read by offset, written beside and renamed."""

from __future__ import annotations

import json
import os
import time
import uuid
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

from sana_kit.errors import StoreError
from sana_kit.files import apply_umask

SHARD_ITEMS, SHARD_BYTES, SHARD_SECONDS = 512, 64 * 2**20, 60.0  # a shard is written when any of these is reached


STALE_SECONDS = 3600.0  # age at which an unfinished shard of a killed run is removed


OPEN_SHARDS = 64  # file handles that a reading process keeps


SAFETENSORS_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}


class ShardIndex:
    """Where the tensors of wanted keys lie: arrays over rows, so that memory stays small for any number of items."""

    def __init__(self, folder: Path, wanted: dict[str, int]):
        self.folder, self.files = str(folder), []
        count = len(wanted)
        self.shard = np.full(count, -1, np.int32)
        self.offset = np.zeros(count, np.int64)
        self.nbytes = np.zeros(count, np.int64)
        self.tokens = np.zeros(count, np.int32)  # first dimension of the tensor
        self.crc = np.zeros(count, np.uint32)
        self.tail: tuple[int, ...] = ()  # the other dimensions, alike for all
        self.dtype = None
        self._reset()

    def _reset(self):
        self._handles: OrderedDict[int, int] = OrderedDict()
        self._pid = os.getpid()

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("_handles", "_pid")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._reset()

    def missing(self) -> np.ndarray:
        """Rows that no shard holds."""
        return np.flatnonzero(self.shard < 0)

    def read(self, row: int) -> torch.Tensor:
        """The tensor of a row, read by offset: a memory map's pages would count as resident memory of every worker.

        Raises:
            StoreError: the shard vanished or its bytes changed.
        """
        number = int(self.shard[row])
        path = os.path.join(self.folder, self.files[number])
        buffer, view = bytearray(int(self.nbytes[row])), 0
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
        tensor = torch.frombuffer(buffer, dtype=self.dtype)
        return tensor.view(int(self.tokens[row]), *self.tail)

    def _handle(self, number: int, path: str) -> int:
        if self._pid != os.getpid():  # after a fork the handles stay valid, but each process closes its own
            self._reset()
        if number not in self._handles:
            while len(self._handles) >= OPEN_SHARDS:
                os.close(self._handles.popitem(last=False)[1])
            self._handles[number] = os.open(path, os.O_RDONLY)
        self._handles.move_to_end(number)
        return self._handles[number]

    def close(self):
        """Close the shards of this process."""
        while self._pid == os.getpid() and self._handles:
            os.close(self._handles.popitem()[1])

    def __del__(self):
        try:
            self.close()
        except Exception:  # the interpreter may be shutting down
            pass


def _shard_header(path: Path) -> dict:
    """The header of a whole shard. Raises ValueError saying what is wrong with a damaged one."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length <= 0 or 8 + length > size:
            raise ValueError(f"cut off at {size} bytes, inside its header")
        try:
            header = json.loads(file.read(length))
            checksums = json.loads(header.pop("__metadata__")["crc32"])
            ends = [entry["data_offsets"][1] for entry in header.values()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"unreadable header ({type(error).__name__})") from None
    if size != 8 + length + max(ends, default=0):
        raise ValueError(f"{size} bytes instead of {8 + length + max(ends, default=0)}")
    for key, entry in header.items():
        if entry["dtype"] not in SAFETENSORS_DTYPES or key not in checksums:
            raise ValueError("not a shard of this kit")
        entry["start"], entry["crc"] = 8 + length + entry["data_offsets"][0], checksums[key]
    return header


def scan_store(folder: Path, wanted: dict[str, int], warn=None) -> ShardIndex:
    """Find the wanted keys (key -> row) in a folder of shards. Damaged shards are set aside as *.damaged and named."""
    index = ShardIndex(folder, wanted)
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):  # `EncodingTeam.meet` makes the folder or says why it cannot
        return index
    except OSError as error:
        raise StoreError(f"Encodings: {folder} cannot be read ({error.strerror}).") from None
    for name in names:
        if not name.endswith(".safetensors") or name.startswith("."):
            continue
        path = Path(folder) / name
        try:
            header = _shard_header(path)
        except FileNotFoundError:  # another rank has just set it aside
            continue
        except ValueError as error:
            set_aside = _set_aside(path)
            if warn is not None:
                warn(f"Encodings: {path} is damaged ({error}); {set_aside}. What it held is encoded again.")
            continue
        number = len(index.files)
        used = False
        for key, entry in header.items():
            row = wanted.get(key)
            if row is None or index.shard[row] >= 0:
                continue
            shape, dtype = entry["shape"], SAFETENSORS_DTYPES[entry["dtype"]]
            if index.dtype is None:
                index.dtype, index.tail = dtype, tuple(shape[1:])
            assert dtype == index.dtype and tuple(shape[1:]) == index.tail, (path, key, shape, dtype)
            index.shard[row], index.offset[row] = number, entry["start"]
            index.nbytes[row] = entry["data_offsets"][1] - entry["data_offsets"][0]
            index.tokens[row], index.crc[row] = shape[0], entry["crc"]
            used = True
        if used:
            index.files.append(name)
    return index


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

    def __init__(self, folder: Path, prefix: str):
        self.folder, self.prefix = Path(folder), prefix
        self.tensors, self.checksums, self.bytes, self.since = {}, {}, 0, time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Write the rest, also when the encoding is stopped or fails: work that is done is kept."""
        if kind is None or not issubclass(kind, StoreError):
            self.flush()

    def add(self, key: str, tensor: torch.Tensor):
        """Take a CPU tensor; call `flush_if_due` where a group of items is whole."""
        tensor = tensor.contiguous()
        raw = tensor.view(torch.uint8).numpy()
        self.tensors[key], self.checksums[key] = tensor, zlib.crc32(raw)
        self.bytes += raw.nbytes

    def flush_if_due(self):
        late = time.monotonic() - self.since > SHARD_SECONDS
        if len(self.tensors) >= SHARD_ITEMS or self.bytes >= SHARD_BYTES or (self.tensors and late):
            self.flush()

    def flush(self):
        """Write what was collected.

        Raises:
            StoreError: the disk is full or the folder cannot be written; nothing half-written stays behind.
        """
        if self.tensors:
            from safetensors.torch import save_file

            name = uuid.uuid4().hex
            temporary = self.folder / f".unfinished-{name}"
            final = self.folder / f"{self.prefix}-{name}.safetensors"
            try:
                save_file(self.tensors, temporary, metadata={"crc32": json.dumps(self.checksums)})
                apply_umask([temporary])
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, final)
                _sync_folder(self.folder)
            except Exception as error:
                temporary.unlink(missing_ok=True)
                raise StoreError(
                    f"Encodings: {self.bytes / 2**20:.1f} MiB could not be written to {self.folder} ({error}). Free"
                    " some space or choose another folder for the encodings; what was written before is kept."
                ) from None
        self.tensors, self.checksums, self.bytes, self.since = {}, {}, 0, time.monotonic()


def _sync_folder(folder: Path):
    """Make a rename durable where the file system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def remove_stale(folder: Path):
    """Remove unfinished shards that a killed run left; a live one is renamed within seconds."""
    for path in Path(folder).glob(".*"):
        if path.name.startswith((".unfinished-", ".probe-", ".failed-")):
            try:
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()
            except OSError:
                pass


def refresh_listing(folder: Path):
    """Make a network file system look at a folder anew: its clients do so after a change of their own."""
    path = folder / f".probe-{uuid.uuid4().hex}"
    try:
        path.touch()
        path.unlink()
    except OSError:
        pass
