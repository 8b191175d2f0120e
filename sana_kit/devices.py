"""Which accelerator there is (Ascend NPU, CUDA GPU, CPU) and everything that differs between them, in one place.

Each kind is one entry of `KINDS`: how it is found and prepared, its torch module, the chips with their peaks and
memory bandwidths, and what of torch works on it. A new kind is one more entry. What there is on a host:

    python -m sana_kit.doctor
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import importlib.util
import os
import random
import re
import resource
import sys
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch

from sana_kit.errors import Problem, UserError

# Of glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device can do at best, from its vendor's data sheet.

    Attributes:
        name: as it is typed and printed, e.g. "h100 pcie".
        pattern: regular expression of its name in the runtime's device name, lower case; matched as whole words.
        tflops: dense bf16 peak in TFLOP/s.
        bandwidth: memory bandwidth in bytes/s.
    """

    name: str
    pattern: str
    tflops: float
    bandwidth: float

    def is_called(self, device_name: str) -> bool:
        """Whether a device of this name is this chip."""
        return re.search(rf"(?<![a-z0-9])(?:{self.pattern})(?![a-z0-9])", device_name.lower()) is not None


def _find_npu() -> bool:
    """Whether torch_npu is installed and sees at least one NPU. Importing torch_npu registers `torch.npu`."""
    if importlib.util.find_spec("torch_npu") is None:
        return False
    importlib.import_module("torch_npu")
    return torch.npu.is_available()


def _prepare_npu(allow_tf32: bool) -> None:
    """ND layouts instead of internal formats, and no just-in-time operator compilation.

    Both are the default on the A2 and A3 series, not on older ones, where they make every new shape recompile
    (torch_npu documentation).
    """
    torch.npu.config.allow_internal_format = False
    torch.npu.set_compile_mode(jit_compile=False)


def _prepare_cuda(allow_tf32: bool) -> None:
    if allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True


@dataclasses.dataclass(frozen=True)
class DeviceKind:
    """One kind of accelerator.

    Attributes:
        name: torch's name of it, "npu", "cuda" or "cpu".
        find: whether at least one is there.
        prepare: one-time settings, called with `allow_tf32` before the first kernel.
        chips: those whose figures are known; the first whose name fits counts.
        channels_last: whether its convolution kernels take channels last without a copy.
        image_by_image: whether a chain of passes over large tensors is quicker one image at a time, in the caches.
        whole_masks: whether attention kernels need masks written out along the query axis.
        fused_attention: the attention kernels, beside torch's own, that exist here.
        fused_adamw: what `torch.optim.AdamW(fused=...)` is given.
        compiles: whether torch.compile has a back end here.
        graphs: whether it records a pass's kernels as one graph.
        fp16: whether fp16 is quick and complete enough to train in.
    """

    name: str
    find: Callable[[], bool]
    prepare: Callable[[bool], None]
    chips: tuple[Chip, ...] = ()
    channels_last: bool = True
    image_by_image: bool = False
    whole_masks: bool = False
    fused_attention: tuple[str, ...] = ()
    fused_adamw: bool | None = None
    compiles: bool = True
    graphs: bool = False
    fp16: bool = True

    @property
    def is_accelerator(self) -> bool:
        """Whether it has memory and queues of its own."""
        return self.name != "cpu"

    @property
    def module(self) -> ModuleType:
        """torch.npu, torch.cuda or torch.cpu."""
        return getattr(torch, self.name)

    def count(self) -> int:
        """How many there are; 0 for the CPU, which is always there."""
        return self.module.device_count() if self.is_accelerator else 0


# In the order of preference. Atlas A2 series: 910B1 414 TFLOP/s, 910B2 376, 910B3 313, 910B4 280; "910b" alone is
# read as the common B3. The A100 is its 80 GB model, the H100 the SXM one.
KINDS = {
    kind.name: kind
    for kind in (
        DeviceKind(
            "npu",
            _find_npu,
            _prepare_npu,
            chips=(
                Chip("910b1", r"(?:ascend)?910b1", 414.0, 1.6e12),
                Chip("910b2", r"(?:ascend)?910b2c?", 376.0, 1.6e12),
                Chip("910b3", r"(?:ascend)?910b3", 313.0, 1.6e12),
                Chip("910b4", r"(?:ascend)?910b4(?:-1)?", 280.0, 1.6e12),
                Chip("910b", r"(?:ascend)?910b", 313.0, 1.6e12),
            ),
            channels_last=False,
            whole_masks=True,
            fused_attention=("npu_fusion",),
            compiles=False,
        ),
        DeviceKind(
            "cuda",
            torch.cuda.is_available,
            _prepare_cuda,
            chips=(
                Chip("h200 nvl", "h200 nvl", 836.0, 4.8e12),
                Chip("h200", "h200", 989.0, 4.8e12),
                Chip("h100 pcie", "h100 pcie", 756.0, 2.0e12),
                Chip("h100 nvl", "h100 nvl", 836.0, 3.9e12),
                Chip("h100", "h100", 989.0, 3.35e12),
                Chip("h800 pcie", "h800 pcie", 756.0, 2.0e12),
                Chip("h800", "h800", 989.0, 3.35e12),
                Chip("a100", "a100", 312.0, 2.04e12),
                Chip("a800", "a800", 312.0, 2.04e12),
                Chip("l40s", "l40s", 362.0, 0.864e12),
                Chip("l40", "l40", 181.0, 0.864e12),
                Chip("4090", r"(?:rtx )?4090(?! d\b| laptop)", 165.0, 1.01e12),
                Chip("3090", r"(?:rtx )?3090(?! ti\b)", 71.0, 0.936e12),
                Chip("a10", "a10", 125.0, 0.6e12),
            ),
            fused_adamw=True,
            graphs=True,
        ),
        DeviceKind("cpu", lambda: True, lambda allow_tf32: None, image_by_image=True, fp16=False),
    )
}


def kind_of(device: torch.device | str) -> DeviceKind:
    """The entry of a device or of a device kind's name."""
    return KINDS[device if isinstance(device, str) else device.type]


def npu_available() -> bool:
    """Whether there is an Ascend NPU that torch can use."""
    return KINDS["npu"].find()


def accelerator_type() -> str:
    """'npu', 'cuda' or 'cpu': the kind of device that a run uses unless told otherwise."""
    return next(name for name, kind in KINDS.items() if kind.find())


def device_count() -> int:
    """Number of accelerators of `accelerator_type()`; 0 on a host that has only CPUs."""
    return kind_of(accelerator_type()).count()


def pick_device(name: str = "auto") -> torch.device:
    """The torch.device for 'auto', 'cpu', 'cuda', 'cuda:1', 'npu', 'npu:3'.

    Raises:
        UserError: the name is unknown, or no such device is there; nothing is substituted. Its field is "device".
    """
    wanted, _, index = (accelerator_type() if name == "auto" else name).partition(":")
    kind = KINDS.get(wanted)
    if kind is None or (index and not index.isdigit()):
        names = ", ".join(["auto", *(n if n == "cpu" else f"{n}, {n}:N" for n in reversed(KINDS))])
        raise UserError(Problem("device", name, "unknown device", f"Use one of {names}."))
    if not kind.is_accelerator:
        return torch.device(kind.name)
    if not kind.find():
        reason = f"no {wanted} device was found here"
        raise UserError(Problem("device", name, reason, "Use auto or cpu."))
    if index and int(index) >= kind.count():
        reason = f"this host has {kind.count()} {wanted} device(s), numbered from 0"
        raise UserError(Problem("device", name, reason, "Name one of them."))
    return torch.device(kind.name, int(index) if index else kind.module.current_device())


def prepare_backend(device: torch.device, allow_tf32: bool = False) -> None:
    """One-time settings of a device kind; call once, before the first kernel."""
    kind_of(device).prepare(allow_tf32)


def random_state(device: torch.device) -> dict:
    """Python's, numpy's, torch's CPU and the device's generator state: {"python", "numpy", "torch", "device"}."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    kind = kind_of(device)
    if kind.is_accelerator:
        state["device"] = kind.module.get_rng_state(device)
    return state


def set_random_state(state: dict, device: torch.device) -> None:
    """Restore what `random_state` returned.

    A state saved on another kind of device lacks "device": the device's generator then stays as it is.
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    kind = kind_of(device)
    if kind.is_accelerator and "device" in state:
        kind.module.set_rng_state(state["device"], device)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy, torch and the generators of all devices of the kind in use."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    kind = kind_of(accelerator_type())
    if kind.is_accelerator:
        kind.module.manual_seed_all(seed)


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing on CPU."""
    kind = kind_of(device)
    if kind.is_accelerator:
        kind.module.synchronize(device)


def empty_cache(device: torch.device) -> None:
    """Collect garbage and give cached device memory back."""
    gc.collect()
    kind = kind_of(device)
    if kind.is_accelerator:
        kind.module.empty_cache()


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU, let this process keep the pages of freed tensors of up to 32 MiB for the next ones.

    A step takes and frees the same tensors each time, and a page that went back to the system costs a fault. Which of
    them glibc keeps by itself depends on what was freed before. Nothing is done for accelerators, whose allocators
    keep memory anyway, nor where the C library is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if kind_of(device).is_accelerator or mallopt is None:
        return
    mallopt(_M_TRIM_THRESHOLD, -1)
    mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of the peak; on CPU the peak is the process's and cannot be reset."""
    kind = kind_of(device)
    if kind.is_accelerator:
        kind.module.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak bytes allocated on the device since the last reset; on CPU the process's peak resident memory."""
    kind = kind_of(device)
    if kind.is_accelerator:
        return int(kind.module.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def memory_info_bytes(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes of an accelerator."""
    free, total = kind_of(device).module.mem_get_info(device)
    return int(free), int(total)


def free_memory_bytes(device: torch.device) -> int | None:
    """Free bytes on the device, None where the host cannot say."""
    if kind_of(device).is_accelerator:
        return memory_info_bytes(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def device_name(device: torch.device) -> str:
    """The device's name as its runtime gives it, 'CPU' for the host."""
    kind = kind_of(device)
    return kind.module.get_device_name(device) if kind.is_accelerator else "CPU"


def chips() -> dict[str, Chip]:
    """All chips whose figures are known, by name."""
    return {chip.name: chip for kind in KINDS.values() for chip in kind.chips}


def find_chip(name: str) -> Chip | None:
    """The chip of a device or chip name such as 'Ascend910B2', 'NVIDIA H100 80GB HBM3'; None for one not known."""
    return next((chip for chip in chips().values() if chip.is_called(name)), None)


def peak_flops(name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a device or chip name; None where it is not known."""
    chip = find_chip(name)
    return None if chip is None else chip.tflops * 1e12


def memory_bandwidth(name: str) -> float | None:
    """Memory bandwidth in bytes/s of a device or chip name; None where it is not known."""
    chip = find_chip(name)
    return None if chip is None else chip.bandwidth


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory is used up (CUDA, NPU and CPU allocators)."""
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
