"""One live run per folder: an flock where the file system has one, else a lock file with signs of life.

The flock belongs to the open file, so a crash releases it. Some network and user file systems have none (ENOSYS,
ENOLCK, EOPNOTSUPP): there a file made with O_EXCL says who holds the folder, and its time is renewed while the run
lives. A holder of this machine that no longer runs, or one of another machine that has not renewed it for
`STALE_SECONDS`, is gone, and the next run takes over.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sana_kit.errors import Problem, UserError
from sana_kit.files import unique_name

logger = logging.getLogger("sana")

NO_FLOCK = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
RENEW_SECONDS = 15.0
STALE_SECONDS = 120.0


def _in_use(folder: Path, field: str, owner: str) -> UserError:
    reason = f"another live run is writing there ({owner})"
    return UserError(Problem(field, str(folder), reason, "Wait for it, end it, or choose another folder."))


@contextmanager
def lock_folder(folder: str | os.PathLike, enabled: bool = True, field: str = "output_dir") -> Iterator[None]:
    """Hold a folder, made if needed, for this run.

    Args:
        enabled: False makes this do nothing: on all ranks but the first.
        field: the setting that names the folder.

    Raises:
        UserError: another live process holds it.
    """
    if not enabled:
        yield
        return
    import fcntl

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise _in_use(folder, field, handle.read().strip() or "unknown process") from None
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            logger.warning("%s: its file system has no flock (%s); a lock file is used", folder, error.strerror)
            with _lock_file(folder, field):
                yield
            return
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {os.uname().nodename}")
        handle.flush()
        # The lock goes when the file closes; the file itself stays, so that no two runs lock two inodes.
        yield


def _machine() -> str:
    """This start of this machine, or of this container: equal only for processes that see each other's ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()
    return f"{boot} {space}"


def _started(pid: int) -> float | None:
    """When a process of this machine began, in seconds; None if there is none of that id."""
    import psutil

    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def _now_there(folder: Path) -> float:
    """The file system's own clock, which need not be this machine's."""
    probe = folder / unique_name("clock")
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _holder_lives(path: Path, holder: dict) -> bool:
    if holder.get("machine") == _machine():
        started = _started(int(holder.get("pid", -1)))
        return started is not None and abs(started - float(holder.get("started", 0))) < 1.0
    return _now_there(path.parent) - path.stat().st_mtime < STALE_SECONDS


def _read_holder(path: Path) -> dict:
    """What a lock file says; {} for one that is just being written or is damaged: then its age decides."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _take_over(path: Path, holder: dict) -> bool:
    """Set a dead holder's file aside; False if somebody else was quicker."""
    aside = path.with_name(unique_name(path.name))
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return True
    ours = _read_holder(aside) == holder
    if not ours:  # a new holder's file: back to its place
        with suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)
    return ours


@contextmanager
def _lock_file(folder: Path, field: str) -> Iterator[None]:
    path, token = folder / ".lock-holder", uuid.uuid4().hex
    me = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine(), "token": token}
    me["started"] = _started(os.getpid())
    for _ in range(5):
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            try:
                holder = _read_holder(path)
                lives = _holder_lives(path, holder)
            except FileNotFoundError:
                continue
            owner = f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown machine')}"
            if lives or not _take_over(path, holder):
                raise _in_use(folder, field, owner) from None
            logger.warning("%s: its lock was left by %s, which is gone; taken over", folder, owner)
            continue
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            json.dump(me, handle)
        break
    else:
        raise _in_use(folder, field, "several runs start at once")
    done = threading.Event()

    def renew() -> None:
        while not done.wait(RENEW_SECONDS):
            with suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=renew, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with suppress(OSError):
            if _read_holder(path).get("token") == token:
                path.unlink()
