"""CPU kernels under the real torch_npu: device memory is host memory, so an operator runs on a CPU view of its bytes.

Loaded by sitecustomize.py right after torch_npu. torch_npu registers about 1,500 ATen operators for its device; those
with a CPU kernel get that kernel here. Not replaced, so that torch_npu's own C++ runs down to the stand-in runtime:
memory, views, copies and casts, scaled_dot_product_attention's choice of kernel, the fused attention, RMS norm and
dropout, every derivative formula, generators, streams, events, and ProcessGroupHCCL.

With ASCEND_EMULATED_COUNTERS=FILE each process writes FILE (%p becomes its process id) when it ends: a JSON object
with the calls of the runtime's kernels ("kernels") and of the ATen operators by their dtypes ("operators").
With ASCEND_EMULATED_NO_CUDA=FOLDER any call of a function of torch.cuda from code in that folder raises.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import inspect
import json
import os
import sys

import torch

# torch_npu's own C++ stays: it needs only memory, copies and the few kernels that runtime/aclnn.c has.
TORCH_NPUS_OWN = {
    "_copy_from",
    "_copy_from_and_resize",
    "_has_compatible_shallow_copy_type",
    "_local_scalar_dense",
    "_pin_memory",
    "_reshape_alias",
    "_to_copy",
    "alias",
    "as_strided",
    "clone",
    "contiguous",
    "copy_",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "empty_with_swapped_memory",
    "is_pinned",
    "is_set_to",
    "native_dropout",
    "native_dropout_backward",
    "new_empty_strided",
    "record_stream",
    "resize_",
    "scaled_dot_product_attention",
    "set_",
    "unfold",
    "view",
}
# Operators that take index tensors from the host, on hardware too.
HOST_INDICES = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}

_libraries = []  # registrations live as long as these
_operators: dict[tuple, int] = {}
_counting = False


def host(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor over the device tensor's own bytes. The device must be idle (see `_drain`)."""
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    if size == 0 or tensor.numel() == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    raw = torch.frombuffer((ctypes.c_char * size).from_address(storage.data_ptr()), dtype=torch.uint8)
    view = torch.empty(0, dtype=tensor.dtype)
    return view.set_(raw.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The device's copy of a CPU result, strides kept."""
    out = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    if tensor.numel():
        _drain()  # the block may be one that a queued task still reads
        host(out).copy_(tensor)
    return out


def _drain() -> None:
    """Wait for torch_npu's task queue: copies and fused kernels run in its thread, these kernels in the caller's."""
    torch.npu.synchronize()


def _host_generator(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """A CPU generator for the next draw of the NPU generator, whose offset moves on as a real draw moves it."""
    if generator is None:
        index = torch.npu.current_device() if device.index is None else device.index
        generator = torch.npu.default_generators[index]
    elif generator.device.type != "npu":
        raise RuntimeError(f"Expected a 'npu' device type for generator but found '{generator.device.type}'")
    offset = generator.get_offset()
    generator.set_offset(offset + 12)  # torch_npu asks for 10 and rounds up to a multiple of 4
    seed = (generator.initial_seed() * 0x9E3779B97F4A7C15 + offset * 0xBF58476D1CE4E5B9 + 1) % 2**63
    return torch.Generator().manual_seed(seed)


class _Kernel:
    """The kernel of one ATen operator on the device: the same operator, on the host's view of the arguments."""

    def __init__(self, operator, name: str):
        self.operator, self.name = operator, name
        self.draws = torch.Tag.nondeterministic_seeded in operator.tags
        self.takes_generator = any(a.name == "generator" for a in operator._schema.arguments)
        self.host_arguments_allowed = name.partition(".")[0] in HOST_INDICES

    def __call__(self, *args, **kwargs):
        pairs = []  # (host view, device tensor)
        state = {"device": None, "stray": None}
        _drain()
        host_args = [self._to_host(a, pairs, state) for a in args]
        host_kwargs = {k: self._to_host(v, pairs, state) for k, v in kwargs.items()}
        device = state["device"]
        if state["stray"] is not None and device is not None and not self.host_arguments_allowed:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{device} and {state['stray']}! (when calling {self.name})"
            )
        if _counting:
            key = (self.name, *(str(view.dtype).removeprefix("torch.") for view, _ in pairs))
            _operators[key] = _operators.get(key, 0) + 1
        if self.draws and self.takes_generator:
            host_kwargs["generator"] = _host_generator(kwargs.get("generator"), device)
            result = self.operator(*host_args, **host_kwargs)
        elif self.draws:
            kept = torch.default_generator.get_state()
            torch.default_generator.set_state(_host_generator(None, device).get_state())
            try:
                result = self.operator(*host_args, **host_kwargs)
            finally:
                torch.default_generator.set_state(kept)
        else:
            result = self.operator(*host_args, **host_kwargs)
        for view, tensor in pairs:  # an out= argument that the operator gave another size
            if view.shape != tensor.shape:
                tensor.resize_(view.shape)
                host(tensor).copy_(view)
        return self._to_device(result, pairs, device)

    def _to_host(self, value, pairs, state):
        if isinstance(value, torch.Tensor):
            if value.device.type == "npu":
                if state["device"] is None:
                    state["device"] = value.device
                elif value.device != state["device"]:
                    state["stray"] = value.device
                view = host(value)
                pairs.append((view, value))
                return view
            if value.dim() > 0 and value.device.type == "cpu":
                state["stray"] = value.device
            return value
        if isinstance(value, (list, tuple)):
            return [self._to_host(v, pairs, state) for v in value]
        if isinstance(value, torch.device) and value.type == "npu":
            if state["device"] is None:
                state["device"] = value
            return torch.device("cpu")
        return value

    def _to_device(self, value, pairs, device):
        if isinstance(value, torch.Tensor):
            for view, tensor in pairs:
                if view is value:
                    return tensor
            if value.numel():
                start = value.untyped_storage().data_ptr()
                for view, tensor in pairs:
                    if view.numel() and view.untyped_storage().data_ptr() == start:  # a view of an argument
                        return torch.as_strided(tensor, value.size(), value.stride(), value.storage_offset())
            return to_device(value, device)
        if isinstance(value, (list, tuple)):
            return type(value)(self._to_device(v, pairs, device) for v in value)
        return value


# ---------------------------------------------------------------------------------------------------------------------
# Operators of torch_npu without a namesake on the CPU


def _matmul_backward(grad_out, self, other, mask):
    """The gradients of torch.matmul, which torch_npu differentiates as one operator."""
    _drain()
    g, a, b = host(grad_out), host(self), host(other)
    rows = a if a.dim() > 1 else a.unsqueeze(0)  # (..., n, k)
    columns = b if b.dim() > 1 else b.unsqueeze(1)  # (..., k, m)
    g = g if a.dim() > 1 else g.unsqueeze(-1 if b.dim() == 1 else -2)
    g = g if b.dim() > 1 else g.unsqueeze(-1)  # (..., n, m)
    for_self = for_other = None
    if mask[0]:
        for_self = to_device((g @ columns.mT).sum_to_size(rows.shape).reshape(a.shape), self.device)
    if mask[1]:
        if columns.dim() == 2:  # one product over all rows, as the forward folds them
            found = rows.reshape(-1, rows.shape[-1]).mT @ g.reshape(-1, g.shape[-1])
        else:
            found = (rows.mT @ g).sum_to_size(columns.shape)
        for_other = to_device(found.reshape(b.shape), self.device)
    return for_self, for_other


def _gather_backward(grad, self_size, dim, index, sparse_grad):
    _drain()
    zeros = torch.zeros(self_size, dtype=grad.dtype)
    return to_device(zeros.scatter_add_(dim, host(index), host(grad)), grad.device)


def _convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    _drain()
    x, w, b = host(input), host(weight), None if bias is None else host(bias)
    out = torch.ops.aten.convolution.default(x, w, b, stride, padding, dilation, transposed, output_padding, groups)
    return to_device(out.contiguous(), input.device)


def _convolution_backward(
    grad_out, input, weight, stride, padding, dilation, transposed, output_padding, groups, output_mask
):
    _drain()
    g, x, w = host(grad_out), host(input), host(weight)
    bias_sizes = [grad_out.shape[1]]
    found = torch.ops.aten.convolution_backward.default(
        g, x, w, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, output_mask
    )
    return tuple(None if f is None else to_device(f.contiguous(), input.device) for f in found)


_OWN_KERNELS = {
    "aten::matmul_backward": _matmul_backward,
    "aten::convolution_overrideable": _convolution,
    "aten::convolution_backward_overrideable": _convolution_backward,
    "npu::npu_gather_backward": _gather_backward,
}


# ---------------------------------------------------------------------------------------------------------------------


def install() -> None:
    """Register the kernels. Called once, after torch_npu has registered its own."""
    global _counting
    _counting = "ASCEND_EMULATED_COUNTERS" in os.environ
    if _counting:
        atexit.register(_write_counters, os.environ["ASCEND_EMULATED_COUNTERS"])
    if "ASCEND_EMULATED_NO_CUDA" in os.environ:
        _forbid_cuda(os.environ["ASCEND_EMULATED_NO_CUDA"])
    libraries = {space: torch.library.Library(space, "IMPL") for space in ("aten", "npu")}
    _libraries.extend(libraries.values())
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1")
    for qualified in registered:
        space, _, name = qualified.partition("::")
        base, _, overload = name.partition(".")
        if qualified in _OWN_KERNELS or space != "aten" or base in TORCH_NPUS_OWN:
            continue
        if not hasattr(torch.ops.aten, base):
            continue  # torch_npu's own operators carry an alias in aten's list
        if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(qualified, "CPU"):
            continue
        operator = getattr(getattr(torch.ops.aten, base), overload or "default")
        libraries["aten"].impl(name, _Kernel(operator, name), "PrivateUse1", allow_override=True)
    for qualified, kernel in _OWN_KERNELS.items():
        space, _, name = qualified.partition("::")
        libraries[space].impl(name, kernel, "PrivateUse1", allow_override=True)


def _forbid_cuda(folder: str) -> None:
    """Make every function of torch.cuda raise when code in `folder` calls it (not what is installed inside of it)."""

    def guarded(name, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            caller = sys._getframe(1).f_code.co_filename
            if caller.startswith(folder) and "site-packages" not in caller and "/dist/" not in caller:
                raise AssertionError(f"{caller} called torch.cuda.{name} on an Ascend host")
            return function(*args, **kwargs)

        return call

    for name, value in list(vars(torch.cuda).items()):
        if inspect.isfunction(value) and value.__module__.startswith("torch.cuda") and not name.startswith("_"):
            setattr(torch.cuda, name, guarded(name, value))


def kernel_calls() -> dict[str, int]:
    """How often each kernel of the runtime (aclnn… and Hccl…) was called in this process so far."""
    torch.npu.synchronize()
    library = ctypes.CDLL("libascendcl.so")
    name, calls, found, i = ctypes.c_char_p(), ctypes.c_long(), {}, 0
    while library.emulated_counter(i, ctypes.byref(name), ctypes.byref(calls)):
        found[name.value.decode()] = calls.value
        i += 1
    return found


def operator_calls() -> dict[str, int]:
    """How often each ATen operator was called in this process with which dtypes; empty unless counting is on."""
    return {f"{key[0]}({', '.join(key[1:])})": calls for key, calls in sorted(_operators.items())}


def _write_counters(pattern: str) -> None:
    with open(pattern.replace("%p", str(os.getpid())), "w") as file:
        json.dump({"kernels": kernel_calls(), "operators": operator_calls()}, file, indent=1)
