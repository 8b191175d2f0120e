"""Weights in 8 or 4 bits for drawing, by torchao or bitsandbytes: those of the transformer's blocks and of the text
encoder's layers, which are nearly all. Products are still computed in the run's dtype.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable, Iterator

import torch
from packaging.version import Version
from torch import nn

from sana_kit.errors import Problem
from sana_kit.models.weights import meta_transformer

FIELD = "quantize"


@dataclasses.dataclass(frozen=True)
class Quantization:
    """One way to keep weights.

    Attributes:
        replace: (linear layer, dtype of the products) -> the layer with its weight in few bits, on the CPU.
        package, version: what has to be installed, and the oldest version that was tried.
        without: kind of device -> why it cannot be there.
        multiple: a layer's inputs and outputs must be multiples of this.
        note: what is kept, for the help text.
    """

    replace: Callable[[nn.Linear, torch.dtype], nn.Module]
    package: str
    version: str
    without: dict[str, str]
    note: str
    multiple: int = 1


def _torchao(linear: nn.Linear, config_name: str) -> nn.Module:
    # It warns of CUDA extensions that this torch or host cannot load, none of which are used.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    from torchao import quantization

    quantization.quantize_(linear, getattr(quantization, config_name)())
    return linear


def _int8(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    return _torchao(linear, "Int8WeightOnlyConfig")


def _fp8(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    return _torchao(linear, "Float8WeightOnlyConfig")


def _nf4(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it names faster kernels that could be installed
    from bitsandbytes.nn import Linear4bit, Params4bit

    # 64 is the usual block; the hidden width of SANA's 1.6B feed-forward (5600) has whole blocks of 32 only, which the
    # kernels for CPU need
    block = 64 if linear.in_features % 64 == 0 else 32
    made = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=dtype,
        quant_type="nf4",
        device="meta",
    )
    made.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", blocksize=block, module=made)
    made.bias = linear.bias
    return made.to("cpu")


_UNTRIED = "{} does not name it among the devices of its kernels, and it was not tried there"
_NPU = {package: {"npu": _UNTRIED.format(package)} for package in ("torchao", "bitsandbytes")}

QUANTIZATIONS = {
    "int8": Quantization(_int8, "torchao", "0.18.0", _NPU["torchao"], "8-bit integers, a scale for each output"),
    "fp8": Quantization(_fp8, "torchao", "0.18.0", _NPU["torchao"], "8-bit floats (e4m3), a scale for each output"),
    "nf4": Quantization(
        _nf4, "bitsandbytes", "0.50.0", _NPU["bitsandbytes"], "4-bit normal floats in blocks of 64 or 32", 32
    ),
}


def quantize_problems(name: str, device: torch.device, transformer_config: dict | None = None) -> list[Problem]:
    """Why weights cannot be kept so on this device, or those of a transformer of that config."""
    kind = QUANTIZATIONS.get(name)
    if kind is None:
        return [Problem(FIELD, name, "unknown", f"Use one of {', '.join(QUANTIZATIONS)}.")]
    problems = []
    if device.type in kind.without:
        problems.append(Problem(FIELD, name, f"not on {device.type}: {kind.without[device.type]}", "Leave it out."))
    elif importlib.util.find_spec(kind.package) is None:
        reason = f"it needs {kind.package}, which is not installed"
        problems.append(Problem(FIELD, name, reason, f"pip install '{kind.package}>={kind.version}'"))
    elif Version(importlib.metadata.version(kind.package)) < Version(kind.version):
        reason = f"it needs {kind.package} {kind.version} or newer"
        problems.append(Problem(FIELD, name, reason, f"pip install -U '{kind.package}>={kind.version}'"))
    if transformer_config is not None:
        problems += _shape_problems(name, kind.multiple, transformer_config)
    return problems


def _shape_problems(name: str, multiple: int, transformer_config: dict) -> list[Problem]:
    blocks = meta_transformer(transformer_config).transformer_blocks
    for _, _, layer in _layers(blocks):
        if type(layer) is nn.Linear or _pointwise(layer):
            sides = layer.weight.shape[:2]
            if any(side % multiple for side in sides):
                reason = f"a layer of {sides[1]} x {sides[0]} has no whole blocks of {multiple}"
                return [Problem(FIELD, name, reason, "Use int8 or fp8.")]
    return []


class PointwiseLinear(nn.Module):
    """A 1 x 1 convolution as a linear layer over channels, which libraries can quantise; the same sums."""

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.linear = nn.Linear(
            convolution.in_channels, convolution.out_channels, bias=convolution.bias is not None, device="meta"
        )
        self.linear.weight = nn.Parameter(convolution.weight.data.flatten(1), requires_grad=False)
        self.linear.bias = convolution.bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(N, in, H, W) -> (N, out, H, W)."""
        return self.linear(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _pointwise(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == module.stride == module.dilation == (1, 1)
        and module.padding in (0, (0, 0))
        and module.groups == 1
    )


def _layers(root: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, layer) of the products' layers below; adapters beside them stay as they are."""
    for parent in list(root.modules()):
        for name, layer in list(parent.named_children()):
            if name not in ("lora_A", "lora_B") and not isinstance(parent, nn.ModuleDict):
                yield parent, name, layer


@torch.no_grad()
def quantize_weights(root: nn.Module, name: str, dtype: torch.dtype) -> int:
    """Keep the weights of all linear layers and 1 x 1 convolutions below `root` in few bits; returns how many.

    Args:
        root: on the CPU, loaded and with its adapter merged or beside it.
        name: of QUANTIZATIONS.
        dtype: of the products.
    """
    replace, count = QUANTIZATIONS[name].replace, 0
    for parent, child, layer in _layers(root):
        if _pointwise(layer):
            wrapped = PointwiseLinear(layer)
            wrapped.linear = replace(wrapped.linear, dtype)
            setattr(parent, child, wrapped)
        elif type(layer) is nn.Linear:
            setattr(parent, child, replace(layer, dtype))
        else:
            continue
        count += 1
    return count


def saved_bytes(name: str, transformer_config: dict) -> int:
    """Bytes that a transformer of that config takes less on the device than in bfloat16; scales are counted."""
    total = 0
    for _, _, layer in _layers(meta_transformer(transformer_config).transformer_blocks):
        if type(layer) is nn.Linear or _pointwise(layer):
            outputs, inputs = layer.weight.shape[:2]
            if name == "nf4":
                kept = outputs * inputs * (1 / 2 + 4 / (64 if inputs % 64 == 0 else 32))
            else:
                kept = outputs * inputs + outputs * (2 if name == "int8" else 4)
            total += 2 * outputs * inputs - kept
    return round(total)
