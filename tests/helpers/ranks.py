"""Several ranks on this machine for tests: `run_ranks(job, 2)` forks them, each with accelerate's group of gloo."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable

import psutil
import torch

from helpers import free_port
from sana_kit.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


def _work(job: Callable, rank: int, world_size: int, port: int, results) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of a run that an earlier test did in the parent
    torch.set_num_threads(1)
    ranks = Ranks.start("auto")
    try:
        results.put((rank, True, job(ranks)))
        ranks.close()
    except BaseException as error:
        results.put((rank, False, f"{type(error).__name__}: {error}"))
        if not isinstance(error, Exception):
            traceback.print_exc()
    results.close()
    results.join_thread()
    os._exit(0)


def _stopped(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED


def run_ranks(job: Callable, world_size: int = 2, timeout: float = 900) -> list:
    """What `job(ranks)` returned or raised on each rank, as (ok, value or "Class: message").

    A rank that ended without a word (it was killed, or stopped with nobody left to wait for it) is None.
    """
    context = multiprocessing.get_context("fork")
    results, port = context.Queue(), free_port()
    processes = [
        context.Process(target=_work, args=(job, rank, world_size, port, results)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    found: list = [None] * world_size
    ended = 0
    deadline = time.monotonic() + timeout
    while ended < world_size and time.monotonic() < deadline:
        ended = sum(not process.is_alive() for process in processes)
        time.sleep(0.02)
        if ended and all(_stopped(process.pid) for process in processes if process.is_alive()):
            break
    while not results.empty():
        rank, ok, value = results.get()
        found[rank] = ok, value
    for process in processes:
        if process.is_alive():
            process.kill()
    return found
