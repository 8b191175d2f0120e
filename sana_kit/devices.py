"""Which accelerator there is (Ascend NPU, CUDA GPU, CPU) and everything that differs between them, in one place.

Device choice, dtypes, random state, memory figures, peak FLOP/s. `python -m sana_kit.doctor` prints what was found.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import random

import numpy as np
import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# Dense bf16 peak in TFLOP/s per device, from the vendors' data sheets; the first key found in the device's name
# counts. Atlas A2 series: 910B1 414, 910B2 376, 910B3 and 910B4 313/280; "910b" alone is read as the common B3.
PEAK_BF16_TFLOPS = {
    "910b1": 414.0,
    "910b2": 376.0,
    "910b3": 313.0,
    "910b4": 280.0,
    "910b": 313.0,
    "h200": 989.0,
    "h100 pcie": 756.0,
    "h100": 989.0,
    "h800": 989.0,
    "a100": 312.0,
    "a800": 312.0,
    "l40s": 362.0,
    "l40": 181.0,
    "4090": 165.0,
    "3090": 71.0,
    "a10": 125.0,
}


def npu_available() -> bool:
    """Whether torch_npu is installed and sees at least one NPU. Importing torch_npu registers `torch.npu`."""
    if importlib.util.find_spec("torch_npu") is None:
        return False
    import torch_npu  # noqa: F401  registers the "npu" backend

    return torch.npu.is_available()


def accelerator_type() -> str:
    """'npu', 'cuda' or 'cpu': the kind of device that a run uses unless told otherwise."""
    if npu_available():
        return "npu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_count() -> int:
    """Number of accelerators of `accelerator_type()`; 0 on a host that has only CPUs."""
    kind = accelerator_type()
    return 0 if kind == "cpu" else _backend(kind).device_count()


def pick_device(name: str = "auto") -> torch.device:
    """The torch.device for 'auto', 'cpu', 'cuda', 'cuda:1', 'npu', 'npu:3'.

    Raises:
        ValueError: the name is unknown, or no such device is there; nothing is substituted.
    """
    if name == "auto":
        kind = accelerator_type()
        return torch.device(kind) if kind == "cpu" else torch.device(kind, _backend(kind).current_device())
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "npu") or (index and not index.isdigit()):
        raise ValueError(f"--device={name}: unknown device. Use auto, cpu, cuda, cuda:N, npu or npu:N.")
    if kind == "cpu":
        return torch.device("cpu")
    available = npu_available() if kind == "npu" else torch.cuda.is_available()
    if not available:
        raise ValueError(f"--device={name}: no {kind} device was found here. Use --device=auto or --device=cpu.")
    count = _backend(kind).device_count()
    if index and int(index) >= count:
        raise ValueError(f"--device={name}: this host has {count} {kind} device(s), numbered from 0.")
    return torch.device(kind, int(index) if index else _backend(kind).current_device())


def _backend(kind: str):
    """The torch module of a device kind: torch.npu or torch.cuda. Never called for 'cpu'."""
    assert kind in ("npu", "cuda"), kind
    return getattr(torch, kind)


def prepare_backend(device: torch.device, allow_tf32: bool = False) -> None:
    """One-time settings of a device kind; call once, before the first kernel.

    On Ascend: ND layouts instead of internal formats and no just-in-time operator compilation. Both are the default on
    the A2 and A3 series, not on older ones, where they make every new shape recompile (torch_npu documentation).
    """
    if device.type == "npu":
        torch.npu.config.allow_internal_format = False
        torch.npu.set_compile_mode(jit_compile=False)
    elif device.type == "cuda" and allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True


def random_state(device: torch.device) -> dict:
    """Python's, numpy's, torch's CPU and the device's generator state: {"python", "numpy", "torch", "device"}."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if device.type != "cpu":
        state["device"] = _backend(device.type).get_rng_state(device)
    return state


def set_random_state(state: dict, device: torch.device) -> None:
    """Restore what `random_state` returned; a state saved on another device kind lacks "device", which stays as it
    is.
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type != "cpu" and "device" in state:
        _backend(device.type).set_rng_state(state["device"], device)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy, torch and the devices' generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # covers CUDA and, where torch_npu is imported, NPU
    if accelerator_type() == "npu":
        torch.npu.manual_seed_all(seed)


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing on CPU."""
    if device.type != "cpu":
        _backend(device.type).synchronize(device)


def empty_cache(device: torch.device) -> None:
    """Collect garbage and give cached device memory back."""
    gc.collect()
    if device.type != "cpu":
        _backend(device.type).empty_cache()


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of the peak; on CPU the peak is the process's and cannot be reset."""
    if device.type != "cpu":
        _backend(device.type).reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak bytes allocated on the device since the last reset; on CPU the process's peak resident memory."""
    if device.type != "cpu":
        return int(_backend(device.type).max_memory_allocated(device))
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def free_memory_bytes(device: torch.device) -> int | None:
    """Free bytes on the device, None where the host cannot say."""
    if device.type != "cpu":
        return int(_backend(device.type).mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def memory_info_bytes(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes of an accelerator."""
    free, total = _backend(device.type).mem_get_info(device)
    return int(free), int(total)


def device_name(device: torch.device) -> str:
    """The device's name as its runtime gives it, 'CPU' for the host."""
    return "CPU" if device.type == "cpu" else _backend(device.type).get_device_name(device)


def peak_flops(name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a device or chip name such as 'Ascend910B2' or 'NVIDIA H100 80GB HBM3'."""
    lowered = name.lower()
    for key, tflops in PEAK_BF16_TFLOPS.items():
        if key in lowered:
            return tflops * 1e12
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory is used up (CUDA, NPU and CPU allocators)."""
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
