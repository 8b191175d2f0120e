"""The optimizers that a run may ask for: one entry each in OPTIMIZERS.

A new one is one entry: its class, what it is built with, and what ZeRO and other settings have to know of it. What it
keeps is read from its state, never from a list of names, so nothing else changes: `--help`, the refusals, checkpoints
and the tests of every optimizer find it here. No package is imported before one is built: `--help` lists them all.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from sana_kit.devices import DeviceKind
    from sana_kit.training.config import TrainConfig

Arguments = Callable[["TrainConfig", "DeviceKind"], dict[str, Any]]


def _betas(settings: TrainConfig, *_: object) -> dict[str, Any]:
    return {"betas": (settings.adam_beta1, settings.adam_beta2)}


def _adam(settings: TrainConfig, *_: object) -> dict[str, Any]:
    return {**_betas(settings), "eps": settings.adam_epsilon}


def _adamw(settings: TrainConfig, device: DeviceKind) -> dict[str, Any]:
    # One fused kernel on CUDA. NPU's fused AdamW forbids reallocated parameters, which ZeRO makes: torch's own there.
    return {**_adam(settings), "fused": device.fused_adamw}


def _prodigy(settings: TrainConfig, *_: object) -> dict[str, Any]:
    own = ("beta3", "decouple", "use_bias_correction", "safeguard_warmup")
    return {**_adam(settings), **{name: getattr(settings, f"prodigy_{name}") for name in own}}


def _came(settings: TrainConfig, *_: object) -> dict[str, Any]:
    # The third beta and both epsilons as SANA's authors train with (NVlabs/Sana, configs/).
    return {"betas": (settings.adam_beta1, settings.adam_beta2, 0.9999), "eps1": 1e-30, "eps2": 1e-16}


def _adafactor(settings: TrainConfig, *_: object) -> dict[str, Any]:
    import torch

    return {**_betas(settings), "scale_parameter": False, "relative_step": False, "momentum_dtype": torch.float32}


def _muon(settings: TrainConfig, *_: object) -> dict[str, Any]:
    its_adamw = {**_adam(settings), "lr": settings.learning_rate, "wd": settings.adam_weight_decay}
    return {f"adamw_{name}": value for name, value in its_adamw.items()}


def _matrices_apart(groups: list[dict]) -> list[dict]:
    """Muon's groups: matrices, and the rest (biases and tables), which it gives to AdamW."""
    split = []
    for group in groups:
        split.append({**group, "params": [p for p in group["params"] if p.ndim >= 2], "use_muon": True})
        split.append({**group, "params": [p for p in group["params"] if p.ndim < 2], "use_muon": False})
    return [group for group in split if group["params"]]


@dataclasses.dataclass(frozen=True)
class OptimizerKind:
    """One optimizer.

    Attributes:
        path: its class, such as "torch.optim.AdamW"; the package is asked for before anything is loaded.
        elementwise: whether it treats every weight by itself, so that ZeRO may cut the parameters up.
        arguments: (settings, kind of device) -> what it is built with, beside the groups, lr and weight_decay.
        groups: makes its parameter groups of those of `optim.parameter_groups`; None: they are taken as they are.
        devices: kinds of device that it runs on; empty: all.
        learning_rate: a rate that suits it, for a warning about one that is ten times off; None: as AdamW.
        one_rate: whether all parameter groups have to share one learning rate.
        averages: of one that steps one set of weights and means their average to be used: the name of the tensor that
            `optim_state.averaged` makes it of; None where the stepped weights are the result.
    """

    path: str
    elementwise: bool
    arguments: Arguments = _adam
    groups: Callable[[list[dict]], list[dict]] | None = None
    devices: tuple[str, ...] = ()
    learning_rate: float | None = None
    one_rate: bool = False
    averages: str | None = None

    @property
    def package(self) -> str:
        """The package that it is from; torch's own is always there."""
        return self.path.split(".", 1)[0]

    def build(self, groups: list[dict], settings: TrainConfig, device: DeviceKind) -> torch.optim.Optimizer:
        """The optimizer over parameter groups; ImportError where its package is not installed."""
        module, _, name = self.path.rpartition(".")
        groups = groups if self.groups is None else self.groups(groups)
        shared = {"lr": settings.learning_rate, "weight_decay": settings.adam_weight_decay}
        optimizer = getattr(importlib.import_module(module), name)(
            groups, **shared, **self.arguments(settings, device)
        )
        if self.averages:
            optimizer.train()  # pytorch_optimizer's begins in the other mode before 3.6
        return optimizer


_EIGHT_BITS: tuple[str, ...] = ("cuda", "cpu")
OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind("torch.optim.AdamW", elementwise=True, arguments=_adamw),
    "adamw8bit": OptimizerKind("bitsandbytes.optim.AdamW8bit", elementwise=False, devices=_EIGHT_BITS),
    "adamw8bit-torchao": OptimizerKind("torchao.optim.AdamW8bit", elementwise=False, devices=_EIGHT_BITS),
    "schedulefree": OptimizerKind("pytorch_optimizer.ScheduleFreeAdamW", elementwise=True, averages="z"),
    "prodigy": OptimizerKind(
        "prodigyopt.Prodigy", elementwise=False, arguments=_prodigy, learning_rate=1.0, one_rate=True
    ),
    "came": OptimizerKind("pytorch_optimizer.CAME", elementwise=False, arguments=_came),
    "adafactor": OptimizerKind("pytorch_optimizer.AdaFactor", elementwise=False, arguments=_adafactor),
    "lion": OptimizerKind("pytorch_optimizer.Lion", elementwise=True, arguments=_betas, learning_rate=1e-5),
    "muon": OptimizerKind("pytorch_optimizer.Muon", elementwise=False, arguments=_muon, groups=_matrices_apart),
}

# Asked for by name elsewhere, and why they are not here.
REFUSED = {
    "came8bit": "no maintained package has CAME with 8-bit moments (NVlabs' own is part of its trainer); CAME's second"
    " moments are rows and columns already, so 8 bits would save its first moment alone",
}


def one_of(names: Iterable[str]) -> str:
    """'a, b or c'."""
    *some, last = names
    return f"{', '.join(some)} or {last}" if some else last


UNDER_DEEPSPEED = one_of(name for name, kind in OPTIMIZERS.items() if kind.elementwise)
