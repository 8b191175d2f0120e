"""Building what `training/optimizers.py` lists: parameter groups, the optimizer, its schedule, and what is wrong.

`optimizer_problems` steps an optimizer once on three small parameters at start, so that one that does not run here, or
whose state no checkpoint can hold, is refused then. Its state is tensors of any shape and dtype, numbers, and what it
changes in its parameter groups (optim_state.py).
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

from sana_kit.devices import kind_of
from sana_kit.errors import Problem, did_you_mean, setting
from sana_kit.training.optim_state import averaging_key, is_plain
from sana_kit.training.optimizers import OPTIMIZERS, REFUSED, UNDER_DEEPSPEED, OptimizerKind

if TYPE_CHECKING:
    from sana_kit.training.config import TrainConfig

logger = logging.getLogger("sana")


def parameter_groups(settings: TrainConfig, named: Iterable[tuple[str, torch.nn.Parameter]]) -> list[dict]:
    """torch's parameter groups, [{"params", "lr", "weight_decay"}, ...]: one where all weights are treated alike.

    LoRA+ (arXiv 2402.12354) gives the second matrix of each pair a higher rate; weights that scale or shift (norms,
    biases, DoRA's magnitudes, SANA's scale_shift_table) have no decay with `no_decay_norms`.
    """
    groups: dict[tuple[bool, bool], list] = {}
    for name, parameter in named:
        second = settings.lora_plus_ratio != 1 and ".lora_B." in name
        spared = settings.no_decay_norms and (parameter.ndim < 2 or name.endswith("scale_shift_table"))
        groups.setdefault((second, spared), []).append(parameter)
    rate, decay = settings.learning_rate, settings.adam_weight_decay
    return [
        {
            "params": groups[second, spared],
            "lr": rate * settings.lora_plus_ratio if second else rate,
            "weight_decay": 0.0 if spared else decay,
        }
        for second, spared in sorted(groups)
    ]


def optimizer_name(settings: TrainConfig) -> str:
    """The registry's name of what the settings ask for; an unknown one as it was written, in lower case."""
    name = settings.optimizer.lower()
    return "adamw8bit" if settings.use_8bit_adam and name == "adamw" else name


def build_optimizer(
    settings: TrainConfig, named: Iterable[tuple[str, torch.nn.Parameter]], device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer over named parameters that the settings ask for; `optimizer_problems` has found it usable."""
    name = optimizer_name(settings)
    kind = OPTIMIZERS[name]
    wanted = kind.learning_rate
    if wanted is not None and not wanted / 10 < settings.learning_rate < wanted * 10:
        logger.warning("learning_rate %s is far from %s, which suits %s", settings.learning_rate, wanted, name)
    optimizer = kind.build(parameter_groups(settings, named), settings, kind_of(device))
    if averaging_key(optimizer) and not settings.lr_scheduler.startswith("constant"):
        logger.warning("%s takes the place of a schedule; lr_scheduler %s slows it down", name, settings.lr_scheduler)
    return optimizer


def build_schedule(
    settings: TrainConfig, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The course of the learning rate over `steps` updates, stepped once an update.

    accelerate would step it once per process: lengths are in updates here, so it is not prepared.
    """
    from diffusers.optimization import get_scheduler  # seconds, which the checks before a run need not wait for

    return get_scheduler(
        settings.lr_scheduler,
        optimizer=optimizer,
        step_rules=settings.lr_step_rules,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=steps,
        num_cycles=settings.lr_num_cycles,
        power=settings.lr_power,
    )


def schedule_problems(settings: TrainConfig) -> list[Problem]:
    """What is wrong with the course of the learning rate."""
    rules, scheduler = settings.lr_step_rules, settings.lr_scheduler
    if rules is None:
        if scheduler != "piecewise_constant":
            return []
        return [Problem("lr_step_rules", None, f"needed with {scheduler}", "For instance 1:500,0.1:1000,0.01.")]
    if scheduler != "piecewise_constant":
        return [Problem("lr_step_rules", rules, f"has no effect with {setting('lr_scheduler')} {scheduler}")]
    *rates, last = rules.split(",")
    try:
        ends = [int(rule.split(":")[1]) for rule in rates]
        factors = [float(rule.split(":")[0]) for rule in rates] + [float(last)]
        if any(rule.count(":") != 1 for rule in rates) or min(factors) < 0 or ends != sorted(set(ends)):
            raise ValueError
    except (ValueError, IndexError):
        reason = "it is factors with the update that each ends at, in rising order, and the last factor"
        return [Problem("lr_step_rules", rules, reason, "For instance 1:500,0.1:1000,0.01.")]
    return []


def optimizer_problems(settings: TrainConfig, device_type: str, under_deepspeed: bool) -> list[Problem]:
    """Why the optimizer that the settings ask for cannot train, or cannot be saved, on this device and engine."""
    name = optimizer_name(settings)
    field = "use_8bit_adam" if settings.use_8bit_adam else "optimizer"
    value = settings.use_8bit_adam if settings.use_8bit_adam else settings.optimizer
    kind = OPTIMIZERS.get(name)
    refused = REFUSED.get(name.replace("-", "").replace("_", ""))
    if refused is not None:
        return [Problem("optimizer", settings.optimizer, refused, "Use came or adamw8bit.")]
    if kind is None:
        names = f"Use one of {', '.join(OPTIMIZERS)}.{did_you_mean(name, OPTIMIZERS)}"
        return [Problem("optimizer", settings.optimizer, "there is no such optimizer", names)]
    problems = schedule_problems(settings)
    if settings.use_8bit_adam and name != "adamw8bit":
        problems.append(Problem(field, value, f"the optimizer is {settings.optimizer}", "It goes with AdamW only."))
    if kind.devices and device_type not in kind.devices:
        known = " or ".join(device.upper() for device in kind.devices)
        reason = f"{kind.package} needs {known}, and this run is on {device_type}"
        problems.append(Problem(field, value, reason, "Use AdamW."))
    if under_deepspeed and not kind.elementwise:
        reason = f"DeepSpeed cuts the parameters into parts, and {name} looks at whole ones"
        remedy = f"Use {UNDER_DEEPSPEED}, or an accelerate config without DeepSpeed."
        problems.append(Problem(field, value, reason, remedy))
    if importlib.util.find_spec(kind.package) is None:
        problems.append(
            Problem(field, value, f"the package {kind.package} is not installed", f"pip install {kind.package}")
        )
    problems += _group_problems(settings, name, kind)
    if kind.averages and settings.ema_decay is not None:
        reason = f"{name} averages the weights itself"
        problems.append(Problem("ema_decay", settings.ema_decay, reason, "Leave it out."))
    if not problems and name != "adamw":  # torch's own needs no trial, for which its compiler would be imported
        device = torch.device(device_type)
        refused = savable_problem(
            lambda named: kind.build(parameter_groups(settings, named), settings, kind_of(device)),
            device,
            under_deepspeed,
        )
        if refused is not None:
            problems.append(Problem(field, value, refused, "Use another optimizer, such as AdamW."))
    return problems


def _group_problems(settings: TrainConfig, name: str, kind: OptimizerKind) -> list[Problem]:
    """What is wrong with learning rates and decays of their own."""
    ratio = settings.lora_plus_ratio
    if ratio != 1 and settings.train_mode != "lora":
        return [Problem("lora_plus_ratio", ratio, "has no effect without LoRA")]
    if ratio != 1 and kind.one_rate:
        return [Problem("lora_plus_ratio", ratio, f"{name} finds one rate for all weights", "Use another optimizer.")]
    return []


def savable_problem(
    build: Callable[[list], torch.optim.Optimizer], device: torch.device, under_deepspeed: bool
) -> str | None:
    """Why this optimizer cannot run here or no checkpoint could hold its state; None if all is well.

    Steps it once on small parameters, the first large enough for 8-bit moments; nothing is compiled for that.

    Args:
        build: (named parameters) -> optimizer.
    """
    shapes = {"a.lora_A.weight": (64, 64), "a.lora_B.weight": (8, 8, 1, 1), "norm.weight": (48,)}
    named = [(key, torch.nn.Parameter(torch.full(shape, 0.1, device=device))) for key, shape in shapes.items()]
    eager = getattr(torch.compiler, "set_stance", None)  # torch 2.6
    try:
        optimizer = build(named)
        for _, parameter in named:
            parameter.grad = torch.full_like(parameter, 0.01)
        with eager("force_eager") if eager else contextlib.nullcontext():
            optimizer.step()
    except Exception as error:
        return f"it does not run here ({type(error).__name__}: {' '.join(str(error).split())})"
    for _, parameter in named:
        for key, value in optimizer.state.get(parameter, {}).items():
            if not is_plain(value):
                return f"it keeps '{key}' as {type(value).__name__}, which no checkpoint of the kit holds"
            whole = not torch.is_tensor(value) or value.ndim == 0 or value.shape == parameter.shape
            if under_deepspeed and not whole:
                return f"it keeps '{key}' in another shape than the parameter's, which DeepSpeed cannot cut into parts"
    return None
