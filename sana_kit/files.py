"""Files that are never half-written: atomic writes, hashes, permissions, folder locks, safetensors headers."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path


@contextmanager
def lock_folder(output_dir: Path, enabled: bool = True, flag: str = "--output_dir"):
    """Hold the output folder for this run; a crash releases it, since the lock belongs to the open file.

    Raises:
        ValueError: another live process holds it.
    """
    if not enabled:
        yield
        return
    import fcntl

    output_dir.mkdir(parents=True, exist_ok=True)
    with open(output_dir / ".lock", "a+", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            owner = handle.read().strip() or "unknown process"
            raise ValueError(
                f"{flag}={output_dir}: another live run is writing there ({owner}). Wait for it, end it, or"
                " choose another folder."
            ) from None
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {os.uname().nodename}")
        handle.flush()
        yield  # the lock is released when the file closes; the file itself stays, so that no two runs lock two inodes


def sync_path(path: Path) -> None:
    """fsync a file or folder; file systems that cannot sync a folder are left to their own order."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def check_output_path(path: str) -> list[str]:
    """Problems of an output folder that may not exist yet; creates nothing."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        return [f"--output_path={path}: is a file. Name a folder."]
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        return [f"--output_path={path}: {existing} is a file. Name a folder."]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"--output_path={path}: {existing} is not writable. Name another folder, or change its permissions."]
    return []


def read_header(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]:
    """({tensor name: (dtype such as 'BF16', shape)}, metadata) of a safetensors file, without reading a tensor.

    Raises:
        ValueError: not a safetensors file, or cut off; the message says which.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise ValueError("it is not a safetensors file, or was cut off")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            tensors = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ValueError("it is not a safetensors file: its header is no JSON of tensors") from None
    if size != 8 + length + end:
        raise ValueError(f"it was cut off: {size:,} bytes instead of {8 + length + end:,}")
    return tensors, metadata


def file_sha256(path: str | os.PathLike) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_atomic(path: str | os.PathLike, write: Callable) -> Path:
    """Call `write(binary file)` on a temporary neighbour, then rename it to `path`: never half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


@lru_cache(maxsize=1)
def _umask() -> int:
    """The process's umask. Reading it sets it, so it is read once, before threads write files."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def apply_umask(paths: Iterable[Path]) -> None:
    """Give files the permissions that the umask leaves to new ones.

    safetensors >= 0.8 writes files that only their owner may read: on a folder shared by machines or people the others
    could neither resume nor draw. File systems that know no permissions refuse; the file is whole all the same.
    """
    usual = 0o666 & ~_umask()
    for path in paths:
        if path.stat().st_mode & 0o777 != usual:
            with suppress(OSError):
                path.chmod(usual)
