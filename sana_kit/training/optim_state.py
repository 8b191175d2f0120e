"""The state of an optimizer, whatever its keys: as a checkpoint's tensors and numbers, and back."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence

import torch

from sana_kit.training.optimizers import OPTIMIZERS

ADAMS = ("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam", "NpuFusedAdamW")
# Tensors made of several, by class and module (torchao 0.9 to 0.18), which torch's own protocol takes apart.
WRAPPERS = {"OptimState8bit": "torchao.optim.subclass_8bit"}


def base_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The torch optimizer below accelerate's and DeepSpeed's wrappers."""
    seen = set()
    while hasattr(optimizer, "optimizer") and id(optimizer) not in seen:
        seen.add(id(optimizer))
        optimizer = optimizer.optimizer
    return optimizer


def optimizer_family(class_name: str) -> str:
    """'Adam' for every implementation whose state is Adam's (fused, CPU-offloaded, ...), else the class's own name."""
    return "Adam" if class_name in ADAMS else class_name


def is_plain(value: object) -> bool:
    """Whether a checkpoint can hold a value of an optimizer's state."""
    if isinstance(value, torch.Tensor):
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            return type(value).__name__ in WRAPPERS
        return value.layout is torch.strided and not value.is_quantized
    return value is None or isinstance(value, (bool, int, float, str))


def _parts(key: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """The plain tensors of a wrapper, such as {"exp_avg.codes", "exp_avg.scale", "exp_avg.qmap"}."""
    return {f"{key}.{name}": getattr(value, name) for name in value.__tensor_flatten__()[0]}


def state_tensors(state: dict) -> dict[str, torch.Tensor]:
    """The tensors of one parameter's state that have a shape, in the order of their names."""
    found = {}
    for key in sorted(state):
        if type(state[key]).__name__ in WRAPPERS:
            found.update(_parts(key, state[key]))
        elif torch.is_tensor(state[key]) and state[key].ndim > 0:
            found[key] = state[key]
    return found


def state_numbers(state: dict) -> dict[str, object]:
    """The rest of it as JSON values; a tensor without a shape becomes {"value", "dtype", "on"}.

    Of a tensor made of several, whose parts are `state_tensors`, it is {"wrapper", "context"}.
    """
    numbers: dict[str, object] = {}
    for key in sorted(state):
        value = state[key]
        if type(value).__name__ in WRAPPERS:
            context = [str(part) if isinstance(part, torch.dtype) else part for part in value.__tensor_flatten__()[1]]
            numbers[key] = {"wrapper": type(value).__name__, "context": context}
        elif not torch.is_tensor(value):
            numbers[key] = value
        elif value.ndim == 0:
            dtype, on = str(value.dtype).removeprefix("torch."), "cpu" if value.device.type == "cpu" else "device"
            numbers[key] = {"value": value.item(), "dtype": dtype, "on": on}
    return numbers


def restored_number(base: torch.optim.Optimizer, key: str, saved: dict, device: torch.device) -> object:
    """A number of `state_numbers` as this optimizer keeps it; `device` is that of the parameter.

    Adam's step count changes its form between implementations: torch's own keep a float32 scalar, on the device where
    they are fused, DeepSpeed's a whole number.
    """
    record = saved if isinstance(saved, dict) else {"value": saved, "dtype": None, "on": "cpu"}
    if key == "step" and optimizer_family(type(base).__name__) == "Adam":
        if not isinstance(base, (torch.optim.Adam, torch.optim.AdamW)):
            return int(record["value"])
        on_device = any(group.get("fused") or group.get("capturable") for group in base.param_groups)
        return torch.tensor(float(record["value"]), device=device if on_device else "cpu")
    if record["dtype"] is None:
        return record["value"]
    place = device if record["on"] == "device" else "cpu"
    return torch.tensor(record["value"], dtype=getattr(torch, record["dtype"]), device=place)


def restored_state(
    base: torch.optim.Optimizer, numbers: Mapping, tensors: Mapping[str, torch.Tensor], device: torch.device
) -> dict:
    """The state of one parameter, from its `state_numbers` and `state_tensors`; `device` is the parameter's."""
    state, left = {}, {key: tensor.to(device) for key, tensor in tensors.items()}
    for key, saved in numbers.items():
        if isinstance(saved, dict) and "wrapper" in saved:
            wrapper = getattr(importlib.import_module(WRAPPERS[saved["wrapper"]]), saved["wrapper"])
            parts = {name: left.pop(name) for name in list(left) if name.startswith(f"{key}.")}
            context = [_dtype(part) if isinstance(part, str) else part for part in saved["context"]]
            named = {name.removeprefix(f"{key}."): part for name, part in parts.items()}
            state[key] = wrapper.__tensor_unflatten__(named, context)
        else:
            state[key] = restored_number(base, key, saved, device)
    return {**state, **left}


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name.removeprefix("torch."))


# ---------------------------------------------------------------------------------------------------------------------
# Weights that an optimizer means to be used, where they are not those that it steps


def averaging_key(base: torch.optim.Optimizer) -> str | None:
    """The name of the tensor that `averaged` needs beside the master; None where the masters are the result."""
    name = type(base).__name__
    return next((kind.averages for kind in OPTIMIZERS.values() if kind.path.endswith(f".{name}")), None)


def averaged(base: torch.optim.Optimizer, master: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Schedule-free AdamW's average x of its iterate y (the master) and z: y = beta1 x + (1 - beta1) z.

    As the package's own `eval()`, but in steps that are each rounded alike on every device and for every part of a
    tensor, so that all ranks and a resumed run find the same bits.
    """
    beta1 = base.param_groups[0]["betas"][0]
    return master + (other - master) * (1 - 1 / beta1)


class GroupNumbers:
    """What an optimizer changes in its parameter groups while it trains, such as Prodigy's distance estimate.

    Everything else in a group is a setting of the run, which a resumed run may change.
    """

    # The schedule's, which is replayed.
    _OF_THE_SCHEDULE = ("lr", "initial_lr")

    def __init__(self, base: torch.optim.Optimizer):
        self._base = base
        self._at_start = [self._numbers(group) for group in base.param_groups]

    @classmethod
    def _numbers(cls, group: dict) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in group.items():
            if key == "params" or key in cls._OF_THE_SCHEDULE:
                continue
            if torch.is_tensor(value) and value.numel() == 1:
                value = value.item()
            if isinstance(value, (bool, int, float, str)):
                found[key] = value
        return found

    def changed(self) -> list[dict[str, object]]:
        """Per group {name: number} of what differs from the start."""
        pairs = zip(self._base.param_groups, self._at_start, strict=True)
        return [
            {key: value for key, value in self._numbers(group).items() if key not in start or start[key] != value}
            for group, start in pairs
        ]

    def restore(self, saved: Sequence[dict[str, object]]) -> None:
        """Put the numbers of `changed` back."""
        for group, numbers in zip(self._base.param_groups, saved, strict=True):
            for key, value in numbers.items():
                if torch.is_tensor(group.get(key)):
                    group[key].fill_(value)
                else:
                    group[key] = value
