"""Several processes: what the launcher promised, the process group, agreement between ranks, stop signals."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed

from sana_kit import devices, heartbeat, launchers
from sana_kit.devices import accelerator_type
from sana_kit.errors import InputError, KitError, Problem, RankFailed, UserError, at_failure
from sana_kit.launchers import announced_wait, launched_world_size

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

T = TypeVar("T")


def force_cpu() -> bool:
    """Whether accelerate must be told `cpu=True`.

    On a host without accelerator accelerate forms a process group only then (accelerate 1.15); otherwise every rank
    believes that it is alone. Not under DeepSpeed, which `cpu=True` would switch off: it gets its backend from
    `process_group_handlers`.
    """
    return accelerator_type() == "cpu" and not under_deepspeed()


def under_deepspeed() -> bool:
    """Whether `accelerate launch` was given a DeepSpeed config (it says so through the environment)."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true")


def _name_cpu_to_accelerate() -> None:
    """Where torch has no `torch.cpu.set_device` (2.1), accelerate can form a group of CPU ranks only if its own
    variable names the device beforehand.
    """
    if accelerator_type() == "cpu" and not hasattr(torch.cpu, "set_device"):
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")


def process_group_handlers(timeout_seconds: int = 7500) -> list:
    """kwargs_handlers for `Accelerator`: backend gloo on a CPU-only host, else the device's own, and a long timeout.

    The timeout covers the waits of other ranks while one encodes, compiles or writes. It is longer than the launcher's
    HCCL_EXEC_TIMEOUT (7200 s), so that HCCL reports a stuck collective first. It is not what ends a run whose machine
    is gone: the heartbeat of `Ranks` does so within two minutes.
    """
    from accelerate import InitProcessGroupKwargs

    _name_cpu_to_accelerate()
    grouped = launched_world_size() > 1 or under_deepspeed()  # accelerate takes a backend as a promise of a group
    backend = {"backend": "gloo"} if accelerator_type() == "cpu" and grouped else {}
    return [InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_seconds), **backend)]


def distributed_state() -> PartialState:
    """accelerate's PartialState for inference scripts; never lets two ranks believe that they are alone.

    Raises:
        RuntimeError: the launcher started several processes, but they did not find one another.
    """
    from accelerate import PartialState

    _name_cpu_to_accelerate()
    with announced_wait():
        state = PartialState(cpu=True) if accelerator_type() == "cpu" else PartialState()
    check_world_size(state.num_processes)
    return state


def check_world_size(num_processes: int) -> None:
    """Raise RuntimeError unless the process group is as large as the launcher promised."""
    promised = launched_world_size()
    if num_processes != promised:
        raise RuntimeError(
            f"The launcher started {promised} processes, but this process sees a group of {num_processes}: each rank"
            " would believe that it is alone. Check that every process sees its device (ASCEND_RT_VISIBLE_DEVICES,"
            " CUDA_VISIBLE_DEVICES); on a host without accelerator start with `accelerate launch --multi_gpu"
            " --num_processes N`, or with the DeepSpeed config."
        )


def _hide_progress_bars() -> None:
    """Loading bars of the libraries: the main process shows them for all."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


class Ranks:
    """The processes of a run, and THE agreement between them.

    Objects are exchanged over a gloo group of its own: the devices' own back ends limit how long a rank may wait (HCCL
    1836 s by default), and an idle rank may wait for the whole run. Whether a peer still lives is the heartbeat's to
    say, within two minutes; a peer that ends with an error is known at once.

    Attributes:
        rank, world_size: this process's number and how many there are.
        local_rank: its number on its machine.
        device: the torch.device of this rank.
        device_problem: why the device asked for cannot be used (`start` only); None if it can.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device, own_group: bool = False):
        self.rank, self.world_size, self.device = rank, world_size, device
        self.local_rank = launchers.local_rank()
        self.device_problem: Problem | None = None
        self._own_group, self._group = own_group, None
        self._heartbeat: heartbeat.Heartbeat | None = None
        self._forget: Callable[[], None] | None = None
        if world_size > 1:
            self._meet()

    @classmethod
    def of(cls, state: PartialState | Accelerator) -> Ranks:
        """The ranks of an accelerate Accelerator or PartialState."""
        return cls(state.process_index, state.num_processes, state.device)

    @classmethod
    def start(cls, device: str) -> Ranks:
        """Make the process group that the launcher promised, for a script without an Accelerator.

        Args:
            device: "auto" or a device's name; one that is not there becomes `device_problem`.

        Raises:
            RuntimeError: the ranks do not find one another.
        """
        problem, world_size = None, launched_world_size()
        if world_size == 1:
            try:
                chosen = devices.pick_device(device)
            except UserError as error:
                chosen, problem = devices.pick_device("cpu"), error.problems[0]
            ranks = cls(0, 1, chosen)
        else:
            kind = devices.accelerator_type()
            if device not in ("auto", kind):
                reason = f"with {world_size} processes each takes its own {kind} device"
                remedy = "Leave it out, and hide devices by CUDA_VISIBLE_DEVICES or ASCEND_RT_VISIBLE_DEVICES."
                problem = Problem("device", device, reason, remedy)
            own = not torch.distributed.is_initialized()
            state = distributed_state()
            ranks = cls(state.process_index, state.num_processes, state.device, own_group=own)
        ranks.device_problem = problem
        devices.prepare_backend(ranks.device)
        if not ranks.is_main:
            _hide_progress_bars()
        return ranks

    def _meet(self) -> None:
        """The gloo group and the heartbeat's store, whose port rank 0 tells."""
        self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        store = heartbeat.open_store(host, 0, self.world_size, True) if self.is_main else None
        port = self.agree(store.port if store else None)
        if store is None:
            store = heartbeat.open_store(host, port, self.world_size, False)
        self._heartbeat = heartbeat.Heartbeat(store, self.rank, self.world_size)
        self._forget = at_failure(self._heartbeat.tell_failure)
        atexit.register(self._heartbeat.at_exit)
        self.barrier()  # from here on every rank is watched: none is left connecting to a store that froze meanwhile

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this is the first rank of its machine."""
        return self.local_rank == 0

    def _exchange(self, collective: Callable[[], None]) -> None:
        """Run a collective of the gloo group; RankFailed, with the reason, where another rank is gone or failed."""
        if self._heartbeat is not None:
            self._heartbeat.check()
        try:
            collective()
        except RuntimeError as error:
            reason = self._heartbeat.why() if self._heartbeat is not None else None
            if reason is None:
                reason = f"another rank ended while this one waited for it ({error})"
                if self._heartbeat is not None:  # the ranks that are left end now; nobody waits for one that is gone
                    self._heartbeat.tell_failure(reason)
            raise RankFailed(reason) from error

    def gather(self, value: T) -> list:
        """Every rank's value (anything that pickles), in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        self._exchange(lambda: torch.distributed.all_gather_object(values, value, group=self._group))
        return values

    def agree(self, value: T, from_rank: int = 0) -> T:
        """The value of `from_rank`, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        self._exchange(lambda: torch.distributed.broadcast_object_list(box, src=from_rank, group=self._group))
        return box[0]

    def largest(self, number: int) -> int:
        """The largest of all ranks' whole numbers; waits for the other hosts, never for a device."""
        if self.world_size == 1:
            return number
        flag = torch.tensor([number], dtype=torch.int64)
        self._exchange(lambda: torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._group))
        return int(flag)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.largest(0)

    def run_on_all(self, action: Callable[[], T], checks_input: bool = False) -> T:
        """Run `action` on every rank; if it fails anywhere, it fails everywhere. Returns this rank's result.

        Args:
            checks_input: a ValueError without problems of its own is the user's to mend, too.

        Raises:
            UserError: where ranks met problems with settings: all of them, each once, on every rank.
            the first failing rank's error: a KitError of any other class, on every rank, with its class.
            the rank's own exception: on a rank that failed with something else.
            RankFailed: on the others, then.
        """
        result = failure = None
        try:
            result = action()
        except Exception as error:
            failure = error
        if self.world_size == 1:
            if checks_input and isinstance(failure, ValueError) and not isinstance(failure, KitError):
                raise InputError(str(failure)) from failure
            if failure is not None:
                raise failure
            return result
        reports = self.gather(_report(failure, checks_input))
        if all(report is None for report in reports):
            return result
        raise _merged(reports, self.rank, failure) from failure

    def close(self) -> None:
        """Leave, at the end of a run that went well; no rank is missed afterwards."""
        if self._heartbeat is not None:
            self._heartbeat.close()
            self._forget()
            atexit.unregister(self._heartbeat.at_exit)
        if self._own_group:
            torch.distributed.destroy_process_group()


def _report(failure: Exception | None, checks_input: bool) -> tuple | None:
    """A failure as it travels: (its class, None for an unexpected one; problems; heading; text)."""
    if failure is None:
        return None
    if isinstance(failure, UserError):
        problems = [dataclasses.replace(p, value=None if p.value is None else str(p.value)) for p in failure.problems]
        return UserError, problems, failure.heading, str(failure)
    if isinstance(failure, KitError):
        return type(failure), None, "", str(failure)
    if checks_input and isinstance(failure, ValueError):
        return InputError, None, "", str(failure)
    return None, None, "", f"{type(failure).__name__}: {failure}"


def _merged(reports: list[tuple | None], rank: int, own: Exception | None) -> Exception:
    """The one error that this rank raises when these came together; see `Ranks.run_on_all`."""
    failed = [(number, *report) for number, report in enumerate(reports) if report is not None]
    unexpected = [entry for entry in failed if entry[1] is None]
    if unexpected:
        if own is not None and reports[rank][0] is None:
            return own
        number, _, _, _, text = unexpected[0]
        return RankFailed(f"rank {number} failed: {text}")
    # a rank that stopped since another had failed has nothing of its own to say
    telling = [entry for entry in failed if not issubclass(entry[1], RankFailed)] or failed
    kind = telling[0][1]
    if kind is UserError:
        problems = [problem for entry in telling for problem in entry[2] or ()]
        merged = UserError(dict.fromkeys(problems), telling[0][3])
    else:
        texts = dict.fromkeys(entry[4] for entry in telling)
        merged = kind("\n".join(texts))
    merged.shared = True
    return merged


EXIT_INTERRUPTED: dict[int | None, int] = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}


class StopSignal:
    """SIGTERM, SIGINT and a closed terminal ask for a stop after the current update; all ranks agree on which it is.

    A second signal ends at once. `requested` is this rank's own knowledge, for loops that may be left at any image;
    `agreed()` is the same on all ranks. It exchanges four bytes between the hosts and never waits for a device, so
    the device keeps the work that is queued.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks if isinstance(ranks, Ranks) else Ranks.of(ranks)
        self.signal: int | None = None
        self._signalled_at = 0.0
        for number in EXIT_INTERRUPTED:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP, and means it
                signal.signal(number, self._on_signal)
        if sys.platform == "linux" and "LOCAL_RANK" in os.environ:
            # A launcher that is killed takes its ranks with it: the kernel sends them a SIGTERM then.
            pr_set_pdeathsig = 1
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """What the script returns after a stop."""
        return EXIT_INTERRUPTED.get(self.signal, EXIT_INTERRUPTED[signal.SIGTERM])

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if time.monotonic() - self._signalled_at > 1.0:
                os._exit(EXIT_INTERRUPTED[number])
            return
        self.signal, self._signalled_at = number, time.monotonic()
        if not self.ranks.is_local_main:
            return
        with contextlib.suppress(OSError):  # a closed terminal (EIO), pipe (EPIPE) or descriptor (EBADF)
            os.write(2, f"\nsignal {number}: finishing this step, then saving; once more to end at once\n".encode())

    def agreed(self) -> bool:
        """Whether the run stops now; the same answer on every rank. Call once per update, after it was issued."""
        number = self.ranks.largest(self.signal or 0)
        self.signal = self.signal or number or None
        return number != 0
