"""Tensors of a checkpoint, written by several ranks at once, each its share, and hashed on the way to the disk.

A checkpoint's tensors are cut into files of about `FILE_BYTES`; the ranks that see the folder take the files in turn.
All ranks then walk the tensors in one order, in which the writers alternate: under ZeRO each tensor is put together by
all of them, kept by its writer alone, and written by that rank's thread while the next ones are put together. No rank
ever holds more than a few tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch

from sana_kit.training.engine import Entry

FILE_BYTES = 1 << 30
# A model's files are as large as diffusers' and huggingface_hub's own.
MODEL_FILE_BYTES = 5_000_000_000
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# {name in a safetensors file: dtype}
DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """One safetensors file: its path below the checkpoint, and its tensors in the order of their bytes."""

    name: str
    entries: tuple[Entry, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(entry.bytes for entry in self.entries)


def split_files(stem: str, entries: Sequence[Entry], limit: int = FILE_BYTES) -> list[TensorFile]:
    """`stem`.safetensors, or `stem`-00001-of-00003.safetensors and so on where the tensors exceed `limit` bytes."""
    parts, size = [[]], 0
    for entry in entries:
        if parts[-1] and size + entry.bytes > limit:
            parts.append([])
            size = 0
        parts[-1].append(entry)
        size += entry.bytes
    # Wide numbers first: each tensor then begins at a multiple of its own width, as readers expect.
    parts = [sorted(part, key=lambda entry: -entry.dtype.itemsize) for part in parts]
    if len(parts) == 1:
        return [TensorFile(f"{stem}.safetensors", tuple(parts[0]))]
    names = [f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    return [TensorFile(name, tuple(part)) for name, part in zip(names, parts, strict=True)]


def index_of(files: Sequence[TensorFile]) -> dict:
    """The index file of a model in several files, as diffusers reads it."""
    where = {entry.key: Path(file.name).name for file in files for entry in file.entries}
    return {"metadata": {"total_size": sum(file.bytes for file in files)}, "weight_map": where}


def share_out(files: Sequence[TensorFile], writers: Sequence[int]) -> dict[int, list[TensorFile]]:
    """{writer's rank: its files}: the largest file first, each to the writer that has least to do."""
    shares: dict[int, list[TensorFile]] = {rank: [] for rank in writers}
    for file in sorted(files, key=lambda file: -file.bytes):
        least = min(writers, key=lambda rank: sum(mine.bytes for mine in shares[rank]))
        shares[least].append(file)
    return shares


def write_shares(folder: Path, shares: dict[int, list[TensorFile]], rank: int) -> tuple[dict[str, dict], str | None]:
    """Walk all tensors with all ranks and write this rank's files into `folder`.

    Returns:
        ({file name: {"bytes", "sha256"}} of this rank's files, what went wrong on this rank or None). An error of the
        disk does not stop the walk, in which the other ranks still need this one.
    """
    writer = _Writer(folder) if shares.get(rank) else None
    walks = {owner: [(file, entry) for file in files for entry in file.entries] for owner, files in shares.items()}
    for turn in range(max((len(walk) for walk in walks.values()), default=0)):
        for owner, walk in walks.items():
            if turn < len(walk):
                file, entry = walk[turn]
                tensor = entry.fetch(owner == rank)
                if owner == rank and writer is not None:
                    writer.put(file, entry, tensor)
    return writer.finish() if writer is not None else ({}, None)


def _header(file: TensorFile) -> bytes:
    """The head of a safetensors file (https://github.com/huggingface/safetensors), padded to eight bytes."""
    described: dict[str, dict[str, object]] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in file.entries:
        end = offset + entry.bytes
        described[entry.key] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


class _Writer:
    """A thread that writes tensors one after another and hashes their bytes; its errors are kept until `finish`."""

    def __init__(self, folder: Path):
        self._folder, self._written = folder, {}
        self._problem: str | None = None
        self._queue: queue.Queue = queue.Queue(maxsize=2)
        self._thread = threading.Thread(target=self._run, name="checkpoint writer", daemon=True)
        self._thread.start()

    def put(self, file: TensorFile, entry: Entry, tensor: torch.Tensor) -> None:
        """Queue a tensor; waits while two are waiting already."""
        self._queue.put((file, entry, tensor))

    def finish(self) -> tuple[dict[str, dict], str | None]:
        """Wait for the thread; what it wrote and what went wrong."""
        self._queue.put(None)
        self._thread.join()
        return self._written, self._problem

    def _run(self) -> None:
        current, handle, digest = None, None, None
        try:
            while (item := self._queue.get()) is not None:
                if self._problem is not None:
                    continue
                try:
                    file, entry, tensor = item
                    if file is not current:
                        self._close(current, handle, digest)
                        path = self._folder / file.name
                        path.parent.mkdir(parents=True, exist_ok=True)
                        current, handle, digest = file, open(path, "wb"), hashlib.sha256()
                        self._write(handle, digest, _header(file))
                    if not _is_finite(tensor):
                        raise ValueError(f"{entry.key} holds values that are not finite")
                    assert tensor.dtype == entry.dtype and tuple(tensor.shape) == entry.shape, entry.key
                    flat = tensor.contiguous().reshape(-1)
                    self._write(handle, digest, flat.view(torch.uint8).numpy().data)
                except Exception as error:
                    self._problem = f"{type(error).__name__}: {error}"
            if self._problem is None:
                self._close(current, handle, digest)
        except OSError as error:
            self._problem = f"{type(error).__name__}: {error}"
        finally:
            if handle is not None:
                handle.close()

    @staticmethod
    def _write(handle: IO[bytes], digest: hashlib._Hash, data: bytes) -> None:
        handle.write(data)
        digest.update(data)

    def _close(self, file: TensorFile | None, handle: IO[bytes], digest: hashlib._Hash) -> None:
        if file is None:
            return
        handle.flush()
        os.fsync(handle.fileno())
        self._written[file.name] = {"bytes": handle.tell(), "sha256": digest.hexdigest()}
        handle.close()
