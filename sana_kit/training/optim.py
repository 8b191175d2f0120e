"""Optimizers: a registry, one entry each, and what a checkpoint has to know of their state.

A new optimizer is one `OptimizerKind` in OPTIMIZERS. What it keeps is read from its state, never from a list of names:
tensors of any shape and dtype, numbers, and what it changes in its parameter groups. `optimizer_problems` steps it
once on three small parameters at start, so that an optimizer whose state no checkpoint can hold is refused then.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Callable, Iterable, Sequence

import torch

from sana_kit.devices import kind_of
from sana_kit.errors import Problem, did_you_mean

logger = logging.getLogger("sana")

ADAMS = ("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam", "NpuFusedAdamW")


@dataclasses.dataclass(frozen=True)
class OptimizerKind:
    """One optimizer.

    Attributes:
        build: (parameters, settings, device) -> torch optimizer; `settings` has the flags' names.
        elementwise: whether it treats every weight by itself, so that ZeRO may cut the parameters up.
        package: what has to be installed, None for torch's own.
        devices: kinds of device that it runs on; empty: all.
        note: one line for the help text.
        learning_rate: a rate that suits it, for a warning about one that is ten times off; None: as AdamW.
    """

    build: Callable[[list, object, torch.device], torch.optim.Optimizer]
    elementwise: bool
    package: str | None = None
    devices: tuple[str, ...] = ()
    note: str = ""
    learning_rate: float | None = None


def _betas(settings) -> tuple[float, float]:
    return settings.adam_beta1, settings.adam_beta2


def _adamw(parameters: list, settings, device: torch.device) -> torch.optim.Optimizer:
    # One fused kernel on CUDA. NPU's fused AdamW forbids reallocated parameters, which ZeRO makes: torch's own there.
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=_betas(settings),
        weight_decay=settings.adam_weight_decay,
        eps=settings.adam_epsilon,
        fused=kind_of(device).fused_adamw,
    )


def _adamw8bit(parameters: list, settings, device: torch.device) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(
        parameters,
        lr=settings.learning_rate,
        betas=_betas(settings),
        weight_decay=settings.adam_weight_decay,
        eps=settings.adam_epsilon,
    )


def _prodigy(parameters: list, settings, device: torch.device) -> torch.optim.Optimizer:
    import prodigyopt

    return prodigyopt.Prodigy(
        parameters,
        lr=settings.learning_rate,
        betas=_betas(settings),
        beta3=settings.prodigy_beta3,
        weight_decay=settings.adam_weight_decay,
        eps=settings.adam_epsilon,
        decouple=settings.prodigy_decouple,
        use_bias_correction=settings.prodigy_use_bias_correction,
        safeguard_warmup=settings.prodigy_safeguard_warmup,
    )


def _came(parameters: list, settings, device: torch.device) -> torch.optim.Optimizer:
    import pytorch_optimizer

    # The third beta and both epsilons as SANA's authors train with (NVlabs/Sana, configs/).
    betas = (*_betas(settings), 0.9999)
    decay = settings.adam_weight_decay
    return pytorch_optimizer.CAME(
        parameters, lr=settings.learning_rate, betas=betas, weight_decay=decay, eps1=1e-30, eps2=1e-16
    )


def _adafactor(parameters: list, settings, device: torch.device) -> torch.optim.Optimizer:
    import pytorch_optimizer

    return pytorch_optimizer.AdaFactor(
        parameters,
        lr=settings.learning_rate,
        betas=_betas(settings),
        weight_decay=settings.adam_weight_decay,
        scale_parameter=False,
        relative_step=False,
        momentum_dtype=torch.float32,
    )


def _lion(parameters: list, settings, device: torch.device) -> torch.optim.Optimizer:
    import pytorch_optimizer

    decay = settings.adam_weight_decay
    return pytorch_optimizer.Lion(parameters, lr=settings.learning_rate, betas=_betas(settings), weight_decay=decay)


def _muon(parameters: list, settings, device: torch.device) -> torch.optim.Optimizer:
    import pytorch_optimizer

    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "use_muon": True},
        {"params": [p for p in parameters if p.ndim < 2], "use_muon": False},  # biases and tables: AdamW
    ]
    return pytorch_optimizer.Muon(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        weight_decay=settings.adam_weight_decay,
        adamw_lr=settings.learning_rate,
        adamw_betas=_betas(settings),
        adamw_wd=settings.adam_weight_decay,
        adamw_eps=settings.adam_epsilon,
    )


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(_adamw, elementwise=True, note="the default; every engine"),
    "adamw8bit": OptimizerKind(
        _adamw8bit, elementwise=False, package="bitsandbytes", devices=("cuda",), note="8-bit moments"
    ),
    "prodigy": OptimizerKind(
        _prodigy, elementwise=False, package="prodigyopt", note="finds its own rate", learning_rate=1.0
    ),
    "came": OptimizerKind(_came, elementwise=False, package="pytorch_optimizer", note="what SANA was trained with"),
    "adafactor": OptimizerKind(_adafactor, elementwise=False, package="pytorch_optimizer", note="small moments"),
    "lion": OptimizerKind(
        _lion, elementwise=True, package="pytorch_optimizer", note="one moment, its sign", learning_rate=1e-5
    ),
    "muon": OptimizerKind(_muon, elementwise=False, package="pytorch_optimizer", note="orthogonal updates"),
}


def optimizer_name(settings) -> str:
    """The registry's name of what the settings ask for; an unknown one as it was written, in lower case."""
    name = settings.optimizer.lower()
    return "adamw8bit" if settings.use_8bit_adam and name == "adamw" else name


def build_optimizer(settings, parameters: Iterable[torch.nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    """The optimizer over `parameters` that the settings ask for; `optimizer_problems` has found it usable."""
    name = optimizer_name(settings)
    kind = OPTIMIZERS[name]
    wanted = kind.learning_rate
    if wanted is not None and not wanted / 10 < settings.learning_rate < wanted * 10:
        logger.warning("learning_rate %s is far from %s, which suits %s", settings.learning_rate, wanted, name)
    return kind.build(list(parameters), settings, device)


def build_schedule(settings, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The course of the learning rate over `steps` updates, stepped once an update.

    accelerate would step it once per process: lengths are in updates here, so it is not prepared.
    """
    from diffusers.optimization import get_scheduler  # seconds, which the checks before a run need not wait for

    return get_scheduler(
        settings.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=steps,
        num_cycles=settings.lr_num_cycles,
        power=settings.lr_power,
    )


def optimizer_problems(settings, device_type: str, under_deepspeed: bool) -> list[Problem]:
    """Why the optimizer that the settings ask for cannot train, or cannot be saved, on this device and engine."""
    name = optimizer_name(settings)
    field = "use_8bit_adam" if settings.use_8bit_adam else "optimizer"
    value = settings.use_8bit_adam if settings.use_8bit_adam else settings.optimizer
    kind = OPTIMIZERS.get(name)
    if kind is None:
        names = f"Use one of {', '.join(OPTIMIZERS)}.{did_you_mean(name, OPTIMIZERS)}"
        return [Problem("optimizer", settings.optimizer, "there is no such optimizer", names)]
    problems = []
    if settings.use_8bit_adam and name != "adamw8bit":
        problems.append(Problem(field, value, f"the optimizer is {settings.optimizer}", "It goes with AdamW only."))
    if kind.devices and device_type not in kind.devices:
        reason = f"{kind.package} needs {' or '.join(kind.devices).upper()}, and this run is on {device_type}"
        problems.append(Problem(field, value, reason, "Use AdamW."))
    if under_deepspeed and not kind.elementwise:
        reason = f"DeepSpeed cuts the parameters into parts, and {name} looks at whole ones"
        problems.append(Problem(field, value, reason, "Use AdamW or lion, or an accelerate config without DeepSpeed."))
    if kind.package is not None and importlib.util.find_spec(kind.package) is None:
        problems.append(
            Problem(field, value, f"the package {kind.package} is not installed", f"pip install {kind.package}")
        )
    if not problems:
        device = torch.device(device_type)
        refused = savable_problem(lambda parameters: kind.build(parameters, settings, device), device, under_deepspeed)
        if refused is not None:
            problems.append(Problem(field, value, refused, "Use another optimizer, such as AdamW."))
    return problems


def savable_problem(
    build: Callable[[list], torch.optim.Optimizer], device: torch.device, under_deepspeed: bool
) -> str | None:
    """Why no checkpoint could hold this optimizer's state; None if one can. Steps it once on small parameters."""
    shapes = ((64, 16), (48,), (8, 8, 1, 1))
    parameters = [torch.nn.Parameter(torch.full(shape, 0.1, device=device)) for shape in shapes]
    optimizer = build(parameters)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.01)
    optimizer.step()
    for parameter in parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            if not _plain(value):
                return f"it keeps '{key}' as {type(value).__name__}, which no checkpoint of the kit holds"
            whole = not torch.is_tensor(value) or value.ndim == 0 or value.shape == parameter.shape
            if under_deepspeed and not whole:
                return f"it keeps '{key}' in another shape than the parameter's, which DeepSpeed cannot cut into parts"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The state of an optimizer, whatever its keys


def base_optimizer(optimizer) -> torch.optim.Optimizer:
    """The torch optimizer below accelerate's and DeepSpeed's wrappers."""
    seen = set()
    while hasattr(optimizer, "optimizer") and id(optimizer) not in seen:
        seen.add(id(optimizer))
        optimizer = optimizer.optimizer
    return optimizer


def optimizer_family(class_name: str) -> str:
    """'Adam' for every implementation whose state is Adam's (fused, CPU-offloaded, ...), else the class's own name."""
    return "Adam" if class_name in ADAMS else class_name


def _plain(value) -> bool:
    if torch.is_tensor(value):
        return value.layout is torch.strided and not value.is_quantized
    return value is None or isinstance(value, (bool, int, float, str))


def state_tensors(state: dict) -> dict[str, torch.Tensor]:
    """The tensors of one parameter's state that have a shape, in the order of their names."""
    return {key: state[key] for key in sorted(state) if torch.is_tensor(state[key]) and state[key].ndim > 0}


def state_numbers(state: dict) -> dict[str, object]:
    """The rest of it as JSON values; a tensor without a shape becomes {"value", "dtype", "on"}."""
    numbers = {}
    for key in sorted(state):
        value = state[key]
        if not torch.is_tensor(value):
            numbers[key] = value
        elif value.ndim == 0:
            dtype, on = str(value.dtype).removeprefix("torch."), "cpu" if value.device.type == "cpu" else "device"
            numbers[key] = {"value": value.item(), "dtype": dtype, "on": on}
    return numbers


def restored_number(base: torch.optim.Optimizer, key: str, saved, device: torch.device):
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
        found = {}
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
