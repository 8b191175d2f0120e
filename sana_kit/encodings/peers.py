"""The ranks that encode together: those that see the same store folder. Who they are is found out, not configured."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar

from sana_kit.distributed import Ranks
from sana_kit.encodings.plan import PARTS
from sana_kit.encodings.store import refresh_listing, remove_stale
from sana_kit.errors import EncodingStopped, StoreError

T = TypeVar("T")

SHARED_SECONDS = 10.0  # after that a store that shows no file of another machine's rank counts as not shared


class Stop(Protocol):
    """What asks for an early end: `sana_kit.distributed.StopSignal`, or anything with its attribute."""

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop."""


class _OtherRankFailed(RuntimeError):
    """Ends this rank's share early; the error that all ranks raise is the failed rank's."""


class Peers:
    """The ranks that share a store, and their agreement while they encode.

    Attributes:
        members: the ranks that see this store, this one among them.
    """

    def __init__(self, ranks: Ranks, store: Path, stop: Stop | None = None):
        self.ranks, self.store, self._stop = ranks, store, stop
        self.members = [ranks.rank]
        self._token: str | None = None

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._clean_up()

    def find(self) -> None:
        """Find out which ranks share the store: each leaves a file there and looks whose it sees.

        Raises:
            StoreError: the store cannot be written, or the ranks see it differently.
        """
        rank, world_size = self.ranks.rank, self.ranks.world_size
        self._token = self.ranks.agree(uuid.uuid4().hex)
        self.ranks.run_on_all(self._leave_mark)
        if world_size == 1:
            return
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "0") or 0)
        deadline = time.monotonic() + SHARED_SECONDS
        while True:
            seen = sorted(int(p.name.rsplit("-", 1)[1]) for p in self.store.glob(f".probe-{self._token}-*"))
            # Ranks of one machine always share the folder; those of others may, and then show within a few seconds.
            if len(seen) == world_size or local == world_size or time.monotonic() > deadline:
                break
            refresh_listing(self.store)
            time.sleep(0.2)
        views = self.ranks.gather(seen)
        self.members = seen
        if rank not in seen or any(views[other] != seen for other in seen):
            raise StoreError(
                f"Encodings: the ranks disagree on who shares {self.store} ({views}). Put the encodings on a file"
                " system that all machines share, or on one that each machine has for itself."
            )

    def _leave_mark(self) -> None:
        try:
            for part in PARTS:
                (self.store / part).mkdir(parents=True, exist_ok=True)
                remove_stale(self.store / part)
            remove_stale(self.store)
            (self.store / f".probe-{self._token}-{self.ranks.rank}").touch()
        except OSError as error:
            raise StoreError(
                f"Encodings: {self.store} cannot be written ({error.strerror}). Choose another folder for them."
            ) from None

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of a list that is alike on all ranks."""
        return list(items)[self.members.index(self.ranks.rank) :: len(self.members)]

    def run(self, job: Callable[[], T]) -> T | None:
        """Run a job on every rank; one that fails ends the others at their next `check`, and all raise its error.

        Returns: this rank's own result.
        """

        def guarded() -> T | None:
            try:
                return job()
            except _OtherRankFailed:
                return None
            except Exception:
                with suppress(OSError):
                    if self._token is not None and self.ranks.world_size > 1:
                        (self.store / f".failed-{self._token}").touch()
                raise

        return self.ranks.run_on_all(guarded)

    def check(self) -> None:
        """Leave the job where an end is asked for, or another rank has failed; call it between groups.

        Raises:
            EncodingStopped: an end is asked for.
        """
        if self._stop is not None and self._stop.requested:
            raise EncodingStopped("Encoding was stopped on request; start again to go on where it was.")
        if self._token is not None and (self.store / f".failed-{self._token}").exists():
            raise _OtherRankFailed

    def _clean_up(self) -> None:
        """Remove this rank's marks from the store."""
        if self._token is not None:
            for name in (f".probe-{self._token}-{self.ranks.rank}", f".failed-{self._token}"):
                with suppress(OSError):  # a store that cannot be written has its own error
                    (self.store / name).unlink(missing_ok=True)
