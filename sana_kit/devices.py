"""Which accelerator there is (Ascend NPU, CUDA GPU, CPU) and everything that differs between them, in one place.

Device choice, dtypes, the distributed state, attention kernels and masks, random state, memory figures, peak FLOP/s.
Used by every script; `python -m sana_kit.doctor` prints what was found, with a remedy for each problem.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import random

import numpy as np
import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ATTENTION_CHOICES = ("auto", "sdpa", "npu_fusion")

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


# ---------------------------------------------------------------------------------------------------------------------
# Which device


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


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


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

    The timeout covers the waits of other ranks while one encodes the last pictures or writes a checkpoint. It is
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


# ---------------------------------------------------------------------------------------------------------------------
# Random state


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


# ---------------------------------------------------------------------------------------------------------------------
# Memory and time


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


# ---------------------------------------------------------------------------------------------------------------------
# Attention


class CrossAttentionProcessor:
    """Cross-attention of a Sana block with a boolean mask that was built once per forward pass.

    diffusers' own processor turns an additive (B, 1, S) bias into (B * heads, 1, S) in every layer, and an additive
    mask keeps torch_npu from its fused kernel; its NPU processor drops the query and key norms of SANA-1.5 and Sprint.

    Args:
        kernel: "sdpa" (torch.nn.functional.scaled_dot_product_attention) or "npu_fusion"
            (torch_npu.npu_fusion_attention, whose mask is True where a token is left out).
    """

    def __init__(self, kernel: str = "sdpa"):
        assert kernel in ("sdpa", "npu_fusion"), kernel
        self.kernel = kernel

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, *args, **kwargs):
        """hidden_states (B, N, D), encoder_hidden_states (B, S, D), attention_mask bool (B, 1, 1 or N, S), True =
        use.
        """
        batch, length, _ = hidden_states.shape
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        if attn.norm_q is not None:  # before the split into heads: the norm runs across all heads
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        query, key, value = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (query, key, value))
        # query (B, heads, N, d), key and value (B, heads, S, d)
        if self.kernel == "npu_fusion":
            import torch_npu

            out = torch_npu.npu_fusion_attention(
                query.contiguous(),
                key.contiguous(),
                value.contiguous(),
                attn.heads,
                input_layout="BNSD",
                atten_mask=attention_mask,
                scale=query.shape[-1] ** -0.5,
            )[0]
        else:
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        out = out.transpose(1, 2).reshape(batch, length, -1).to(query.dtype)
        out = attn.to_out[1](attn.to_out[0](out))
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


class LinearAttentionProcessor:
    """Sana's linear self-attention, relu(Q) (relu(K)^T V) / relu(Q) sum(relu(K)), with each tensor laid out once.

    The arithmetic is that of diffusers' SanaLinearAttnProcessor2_0, float32 included (Sana, arXiv 2410.10629, section
    3.2). That one puts features first, (heads, d, N): each product then copies its float32 operands once more, the
    relu and its gradient walk over strided memory, and V is padded with a row of ones for the denominator. Here one
    copy both casts and lays out as the products read, forward and backward, and the denominator's sum is one more
    column of the small K^T V. The order of summation differs, so results agree to float32 rounding.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, *args, **kwargs):
        """hidden_states (B, N, D) -> (B, N, D) in the same dtype."""
        dtype, (batch, length, _) = hidden_states.dtype, hidden_states.shape
        query, key, value = (project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)

        def heads(tensor, *order):  # (B, N, D) as (B, N, heads, d) permuted, float32, contiguous
            split = tensor.unflatten(-1, (attn.heads, -1)).permute(0, *order)
            return split.to(torch.float32, memory_format=torch.contiguous_format)

        # relu after the cast: nothing but the copies is kept for the backward pass
        query, value = heads(query, 2, 1, 3).relu(), heads(value, 2, 1, 3)  # (B, heads, N, d)
        key = heads(key, 2, 3, 1).relu()  # (B, heads, d, N)
        context = torch.cat([key @ value, key.sum(-1, keepdim=True)], dim=-1)  # (B, heads, d, d + 1)
        out, total = (query @ context).split([value.shape[-1], 1], dim=-1)
        out = (out / (total + 1e-15)).to(dtype).transpose(1, 2).reshape(batch, length, -1)
        out = attn.to_out[1](attn.to_out[0](out))
        return out.clip(-65504, 65504) if dtype == torch.float16 else out


class _CrossAttentionMask:
    """Forward pre-hook of the transformer: a (B, S) mask of 0 and 1 becomes the boolean mask of the chosen kernel.

    The model's forward would otherwise turn the (B, S) mask into an additive bias; a 4-dimensional one passes through.
    """

    def __init__(self, kernel: str, materialize: bool):
        self.kernel, self.materialize = kernel, materialize

    def __call__(self, module, args, kwargs):
        mask = kwargs.get("encoder_attention_mask")
        if mask is None or mask.ndim != 2:
            return None
        mask = mask.to(torch.bool)[:, None, None, :]  # (B, 1, 1, S)
        if self.materialize:
            # The Ascend kernels broadcast over heads only, so the query axis is written out, once for all layers.
            hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            patch = module.config.patch_size
            queries = (hidden_states.shape[-2] // patch) * (hidden_states.shape[-1] // patch)
            mask = mask.expand(-1, -1, queries, -1).contiguous()  # (B, 1, N, S)
        if self.kernel == "npu_fusion":
            mask = ~mask
        return args, {**kwargs, "encoder_attention_mask": mask}


def resolve_attention(attention: str, device: torch.device) -> str:
    """The kernel for `--attention`: 'auto' is 'sdpa' everywhere.

    torch_npu's scaled_dot_product_attention reaches the same fused kernel as npu_fusion_attention when the mask is
    boolean, so one code path serves every device; 'npu_fusion' calls the Ascend operator by name.

    Raises:
        ValueError: 'npu_fusion' without an NPU, or an unknown name.
    """
    if attention not in ATTENTION_CHOICES:
        raise ValueError(f"--attention={attention}: unknown. Use one of {', '.join(ATTENTION_CHOICES)}.")
    if attention == "npu_fusion" and device.type != "npu":
        raise ValueError(
            f"--attention=npu_fusion (--enable_npu_flash_attention) needs an Ascend NPU with torch_npu; this run is on"
            f" '{device.type}'. Use --attention=auto."
        )
    return "sdpa" if attention == "auto" else attention


def set_attention(transformer, attention: str, device: torch.device) -> str:
    """Give a SanaTransformer2DModel the kit's attention processors; returns the cross-attention kernel's name.

    The kernel is chosen for the cross-attention `attn2` only: `attn1` is Sana's linear attention, which no softmax
    kernel may replace. Calling it again replaces the former choice.
    """
    kernel = resolve_attention(attention, device)
    for block in transformer.transformer_blocks:
        block.attn1.set_processor(LinearAttentionProcessor())
        if block.attn2 is not None:
            block.attn2.set_processor(CrossAttentionProcessor(kernel))
    previous = getattr(transformer, "_sana_kit_mask_hook", None)
    if previous is not None:
        previous.remove()
    mask = _CrossAttentionMask(kernel, materialize=device.type == "npu")
    transformer._sana_kit_mask_hook = transformer.register_forward_pre_hook(mask, with_kwargs=True)
    return kernel
