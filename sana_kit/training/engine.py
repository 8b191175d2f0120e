"""accelerate and DeepSpeed: the Accelerator, the DeepSpeed config, optimizer state per parameter for every engine."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path

import torch

from sana_kit.arithmetic import bucket_elements
from sana_kit.distributed import check_world_size, force_cpu, process_group_handlers, under_deepspeed
from sana_kit.errors import CheckpointError
from sana_kit.launchers import announced_wait
from sana_kit.training.optim import base_optimizer, first_flat_state, optimizer_family
from sana_kit.training.state import OPTIMIZER_FILE


def _deepspeed_zero_optimizer(model):
    """The ZeRO optimizer behind a prepared DeepSpeedEngine, None for other engines."""
    return model.optimizer if hasattr(model, "zero_optimization_stage") else None


def collect_optimizer_state(model, optimizer, named_parameters, keep: bool):
    """Yield (key, float32 CPU tensor) for the master and each optimizer tensor of every trainable parameter.

    Every rank must iterate it to the end: under ZeRO each tensor is put together by a collective. Only ranks with
    `keep` get tensors, the others None. Keys: "<parameter name>|master", "<parameter name>|exp_avg", ...
    """
    zero = _deepspeed_zero_optimizer(model)
    base = base_optimizer(optimizer)
    if zero is None:
        for name, parameter in named_parameters:
            yield f"{name}|master", parameter.detach().float().cpu() if keep else None
            for key, value in base.state.get(parameter, {}).items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    yield f"{name}|{key}", value.detach().float().cpu() if keep else None
        return
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    keys = sorted(k for k, v in first_flat_state(base).items() if torch.is_tensor(v) and v.dim() > 0)
    for name, parameter in named_parameters:
        master = safe_get_full_fp32_param(parameter)
        yield f"{name}|master", master.cpu() if keep else None
        for key in keys:
            value = safe_get_full_optimizer_state(parameter, key)
            yield f"{name}|{key}", value.cpu() if keep else None


def restore_optimizer_state(model, optimizer, named_parameters, scalars: dict, read) -> None:
    """Put masters and optimizer tensors back, whatever engine and number of processes wrote them.

    Args:
        read: function (key) -> float32 tensor on CPU, the same on every rank, or None if there is no such key.

    Raises:
        CheckpointError: the checkpoint was written with another optimizer, or lacks a parameter.
    """
    base = base_optimizer(optimizer)
    if optimizer_family(scalars["class"]) != optimizer_family(type(base).__name__):
        raise CheckpointError(
            f"The checkpoint was written with optimizer {scalars['class']}, this run uses {type(base).__name__}."
            f" Resume with"
            " the same --optimizer (and --use_8bit_adam)."
        )
    zero = _deepspeed_zero_optimizer(model)
    stepped = bool(scalars["state"])
    if zero is None:
        # torch keeps a fused optimizer's step count on the device, others' on the host.
        fused = any(group.get("fused") or group.get("capturable") for group in base.param_groups)
        step_device = str(named_parameters[0][1].device) if fused else "cpu"
        with torch.no_grad():
            for name, parameter in named_parameters:
                parameter.copy_(_required(read, f"{name}|master").to(parameter.device))
                if stepped:
                    base.state[parameter] = _fresh_state(read, name, parameter, scalars["state"], step_device)
    else:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        flats = _flat_partitions(zero, base)
        device = flats[0].device
        if stepped:
            keys = [k for k in ("exp_avg", "exp_avg_sq") if read(f"{named_parameters[0][0]}|{k}") is not None]
            _create_flat_states(zero, base, flats, keys, scalars["state"])
        with torch.no_grad():
            for name, parameter in named_parameters:
                master = _required(read, f"{name}|master").to(device)
                safe_set_full_fp32_param(parameter, master)
                if hasattr(
                    parameter, "ds_id"
                ):  # ZeRO-3 keeps a part of the bf16 copy: gathered, set, partitioned again
                    import deepspeed

                    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                        parameter.data.copy_(master)
                else:
                    parameter.copy_(master.to(parameter.device))
                for key in keys if stepped else ():
                    safe_set_full_optimizer_state(parameter, _required(read, f"{name}|{key}").to(master.device), key)
    for group, saved in zip(base.param_groups, scalars["groups"], strict=True):
        group.update({k: v for k, v in saved.items() if k in group and k in ("d", "k", "d0", "d_max", "d_numerator")})


def _required(read, key: str) -> torch.Tensor:
    value = read(key)
    if value is None:
        raise CheckpointError(
            f"{OPTIMIZER_FILE} lacks '{key}': the checkpoint is of another model, rank or layer choice."
        )
    return value


def _fresh_state(read, name: str, parameter: torch.nn.Parameter, numbers: dict, step_device: str) -> dict:
    """An optimizer state for one parameter, single process or DDP: tensors from the file, numbers as torch keeps
    them.
    """
    state = {}
    for key, number in numbers.items():
        state[key] = torch.tensor(float(number), device=step_device) if key == "step" else number
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "s", "p0", "exp_avg_sq_diff"):
        value = read(f"{name}|{key}")
        if value is not None:
            state[key] = value.to(parameter.device, parameter.dtype)
    return state


def _flat_partitions(zero, base) -> list:
    """This rank's flat float32 partitions, the parameters that the torch optimizer below ZeRO steps."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3 shows them to the optimizer only while it steps
        return list(zero.fp32_partitioned_groups_flat)
    return [flat for group in base.param_groups for flat in group["params"]]


def _create_flat_states(zero, base, flats: list, keys: list[str], numbers: dict) -> None:
    """Give each flat ZeRO partition the state that the first step would create, so that it can be filled.

    DeepSpeed creates optimizer states lazily at the first step (0.15 to 0.19); `_lazy_init_hp_params_optimizer_state`
    then links each parameter's fragment of them.
    """
    for flat in flats:
        state = base.state[flat]
        for key, number in numbers.items():
            state[key] = torch.tensor(float(number)) if key == "step" else number
        for key in keys:
            state[key] = torch.zeros_like(flat)
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()


def parameter_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """The whole shape of a parameter, also where ZeRO-3 holds only a part of it."""
    return parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape


@announced_wait()
def create_accelerator(args):
    """The Accelerator, with flags and the DeepSpeed config brought together.

    Raises:
        ValueError: a flag given on the command line and the accelerate or DeepSpeed config contradict each other.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import ProjectConfiguration

    problems = []
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if args.mixed_precision is None:
        args.mixed_precision = launched
    elif under_deepspeed() and launched not in ("no", args.mixed_precision):
        problems.append(
            f"--mixed_precision={args.mixed_precision}: the accelerate config says mixed_precision: {launched}. Make"
            " both the same, or leave the flag out."
        )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    if steps not in ("auto", "None", ""):
        _agree(args, "gradient_accumulation_steps", int(steps), "gradient_accumulation_steps", problems)
    clipping = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "auto")
    if under_deepspeed() and clipping not in ("auto", "None", "none", ""):
        _agree(args, "max_grad_norm", float(clipping), "gradient_clipping", problems)
    if problems:
        raise ValueError(f"{len(problems)} contradiction(s):\n  " + "\n  ".join(problems))
    if under_deepspeed():
        # accelerate reads these once more from the environment, where a config without them leaves the word "None".
        os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(args.gradient_accumulation_steps)
        os.environ["ACCELERATE_GRADIENT_CLIPPING"] = str(args.max_grad_norm)

    handlers = process_group_handlers()
    if not under_deepspeed():
        handlers.append(DistributedDataParallelKwargs(gradient_as_bucket_view=True))
    accelerator = Accelerator(
        cpu=force_cpu(),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))
        ),
        kwargs_handlers=handlers,
    )
    check_world_size(accelerator.num_processes)
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:
        configure_deepspeed(args, accelerator, plugin.deepspeed_config)
        # transformers would load the text encoder partitioned under ZeRO-3, for an engine that it never gets.
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    elif args.train_mode == "lora" and args.mixed_precision == "bf16":
        # The frozen base runs in bf16 as it is and LoRA layers cast for themselves (see lean_lora): no global
        # autocast, which would run every norm in float32.
        accelerator.native_amp = False
    return accelerator


def _agree(args, flag: str, configured, config_name: str, problems: list[str]) -> None:
    """Take the config's value where the flag was not given; note a contradiction where it was."""
    value = getattr(args, flag)
    if flag in args.explicit and value != configured:
        problems.append(
            f"--{flag}={value}: the config says {config_name}: {configured}. Make both the same, or drop one."
        )
    else:
        setattr(args, flag, configured)


def configure_deepspeed(args, accelerator, config: dict) -> None:
    """Write what the flags decide into the DeepSpeed config; bucket sizes follow in `fit_buckets`.

    Raises:
        ValueError: a flag and the config contradict each other, or the config asks for what the kit cannot do.
    """
    problems = []
    zero = config.setdefault("zero_optimization", {})
    stage = zero.get("stage", 0)
    if args.train_mode == "lora" and stage == 3:
        problems.append(
            "zero_stage: 3 in the accelerate config: a LoRA's few million trainable weights gain nothing from"
            " partitioned parameters, and every step would gather the frozen base. Use zero_stage: 2 (or 1)."
        )
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if stage == 0:
        problems.append("zero_stage: 0 in the accelerate config: use 1 or 2, or no DeepSpeed at all.")
    values = {
        "train_micro_batch_size_per_gpu": ("train_batch_size", args.train_batch_size),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", args.gradient_accumulation_steps),
        "gradient_clipping": ("max_grad_norm", args.max_grad_norm),
        "train_batch_size": (
            "train_batch_size x accumulation x processes",
            args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes,
        ),
    }
    for key, (flag, value) in values.items():
        configured = config.get(key, "auto")
        if configured not in ("auto", None) and float(configured) != float(value):
            problems.append(f"--{flag}={value}: the DeepSpeed config says {key}: {configured}. Make both the same.")
        config[key] = value
    if problems:
        raise ValueError(f"{len(problems)} problem(s) with the DeepSpeed config:\n  " + "\n  ".join(problems))
    # bf16 gradients are added up over micro-steps and ranks in float32: small LoRA gradients round away otherwise.
    if args.mixed_precision == "bf16":
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
        config.setdefault("communication_data_type", "fp32" if args.train_mode == "lora" else "bf16")
    config["zero_allow_untested_optimizer"] = True


def fit_buckets(accelerator, trainable_numel: int) -> None:
    """Size ZeRO's buckets to the trainable parameters; the defaults reserve about 1 GB for 4 MB of LoRA gradients."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        return

    zero = plugin.deepspeed_config["zero_optimization"]
    size = bucket_elements(trainable_numel)
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        if zero.get(key, "auto") in ("auto", None):
            zero[key] = size


def compute_dtype(args) -> torch.dtype:
    """What the transformer computes in."""
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.mixed_precision]


def zero_nonfinite_loss(loss: torch.Tensor, parameters: list, accelerator) -> tuple[torch.Tensor, bool]:
    """For --on_nan=skip: (loss, False), or, if the loss is not finite on any rank, (a zero in its place, True).

    The zero hangs on the parameters themselves: a gradient through the forward pass would be 0 * NaN. Every rank gets
    the same answer, which costs one wait for the device per micro-step; without the flag there is none.
    """
    bad = (~torch.isfinite(loss.detach())).to(torch.float32)
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
    if not bad.item():
        return loss, False
    return sum((parameter.float() * 0.0).sum() for parameter in parameters), True


@contextmanager
def frozen_weights(optimizer, frozen: bool):
    """While inside, updates leave the weights as they are: the learning rate, and with it weight decay, is zero."""
    rates = [group["lr"] for group in optimizer.param_groups]
    if frozen:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    yield
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
