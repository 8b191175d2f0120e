"""Tells within two minutes that another rank, or its whole machine, is gone, whatever the main thread waits for.

A rank waits legitimately long for others: while they encode their share, write a checkpoint, compile a kernel. The
timeouts of collectives therefore say nothing about a lost machine. Here each rank gives a sign of life every few
seconds through a store of their own, held by rank 0. A rank that is silent for `SILENT_SECONDS`, or that told of its
failure, ends all others: a main thread that calls `check()` gets RankFailed; where it does not, since it is inside a
collective and cannot be woken, the process is ended `GRACE_SECONDS` later.

Torch's public TCPStore only; no collective is used, so any backend may be stuck meanwhile.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from sana_kit.errors import RankFailed, show_error
from sana_kit.launchers import local_rank

if TYPE_CHECKING:
    from torch.distributed import TCPStore

BEAT_SECONDS = 2.0
SILENT_SECONDS = 90.0
GRACE_SECONDS = 20.0
CONNECT_SECONDS = 60.0


def open_store(host: str, port: int, world_size: int, is_server: bool) -> TCPStore:
    """A TCPStore: as the server on a free port (`port` 0), or as a client of it."""
    from torch.distributed import TCPStore

    seconds = timedelta(seconds=CONNECT_SECONDS)
    return TCPStore(host, port, world_size, is_server, timeout=seconds, wait_for_workers=False)


def _end_process(message: str) -> None:
    """Leave at once: the main thread is inside a collective that will not come back."""
    if local_rank() == 0:
        show_error(message)
    os._exit(1)


class Heartbeat:
    """Signs of life of this rank, and a watch over the others.

    Rank 0 watches all; the others watch rank 0, whose store also tells them of any failure. One thread makes all
    calls to the store; a second one looks at clocks only, so that nothing can hang it.

    Args:
        store: a TCPStore that nobody else uses; rank 0 holds its server.
        beat, silent, grace: seconds; those at the top of this file unless given.
        end: called with the reason when the main thread has not ended by itself; the default leaves the process.
    """

    def __init__(
        self,
        store: TCPStore,
        rank: int,
        world_size: int,
        *,
        beat: float | None = None,
        silent: float | None = None,
        grace: float | None = None,
        end: Callable[[str], None] = _end_process,
    ):
        self.store, self.rank, self.world_size = store, rank, world_size
        self.beat = BEAT_SECONDS if beat is None else beat
        self.silent = SILENT_SECONDS if silent is None else silent
        self.grace, self.end = GRACE_SECONDS if grace is None else grace, end
        self.lost: str | None = None  # why this run cannot go on: another rank is gone or failed
        self._lost_at, self._answered_at = 0.0, time.monotonic()
        self._report: str | None = None  # what this rank tells before it fails
        self._reported, self._leaving, self._left, self._ended, self._wake = (threading.Event() for _ in range(5))
        self._seen: dict[int, tuple[int, float]] = {}  # of rank 0: number of each rank's last beat, and when it came
        for work in (self._exchange_on, self._watch):
            threading.Thread(target=work, name="heartbeat", daemon=True).start()

    def check(self) -> None:
        """Raise RankFailed if another rank is gone or failed."""
        if self.lost is not None:
            raise RankFailed(self.lost)

    def why(self, seconds: float = 3.0) -> str | None:
        """Why a collective has just failed; waits so long for the news, None if there is none."""
        deadline = time.monotonic() + seconds
        while self.lost is None and time.monotonic() < deadline:
            self._wake.set()
            time.sleep(0.1)
        return self.lost

    def tell_failure(self, message: str) -> None:
        """Let the other ranks know with what this one failed; call before the process ends."""
        if not self._ended.is_set():
            self._report = f"rank {self.rank} on {socket.gethostname()} failed: {message}"
            self._wake.set()
            self._reported.wait(4 * self.beat)
        self._ended.set()

    def close(self) -> None:
        """This rank leaves and all is well. Rank 0 stays until the others have left, since they need its store."""
        self._leaving.set()
        self._wake.set()
        if not self._ended.is_set():
            self._left.wait(self.silent + self.grace)
        self._ended.set()

    def at_exit(self) -> None:
        """Leave when the interpreter ends without `close`; an exception that nobody caught is a failure."""
        error = getattr(sys, "last_value", None)
        if error is None:
            self.close()
        else:
            self.tell_failure(f"{type(error).__name__}: {error}")

    def _lose(self, message: str) -> None:
        if self.lost is None and not self._leaving.is_set():
            self._lost_at, self.lost = time.monotonic(), message

    def _exchange_on(self) -> None:
        try:
            self.store.set(f"host/{self.rank}", socket.gethostname())
            while not self._ended.is_set():
                self._exchange()
                self._answered_at = time.monotonic()
                self._wake.wait(0.05 if self._leaving.is_set() or self._report else self.beat)
                self._wake.clear()
        except RuntimeError:
            self._lose(f"rank 0 on {os.environ.get('MASTER_ADDR', 'another machine')} is gone")
        finally:
            self._reported.set()
            self._left.set()

    def _exchange(self) -> None:
        """One sign of life, and the news."""
        self.store.add(f"beat/{self.rank}", 1)
        if self._report is not None:
            self.store.compare_set("failure", "", self._report)
        if self.store.check(["failure"]):
            self.store.set(f"heard/{self.rank}", "1")
            if self._report is None:
                self._lose(self.store.get("failure").decode())
            elif self.rank or self._others("heard"):
                self._reported.set()
        if self.rank == 0:
            self._look_at_others()
        if self._leaving.is_set():
            self.store.set(f"left/{self.rank}", "1")
            if self.rank or self.lost or self._others("left"):
                self._left.set()

    def _others(self, said: str) -> bool:
        """Whether all ranks but 0 have said so."""
        return all(self.store.check([f"{said}/{rank}"]) for rank in range(1, self.world_size))

    def _look_at_others(self) -> None:
        now = time.monotonic()
        for rank in range(1, self.world_size):
            number = self.store.add(f"beat/{rank}", 0)
            if number != self._seen.get(rank, (-1, now))[0]:
                self._seen[rank] = number, now
            elif now - self._seen[rank][1] > self.silent and not self.store.check([f"left/{rank}"]):
                known = self.store.check([f"host/{rank}"])
                host = self.store.get(f"host/{rank}").decode() if known else "a machine that never answered"
                text = f"rank {rank} on {host} gave no sign of life for {self.silent:g} s: it is gone or frozen"
                self.store.compare_set("failure", "", text)
                self._lose(text)

    def _watch(self) -> None:
        """End the process when the main thread does not do so by itself."""
        while not self._ended.wait(min(1.0, self.beat)):
            now = time.monotonic()
            if now - self._answered_at > self.silent + self.beat:
                host = os.environ.get("MASTER_ADDR", "another machine")
                self._lose(f"rank 0 on {host} gave no answer for {self.silent:g} s: it is gone or frozen")
            if self.lost is not None and now - self._lost_at > self.grace:
                self.end(self.lost)
                return
