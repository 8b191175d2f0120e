"""Several processes: what the launcher promised, the process group, agreement between ranks, stop signals."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable

import torch

from sana_kit import devices
from sana_kit.devices import accelerator_type
from sana_kit.errors import InputError, RankFailed


def launched_world_size() -> int:
    """The world size that the launcher (accelerate launch, torchrun) promised through the environment; 1 without
    one.
    """
    return int(os.environ.get("WORLD_SIZE", "1") or 1)


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

    The timeout covers the waits of other ranks while one encodes the last images or writes a checkpoint. It is
    longer than the launcher's HCCL_EXEC_TIMEOUT (7200 s), so that HCCL reports a stuck collective first.
    """
    from datetime import timedelta

    from accelerate import InitProcessGroupKwargs

    _name_cpu_to_accelerate()
    grouped = launched_world_size() > 1 or under_deepspeed()  # accelerate takes a backend as a promise of a group
    backend = {"backend": "gloo"} if accelerator_type() == "cpu" and grouped else {}
    return [InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_seconds), **backend)]


def distributed_state():
    """accelerate's PartialState for inference scripts; never lets two ranks believe that they are alone.

    Raises:
        RuntimeError: the launcher started several processes, but they did not find one another.
    """
    from accelerate import PartialState

    _name_cpu_to_accelerate()
    state = PartialState(cpu=True) if accelerator_type() == "cpu" else PartialState()
    check_world_size(state.num_processes)
    return state


def check_world_size(num_processes: int) -> None:
    """Raise RuntimeError unless the process group is as large as the launcher promised."""
    promised = launched_world_size()
    if num_processes != promised:
        raise RuntimeError(
            f"The launcher started {promised} processes, but this process sees a group of {num_processes}: each rank"
            f" would"
            " believe that it is alone. Check that every process sees its device (ASCEND_RT_VISIBLE_DEVICES,"
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
    """The processes of a run. Object exchange goes over a gloo group of its own.

    Gloo, because the devices' own back ends limit how long a rank may wait (HCCL 1836 s by default), and an idle rank
    waits for the whole run; gloo also notices at once when a peer has died.
    """

    def __init__(self, device_flag: str):
        """RuntimeError where ranks do not find one another. A device that is not there becomes `device_problem`."""

        self.world = launched_world_size()
        self.rank, self.group, self.own = 0, None, False
        self.device_problem: str | None = None
        if self.world == 1:
            try:
                self.device = devices.pick_device(device_flag)
            except ValueError as error:
                self.device, self.device_problem = devices.pick_device("cpu"), str(error)
        else:
            from datetime import timedelta

            import torch.distributed

            kind = devices.accelerator_type()
            if device_flag not in ("auto", kind):
                self.device_problem = (
                    f"--device={device_flag}: with {self.world} processes each takes its own {kind} device. Leave"
                    " --device out, and hide devices by CUDA_VISIBLE_DEVICES or ASCEND_RT_VISIBLE_DEVICES."
                )
            self.own = not torch.distributed.is_initialized()
            state = distributed_state()
            self.rank, self.device = state.process_index, state.device
            self.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))
        devices.prepare_backend(self.device)
        if not self.main:
            _hide_progress_bars()

    @property
    def main(self) -> bool:
        return self.rank == 0

    def gather(self, value) -> list:
        """Every rank's value, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        import torch.distributed

        values = [None] * self.world
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def run_on_all(self, action: Callable, checks_input: bool = False):
        """Run `action` on every rank; if it fails anywhere, it fails everywhere. Returns this rank's result.

        Args:
            checks_input: a ValueError is the user's to mend: every rank raises all ranks' messages, each once.

        Raises:
            InputError: with `checks_input`, where no rank failed in another way.
            the rank's own exception: on a rank that failed.
            RankFailed: on the others.
        """
        result = failure = None
        try:
            result = action()
        except Exception as error:
            failure = error
        kind = None
        if failure is not None:
            kind = "input" if checks_input and isinstance(failure, ValueError) else "failure"
        reports = self.gather((kind, f"{type(failure).__name__}: {failure}" if kind == "failure" else str(failure)))
        kinds = {kind for kind, _ in reports}
        if "input" in kinds and "failure" not in kinds:
            raise InputError("\n".join(dict.fromkeys(text for kind, text in reports if kind))) from failure
        if failure is not None:
            raise failure
        for rank, (kind, text) in enumerate(reports):
            if kind is not None:
                raise RankFailed(f"rank {rank} failed: {text}")
        return result

    def close(self) -> None:
        """Leave the process group, at the end of a run that went well."""
        if self.own:
            import torch.distributed

            torch.distributed.destroy_process_group()


EXIT_INTERRUPTED = {signal.SIGTERM: 143, signal.SIGINT: 130}


class StopSignal:
    """SIGTERM and SIGINT ask for a stop after the current step; all ranks agree on which step that is.

    Every step adds up one flag over the ranks and copies it to the host without waiting; the sum of two steps ago is
    looked at, so the device always has work queued and every rank stops at the same step. A second signal ends at
    once.
    """

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self.signal, self.signalled_at = None, 0.0
        self.pending = deque()
        for number in EXIT_INTERRUPTED:
            signal.signal(number, self._on_signal)
        if sys.platform == "linux" and "LOCAL_RANK" in os.environ:
            # A launcher that is killed takes nobody with it: ask the kernel for a SIGTERM then, so that no rank is
            # left.
            import ctypes

            pr_set_pdeathsig = 1
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)

    def _on_signal(self, number, frame):
        if self.signal is not None:
            if time.monotonic() - self.signalled_at > 1.0:
                os._exit(EXIT_INTERRUPTED[number])
            return
        self.signal, self.signalled_at = number, time.monotonic()
        sys.stderr.write(f"\nsignal {number}: finishing this step, then saving; once more to end at once\n")

    def agreed(self) -> bool:
        """Whether the run stops after this step; the same answer on every rank. Call once per step."""
        number = self.signal or 0
        if self.accelerator.num_processes == 1:
            return number != 0
        device = self.accelerator.device
        flag = torch.tensor([number], dtype=torch.int32, device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        if device.type == "cpu":
            host, event = flag, None
        else:
            backend = getattr(torch, device.type)
            host = torch.empty(1, dtype=torch.int32, pin_memory=True)
            host.copy_(flag, non_blocking=True)
            event = backend.Event()
            event.record()
        self.pending.append((host, event))
        if len(self.pending) <= 2:
            return False
        host, event = self.pending.popleft()
        if event is not None:
            event.synchronize()
        agreed = int(host.item())
        if agreed:
            self.signal = self.signal or agreed
        return agreed != 0
