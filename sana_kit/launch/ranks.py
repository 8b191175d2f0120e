"""`accelerate launch` in this process: its environment for checks beforehand, the trainer's own exit code afterwards.

torch's and accelerate's tracebacks about a rank that failed say nothing that the rank has not said, so they stay off
the screen. Private names: accelerate's `_validate_launch_command` (0.33 to 1.15) and torch's
`_terminate_process_handler` (2.1 to 2.13).
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch.distributed
from accelerate.commands import launch
from accelerate.utils import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from sana_kit.errors import show_error
from sana_kit.launchers import announced
from sana_kit.quiet import leave

# What says how processes start and end; nothing in it tells a user more than the trainer's own message.
QUIET_LOGGERS = ("torch.distributed.elastic", "torch.distributed.run", "accelerate.commands.launch")
MEETING_SECONDS = 900  # torch's own limit for the launchers of several machines (LaunchConfig, 2.1 to 2.13)
NO_CHECKPOINT = "; no checkpoint was written by this start"
REMEDIES = {
    signal.SIGKILL: "Often the host's memory is short: fewer --dataloader_num_workers or processes; see dmesg.",
    signal.SIGBUS: "Often shared memory is short: a larger /dev/shm (docker run --shm-size=16g).",
}


def pass_on(number: int, folder: str) -> None:
    """Pass a signal on to the run's processes; without any yet, end. torch's launcher brings handlers of its own.

    Args:
        folder: of this start, removed before it ends.
    """
    children = psutil.Process().children()
    if not children:
        shutil.rmtree(folder, ignore_errors=True)
        leave(number, NO_CHECKPOINT)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(number)


class _OnceASecond:
    """torch's handler of signals, which raises, without those that come within a second of the first.

    A scheduler sends a signal to every process of a job, so that this one gets it once by itself and once from the
    launcher. Raised again while torch waits for the ranks, it would leave them behind.
    """

    def __init__(self) -> None:
        self.last = float("-inf")

    def __call__(self, number: int, frame: object) -> None:
        before, self.last = self.last, time.monotonic()
        if self.last - before > 1.0:
            raise SignalException(f"process {os.getpid()} got signal {number}", signal.Signals(number))


class Launch:
    """What `accelerate launch` makes of its words and the accelerate config.

    Args:
        words: its command line, with the script and the script's own.

    Raises:
        ValueError: accelerate cannot make a run of them; the message says why.
    """

    def __init__(self, words: list[str]):
        self.arguments = launch.launch_command_parser().parse_args(words)

    @contextlib.contextmanager
    def environment(self) -> Iterator[None]:
        """Around checks: the environment that the processes will get, without their ranks."""
        arguments, defaults, _ = launch._validate_launch_command(copy.deepcopy(self.arguments))
        if arguments.use_deepspeed and not arguments.cpu:
            fields = list(defaults.deepspeed_config) if defaults else []
            arguments.deepspeed_fields_from_accelerate_config = ",".join(fields)
            _, found = prepare_deepspeed_cmd_env(arguments)
        elif (arguments.use_fsdp or arguments.use_megatron_lm or arguments.multi_gpu) and not arguments.cpu:
            found = prepare_multi_gpu_env(arguments)
        else:
            _, found = prepare_simple_launcher_cmd_env(arguments)
        before = dict(os.environ)
        os.environ.update({name: str(value) for name, value in found.items()})
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    def run(self) -> tuple[int, int | None]:
        """Start the processes and wait for them.

        Returns: (exit code as a shell tells it, the signal that ended the run or None).
        """
        kept = io.StringIO()
        for name in QUIET_LOGGERS:
            logger = logging.getLogger(name)
            logger.handlers, logger.propagate = [logging.StreamHandler(kept)], False
        api._terminate_process_handler = _OnceASecond()
        try:
            with self._told_of_the_wait():
                launch.launch_command(self.arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            return _failed(failure.exitcode, rank), None
        except subprocess.CalledProcessError as error:
            return _failed(error.returncode, None), None
        except SignalException as error:
            return 128 + error.sigval, int(error.sigval)
        except torch.distributed.DistError as error:  # the launchers of several machines did not find each other
            show_error(f"the machines did not meet: {self._meeting()[1]} torch says: {str(error).splitlines()[0]}")
            return 1, None
        except (ValueError, ImportError, OSError) as error:
            show_error(f"accelerate launch: {error}")
            return 1, None
        except Exception:
            show_error(f"accelerate launch failed:\n{kept.getvalue()}{traceback.format_exc()}")
            return 1, None
        return 0, None

    def _told_of_the_wait(self) -> contextlib.AbstractContextManager[None]:
        """torch's launchers of several machines meet before they start a process, and say nothing meanwhile."""
        machines, line = self._meeting()
        if machines == 1:
            return contextlib.nullcontext()
        before = set(psutil.Process().children())
        return announced(line, over=lambda: bool(set(psutil.Process().children()) - before))

    def _meeting(self) -> tuple[int, str]:
        """(number of machines, what the user of one of them is to know)."""
        arguments, _, _ = launch._validate_launch_command(copy.deepcopy(self.arguments))
        machines = int(arguments.num_machines or 1)
        return machines, (
            f"machine {arguments.machine_rank} of num_machines={machines} waits for the others at"
            f" {arguments.main_process_ip}:{arguments.main_process_port}, {MEETING_SECONDS // 60} minutes at most."
            " Start the same command on each of them, with its own machine_rank, or check that they reach it."
        )


def _failed(code: int, rank: int | None) -> int:
    """The exit code of a process that failed; one that was killed could not say so itself."""
    if code >= 0:
        return code
    number = signal.Signals(-code)
    if number not in (signal.SIGTERM, signal.SIGINT):
        whose = "the training process" if rank is None else f"the process of rank {rank}"
        remedy = REMEDIES.get(number, "A library failed in its own code; its last lines are above.")
        show_error(f"{whose} was ended by {number.name}. {remedy}")
    return 128 + number


class RunSummary:
    """Whether the run that is about to start writes its summary.json, and how it stopped."""

    def __init__(self, output_dir: Path):
        self.path = output_dir / "summary.json"
        self._before = self._mark()

    def _mark(self) -> tuple[int, int] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino

    def stopped_at(self) -> int | None:
        """The update after which the run stopped as a signal asked; None where it did not, or said nothing."""
        if self._mark() == self._before:
            return None
        try:
            summary = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return summary.get("global_step") if summary.get("interrupted_by_signal") else None
