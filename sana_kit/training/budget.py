"""A budget of memory, as it is given: what can be wrong with it. `recomputation` makes a step fit into it."""

from __future__ import annotations

import math

from sana_kit import devices
from sana_kit.errors import Problem, setting
from sana_kit.training.config import TrainConfig

# The budget that is what the device has free.
AUTO = "auto"


def budget_problems(config: TrainConfig, device_type: str) -> list[Problem]:
    """What is wrong with the budget itself; whether a step fits into it is found by `recomputation.fit_memory`."""
    field, value = "memory_budget", config.memory_budget
    if value is None:
        return []
    problems = []
    # not by what was given: run.yaml gives every setting
    for name, unset in (("gradient_checkpointing", False), ("gradient_checkpointing_interval", 1)):
        if getattr(config, name) != unset:
            reason = "a budget chooses which blocks are recomputed"
            problems.append(Problem(name, None, reason, f"Leave it out, or leave {setting(field)} out."))
    if value == AUTO:
        if not devices.kind_of(device_type).is_accelerator:
            reason = "a CPU's memory is shared with other processes: what is free now says nothing"
            problems.append(Problem(field, value, reason, "Give the GB that each process may use, such as 8."))
        return problems
    try:
        usable = 0 < float(value) < math.inf
    except ValueError:
        usable = False
    if not usable:
        problems.append(Problem(field, value, "is neither auto nor a number of GB", "Give auto, or GB such as 60."))
    return problems
