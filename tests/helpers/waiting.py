"""Waiting for processes without a limit in seconds: a wait fails when the process has ended or does nothing any more.

A hang is told by CPU time: a process tree that gets less than a fiftieth of a core for two minutes waits for something
that will not come. So a busy machine makes a test slower, never red.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil

STALL_SECONDS = 120.0
STALL_CORES = 0.02


def tree(pid: int) -> list[psutil.Process]:
    """A process and all its descendants: torch's launcher gives each rank a session of its own."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """CPU time that processes have used so far, and their ended children that they waited for."""
    total = 0.0
    for process in processes:
        try:
            total += sum(process.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return total


class Hang:
    """Raises TimeoutError once the tree of a process has done nothing for `STALL_SECONDS`; asked again and again."""

    def __init__(self, pid: int) -> None:
        self.pid, self.since, self.used = pid, time.monotonic(), 0.0

    def check(self) -> None:
        now = time.monotonic()
        if now - self.since < STALL_SECONDS:
            return
        used = cpu_seconds(tree(self.pid))
        if 0 <= used - self.used < STALL_CORES * (now - self.since):
            raise TimeoutError(f"process {self.pid} and its children have done nothing for {now - self.since:.0f} s")
        self.since, self.used = now, used


def until(condition: Callable[[], object], process, log: Path | None = None) -> None:
    """Wait until `condition()` is true while `process` (Popen or warm.Program) runs; fails with the end of its log."""
    hang = Hang(process.pid)
    while not condition():
        if process.poll() is not None and not condition():
            told = log.read_text(errors="replace")[-4000:] if log else ""
            raise AssertionError(f"ended with {process.poll()} before what was waited for\n{told}")
        try:
            hang.check()
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{log.read_text(errors='replace')[-4000:] if log else ''}") from None
        time.sleep(0.02)


def finish(process) -> int:
    """The exit code of a process, waited for as long as it or its children do something; a hung tree is killed."""
    hang = Hang(process.pid)
    while process.poll() is None:
        try:
            hang.check()
        except TimeoutError:
            kill(tree(process.pid))
            raise
        time.sleep(0.02)
    return process.poll()


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL all of them at once, as a lost machine or an out-of-memory killer does, and wait for their end."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes)


def nobody_left(processes: list[psutil.Process]) -> bool:
    """Whether all of them end: false once those that are left do nothing any more (they wait for a word)."""
    left, since, used = processes, time.monotonic(), cpu_seconds(processes)
    while left := psutil.wait_procs(left, timeout=0.2)[1]:
        now = time.monotonic()
        if now - since > 20:
            again = cpu_seconds(left)
            if again - used < STALL_CORES * (now - since):
                return False
            since, used = now, again
    return True
