"""Worker processes of a data loader: what fails there ends the run with its error, whatever thread it fails in.

torch sends a worker's tensors from a thread of its own. An exception there only prints, the batch is lost, and the
trainer would wait for it for ever: a TMPDIR so long that no socket fits into it was such a case. Nor may a worker that
is busy hold up the end of a trainer that failed. Pass `prepare_worker` as `worker_init_fn`.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.queues
import os
import signal
import sys
import tempfile
import traceback

# A path of a socket has at most 107 bytes (unix(7)); multiprocessing adds "/pymp-xxxxxxxx/listener-xxxxxxxx".
LONGEST_SOCKET_FOLDER = 107 - 33
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


def socket_folder() -> str:
    """A folder for temporary files whose path leaves room for a socket's name: TMPDIR, or the first short one.

    Raises:
        OSError: TMPDIR is too long, and no short folder can be written to.
    """
    usual = tempfile.gettempdir()
    if len(os.fsencode(usual)) <= LONGEST_SOCKET_FOLDER:
        return usual
    for folder in SHORT_FOLDERS:
        if os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise OSError(
        f"TMPDIR={usual}: too long for the sockets of the loader's workers, at most {LONGEST_SOCKET_FOLDER} bytes fit."
        " Set a shorter TMPDIR, or dataloader_num_workers to 0."
    )


def _end_worker(error: BaseException, item: object) -> None:
    """Called where a result could not be sent: the worker ends, and the loader raises in the trainer."""
    traceback.print_exception(error)
    sys.stderr.write(f"a worker of the data loader cannot send its batch ({type(error).__name__}: {error})\n")
    sys.stderr.flush()
    os._exit(1)


def _kill_workers() -> None:
    """At the trainer's end: multiprocessing waits for its children, and these do not listen to its SIGTERM."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


# Runs before multiprocessing's own function of that kind, which was registered when it was imported, above.
atexit.register(_kill_workers)


def prepare_worker(worker: int) -> None:
    """For `DataLoader(worker_init_fn=...)`: signals are the trainer's alone, and no failure is silent.

    A SIGTERM to the whole group must not end the workers while the trainer finishes its update.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    tempfile.tempdir = socket_folder()
    # The hook that multiprocessing calls when its sending thread fails (Python 3.6 to 3.14); it only prints.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]
