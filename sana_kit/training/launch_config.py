"""What the accelerate config asks for, read before anything is built, and held against the settings of the run.

`accelerate launch` hands its config to the processes through the environment (accelerate 0.33 to 1.15). Here those
variables become one frozen value, and every contradiction, and everything that the kit cannot do, is a `Problem`
before a weight is loaded. `settle` gives the precision, the accumulation and the clipping that then hold.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_kit.errors import Problem

if TYPE_CHECKING:
    from sana_kit.training.config import TrainConfig

# engines of accelerate that shard weights in ways of their own: variable, how it is called, where it stands
_FOREIGN_ENGINES = (
    ("ACCELERATE_USE_FSDP", "FSDP"),
    ("ACCELERATE_USE_MEGATRON_LM", "MEGATRON_LM"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "TP (parallelism_config)"),
)
_UNSET = ("", "auto", "none", "null")


def _true(text: str | None) -> bool:
    return str(text).lower() in ("1", "true", "yes")


def _given(value: object) -> bool:
    """Whether a config names a value; it may also leave it out or say 'auto'."""
    return value is not None and str(value).lower() not in _UNSET


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """The accelerate config of this run.

    Attributes:
        deepspeed: whether DeepSpeed is the engine.
        foreign: an engine that the kit does not train on, such as "FSDP"; None if there is none.
        mixed_precision: "no", "fp16" or "bf16"; of the DeepSpeed config file where there is one that says it.
        gradient_accumulation_steps, max_grad_norm: None where the config leaves them to the run.
        zero_stage: DeepSpeed's ZeRO stage, None without DeepSpeed.
        offload: whether DeepSpeed keeps the optimizer on the host.
        file: the DeepSpeed config file; None without one.
        file_problems: what is wrong with that file, a sentence each.
    """

    deepspeed: bool = False
    foreign: str | None = None
    mixed_precision: str = "no"
    gradient_accumulation_steps: int | None = None
    max_grad_norm: float | None = None
    zero_stage: int | None = None
    offload: bool = False
    file: str | None = None
    file_problems: tuple[tuple[str, str], ...] = ()

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None) -> LaunchConfig:
        """The config as `accelerate launch` passed it on; all defaults in a process that was started plainly."""
        env = os.environ if environment is None else environment
        foreign = next((name for variable, name in _FOREIGN_ENGINES if _true(env.get(variable))), None)
        deepspeed = _true(env.get("ACCELERATE_USE_DEEPSPEED"))
        steps, clip = env.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS"), env.get("ACCELERATE_GRADIENT_CLIPPING")
        found: dict[str, Any] = {
            "deepspeed": deepspeed,
            "foreign": foreign,
            "mixed_precision": env.get("ACCELERATE_MIXED_PRECISION", "no"),
            "gradient_accumulation_steps": int(steps) if _given(steps) else None,
            "max_grad_norm": float(clip) if deepspeed and _given(clip) else None,
        }
        if not deepspeed:
            return cls(**found)
        found["zero_stage"] = int(env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))
        found["offload"] = _given(env.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"))
        file = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if file is not None and _given(file):
            found.update(_read_file(file, found["mixed_precision"]))
        return cls(**found)


def _read_file(file: str, launched: str) -> dict:
    """What a DeepSpeed config file decides, and its problems as (reason, remedy)."""
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no settings by name")
    except (OSError, ValueError) as error:
        return {"file": file, "file_problems": ((f"it cannot be read ({error})", "Give a JSON file."),)}
    problems = []
    for section, flags in (
        ("optimizer", "optimizer, learning_rate and adam_*"),
        ("scheduler", "lr_scheduler and lr_*"),
    ):
        if section in config:
            reason = f"it has a section '{section}', which the settings {flags} of the run decide"
            problems.append((reason, f"Take the section '{section}' out of the file."))
    if "zero_optimization" not in config:
        problems.append(("it has no section 'zero_optimization'", 'Add "zero_optimization": {"stage": 2}.'))
    on = [
        name
        for name, keys in (("bf16", ("bf16", "bfloat16")), ("fp16", ("fp16",)))
        if any(_true((config.get(key) or {}).get("enabled", False)) for key in keys)
    ]
    if len(on) == 2:
        problems.append(("both bf16 and fp16 are enabled in it", "Keep one of them."))
    zero = config.get("zero_optimization") or {}
    precision = on[0] if len(on) == 1 else launched
    found: dict[str, Any] = {"file": file, "file_problems": tuple(problems), "mixed_precision": precision}
    if on and launched not in ("no", on[0]):
        reason = f"it enables {on[0]}, while the accelerate config says mixed_precision: {launched}"
        found["file_problems"] += ((reason, "Make both the same."),)
    if _given(config.get("gradient_accumulation_steps")):
        found["gradient_accumulation_steps"] = int(config["gradient_accumulation_steps"])
    if _given(config.get("gradient_clipping")):
        found["max_grad_norm"] = float(config["gradient_clipping"])
    if _given(zero.get("stage")):
        found["zero_stage"] = int(zero["stage"])
    found["offload"] = _given((zero.get("offload_optimizer") or {}).get("device"))
    return found


@dataclasses.dataclass(frozen=True)
class Settled:
    """What holds for the run after flags and accelerate config were brought together."""

    mixed_precision: str
    gradient_accumulation_steps: int
    max_grad_norm: float


def settle(
    launch: LaunchConfig, settings: TrainConfig, explicit: Set[str], device_type: str
) -> tuple[Settled, list[Problem]]:
    """Bring the run's settings and the accelerate config together.

    Args:
        settings: anything with mixed_precision (None: as the config says), gradient_accumulation_steps,
            max_grad_norm and train_mode.
        explicit: names of the settings that were given, so that they can be told from defaults.
        device_type: "npu", "cuda" or "cpu".

    Returns:
        What holds, and every contradiction. The first is of use only where the second is empty.
    """
    problems = [
        Problem("", None, f"deepspeed_config_file {launch.file}: {why}", do) for why, do in launch.file_problems
    ]
    if launch.foreign is not None:
        problems.append(
            Problem(
                "",
                None,
                f"the accelerate config asks for {launch.foreign}, whose weights are sharded in a way of its own",
                "Use distributed_type DEEPSPEED (ZeRO 1 to 3), MULTI_GPU, MULTI_NPU, MULTI_CPU or NO.",
            )
        )
    if launch.zero_stage == 0:
        problems.append(Problem("", None, "zero_stage: 0 in the accelerate config", "Use 1 or 2, or no DeepSpeed."))
    if launch.zero_stage == 3 and settings.train_mode != "full":
        what = "a LoRA's few million trainable weights gain nothing from partitioned parameters"
        if settings.train_mode == "controlnet":
            what = "a ControlNet's blocks fit one device beside the base"
        problems.append(
            Problem(
                "",
                None,
                f"zero_stage: 3 in the accelerate config: {what}, and every step would gather the frozen base",
                "Use zero_stage: 2 (or 1).",
            )
        )
    precision = settings.mixed_precision or launch.mixed_precision
    said = launch.deepspeed and (launch.mixed_precision != "no" or launch.file is not None)
    if settings.mixed_precision is not None and said and precision != launch.mixed_precision:
        problems.append(_contradiction("mixed_precision", precision, "mixed_precision", launch.mixed_precision))
    if settings.mixed_precision is None and precision not in ("no", "fp16", "bf16"):  # the flag has its choices
        reason = "the kit trains in bf16, fp16 or float32 (no)"
        problems.append(Problem("mixed_precision", precision, reason, "Use one of them."))
    if precision == "fp16" and device_type == "cpu":
        origin = "" if settings.mixed_precision else " (it comes from the accelerate config)"
        problems.append(
            Problem("mixed_precision", precision, f"fp16 needs an accelerator{origin}", "Use bf16 or no on CPU.")
        )
    values = {}
    for field, name in (("gradient_accumulation_steps",) * 2, ("max_grad_norm", "gradient_clipping")):
        value, configured = getattr(settings, field), getattr(launch, field)
        if configured is not None and field in explicit and value != configured:
            problems.append(_contradiction(field, value, name, configured))
        values[field] = value if configured is None or field in explicit else configured
    return Settled(mixed_precision=precision, **values), problems


def _contradiction(field: str, value: object, name: str, configured: object) -> Problem:
    return Problem(
        field, value, f"the accelerate config says {name}: {configured}", "Make both the same, or drop one."
    )
