"""Files that are never half-written: atomic writes, hashes, permissions, removal, folder checks, safetensors headers.

Folder locks are in sana_kit/locks.py. Temporary names hold a random part, since containers that share a file system
have equal process ids.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import struct
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from sana_kit.errors import Problem

logger = logging.getLogger("sana")

REMOVED = ".removed-"  # beginning of the name under which lies what could not be removed


def expand(path: str | os.PathLike) -> Path:
    """`path` with ~ and ~user replaced by the home folder; every path that a user gives goes through here."""
    return Path(os.path.expanduser(path))


def unique_name(name: str, kind: str = "tmp") -> str:
    """A hidden name beside `name` that no other process takes: ".name.RANDOM.kind"."""
    return f".{name}.{uuid.uuid4().hex[:12]}.{kind}"


def sync_path(path: str | os.PathLike) -> None:
    """fsync a file or folder; file systems that cannot sync a folder are left to their own order."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not os.path.isdir(path):
            raise
    finally:
        os.close(descriptor)


def check_output_folder(path: str | os.PathLike, field: str) -> list[Problem]:
    """Problems of an output folder that may not exist yet; leaves nothing behind.

    Args:
        field: the setting that names it, e.g. "output_dir".
    """
    folder = expand(path).absolute()
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        what = "is a file" if existing == folder else f"{existing} is a file"
        return [Problem(field, path, what, "Name a folder.")]
    probe = existing / unique_name("write-test")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = f"{existing} cannot be written to ({error.strerror})"
        return [Problem(field, path, reason, "Name another folder, or change its permissions.")]
    return []


def remove_tree(path: str | os.PathLike) -> bool:
    """Remove a file or folder without ever raising; whether it is gone entirely.

    Network file systems keep files that somebody has open as .nfs... files, and the folder with them. What stays is
    renamed out of the way to a hidden name beside it, and goes with the next `remove_leftovers`.
    """
    path = Path(path)
    for attempt in range(3):
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            return True
        except FileNotFoundError:
            if not os.path.lexists(path):
                return True
        except OSError:
            time.sleep(0.1 * attempt)
    aside = path
    if not path.name.startswith(REMOVED):
        aside = path.with_name(f"{REMOVED}{uuid.uuid4().hex[:12]}")
        try:
            os.replace(path, aside)
        except OSError:
            aside = path
    logger.warning("%s could not be removed whole; what is left lies in %s", path, aside)
    return False


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Remove what earlier `remove_tree` calls had to leave in `folder`; what still cannot go stays, unsaid."""
    with suppress(OSError):
        for path in Path(folder).glob(f"{REMOVED}*"):
            shutil.rmtree(path, ignore_errors=True)


def read_header(path: str | os.PathLike) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]:
    """({tensor name: (dtype such as 'BF16', shape)}, metadata) of a safetensors file, without reading a tensor.

    Raises:
        ValueError: not a safetensors file, or cut off; the message says which.
    """
    entries, metadata, _ = read_layout(path)
    return {name: (dtype, shape) for name, (dtype, shape, _) in entries.items()}, metadata


def read_layout(
    path: str | os.PathLike,
) -> tuple[dict[str, tuple[str, tuple[int, ...], tuple[int, int]]], dict[str, str], int]:
    """As `read_header`, with each tensor's (begin, end) in bytes from the third value on, the end of the header."""
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise ValueError("it is not a safetensors file, or was cut off")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            tensors = {
                name: (entry["dtype"], tuple(entry["shape"]), tuple(entry["data_offsets"]))
                for name, entry in header.items()
            }
            end = max((offsets[1] for _, _, offsets in tensors.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ValueError("it is not a safetensors file: its header is no JSON of tensors") from None
    if size != 8 + length + end:
        raise ValueError(f"it was cut off: {size:,} bytes instead of {8 + length + end:,}")
    return tensors, metadata, 8 + length


def file_sha256(path: str | os.PathLike) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_atomic(
    path: str | os.PathLike,
    write: Callable[[BinaryIO], object],
    durable: bool = True,
    mode_of: str | os.PathLike | None = None,
) -> Path:
    """Call `write(binary file)` on a temporary neighbour, sync it, then rename it to `path`: never half a file.

    Args:
        durable: False for what can be made again (reports, previews): a crash of the machine may then lose it.
        mode_of: a file whose permissions the new one gets; None: those that the umask leaves.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(unique_name(path.name))
    try:
        with open(temporary, "wb") as file:
            write(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if mode_of is not None:
            shutil.copymode(mode_of, temporary)
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    if durable:
        sync_path(path.parent)
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
