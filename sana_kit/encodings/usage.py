"""Who uses a store, how large it is, what in it was not used lately, and its pruning.

A shard's modification time says when a run last used anything of it: every run renews it at its start. A live run
leaves a claim in runs/, which names its shards and is locked while the run lives, so that pruning keeps them however
old they are. A run that starts while the store is being pruned waits; pruning that starts while a run is still
looking what is there, or is encoding, is refused. So neither needs to know of the other beforehand:
the run writes its claim and then looks for the mark of a pruning, the pruning sets its mark and then reads the claims.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from sana_kit.encodings.plan import PARTS
from sana_kit.errors import Problem, UserError
from sana_kit.files import unique_name
from sana_kit.locks import NO_FLOCK, lock_folder

DAY = 86400.0
RENEW_USED_SECONDS = DAY / 4  # a shard's time is renewed at most that often
UNUSED_DAYS = 30.0  # what no run has used for so long counts as unused
PRUNING, PRUNING_STALE_SECONDS = ".pruning", 120.0  # mark of a pruning; one that is older was left by a killed one

# Where the file system has no flock, a claim is believed for so long after its run last renewed it.
CLAIM_RENEW_SECONDS, CLAIM_STALE_SECONDS = 3600.0, 2 * DAY


def mark_used(folder: Path, names: Iterable[str]) -> None:
    """Say that a run uses these shards now; one that belongs to somebody else keeps its time."""
    now = time.time()
    for name in names:
        path = folder / name
        with suppress(OSError):
            if now - path.stat().st_mtime > RENEW_USED_SECONDS:
                os.utime(path)


class Claim:
    """A live run's hold on its shards: a file in runs/, locked while the run lives, gone with it.

    Until `name_shards` is called it stands for the whole store.
    """

    def __init__(self, store: Path):
        self._pid, self._renewed = os.getpid(), time.monotonic()
        self._handle: IO[str] | None = None
        self.path = store / "runs" / f"{uuid.uuid4().hex}.json"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write(None)
        except OSError:  # a store that only can be read cannot be pruned from here either
            self.close()
            return
        self._wait_for_pruning(store)

    def _write(self, shards: dict[str, list[str]] | None) -> None:
        """Put a new file in place, locked before it is seen."""
        temporary = self.path.with_name(unique_name(self.path.name))
        handle = open(temporary, "w", encoding="utf-8")
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "shards": shards}, handle)
        handle.flush()
        os.replace(temporary, self.path)
        if self._handle is not None:
            self._handle.close()
        self._handle = handle

    @staticmethod
    def _wait_for_pruning(store: Path) -> None:
        while True:
            try:
                age = time.time() - (store / PRUNING).stat().st_mtime
            except OSError:
                return
            if age > PRUNING_STALE_SECONDS:
                return
            time.sleep(0.2)

    def name_shards(self, shards: dict[str, list[str]]) -> None:
        """From now on hold these shards of each part alone."""
        if self._handle is not None:
            with suppress(OSError):
                self._write(shards)

    def renew(self) -> None:
        """Say that the run lives, for file systems without flock; cheap enough for every read."""
        if time.monotonic() - self._renewed > CLAIM_RENEW_SECONDS:
            self._renewed = time.monotonic()
            with suppress(OSError):
                os.utime(self.path)

    def close(self) -> None:
        """Give the shards free; a forked process only closes its copy of the file."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None
            if self._pid == os.getpid():
                with suppress(OSError):
                    self.path.unlink(missing_ok=True)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handle": None}

    def __del__(self) -> None:
        with suppress(Exception):  # the interpreter may be shutting down
            self.close()


def _lives(path: Path) -> bool:
    """Whether the run that left this claim lives."""
    with open(path, "rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_FLOCK:
                return time.time() - path.stat().st_mtime < CLAIM_STALE_SECONDS
            return error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN)
    return False


def live_claims(store: Path) -> Iterator[dict]:
    """The claims of live runs; those of dead ones are removed."""
    for path in (store / "runs").glob("*.json"):
        with suppress(FileNotFoundError):
            if _lives(path):
                yield json.loads(path.read_text(encoding="utf-8"))
            else:
                path.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of a store.

    Attributes:
        part: "latents" or "prompts".
        unused_days: days since a run last used anything of it.
    """

    path: Path
    part: str
    bytes: int
    unused_days: float


def shards_of(store: Path) -> list[Shard]:
    """All shards, and files of shards that were set aside or never finished."""
    found, now = [], time.time()
    for part in PARTS:
        with suppress(FileNotFoundError), os.scandir(store / part) as entries:
            for entry in entries:
                if ".safetensors" in entry.name or entry.name.startswith(".unfinished-"):
                    with suppress(FileNotFoundError):
                        stat = entry.stat()
                        found.append(Shard(Path(entry.path), part, stat.st_size, (now - stat.st_mtime) / DAY))
    return found


def size_text(count: int) -> str:
    """Bytes as a person reads them: "1.5 GB"."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def in_short(store: Path, unused_days: float = UNUSED_DAYS) -> str:
    """One sentence on a store's size; where some of it is old, also how to remove that."""
    shards = shards_of(store)
    old = sum(shard.bytes for shard in shards if shard.unused_days > unused_days)
    told = f"store of encodings {store}: {size_text(sum(shard.bytes for shard in shards))}"
    if not old:
        return f"{told}, all used within {unused_days:g} days"
    remedy = f"python -m sana_kit.encodings {store} --prune removes that"
    return f"{told}, {size_text(old)} of it not used for {unused_days:g} days ({remedy})"


def describe(store: Path, unused_days: float = UNUSED_DAYS) -> str:
    """How large a store is, by part, and what of it no run has used lately; several lines."""
    shards, lines = shards_of(store), []
    for part in PARTS:
        own = [shard for shard in shards if shard.part == part]
        old = [shard for shard in own if shard.unused_days > unused_days]
        lines.append(
            f"{part}: {size_text(sum(s.bytes for s in own))} in {len(own)} files;"
            f" {size_text(sum(s.bytes for s in old))} in {len(old)} of them not used for {unused_days:g} days"
        )
    return "\n".join([f"{store}: {size_text(sum(shard.bytes for shard in shards))}", *lines])


@contextmanager
def _pruning_mark(store: Path) -> Iterator[Path]:
    mark = store / PRUNING
    with lock_folder(store, field="store"):
        mark.touch()
        os.utime(mark)
        try:
            yield mark
        finally:
            mark.unlink(missing_ok=True)


def prune(store: Path, unused_days: float = UNUSED_DAYS, dry_run: bool = False) -> list[Shard]:
    """Remove the shards that no run has used for `unused_days` and that no live run holds; returns them.

    A shard goes or stays as a whole: it stays when a run used any of it. Remembered plans that name a removed shard
    are of no use and are removed, too. An interrupted pruning leaves a whole store.

    Args:
        dry_run: remove nothing, only say what would go.

    Raises:
        UserError: no store is there; a run is just looking what it holds, or encoding; another pruning is at work.
    """
    if not any((store / part).is_dir() for part in PARTS):
        raise UserError(
            Problem("store", str(store), "holds no encodings", "Name a folder with latents/ and prompts/.")
        )
    with _pruning_mark(store) as mark:
        held: set[Path] = set()
        for claim in live_claims(store):
            if claim["shards"] is None:
                reason = f"process {claim['pid']} on {claim['host']} is encoding into it"
                raise UserError(Problem("store", str(store), reason, "Prune when it has finished encoding."))
            held |= {store / part / name for part, names in claim["shards"].items() for name in names}
        gone = []
        for shard in shards_of(store):
            if shard.unused_days <= unused_days or shard.path in held:
                continue
            gone.append(shard)
            if not dry_run:
                shard.path.unlink(missing_ok=True)
                if len(gone) % 64 == 0:
                    os.utime(mark)
        if not dry_run:
            _forget_plans(store, unused_days, {shard.path.name for shard in gone})
    return gone


def _forget_plans(store: Path, unused_days: float, gone: set[str]) -> None:
    """Remove remembered plans that are old or name a shard that is gone, and what is remembered of old data sets."""
    from safetensors import safe_open

    for path in (*(store / "images").glob("*.arrow"), *(store / "masks").glob("*.npy")):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > unused_days * DAY:
                path.unlink()
    for path in (store / "plans").glob("*.safetensors"):
        with suppress(OSError):
            useless = time.time() - path.stat().st_mtime > unused_days * DAY
            if not useless and gone:
                with safe_open(path, "numpy") as file:
                    notes = json.loads(file.metadata()["plan"])
                useless = any(name in gone for part in PARTS for name, _ in notes[part]["files"])
            if useless:
                path.unlink(missing_ok=True)
