"""Fine-tune SANA on your own pictures: LoRA (default) or all weights of the transformer.

    accelerate launch --config_file bf16_accelerate_config.yaml train_dreambooth_lora_sana.py \
        --pretrained_model_name_or_path=Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers \
        --dataset_name=pokemon-blip-captions --caption_column=text --instance_prompt="a pokemon" \
        --resolution=1024 --train_batch_size=8 --max_train_steps=5000 --mixed_precision=bf16 --output_dir=output

The accelerate config alone chooses the engine: one process, DDP, DeepSpeed ZeRO-1/2/3; Ascend NPU, CUDA GPU or CPU.
Every flag of diffusers' trainer of the same name is there (`--help` groups them); README.md lists the ones that
behave otherwise.

The way of the data: pictures and captions -> encoded once (sana_kit/encodings.py) -> VAE and text encoder leave
memory -> loader with noise -> transformer -> loss -> engine -> checkpoint-N -> pytorch_lora_weights.safetensors and
report.html.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import logging
import math
import os
import signal
import sys
import time
import warnings
from collections import deque
from contextlib import contextmanager, nullcontext
from pathlib import Path

PROCESS_STARTED = time.perf_counter()  # before the imports that take seconds

import torch  # noqa: E402

from sana_kit import checkpoints, devices, flow_matching  # noqa: E402
from sana_kit.reports import (  # noqa: E402
    JsonLinesLog,
    PhaseClock,
    ThroughputMeter,
    console_bar,
    give_usual_mode,
    refresh_report,
    write_atomic,
)

logger = logging.getLogger("sana")

OPTIMIZERS = ("adamw", "prodigy")
LR_SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
)
TRACKERS = ("tensorboard", "wandb", "comet_ml", "all", "none")
DEFAULT_LORA_LAYERS = ("to_k", "to_q", "to_v")
SECRET_FLAGS = ("hub_token",)
# Padding captions to a multiple keeps the number of distinct shapes small, which compilers and the NPU's kernel cache
# need.
CAPTION_PAD_MULTIPLE = 16
EXIT_INTERRUPTED = {signal.SIGTERM: 143, signal.SIGINT: 130}


# =================================================================================================================
# Command line


class _Parser(argparse.ArgumentParser):
    """argparse that names the nearest flag when one is misspelt."""

    def error(self, message):
        import difflib

        if message.startswith("unrecognized arguments:"):
            known = [option for action in self._actions for option in action.option_strings]
            for word in message.split()[2:]:
                near = difflib.get_close_matches(word.split("=")[0], known, n=1) if word.startswith("--") else []
                if near:
                    message += f"\n  {word.split('=')[0]}: did you mean {near[0]}?"
        self.exit(2, f"{self.prog}: error: {message}\n(--help lists all flags)\n")


def _boolean(text: str) -> bool:
    """'true' or 'false' as a flag's value; diffusers' `type=bool` reads 'False' as True."""
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")


def build_parser() -> argparse.ArgumentParser:
    """All flags, grouped; the names, defaults and meanings of diffusers' trainer come first in each group."""
    parser = _Parser(
        description="Fine-tune SANA (LoRA or full).",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Start it with `accelerate launch`; the launcher finetune_sana_dreambooth_lora_deepspeed_bf16.sh does.",
    )

    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--pretrained_model_name_or_path", required=True, help="Folder of a diffusers SanaPipeline, or its hub name.")
    add("--revision", help="Hub revision of the model.")
    add("--variant", help="Variant of the weight files, e.g. bf16.")
    add("--cache_dir", help="Where downloads are kept.")
    add("--train_mode", choices=("lora", "full"), default="lora", help="Train a LoRA adapter, or every weight.")
    add("--rank", type=int, default=4, help="LoRA rank. (lora)")
    add("--lora_alpha", type=int, default=4, help="LoRA alpha; the update is scaled by alpha / rank. (lora)")
    add("--lora_dropout", type=float, default=0.0, help="Dropout before the LoRA's first matrix. (lora)")
    add("--lora_layers", help="Comma-separated names of linear layers; default to_k,to_q,to_v. (lora)")

    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--dataset_name", help="Hub name, or a local folder: parquet (pokemon-blip-captions layout) or imagefolder.")
    add("--dataset_config_name", help="Config of the hub data set.")
    add("--instance_data_dir", help="Folder of pictures; optional caption in a .txt of the same name.")
    add("--image_column", default="image", help="Column of the pictures.")
    add("--caption_column", help="Column of the captions; without it every picture gets --instance_prompt.")
    add("--instance_prompt", help="Caption of pictures that have none, e.g. 'a photo of TOK dog'.")
    add("--repeats", type=int, default=1, help="Use each picture this often per epoch, each time with its own crop.")
    add("--resolution", type=int, default=512, help="Side of the square training pictures, in pixels.")
    add("--center_crop", action="store_true", help="Crop the centre instead of a random place.")
    add("--random_flip", action="store_true", help="Flip pictures horizontally at random.")
    add("--skip_bad_images", action="store_true", help="Leave out pictures that cannot be read (named and counted).")
    add("--max_sequence_length", type=int, default=300, help="Most caption tokens that reach the transformer.")
    add(
        "--complex_human_instruction",
        default="default",
        help="Instruction before captions: 'default' (SanaPipeline's own), 'none', a JSON list, or a file of lines.",
    )
    add("--dataloader_num_workers", type=int, default=0, help="Worker processes of the loader; 0: in this process.")

    group = parser.add_argument_group("encoding (once, before the first step)")
    add = group.add_argument
    add("--encodings_dir", help="Where latents and prompt embeddings are kept; default output_dir/encodings.")
    add("--vae_dtype", choices=("bf16", "fp32"), default="bf16", help="Dtype of the VAE.")
    add("--vae_batch_size", default="auto", help="Pictures per VAE call; 'auto' fits the free memory.")
    add("--cache_latents", action="store_true", help="Accepted; latents are always encoded once and kept.")
    add("--offload", action="store_true", help="Accepted; VAE and text encoder always leave memory after encoding.")

    group = parser.add_argument_group("prior preservation")
    add = group.add_argument
    add("--with_prior_preservation", action="store_true", help="Add a loss on pictures of the class.")
    add("--class_data_dir", help="Folder of class pictures; missing ones are generated there.")
    add("--class_prompt", help="Prompt of the class pictures.")
    add("--prior_loss_weight", type=float, default=1.0, help="Weight of the prior loss.")
    add("--num_class_images", type=int, default=100, help="How many class pictures there must be.")
    add("--sample_batch_size", type=int, default=4, help="Pictures per call when class pictures are generated.")

    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--seed", type=int, help="Seed of everything; without one a fresh seed is drawn and logged.")
    add("--train_batch_size", type=int, default=4, help="Pictures per device and micro-step.")
    add("--gradient_accumulation_steps", type=int, default=1, help="Micro-steps per update.")
    add("--num_train_epochs", type=int, default=1, help="Epochs, unless --max_train_steps is given.")
    add("--max_train_steps", type=int, help="Number of updates.")
    add("--gradient_checkpointing", action="store_true", help="Recompute blocks in the backward pass to save memory.")
    add("--gradient_checkpointing_interval", type=int, default=1, help="Recompute every n-th block only.")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="Default: what the accelerate config says.")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on CUDA.")
    add("--attention", choices=devices.ATTENTION_CHOICES, default="auto", help="Kernel of the cross-attention.")
    add("--enable_npu_flash_attention", action="store_true", help="The same as --attention=npu_fusion.")
    add("--compile", action="store_true", help="torch.compile each transformer block (not on NPU).")
    add("--local_rank", type=int, default=-1, help="Set by launchers.")

    group = parser.add_argument_group("flow matching")
    add = group.add_argument
    add("--flow_shift", type=float, help="Time-step shift; default: the checkpoint's own.")
    add("--weighting_scheme", choices=flow_matching.WEIGHTING_SCHEMES, default="none", help="Time steps and weights.")
    add("--logit_mean", type=float, default=0.0, help="Mean of logit_normal.")
    add("--logit_std", type=float, default=1.0, help="Standard deviation of logit_normal.")
    add("--mode_scale", type=float, default=1.29, help="Scale of mode.")

    group = parser.add_argument_group("optimizer")
    add = group.add_argument
    add("--optimizer", default="AdamW", help="AdamW or prodigy.")
    add("--learning_rate", type=float, default=1e-4, help="Peak learning rate.")
    add("--scale_lr", action="store_true", help="Multiply the rate by batch size, accumulation and processes.")
    add("--lr_scheduler", default="constant", help="One of: " + ", ".join(LR_SCHEDULERS) + ".")
    add("--lr_warmup_steps", type=int, default=500, help="Updates of warm-up, for schedulers that have one.")
    add("--lr_num_cycles", type=int, default=1, help="Restarts of cosine_with_restarts.")
    add("--lr_power", type=float, default=1.0, help="Power of polynomial.")
    add("--use_8bit_adam", action="store_true", help="bitsandbytes' AdamW8bit (CUDA).")
    add("--adam_beta1", type=float, default=0.9, help="First beta of AdamW and Prodigy.")
    add("--adam_beta2", type=float, default=0.999, help="Second beta of AdamW and Prodigy.")
    add("--adam_weight_decay", type=float, default=1e-04, help="Weight decay.")
    add(
        "--adam_weight_decay_text_encoder",
        type=float,
        default=1e-03,
        help="Accepted; the text encoder is not trained.",
    )
    add("--adam_epsilon", type=float, default=1e-08, help="Epsilon of AdamW and Prodigy.")
    add("--prodigy_beta3", type=float, help="Beta3 of Prodigy.")
    add("--prodigy_decouple", type=_boolean, default=True, help="Decoupled weight decay in Prodigy.")
    add("--prodigy_use_bias_correction", type=_boolean, default=True, help="Bias correction in Prodigy.")
    add("--prodigy_safeguard_warmup", type=_boolean, default=True, help="Prodigy's safeguard during warm-up.")
    add("--max_grad_norm", type=float, default=1.0, help="Clip gradients to this norm; 0: do not clip.")
    add(
        "--on_nan",
        choices=("stop", "skip"),
        default="stop",
        help="A loss that is not finite: stop, or skip the update.",
    )

    group = parser.add_argument_group("checkpoints and output")
    add = group.add_argument
    add("--output_dir", default="sana-dreambooth-lora", help="Everything is written there.")
    add("--checkpointing_steps", type=int, default=500, help="Write checkpoint-N every so many updates.")
    add("--checkpoints_total_limit", type=int, help="Keep at most so many checkpoints.")
    add("--resume_from_checkpoint", help="'latest', checkpoint-N, or a path.")
    add("--upcast_before_saving", action="store_true", help="Save the final adapter in float32.")
    add("--push_to_hub", action="store_true", help="Upload the result.")
    add("--hub_token", help="Token for the upload (better: log in beforehand).")
    add("--hub_model_id", help="Repository to upload to; default: the output folder's name.")

    group = parser.add_argument_group("validation")
    add = group.add_argument
    add("--validation_prompt", action="append", help="Prompt of pictures made during and after training; repeatable.")
    add("--num_validation_images", type=int, default=4, help="Pictures per prompt and validation.")
    add("--validation_epochs", type=int, default=50, help="Validate every so many epochs.")
    add("--validation_steps", type=int, help="Validate every so many updates instead.")
    add("--validation_resolution", type=int, help="Side of the validation pictures; default --resolution.")
    add("--validation_inference_steps", type=int, default=20, help="Denoising steps of the validation pictures.")
    add("--validation_guidance_scale", type=float, default=4.5, help="Guidance scale of the validation pictures.")
    add("--enable_vae_tiling", action="store_true", help="Accepted; decoding is tiled where the size needs it.")

    group = parser.add_argument_group("logging")
    add = group.add_argument
    add("--report_to", default="tensorboard", help="One of: " + ", ".join(TRACKERS) + ".")
    add("--logging_dir", default="logs", help="Folder of the trackers, inside output_dir.")
    add("--logging_steps", type=int, default=10, help="Print and write figures every so many updates.")
    add("--peak_tflops", type=float, help="Dense bf16 peak of one device in TFLOP/s, for MFU where it is not known.")
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse; `args.explicit` is the set of flags that were given, so that they can be told from defaults."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    quiet = build_parser()
    for action in quiet._actions:
        action.default = argparse.SUPPRESS
    args.explicit = set(vars(quiet.parse_args(arguments)))
    if args.enable_npu_flash_attention:
        args.attention = "npu_fusion"
    return args


def public_config(args: argparse.Namespace) -> dict:
    """The flags as a plain dict, secrets removed: for logs, trackers, the report and the model card."""
    return {k: v for k, v in vars(args).items() if k not in SECRET_FLAGS and k != "explicit"}


# =================================================================================================================
# Checks before anything is loaded


def validate_args(args: argparse.Namespace, device_type: str):
    """Gather every problem that can be seen without loading a weight and raise them all as one ValueError.

    Returns: the `sana_kit.models.Model` that --pretrained_model_name_or_path names.
    """
    from sana_kit.models import find_model

    problems = []

    def expect(condition, flag: str, remedy: str) -> None:
        if not condition:
            problems.append(f"--{flag}={getattr(args, flag)}: {remedy}")

    # values
    for flag in (
        "rank",
        "lora_alpha",
        "repeats",
        "train_batch_size",
        "gradient_accumulation_steps",
        "sample_batch_size",
    ):
        expect(getattr(args, flag) >= 1, flag, "must be at least 1.")
    for flag in ("logging_steps", "checkpointing_steps", "num_train_epochs", "gradient_checkpointing_interval"):
        expect(getattr(args, flag) >= 1, flag, "must be at least 1.")
    for flag in ("max_train_steps", "checkpoints_total_limit", "validation_steps", "validation_resolution"):
        value = getattr(args, flag)
        expect(value is None or value >= 1, flag, "must be at least 1.")
    expect(args.max_sequence_length >= 2, "max_sequence_length", "must be at least 2.")
    expect(args.num_validation_images >= 0, "num_validation_images", "must not be negative.")
    expect(args.validation_epochs >= 1, "validation_epochs", "must be at least 1.")
    expect(args.validation_inference_steps >= 1, "validation_inference_steps", "must be at least 1.")
    expect(0 <= args.lora_dropout < 1, "lora_dropout", "must be in [0, 1).")
    expect(args.learning_rate >= 0, "learning_rate", "must not be negative.")
    expect(args.max_grad_norm >= 0, "max_grad_norm", "must not be negative; 0 switches clipping off.")
    expect(args.flow_shift is None or args.flow_shift > 0, "flow_shift", "must be positive.")
    expect(args.seed is None or 0 <= args.seed < 2**63, "seed", "must be a whole number from 0 to 2^63 - 1.")
    expect(args.resolution >= 1, "resolution", "must be positive.")
    auto = args.vae_batch_size == "auto"
    expect(
        auto or (str(args.vae_batch_size).isdigit() and int(args.vae_batch_size) > 0),
        "vae_batch_size",
        "auto or >= 1.",
    )
    expect(args.optimizer.lower() in OPTIMIZERS, "optimizer", f"unknown; use one of {', '.join(OPTIMIZERS)}.")
    expect(args.lr_scheduler in LR_SCHEDULERS, "lr_scheduler", f"unknown; use one of {', '.join(LR_SCHEDULERS)}.")
    expect(args.report_to in TRACKERS, "report_to", f"unknown; use one of {', '.join(TRACKERS)}.")
    if args.use_8bit_adam:
        expect(args.optimizer.lower() == "adamw", "use_8bit_adam", "goes with --optimizer=AdamW only.")
        expect(device_type == "cuda", "use_8bit_adam", f"bitsandbytes needs CUDA, this run is on {device_type}.")
        expect(
            not devices.under_deepspeed(), "use_8bit_adam", "its state cannot be sharded; use AdamW with DeepSpeed."
        )
    if args.optimizer.lower() == "prodigy":
        # Prodigy's distance estimate is a sum over all weights, which a ZeRO rank does not have.
        expect(not devices.under_deepspeed(), "optimizer", "Prodigy cannot run on ZeRO's partitions; use AdamW.")
        expect(_importable("prodigyopt"), "optimizer", "needs the package prodigyopt: pip install prodigyopt.")
    for tracker in ("tensorboard", "wandb", "comet_ml"):
        if args.report_to == tracker:
            expect(_importable(tracker), "report_to", f"the package {tracker} is not installed.")
    if args.report_to == "wandb" and args.hub_token is not None:
        problems.append(
            "--hub_token: must not be given with --report_to=wandb, which may publish it; log in beforehand."
        )

    # devices and precision
    try:
        devices.resolve_attention(args.attention, torch.device(device_type))
    except ValueError as error:
        problems.append(str(error))
    if args.compile:
        expect(device_type != "npu", "compile", "torch.compile has no NPU backend here; leave the flag out.")
    if args.mixed_precision == "fp16":
        expect(device_type != "cpu", "mixed_precision", "fp16 needs an accelerator; use bf16 or no on CPU.")

    # data
    if args.dataset_name is None and args.instance_data_dir is None:
        problems.append("--dataset_name / --instance_data_dir: neither is given; name the pictures to train on.")
    if args.dataset_name is not None and args.instance_data_dir is not None:
        problems.append(
            f"--dataset_name={args.dataset_name} and --instance_data_dir={args.instance_data_dir}: give one of them."
        )
    if args.instance_data_dir is not None and args.caption_column is not None:
        expect(False, "caption_column", "columns belong to --dataset_name; captions in a folder are .txt files.")
    if args.dataset_name is not None and args.caption_column is None and not args.instance_prompt:
        problems.append(
            "--instance_prompt: needed, since no --caption_column is given; every picture gets it as caption."
        )
    if args.with_prior_preservation:
        expect(args.class_data_dir is not None, "class_data_dir", "needed with --with_prior_preservation.")
        expect(args.class_prompt is not None, "class_prompt", "needed with --with_prior_preservation.")
        expect(args.num_class_images >= 1, "num_class_images", "must be at least 1.")
    else:
        for flag in ("class_data_dir", "class_prompt"):
            expect(getattr(args, flag) is None, flag, "has no effect without --with_prior_preservation.")
    from sana_kit.generation import parse_instruction

    try:
        parse_instruction(args.complex_human_instruction)
    except ValueError as error:
        problems.append(str(error))

    # model
    model, found = find_model(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
        dtype=torch.float16 if args.mixed_precision == "fp16" else torch.bfloat16,
        flag="--pretrained_model_name_or_path",
    )
    problems += [problem.replace("--dtype=", "--mixed_precision=").replace("fp32", "no") for problem in found]
    if model is not None:
        problems += _size_and_layer_problems(args, model)

    # output
    problems += _output_problems(args)
    if args.resume_from_checkpoint not in (None, "latest"):
        try:
            checkpoints.find_checkpoint(Path(args.output_dir), args.resume_from_checkpoint)
        except ValueError as error:
            problems.append(str(error))

    if problems:
        raise ValueError(f"{len(problems)} problem(s) with the arguments:\n  " + "\n  ".join(problems))
    return model


def _importable(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def _size_and_layer_problems(args, model) -> list[str]:
    """Problems of flags that depend on the model's configuration: sizes, LoRA layer names."""
    problems = []
    factor = model.pixel_multiple
    for flag in ("resolution", "validation_resolution"):
        value = getattr(args, flag)
        if value and value % factor:
            lower, upper = max(value // factor, 1) * factor, (value // factor + 1) * factor
            problems.append(f"--{flag}={value}: must be a multiple of {factor}, the VAE's factor: {lower} or {upper}.")
    if args.train_mode == "lora" and args.lora_layers is not None:
        linears = _linear_layer_names(model.transformer_config)
        for layer in (part.strip() for part in args.lora_layers.split(",")):
            if not any(full == layer or full.endswith("." + layer) for full in linears):
                ends = sorted(
                    {".".join(full.split(".")[2:]) for full in linears if full.startswith("transformer_blocks")}
                )
                problems.append(
                    f"--lora_layers={args.lora_layers}: '{layer}' matches no linear or convolution layer of the"
                    f" transformer. Names in a block: {', '.join(ends)}."
                )
    return problems


def _linear_layer_names(transformer_config: dict) -> list[str]:
    """Names of the layers that a LoRA can sit on, from the config alone (meta tensors, no memory)."""
    from sana_kit.models import meta_transformer

    modules = meta_transformer(transformer_config).named_modules()
    return [name for name, module in modules if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]


def _output_problems(args) -> list[str]:
    """Whether the output folder can be made and written to; nothing is left behind."""
    output = Path(args.output_dir)
    if output.exists() and not output.is_dir():
        return [f"--output_dir={output}: is a file. Name a folder."]
    existing = output
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    probe = existing / f".write-test-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        return [f"--output_dir={output}: cannot be written to ({error.strerror}). Choose another folder."]
    return []


# =================================================================================================================
# Engine


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
    elif devices.under_deepspeed() and launched not in ("no", args.mixed_precision):
        problems.append(
            f"--mixed_precision={args.mixed_precision}: the accelerate config says mixed_precision: {launched}. Make"
            " both the same, or leave the flag out."
        )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    if steps not in ("auto", "None", ""):
        _agree(args, "gradient_accumulation_steps", int(steps), "gradient_accumulation_steps", problems)
    clipping = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "auto")
    if devices.under_deepspeed() and clipping not in ("auto", "None", "none", ""):
        _agree(args, "max_grad_norm", float(clipping), "gradient_clipping", problems)
    if problems:
        raise ValueError(f"{len(problems)} contradiction(s):\n  " + "\n  ".join(problems))
    if devices.under_deepspeed():
        # accelerate reads these once more from the environment, where a config without them leaves the word "None".
        os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(args.gradient_accumulation_steps)
        os.environ["ACCELERATE_GRADIENT_CLIPPING"] = str(args.max_grad_norm)

    handlers = devices.process_group_handlers()
    if not devices.under_deepspeed():
        handlers.append(DistributedDataParallelKwargs(gradient_as_bucket_view=True))
    accelerator = Accelerator(
        cpu=devices.force_cpu(),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))
        ),
        kwargs_handlers=handlers,
    )
    devices.check_world_size(accelerator.num_processes)
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:
        _configure_deepspeed(args, accelerator, plugin.deepspeed_config)
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


def _configure_deepspeed(args, accelerator, config: dict) -> None:
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
    from sana_kit.flops import bucket_elements

    zero = plugin.deepspeed_config["zero_optimization"]
    size = bucket_elements(trainable_numel)
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        if zero.get(key, "auto") in ("auto", None):
            zero[key] = size


# =================================================================================================================
# Model


def load_transformer(args, accelerator, model):
    """The transformer in the dtype of the run, on the device, with LoRA layers or all weights trainable."""
    from sana_kit import models

    weight_dtype = compute_dtype(args)
    if args.train_mode == "full" and not devices.under_deepspeed():
        weight_dtype = torch.float32  # float32 masters are the weights themselves; autocast computes in bf16
    transformer = models.load_transformer(model, device=accelerator.device, dtype=weight_dtype)
    if args.train_mode == "lora":
        from peft import LoraConfig

        layers = [part.strip() for part in args.lora_layers.split(",")] if args.lora_layers else DEFAULT_LORA_LAYERS
        transformer.add_adapter(
            LoraConfig(
                r=args.rank,
                lora_alpha=args.lora_alpha,
                lora_dropout=args.lora_dropout,
                init_lora_weights="gaussian",
                target_modules=list(layers),
            )
        )
        if devices.under_deepspeed():
            transformer.to(weight_dtype)  # ZeRO keeps the float32 masters
        else:
            for parameter in transformer.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        lean_lora(transformer, accelerator.device.type, weight_dtype)
    else:
        transformer.requires_grad_(True)
    transformer.to(accelerator.device)
    kernel = devices.set_attention(transformer, args.attention, accelerator.device)
    logger.info("cross-attention: %s with a boolean mask built once per forward pass", kernel)
    if args.gradient_checkpointing:
        checkpoint_blocks(transformer, args.gradient_checkpointing_interval)
    if args.compile:
        for block in transformer.transformer_blocks:
            block.compile()  # block by block: one compilation serves all blocks, and parameter names stay
    return transformer


def lean_lora(transformer, device_type: str, dtype: torch.dtype) -> None:
    """Let LoRA layers compute in `dtype` and touch their large input and output once.

    peft casts a layer's whole input to the adapter's float32 (or needs an autocast around the model), then writes the
    update, scales it and adds it in passes over the whole output. Here the small matrices are cast instead, and
    y + s * (x A^T) B^T is one addmm; rounded once, not three times.
    """
    from peft.tuners import lora

    for module in transformer.modules():
        if not isinstance(module, lora.LoraLayer):
            continue
        forward = module.forward
        (name,) = module.active_adapters
        plain = not (getattr(module, "lora_variant", {}) or module.use_dora.get(name)) and not module.merged
        if type(module) is lora.Linear and plain and module.lora_B[name].bias is None:
            forward = functools.partial(_lora_forward, module, name)
        if module.lora_A[name].weight.dtype != dtype:
            module.cast_input_dtype_enabled = False
            forward = torch.autocast(device_type, dtype=dtype)(forward)
        module.forward = forward


def _lora_forward(module, name: str, hidden_states: torch.Tensor) -> torch.Tensor:
    """base(x) + scaling * B(A(dropout(x))) of a peft.tuners.lora.Linear, the sum within the product."""
    base = module.base_layer(hidden_states)
    down = module.lora_A[name](module.lora_dropout[name](hidden_states))
    up = module.lora_B[name].weight
    total = torch.addmm(base.flatten(0, -2), down.flatten(0, -2), up.t(), alpha=module.scaling[name])
    return total.view_as(base)


def checkpoint_blocks(transformer, interval: int) -> None:
    """Recompute every `interval`-th block in the backward pass instead of keeping its activations."""
    from torch.utils.checkpoint import checkpoint

    def recomputed(forward):
        def run(*args, **kwargs):
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        return run

    for index, block in enumerate(transformer.transformer_blocks):
        if index % interval == 0:
            block.forward = recomputed(block.forward)


def create_optimizer(args, parameters: list, device: torch.device):
    """AdamW, AdamW8bit or Prodigy over `parameters`, as the flags say."""
    betas = (args.adam_beta1, args.adam_beta2)
    if args.optimizer.lower() == "prodigy":
        import prodigyopt

        if args.learning_rate <= 0.1:
            logger.warning("--learning_rate=%s is low for Prodigy, which wants about 1.0", args.learning_rate)
        return prodigyopt.Prodigy(
            parameters,
            lr=args.learning_rate,
            betas=betas,
            beta3=args.prodigy_beta3,
            weight_decay=args.adam_weight_decay,
            eps=args.adam_epsilon,
            decouple=args.prodigy_decouple,
            use_bias_correction=args.prodigy_use_bias_correction,
            safeguard_warmup=args.prodigy_safeguard_warmup,
        )
    settings = {
        "lr": args.learning_rate,
        "betas": betas,
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **settings)
    # One fused kernel on CUDA. NPU's fused AdamW forbids reallocated parameters, which ZeRO makes: torch's own there.
    return torch.optim.AdamW(parameters, **settings, fused=True if device.type == "cuda" else None)


# =================================================================================================================
# Data


class TrainingStream(torch.utils.data.Dataset):
    """Training samples by their position in an endless stream: epoch after epoch, each a permutation of all pictures.

    Position p is picture `permutation(epoch p // n)[p % n]`; its noise and time step are drawn from (seed, p). What a
    sample is depends on no rank, batch size or worker, so that a resumed run, on any number of processes, sees exactly
    the samples that an undisturbed one would: none twice and none left out within an epoch.
    """

    def __init__(self, encoded, num_instance: int, num_class: int, *, seed: int, weighting: dict):
        """`encoded[i]`: latents (C, h, w) and prompt_embeds (T, D); class pictures follow the instance pictures."""
        self.encoded, self.num_instance, self.num_class = encoded, num_instance, num_class
        self.seed, self.weighting = seed, weighting
        self._orders = {}

    def picture_index(self, position: int, size: int | None = None, salt: int = 0) -> int:
        """Index of the picture at a position among `size` (default: the instance pictures)."""
        import numpy as np

        size = size or self.num_instance
        epoch, offset = divmod(position, size)
        if (salt, epoch) not in self._orders:
            if len(self._orders) > 4:
                self._orders.clear()
            key = [self.seed & 0xFFFFFFFF, self.seed >> 32, epoch, salt]
            self._orders[(salt, epoch)] = np.random.default_rng(key).permutation(size)
        return int(self._orders[(salt, epoch)][offset])

    def _sample(self, index: int, position: int) -> dict:
        item = self.encoded[index]
        noise, u = flow_matching.draw(
            tuple(item["latents"].shape), seed=self.seed, position=position, **self.weighting
        )
        return {**item, "noise": noise, "u": u}

    def __getitem__(self, position: int) -> list[dict]:
        """The sample at a position, followed by its class sample under prior preservation."""
        samples = [self._sample(self.picture_index(position), 2 * position)]
        if self.num_class:
            index = self.num_instance + self.picture_index(position, self.num_class, salt=1)
            samples.append(self._sample(index, 2 * position + 1))
        return samples


class StreamBatches(torch.utils.data.Sampler):
    """Positions of this rank's micro-batches from `start` on, for `steps` updates."""

    def __init__(self, start: int, steps: int, batch_size: int, accumulation: int, rank: int, world_size: int):
        self.start, self.micro_steps = start, steps * accumulation
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size

    def __len__(self) -> int:
        return self.micro_steps

    def __iter__(self):
        for micro_step in range(self.micro_steps):
            first = self.start + (micro_step * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))


def leave_signals_to_the_trainer(worker: int) -> None:
    """For the loader's processes: a SIGTERM to the whole group must not end them while the trainer finishes its
    step.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def collate(samples: list[list[dict]]) -> dict:
    """Stack samples; instance samples come first, then their class samples.

    Returns: latents (B, C, h, w) in their stored dtype, noise (B, C, h, w) float32, u (B,) float32, prompt_embeds
    (B, T, D) padded to the longest caption, prompt_mask (B, T) int64.
    """
    from sana_kit.encodings import collate_prompt_embeds

    ordered = [sample[part] for part in range(len(samples[0])) for sample in samples]
    embeds, mask = collate_prompt_embeds([s["prompt_embeds"] for s in ordered], multiple=CAPTION_PAD_MULTIPLE)
    return {
        "latents": torch.stack([s["latents"] for s in ordered]),
        "noise": torch.stack([s["noise"] for s in ordered]),
        "u": torch.cat([s["u"] for s in ordered]),
        "prompt_embeds": embeds,
        "prompt_mask": mask,
    }


# =================================================================================================================
# Signals


class StopRequest:
    """SIGTERM and SIGINT ask for a stop after the current step; all ranks agree on which step that is.

    Every step adds up one flag over the ranks and copies it to the host without waiting; the sum of two steps ago is
    looked at, so the device always has work queued and every rank stops at the same step. A second signal ends at
    once.
    """

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self.signal, self.signalled_at = None, 0.0
        self.pending = deque()
        for number in EXIT_INTERRUPTED:
            signal.signal(number, self._on_signal)
        if sys.platform == "linux" and "LOCAL_RANK" in os.environ:
            # A launcher that is killed takes nobody with it: ask the kernel for a SIGTERM then, so that no rank is
            # left.
            import ctypes

            pr_set_pdeathsig = 1
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)

    def _on_signal(self, number, frame):
        if self.signal is not None:
            if time.monotonic() - self.signalled_at > 1.0:
                os._exit(EXIT_INTERRUPTED[number])
            return
        self.signal, self.signalled_at = number, time.monotonic()
        sys.stderr.write(f"\nsignal {number}: finishing this step, then saving; once more to end at once\n")

    def agreed(self) -> bool:
        """Whether the run stops after this step; the same answer on every rank. Call once per step."""
        number = self.signal or 0
        if self.accelerator.num_processes == 1:
            return number != 0
        device = self.accelerator.device
        flag = torch.tensor([number], dtype=torch.int32, device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        if device.type == "cpu":
            host, event = flag, None
        else:
            backend = getattr(torch, device.type)
            host = torch.empty(1, dtype=torch.int32, pin_memory=True)
            host.copy_(flag, non_blocking=True)
            event = backend.Event()
            event.record()
        self.pending.append((host, event))
        if len(self.pending) <= 2:
            return False
        host, event = self.pending.popleft()
        if event is not None:
            event.synchronize()
        agreed = int(host.item())
        if agreed:
            self.signal = self.signal or agreed
        return agreed != 0


# =================================================================================================================
# Validation


class Validation:
    """Pictures of the validation prompts with the live weights: no pipeline is reloaded, every rank draws its
    share.
    """

    def __init__(self, args, accelerator, encoded, base, instruction):
        self.args, self.accelerator, self.base = args, accelerator, base
        self.prompts = validation_prompts(args)
        self.embeddings = {prompt: encoded.prompt(prompt, instruction) for prompt in self.prompts}
        self.negative_embeddings = {"": encoded.prompt("", None)}
        self.vae = None

    def run(self, transformer, step: int) -> list[dict]:
        """Draw, save as PNG below validation/, log to the trackers; every rank calls it.

        Returns: on the main process [{"file", "prompt", "seed"}, ...], file relative to the output folder.
        """
        from accelerate.utils import gather_object

        from sana_kit import models
        from sana_kit.generation import Job, generate_from_embeddings, slug

        args, accelerator = self.args, self.accelerator
        size = args.validation_resolution or args.resolution
        folder = Path(args.output_dir, "validation", f"step-{step:06d}")
        base_seed = args.seed or 0
        jobs = []
        for prompt in self.prompts:
            for number in range(args.num_validation_images):
                index, seed = len(jobs), base_seed + number
                jobs.append(
                    Job(
                        index=index,
                        prompt=prompt,
                        negative_prompt="",
                        seed=seed,
                        height=size,
                        width=size,
                        num_inference_steps=args.validation_inference_steps,
                        guidance_scale=args.validation_guidance_scale,
                        file_name=f"{index:02d}-{slug(prompt)}-seed{seed}.png",
                    )
                )
        if self.vae is None:  # loaded once, kept in host memory between validations
            dtype = devices.DTYPES[args.vae_dtype]
            self.vae = models.load_vae(self.base, device=accelerator.device, dtype=dtype)
        self.vae.to(accelerator.device)
        mine = jobs[accelerator.process_index :: accelerator.num_processes]
        partitioned = any(hasattr(parameter, "ds_id") for parameter in transformer.parameters())
        if (
            partitioned
        ):  # ZeRO-3: each forward is a collective, so all ranks draw all pictures, and the first keeps them
            mine = jobs
        bar = console_bar(
            len(mine) * args.validation_inference_steps,
            "validation",
            main_process=accelerator.is_main_process,
            leave=False,
        )
        done = []

        def keep(job, image, seconds):
            if partitioned and not accelerator.is_main_process:
                return
            png = io.BytesIO()
            image.save(png, format="PNG")
            done.append(({"file": job.file_name, "prompt": job.prompt, "seed": job.seed}, png.getvalue()))

        try:
            generate_from_embeddings(
                transformer=transformer,
                vae=self.vae,
                scheduler=models.load_scheduler(self.base),
                jobs=mine,
                prompt_embeds=self.embeddings,
                negative_prompt_embeds=self.negative_embeddings,
                device=accelerator.device,
                dtype=compute_dtype(args),
                batch_size=1,
                on_picture=keep,
                on_step=bar.update,
            )
        finally:
            bar.close()
            self.vae.to("cpu")
            devices.empty_cache(accelerator.device)
        # Gathered as PNG: the main process writes them all, whether or not machines share the output folder.
        pictures = []
        for entry, png in sorted(gather_object(done), key=lambda pair: pair[0]["file"]):
            path = folder / entry["file"]
            pictures.append({**entry, "file": str(path.relative_to(args.output_dir))})
            if accelerator.is_main_process:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, lambda handle, png=png: handle.write(png))
        if accelerator.is_main_process:
            self._track(pictures, step)
        return pictures

    def _track(self, pictures: list[dict], step: int) -> None:
        import numpy as np
        from PIL import Image

        paths = [Path(self.args.output_dir, entry["file"]) for entry in pictures]
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard" and paths:
                stacked = np.stack([np.asarray(Image.open(path)) for path in paths])
                tracker.writer.add_images("validation", stacked, step, dataformats="NHWC")
            elif tracker.name == "wandb":
                import wandb

                shown = [wandb.Image(str(p), caption=e["prompt"]) for p, e in zip(paths, pictures, strict=True)]
                tracker.log({"validation": shown}, step=step)
            elif tracker.name == "comet_ml":
                for path in paths:
                    tracker.writer.log_image(str(path), name=path.name, step=step)


def validation_prompts(args) -> list[str]:
    """The prompts of --validation_prompt, each once."""
    return list(dict.fromkeys(args.validation_prompt or []))


# =================================================================================================================
# Saving


def write_transformer(accelerator, model, args, folder: Path) -> None:
    """Write a full fine-tuned transformer as a diffusers folder below `folder`; every rank calls it (ZeRO-3
    gathers).
    """
    from huggingface_hub import save_torch_state_dict

    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        transformer = accelerator.unwrap_model(model)
        state = {k: v.to(torch.bfloat16) if args.mixed_precision == "bf16" else v for k, v in state.items()}
        transformer.save_config(folder / "transformer")
        save_torch_state_dict(
            state, folder / "transformer", filename_pattern="diffusion_pytorch_model{suffix}.safetensors"
        )
        base = {"base_model": args.pretrained_model_name_or_path, "revision": args.revision}
        (folder / "sana_kit_base.json").write_text(json.dumps(base), encoding="utf-8")


def upcast_adapter(folder: Path, masters: dict) -> None:
    """Rewrite the adapter file with float32 masters, for --upcast_before_saving under an engine with bf16 weights."""
    from safetensors import safe_open
    from safetensors.torch import save

    path = folder / checkpoints.ADAPTER_FILE
    with safe_open(path, framework="pt") as handle:
        metadata, keys = handle.metadata(), list(handle.keys())
        tensors = {}
        for key in keys:
            name = key.removeprefix("transformer.")
            master = masters.get(name.replace(".weight", ".default.weight"))
            assert master is not None, key
            tensors[key] = master
    write_atomic(path, lambda handle: handle.write(save(tensors, metadata=metadata)))


# =================================================================================================================
# main


def main(args: argparse.Namespace, process_started: float | None = None) -> int:
    """Train; returns the exit code: 0, or 143 / 130 after a SIGTERM / SIGINT that ended the run with a checkpoint.

    Args:
        process_started: time.perf_counter() when this process began, for the summary's start_seconds.
    """
    started = time.perf_counter()
    phases = PhaseClock(started if process_started is None else process_started)
    phases.mark("imports")
    base = validate_args(args, devices.accelerator_type())
    phases.mark("checks")

    # ------------------------------------------------------------------------------------------------- engine, logs
    accelerator = create_accelerator(args)
    phases.mark("processes")
    main_process, device = accelerator.is_main_process, accelerator.device
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        level=logging.INFO if main_process else logging.WARNING,
        force=True,
    )
    for noisy in ("httpx", "DeepSpeed", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    devices.prepare_backend(device, allow_tf32=args.allow_tf32)
    output_dir = Path(args.output_dir)
    from sana_kit.encodings import EncodingStopped

    stop = StopRequest(accelerator)
    with checkpoints.locked_output_dir(output_dir, enabled=main_process):
        try:
            return train(args, accelerator, base, output_dir, started, phases, stop)
        except EncodingStopped:
            logger.warning("stopped while encoding; what is encoded is kept, the same command goes on from there")
            return EXIT_INTERRUPTED.get(stop.signal, EXIT_INTERRUPTED[signal.SIGTERM])


def train(args, accelerator, base, output_dir: Path, started: float, phases: PhaseClock, stop: StopRequest) -> int:
    """The run itself, once the output folder is ours; `base` is the checked model. See `main`."""
    main_process, world_size, device = accelerator.is_main_process, accelerator.num_processes, accelerator.device
    from accelerate.utils import broadcast_object_list
    from diffusers.optimization import get_scheduler

    from patch_sana import check_adapter, create_load_model_hook, create_save_model_hook
    from sana_kit import encodings
    from sana_kit.dataset import (
        bad_picture_problems,
        check_pictures,
        concat,
        load_class_pictures,
        load_pictures,
    )
    from sana_kit.flops import training_flops_per_image
    from sana_kit.generation import parse_instruction
    from sana_kit.models import load_scheduler

    # ------------------------------------------------------------------------------------------- where to start from
    found = [None, [], None]
    if args.resume_from_checkpoint and main_process:
        folder, notes = checkpoints.find_checkpoint(output_dir, args.resume_from_checkpoint)
        found = [str(folder) if folder else None, notes, None]
    if args.seed is None and main_process:
        found[2] = int.from_bytes(os.urandom(4), "little")
    broadcast_object_list(found)
    resume_folder = Path(found[0]) if found[0] else None
    state = checkpoints.read_trainer_state(resume_folder, accelerator) if resume_folder else None
    if args.seed is None:
        args.seed = state["seed"] if state else found[2]
        logger.info("seed: %d (drawn; --seed=%d repeats this run)", args.seed, args.seed)
    devices.seed_everything(args.seed)
    if main_process:
        checkpoints.remove_leftovers(output_dir)
    log = JsonLinesLog(output_dir / "train_log.jsonl", main_process)
    for note in found[1]:
        logger.warning(note)
        log.write("warning", step=0, message=note)
    if args.resume_from_checkpoint == "latest" and resume_folder is None:
        logger.info("no checkpoint in %s yet: starting at step 0", output_dir)

    # ------------------------------------------------------------------------------------- pictures and captions
    pictures = load_pictures(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        instance_data_dir=args.instance_data_dir,
        image_column=args.image_column,
        caption_column=args.caption_column,
        instance_prompt=args.instance_prompt,
        cache_dir=args.cache_dir,
        repeats=args.repeats,
        skip_bad_images=args.skip_bad_images,
    )
    num_class = 0
    if args.with_prior_preservation:
        if not args.skip_bad_images and (
            bad := check_pictures(pictures)
        ):  # before weights load for the class pictures
            raise ValueError("The training pictures cannot be used:\n- " + bad_picture_problems([m for _, m in bad]))
        generate_class_pictures(args, accelerator, base)
        classes = load_class_pictures(args.class_data_dir, args.class_prompt, args.num_class_images)
        num_class = len(classes)
    num_instance = len(pictures)
    if main_process:
        for note in pictures.notes:
            logger.warning("data: %s", note)
            log.write("warning", step=0, message=note)
    instruction = parse_instruction(args.complex_human_instruction)
    extra_prompts = []
    if validation_prompts(args):
        extra_prompts = [(prompt, instruction) for prompt in validation_prompts(args)] + [("", None)]
    encoded = encodings.encode(
        concat(pictures, classes) if num_class else pictures,
        accelerator=accelerator,
        pretrained_model_name_or_path=args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
        store_dir=str(args.encodings_dir or output_dir / "encodings"),
        resolution=args.resolution,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        seed=args.seed,
        max_sequence_length=args.max_sequence_length,
        complex_human_instruction=instruction,
        vae_dtype=devices.DTYPES[args.vae_dtype],
        vae_batch_size=args.vae_batch_size if args.vae_batch_size == "auto" else int(args.vae_batch_size),
        extra_prompts=extra_prompts,
        skip_bad_images=args.skip_bad_images,
        should_stop=lambda: stop.signal is not None,
        log=logger.warning,
    )
    for message in encoded.messages:
        log.write("warning", step=0, message=message)
    if len(encoded) != num_instance + num_class:  # bad pictures were skipped; class rows follow all instance rows
        last_instance_row = max(pictures.row(i) for i in range(num_instance))
        num_instance = sum(encoded.pictures.row(i) <= last_instance_row for i in range(len(encoded)))
        num_class = len(encoded) - num_instance
    logger.info(
        "encodings: %d pictures, %d captions new; %d, %d reused; %.1f s; %.1f MB of latents, %.1f MB of embeddings",
        encoded.encoded_pictures,
        encoded.encoded_prompts,
        encoded.reused_pictures,
        encoded.reused_prompts,
        encoded.seconds,
        encoded.bytes["latents"] / 1e6,
        encoded.bytes["prompts"] / 1e6,
    )

    # ------------------------------------------------------------------------------------------------ model, optimizer
    own_shift = flow_matching.read_flow_shift(load_scheduler(base).config)
    if args.flow_shift is None:
        args.flow_shift = own_shift
    logger.info("flow_shift: %s (the checkpoint's own: %s)", args.flow_shift, own_shift)
    phases.mark("pictures and encodings")
    devices.seed_everything(args.seed)  # the adapter's random start does not depend on what encoding consumed
    transformer = load_transformer(args, accelerator, base)
    phases.mark("transformer")
    named_parameters = [(n, p) for n, p in transformer.named_parameters() if p.requires_grad]
    trainable = sum(p.numel() for _, p in named_parameters)
    transformer_config = dict(transformer.config)
    fit_buckets(accelerator, trainable)
    if args.scale_lr:
        args.learning_rate *= args.gradient_accumulation_steps * args.train_batch_size * world_size
    optimizer = create_optimizer(args, [p for _, p in named_parameters], device)

    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * world_size
    if args.max_train_steps is None:
        args.max_train_steps = math.ceil(args.num_train_epochs * num_instance / samples_per_step)
    # Stepped once per update here, not by accelerate (which steps it once per process): lengths are in updates.
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    transformer.train()
    model, optimizer = accelerator.prepare(transformer, optimizer)

    def unwrap_model(module):
        return accelerator.unwrap_model(module)

    save_hook = None
    if args.train_mode == "lora":
        save_hook = create_save_model_hook(accelerator, unwrap_model, transformer)
        accelerator.register_save_state_pre_hook(save_hook)
        accelerator.register_load_state_pre_hook(create_load_model_hook(accelerator, unwrap_model, transformer, args))

    def write_weights(folder: Path) -> None:
        if args.train_mode == "lora":
            save_hook([model], [], str(folder))
        else:
            write_transformer(accelerator, model, args, folder)

    # ------------------------------------------------------------------------------------------------------- resume
    global_step, samples_seen = 0, 0
    if state is not None:
        if main_process and args.train_mode == "lora":
            check_adapter(str(resume_folder), unwrap_model(model), same_weights=False)
        random_state = checkpoints.load_checkpoint(
            resume_folder,
            accelerator=accelerator,
            model=model,
            optimizer=optimizer,
            named_parameters=named_parameters,
            trainer_state=state,
            device=device,
        )
        if main_process and args.train_mode == "lora":  # the adapter file and the masters must say the same
            check_adapter(str(resume_folder), unwrap_model(model), same_weights=True)
        global_step, samples_seen = state["global_step"], state["samples_seen"]
        with warnings.catch_warnings():  # torch warns that no optimizer step came before
            warnings.simplefilter("ignore", UserWarning)
            for _ in range(global_step):
                lr_scheduler.step()
        for warning in differences(state["run"], run_identity(args, num_instance, world_size)):
            logger.warning(warning)
            log.write("warning", step=global_step, message=warning)
        logger.info("resumed from %s: step %d, %d samples seen", resume_folder.name, global_step, samples_seen)
    else:
        random_state = None
    if random_state is None:  # dropout differs between ranks, and goes on differently after a change of world size
        devices.seed_everything((args.seed * 1_000_003 + 97 * global_step + accelerator.process_index) % 2**63)
    else:
        devices.set_random_state(random_state, device)

    # ------------------------------------------------------------------------------------------------------- loader
    stream = TrainingStream(
        encoded,
        num_instance,
        num_class,
        seed=args.seed,
        weighting={k: getattr(args, k) for k in ("weighting_scheme", "logit_mean", "logit_std", "mode_scale")},
    )
    steps_left = max(args.max_train_steps - global_step, 0)
    batches = StreamBatches(
        samples_seen,
        steps_left,
        args.train_batch_size,
        args.gradient_accumulation_steps,
        accelerator.process_index,
        world_size,
    )
    workers = args.dataloader_num_workers
    loader = torch.utils.data.DataLoader(
        stream,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        persistent_workers=workers > 0,
        pin_memory=device.type != "cpu",
        worker_init_fn=leave_signals_to_the_trainer,
        generator=torch.Generator(),  # the loader's own draw must not move the state that dropout continues from
    )

    # ----------------------------------------------------------------------------------------------------- reporting
    config = {
        **public_config(args),
        "command": redacted_command(),
        "device": devices.device_name(device),
        "world_size": world_size,
    }
    log.write("resume" if state else "start", step=global_step, world_size=world_size, config=config)
    if args.report_to != "none":
        trackable = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in config.items()}
        accelerator.init_trackers("sana-dreambooth-lora", config=trackable)
    validation = None
    if validation_prompts(args) and args.num_validation_images > 0:
        validation = Validation(args, accelerator, encoded, base, instruction)
    latents_shape = tuple(encoded[0]["latents"].shape)
    caption_tokens = float(encoded.prompt_tokens().mean())
    flops_per_image = training_flops_per_image(
        transformer_config,
        latents_shape[1:],
        caption_tokens,
        mode=args.train_mode,
        gradient_checkpointing=False,  # MFU counts the model's work, not the recomputation
    ) * (2 if num_class else 1)
    peak = args.peak_tflops * 1e12 if args.peak_tflops else devices.peak_flops(devices.device_name(device))
    logger.info("pictures: %d (+ %d of the class), trainable weights: %d", num_instance, num_class, trainable)
    logger.info(
        "updates: %d of %d pictures (%d per device x %d accumulation x %d processes), %.2f epochs",
        args.max_train_steps,
        samples_per_step,
        args.train_batch_size,
        args.gradient_accumulation_steps,
        world_size,
        args.max_train_steps * samples_per_step / num_instance,
    )

    def report_page() -> None:
        if main_process:
            refresh_report(output_dir, log, global_step)

    def validate() -> None:
        with meter.paused(), bar.paused() if bar is not None else nullcontext():
            shown = validation.run(unwrap_model(model), global_step)
            log.write(
                "validation",
                step=global_step,
                files=[entry["file"] for entry in shown],
                prompts=[entry["prompt"] for entry in shown],
                seeds=[entry["seed"] for entry in shown],
            )
            report_page()

    def save() -> Path:
        with meter.paused(), bar.paused():
            folder, seconds = checkpoints.save_checkpoint(
                output_dir,
                accelerator=accelerator,
                model=model,
                optimizer=optimizer,
                named_parameters=named_parameters,
                trainer_state={
                    "global_step": global_step,
                    "samples_seen": samples_seen,
                    "epoch": samples_seen / num_instance,
                    "seed": args.seed,
                    "learning_rate": lr_scheduler.get_last_lr()[0],
                    "run": run_identity(args, num_instance, world_size),
                },
                random_state=devices.random_state(device),
                write_weights=write_weights,
                keep=args.checkpoints_total_limit,
            )
            log.write("checkpoint", step=global_step, path=folder.name, seconds=round(seconds, 3))
            report_page()
        return folder

    phases.mark("engine, checkpoint")
    # -------------------------------------------------------------------------------------------------------- train
    meter, bar = ThroughputMeter(samples_per_step), None
    meter.start()
    if validation is not None and global_step == 0:
        validate()  # what the model draws before it has learnt anything: the first row of the report
        phases.mark("first validation")
    first_step = global_step + 1
    bar = console_bar(
        args.max_train_steps,
        "training",
        initial=global_step,
        images_per_unit=samples_per_step,
        main_process=main_process,
    )
    devices.reset_peak_memory(device)
    interval = []  # losses since the last report, on the device: reading them would wait for it
    trained, skipped_updates = [p for _, p in named_parameters], 0
    last_saved, final_loss, interrupted, grad_norm = global_step, None, False, None
    batch_iterator = iter(loader)
    meter.start()  # once more: the first validation does not count
    while global_step < args.max_train_steps:
        step_loss, skip_update = torch.zeros((), dtype=torch.float32, device=device), False
        for _ in range(args.gradient_accumulation_steps):
            batch = {k: v.to(device, non_blocking=True) for k, v in next(batch_iterator).items()}
            with accelerator.accumulate(model):
                loss = flow_matching_loss(model, batch, args, num_class > 0)
                step_loss += loss.detach() / args.gradient_accumulation_steps
                if args.on_nan == "skip":
                    loss, bad = leave_out_if_not_finite(loss, trained, accelerator)
                    skip_update = skip_update or bad
                with frozen_weights(optimizer, skip_update):  # DeepSpeed's engine steps inside backward
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and not devices.under_deepspeed() and args.max_grad_norm > 0:
                        # Under DeepSpeed the engine clips: its gradient_clipping comes from --max_grad_norm.
                        grad_norm = accelerator.clip_grad_norm_(trained, args.max_grad_norm)
                    optimizer.step()
                optimizer.zero_grad()
        skipped_updates += skip_update
        lr_scheduler.step()
        global_step += 1
        samples_seen += samples_per_step
        interval.append(step_loss)
        meter.step()
        bar.update(1)
        if global_step == first_step:
            devices.synchronize(device)
            phases.mark("first step")
            logger.info("first step after %s", phases)
        interrupted = stop.agreed()

        # After the first step the only place where the host waits for the device.
        if global_step % args.logging_steps == 0 or global_step == args.max_train_steps or interrupted:
            losses = accelerator.reduce(torch.stack(interval), reduction="mean").tolist()
            interval.clear()
            check_finite(losses, samples_seen, stream, samples_per_step, global_step, last_saved, args, log)
            finite = [value for value in losses if math.isfinite(value)]
            final_loss = sum(finite) / len(finite) if finite else float("nan")
            rate = meter.lap()
            if devices.under_deepspeed():
                grad_norm = model.get_global_grad_norm()
            figures = {
                "loss": final_loss,
                "loss_max": max(finite, default=None),  # a spike of one step would drown in the mean of the interval
                "learning_rate": lr_scheduler.get_last_lr()[0],
                "images_per_second": rate,
                "peak_memory_bytes": devices.peak_memory_bytes(device),
                "mfu": rate * flops_per_image / (peak * world_size) if peak and rate else None,
                "grad_norm": float(grad_norm) if grad_norm is not None else None,
            }
            log.write("step", step=global_step, epoch=samples_seen / num_instance, **figures)
            accelerator.log({k: v for k, v in figures.items() if v is not None}, step=global_step)
            bar.set_postfix(
                loss=f"{final_loss:.4f}",
                lr=f"{figures['learning_rate']:.1e}",
                memory=f"{figures['peak_memory_bytes'] / 2**30:.2f}GiB",
            )

        if interrupted:
            break
        if global_step % args.checkpointing_steps == 0:
            if (
                interval and args.on_nan == "stop"
            ):  # between two reports: nothing that is not a number may get into a checkpoint
                losses = accelerator.reduce(torch.stack(interval), reduction="mean").tolist()
                check_finite(losses, samples_seen, stream, samples_per_step, global_step, last_saved, args, log)
            save()
            last_saved = global_step
        if validation is not None and validation_due(args, global_step, samples_seen, samples_per_step, num_instance):
            validate()
    bar.close()

    # ---------------------------------------------------------------------------------------------------------- end
    if interrupted:
        if last_saved != global_step:
            save()
        logger.warning(
            "stopped by signal %d after step %d; --resume_from_checkpoint=latest goes on from there",
            stop.signal,
            global_step,
        )
        log.write("warning", step=global_step, message=f"stopped by signal {stop.signal}")
    else:
        write_final_weights(args, accelerator, model, optimizer, named_parameters, write_weights, output_dir)
        if validation is not None:
            validate()
    summary = {
        "images_per_second": meter.steady_images_per_second(),
        "iterations_per_second": meter.steady_steps_per_second(),
        "steady_state_note": meter.steady_reason,
        "final_loss": final_loss,
        "duration_seconds": time.perf_counter() - started,
        "encode_seconds": encoded.seconds,
        "start_seconds": {phase: round(seconds, 3) for phase, seconds in phases.seconds.items()},
        "global_step": global_step,
        "world_size": world_size,
        "batch_size": args.train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "resolution": args.resolution,
        "mixed_precision": args.mixed_precision,
        "train_mode": args.train_mode,
        "device": devices.device_name(device),
        "device_type": device.type,
        "peak_memory_bytes": devices.peak_memory_bytes(device),
        "flops_per_image": flops_per_image,
        "skipped_updates": skipped_updates,
        "interrupted_by_signal": stop.signal if interrupted else None,
    }
    if main_process:
        write_atomic(output_dir / "summary.json", lambda handle: handle.write(json.dumps(summary, indent=1).encode()))
        log.write("end", step=global_step, summary=summary)
        report_page()
        if not interrupted:
            finish_outputs(args, output_dir, validation)
        print_summary(summary)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    log.close()
    return EXIT_INTERRUPTED[stop.signal] if interrupted else 0


# =================================================================================================================
# Steps of main


def flow_matching_loss(model, batch: dict, args, with_prior: bool) -> torch.Tensor:
    """The loss of one micro-batch, float32 scalar: mean over instance samples, plus the weighted prior loss."""
    sigma = flow_matching.shifted_sigma(batch["u"], args.flow_shift)  # (B,)
    noisy, target = flow_matching.add_noise(batch["latents"], batch["noise"], sigma)  # (B, C, h, w), float32
    dtype = compute_dtype(args)
    prediction = model(
        hidden_states=noisy.to(dtype),
        encoder_hidden_states=batch["prompt_embeds"].to(dtype),
        encoder_attention_mask=batch["prompt_mask"],
        timestep=sigma * flow_matching.NUM_TRAIN_TIMESTEPS,
        return_dict=False,
    )[0]
    losses = flow_matching.loss_per_sample(prediction, target, sigma, args.weighting_scheme)  # (B,)
    if not with_prior:
        return losses.mean()
    instance, prior = losses.chunk(2)
    return instance.mean() + args.prior_loss_weight * prior.mean()


def compute_dtype(args) -> torch.dtype:
    """What the transformer computes in."""
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.mixed_precision]


def leave_out_if_not_finite(loss: torch.Tensor, parameters: list, accelerator) -> tuple[torch.Tensor, bool]:
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


def check_finite(losses, samples_seen, stream, samples_per_step, global_step, last_saved, args, log) -> None:
    """Stop on a loss that is not finite: names the step, its pictures and the last good checkpoint.

    Raises:
        FloatingPointError: on every rank, since the losses were averaged over all of them.
    """
    for offset, value in enumerate(losses):
        if math.isfinite(value):
            continue
        step = global_step - len(losses) + offset + 1
        start = samples_seen - (len(losses) - offset) * samples_per_step
        indices = [stream.picture_index(position) for position in range(start, start + samples_per_step)]
        message = f"loss {value} at step {step}, pictures {indices[:64]}"
        if args.on_nan == "skip":
            logger.warning("%s: update skipped", message)
            log.write("warning", step=step, message=message + ": update skipped")
            continue
        good = f"checkpoint-{last_saved}" if last_saved else "none was written"
        log.write("warning", step=step, message=f"{message}; last good checkpoint: {good}")
        raise FloatingPointError(
            f"{message}. Last good checkpoint: {good}. Lower --learning_rate, look at those pictures, or use"
            " --on_nan=skip."
        )


def validation_due(args, step: int, samples_seen: int, samples_per_step: int, num_pictures: int) -> bool:
    """Whether a validation belongs after this step: every --validation_steps, else as --validation_epochs pass."""
    if step >= args.max_train_steps:
        return False  # the final validation follows
    if args.validation_steps is not None:
        return step % args.validation_steps == 0
    per_validation = args.validation_epochs * num_pictures
    return samples_seen // per_validation > (samples_seen - samples_per_step) // per_validation


def run_identity(args, num_pictures: int, world_size: int) -> dict:
    """What a resumed run should share with the one that wrote the checkpoint."""
    keys = (
        "pretrained_model_name_or_path",
        "train_mode",
        "rank",
        "lora_alpha",
        "lora_layers",
        "resolution",
        "flow_shift",
    )
    keys += ("weighting_scheme", "train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler")
    keys += ("max_train_steps", "seed", "mixed_precision", "lora_dropout", "optimizer")
    return {**{key: getattr(args, key) for key in keys}, "pictures": num_pictures, "world_size": world_size}


def differences(before: dict, now: dict) -> list[str]:
    """One sentence per setting that differs from the checkpoint's."""
    return [
        f"{key} was {before[key]} when the checkpoint was written and is {now[key]} now"
        for key in now
        if key in before and before[key] != now[key]
    ]


def write_final_weights(
    args, accelerator, model, optimizer, named_parameters, write_weights, output_dir: Path
) -> None:
    """The adapter (or transformer/) in the output folder, written beside and renamed."""
    import shutil

    masters = {}
    if args.upcast_before_saving and args.train_mode == "lora":
        keep = accelerator.is_main_process
        for key, tensor in checkpoints.collect_optimizer_state(model, optimizer, named_parameters, keep):
            if keep and key.endswith("|master"):
                masters[key.removesuffix("|master")] = tensor
    partial = output_dir / ".final.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    write_weights(partial)
    if accelerator.is_main_process:
        if masters:
            upcast_adapter(partial, masters)
        give_usual_mode(path for path in partial.rglob("*") if path.is_file())
        for path in sorted(partial.iterdir()):
            target = output_dir / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
        partial.rmdir()
    accelerator.wait_for_everyone()


def generate_class_pictures(args, accelerator, base) -> None:
    """Fill --class_data_dir up to --num_class_images with pictures of --class_prompt, each rank its share."""
    from sana_kit import generation
    from sana_kit.models import load_pipeline

    folder = Path(args.class_data_dir)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    suffixes = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
    present = len([path for path in folder.iterdir() if path.suffix.lower() in suffixes])
    missing = args.num_class_images - present
    accelerator.wait_for_everyone()  # every rank has counted before one adds
    if missing <= 0:
        return
    logger.info("prior preservation: %d pictures in %s, generating %d", present, folder, missing)
    pipeline = load_pipeline(
        base,
        device=accelerator.device,
        dtype=torch.float32 if args.mixed_precision == "no" else torch.bfloat16,
        attention=args.attention,
    )
    jobs = [
        generation.Job(
            index=number,
            prompt=args.class_prompt,
            negative_prompt="",
            seed=(args.seed or 0) + present + number,
            height=args.resolution,
            width=args.resolution,
            num_inference_steps=args.validation_inference_steps,
            guidance_scale=args.validation_guidance_scale,
            file_name=f"class-{present + number:05d}.png",
        )
        for number in range(missing)
    ][accelerator.process_index :: accelerator.num_processes]
    instruction = generation.parse_instruction(args.complex_human_instruction)
    embeddings, negative_embeddings = generation.encode_job_prompts(
        pipeline, jobs, instruction, device=accelerator.device, max_sequence_length=args.max_sequence_length
    )
    generation.generate_from_embeddings(
        transformer=pipeline.transformer,
        vae=pipeline.vae,
        scheduler=pipeline.scheduler,
        jobs=jobs,
        prompt_embeds=embeddings,
        negative_prompt_embeds=negative_embeddings,
        device=accelerator.device,
        dtype=pipeline.transformer.dtype,
        batch_size=args.sample_batch_size,
        on_picture=lambda job, image, seconds: write_atomic(
            folder / job.file_name, lambda target: image.save(target, format="PNG")
        ),
    )
    del pipeline
    devices.empty_cache(accelerator.device)
    accelerator.wait_for_everyone()
    there = len([path for path in folder.iterdir() if path.suffix.lower() in suffixes])
    if there < args.num_class_images:
        raise ValueError(
            f"--class_data_dir={folder}: holds {there} of {args.num_class_images} class pictures on this machine. The"
            " machines of a run must share this folder, or each must have all class pictures beforehand."
        )


def finish_outputs(args, output_dir: Path, validation) -> None:
    """Model card, and the upload where it was asked for."""
    from sana_kit import model_card

    model_card.write_model_card(
        output_dir,
        base_model=args.pretrained_model_name_or_path,
        dataset=args.dataset_name or args.instance_data_dir,
        instance_prompt=args.instance_prompt,
        validation_prompts=validation.prompts if validation else [],
        command=redacted_command(),
        train_mode=args.train_mode,
        rank=args.rank if args.train_mode == "lora" else None,
        lora_alpha=args.lora_alpha if args.train_mode == "lora" else None,
    )
    if args.push_to_hub:
        model_card.push(output_dir, args.hub_model_id or output_dir.name, args.hub_token)


def redacted_command() -> str:
    """The command line of this run without secrets."""
    from sana_kit.model_card import redact_command

    return redact_command(["accelerate", "launch", *sys.argv])


def print_summary(summary: dict) -> None:
    """The last lines on the console."""
    rate = summary["images_per_second"]
    shown = f"{rate:.2f} images/s" if rate else f"no steady state ({summary['steady_state_note']})"
    loss = summary["final_loss"]
    print(
        f"steps {summary['global_step']}, {shown}, final loss {loss if loss is None else round(loss, 4)}, duration"
        f" {summary['duration_seconds']:.1f} s (encoding {summary['encode_seconds']:.1f} s)",
        flush=True,
    )


def is_users_problem(problem: RuntimeError) -> bool:
    """Whether the message alone tells a user what to do; of other errors the traceback is needed."""
    from sana_kit.encodings import StoreError

    return isinstance(problem, (checkpoints.CheckpointError, StoreError))


if __name__ == "__main__":
    try:
        sys.exit(main(parse_args(), PROCESS_STARTED))
    except (ValueError, RuntimeError, FloatingPointError) as problem:
        if isinstance(problem, RuntimeError) and not is_users_problem(problem):
            raise
        # A user's error: its message is the help; a traceback would bury it. All ranks see the same one: rank 0 tells
        # it.
        if int(os.environ.get("RANK", "0")) == 0 or isinstance(problem, checkpoints.CheckpointError):
            sys.stderr.write(f"\nerror: {problem}\n")
            if os.environ.get(
                "SANA_ERROR_FILE"
            ):  # the launcher shows it once more, below the launcher's own traceback
                Path(os.environ["SANA_ERROR_FILE"]).write_text(f"error: {problem}\n", encoding="utf-8")
        sys.exit(1)
