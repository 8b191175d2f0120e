"""DeepSpeed's ZeRO, behind training/engine.py: its config, its optimizer's state per parameter, its loss scale.

Public calls where there are any (`safe_get_full_fp32_param` and its kin, `optimizer.overflow`). The private names that
remain, each read in deepspeed 0.15.2 and 0.19.8, stand in PRIVATE_NAMES; tests/unit/training/test_engine_zero.py fails
by name where one is gone.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sana_kit.arithmetic import bucket_elements
from sana_kit.errors import CheckpointError, Problem, UserError
from sana_kit.training.optim_state import restored_number, state_tensors

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    from sana_kit.training.config import TrainConfig

# class: names that the kit reads or calls on it
PRIVATE_NAMES = {
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer": ("_lazy_init_hp_params_optimizer_state",),
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3": ("has_overflow",),
    "deepspeed.runtime.bf16_optimizer:BF16_Optimizer": ("_lazy_init_hp_params_optimizer_state",),
}
LINKED = "_hp_optimizer_states_linked"  # of the first and the third: whether parameters know their states
COMPATIBLE_OPS = "__compatible_ops__"  # of deepspeed.ops: which operators may be compiled, by name
# The state of a dynamic loss scale (deepspeed/runtime/fp16/loss_scaler.py, DynamicLossScaler).
LOSS_SCALE_NAMES = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def leave_out_shm_operator() -> None:
    """Keep DeepSpeed from compiling its shared-memory operator on a CPU host; call before the process group is made.

    Only its inference uses that operator (`inference_all_reduce`). Compiling it took half a minute of the first start,
    and the lock file that a killed compilation leaves let every later start wait for ever without a word.
    """
    ops = importlib.import_module("deepspeed.ops")
    getattr(ops, COMPATIBLE_OPS)["deepspeed_shm_comm"] = False


def leave_out_muon_compilation() -> None:
    """Import DeepSpeed's Muon optimizer, which ZeRO imports for its own checks, without its calls of torch.compile.

    They import the whole of torch's compiler, a second of every start; the kit does not train with Muon.
    """
    name = "deepspeed.runtime.zero.muon.muon_optimizer"
    try:
        missing = importlib.util.find_spec(name) is None
    except ImportError:  # deepspeed 0.15.2 has no such package
        missing = True
    if missing or name in sys.modules:
        return
    compiler: Any = importlib.import_module("deepspeed.runtime.compiler")
    compile_, compiler.compile = compiler.compile, lambda *args, **kwargs: lambda function: function
    try:
        importlib.import_module(name)
    finally:
        compiler.compile = compile_


def fill_config(config: dict, settings: TrainConfig, world_size: int) -> None:
    """Write what the run's settings decide into the DeepSpeed config; bucket sizes follow in `fit_buckets`.

    Args:
        settings: mixed_precision, train_mode, train_batch_size, gradient_accumulation_steps and max_grad_norm.

    Raises:
        UserError: a setting and the config contradict each other.
    """
    batch = settings.train_batch_size * settings.gradient_accumulation_steps * world_size
    values = {
        "train_micro_batch_size_per_gpu": ("train_batch_size", settings.train_batch_size),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", settings.gradient_accumulation_steps),
        "gradient_clipping": ("max_grad_norm", settings.max_grad_norm),
        "train_batch_size": ("train_batch_size", batch),
    }
    problems = []
    for key, (field, value) in values.items():
        configured = config.get(key, "auto")
        if configured not in ("auto", None) and float(configured) != float(value):
            counted = f", which makes {batch} images an update on all {world_size} devices" if key == field else ""
            reason = f"the DeepSpeed config says {key}: {configured}{counted}"
            problems.append(Problem(field, getattr(settings, field), reason, "Make both the same."))
        config[key] = value
    if problems:
        raise UserError(problems, f"{len(problems)} problem(s) with the DeepSpeed config:")
    if config.setdefault("zero_optimization", {}).get("stage", 0) == 3:
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    if settings.mixed_precision == "bf16":
        # bf16 gradients are added up over micro-steps and ranks in float32: small LoRA gradients round away otherwise.
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
        config.setdefault("communication_data_type", "fp32" if settings.train_mode == "lora" else "bf16")
        if checks_bf16_gradients():
            config.setdefault("bf16", {})["check_grad_overflow"] = True
    config["zero_allow_untested_optimizer"] = True


def fit_buckets(config: dict, trainable_numel: int) -> None:
    """Size ZeRO's buckets to the trainable parameters; the defaults reserve about 1 GB for 4 MB of LoRA gradients."""
    size = bucket_elements(trainable_numel)
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        if config["zero_optimization"].get(key, "auto") in ("auto", None):
            config["zero_optimization"][key] = size


def checks_bf16_gradients() -> bool:
    """Whether this DeepSpeed can look for gradients in bf16 that are not finite (0.19 does, 0.15 does not)."""
    try:
        from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    except ImportError:
        return False
    return "check_grad_overflow" in DeepSpeedBF16Config.model_fields


def engine_step(model: DeepSpeedEngine) -> tuple[bool, float | torch.Tensor | None]:
    """One update by the DeepSpeed engine; returns (whether it was left out on all ranks, the gradient norm).

    An update whose gradient is not finite is left out by the ZeRO optimizer, which asks all ranks and keeps weights,
    moments and step count. Before 0.19 it asked in fp16 only; there the answer is put where its `step` looks for it.
    """
    zero = model.optimizer
    asks = checks_bf16_gradients() or getattr(zero, "dtype", None) == torch.float16
    if not asks and hasattr(zero, "has_overflow"):
        zero.overflow = zero.has_overflow()
    model.step()
    norm = model.get_global_grad_norm()
    left_out = bool(getattr(zero, "overflow", False))
    return left_out, float("inf") if left_out else norm


def whole_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """The whole shape of a parameter, also where ZeRO-3 holds only a part of it."""
    return tuple(parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape)


def flat_partitions(zero: ZeROOptimizer, base: torch.optim.Optimizer) -> list[torch.Tensor]:
    """This rank's flat float32 partitions, the parameters that the torch optimizer below ZeRO steps."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3 shows them to the optimizer only while it steps
        return list(zero.fp32_partitioned_groups_flat)
    return [flat for group in base.param_groups for flat in group["params"]]


def first_state(base: torch.optim.Optimizer) -> dict:
    """The state of the first partition that has one: all have the same keys."""
    return next((state for state in base.state.values() if state), {})


def fetch_master(parameter: torch.nn.Parameter, keep: bool) -> torch.Tensor | None:
    """The float32 master of a parameter, put together by all ranks; on the CPU where `keep`, else None."""
    from deepspeed.utils import safe_get_full_fp32_param

    master = safe_get_full_fp32_param(parameter)
    return master.cpu() if keep else None


def set_master(
    zero: ZeROOptimizer, base: torch.optim.Optimizer, parameter: torch.nn.Parameter, value: torch.Tensor
) -> None:
    """Give a parameter's float32 master a new value, each rank its own part of it."""
    from deepspeed.utils import safe_set_full_fp32_param

    safe_set_full_fp32_param(parameter, value.to(flat_partitions(zero, base)[0].device))


def fetch_state(parameter: torch.nn.Parameter, key: str, keep: bool) -> torch.Tensor | None:
    """One optimizer tensor of a parameter, put together by all ranks; on the CPU where `keep`, else None."""
    from deepspeed.utils import safe_get_full_optimizer_state

    value = safe_get_full_optimizer_state(parameter, key)
    return value.cpu() if keep else None


def fetch_weight(parameter: torch.Tensor, keep: bool) -> torch.Tensor | None:
    """A weight as the model computes with it, whole; a collective under ZeRO-3 only."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().cpu() if keep else None
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().to("cpu", copy=True) if keep else None


def writable(parameter: torch.nn.Parameter) -> contextlib.AbstractContextManager:
    """Within it the weight is whole and may be written to, by all ranks alike; a collective under ZeRO-3 only."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def restore(
    zero: ZeROOptimizer,
    base: torch.optim.Optimizer,
    named_parameters: Sequence[tuple[str, torch.nn.Parameter]],
    keys: Iterable[str],
    numbers: dict,
    read: Callable[[str], torch.Tensor],
) -> None:
    """Put masters and optimizer tensors into ZeRO's partitions; every rank must call it.

    Args:
        keys: names of the optimizer's tensors; none where the optimizer had not stepped yet.
        numbers: its numbers, as `optim.state_numbers` gave them.
        read: (key of the checkpoint) -> tensor on the CPU or the device, the same on every rank.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    flats = flat_partitions(zero, base)
    device = flats[0].device
    keys = list(keys)
    if keys or numbers:
        _create_states(zero, base, flats, keys, numbers)
    with torch.no_grad():
        for name, parameter in named_parameters:
            master = read(f"{name}|master").to(device)
            safe_set_full_fp32_param(parameter, master)
            with writable(parameter):  # ZeRO-3 keeps a part of the bf16 copy: gathered, set, partitioned again
                parameter.data.copy_(master)
            for key in keys:
                safe_set_full_optimizer_state(parameter, read(f"{name}|{key}").to(master.device), key)


def _create_states(
    zero: ZeROOptimizer, base: torch.optim.Optimizer, flats: list, keys: list[str], numbers: dict
) -> None:
    """Give each flat partition the state that the first step would create, so that it can be filled.

    DeepSpeed creates optimizer states at the first step; `_lazy_init_hp_params_optimizer_state` then links each
    parameter's fragment of them (not in ZeRO-3, which finds them by offset).
    """
    for flat in flats:
        state = base.state[flat]
        for key, saved in numbers.items():
            state[key] = restored_number(base, key, saved, flat.device)
        for key in keys:
            state[key] = torch.zeros_like(flat)
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()


def tensor_keys(zero: ZeROOptimizer, base: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's tensors, each of which `fetch_state` then finds.

    Raises:
        CheckpointError: one is not of the partition's shape; `optim.optimizer_problems` refuses such an optimizer.
    """
    for flat in flat_partitions(zero, base):
        odd = [key for key, value in state_tensors(base.state.get(flat, {})).items() if value.shape != flat.shape]
        if odd:
            raise CheckpointError(f"{type(base).__name__} keeps {odd} in a shape of its own; ZeRO cannot save that.")
    if len(base.param_groups) > 1 and first_state(base):
        _link_states(zero)
    return list(state_tensors(first_state(base)))


def _link_states(zero: ZeROOptimizer) -> None:
    """Let each parameter find its part of the optimizer's state, in all groups.

    DeepSpeed (0.15 to 0.19) steps group by group and links all of them after the first one's first step, when the
    others have no state yet, and then never again.
    """
    if hasattr(zero, LINKED):
        setattr(zero, LINKED, False)
        zero._lazy_init_hp_params_optimizer_state()


def loss_scale(zero: ZeROOptimizer) -> dict[str, float] | None:
    """The state of fp16's loss scale, None where there is none or it is fixed."""
    scaler = getattr(zero, "loss_scaler", None)
    if scaler is None or not getattr(scaler, "dynamic", False):
        return None
    return {name: getattr(scaler, name) for name in LOSS_SCALE_NAMES}


def restore_loss_scale(zero: ZeROOptimizer, saved: dict[str, float]) -> None:
    """Put the state of `loss_scale` back."""
    for name in LOSS_SCALE_NAMES:
        setattr(zero.loss_scaler, name, saved[name])
