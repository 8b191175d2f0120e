"""The trainer's command line: flags, ranges, checks across flags."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from sana_kit.encodings.prompts import parse_instruction
from sana_kit.errors import CheckpointError, Problem, UserError
from sana_kit.files import check_output_folder, expand
from sana_kit.models.attention import ATTENTION_CHOICES, resolve_attention
from sana_kit.models.folder import ModelFields, find_model
from sana_kit.models.weights import meta_transformer
from sana_kit.training.accounts import tracker_problems, upload_problems
from sana_kit.training.checkpoint_folders import find_checkpoint, folder_problems
from sana_kit.training.launch_config import LaunchConfig, settle
from sana_kit.training.optim import OPTIMIZERS, optimizer_problems
from sana_kit.training.recipes import WEIGHTING_SCHEMES

LR_SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
)


TRACKERS = ("tensorboard", "wandb", "comet_ml", "all", "none")


PATH_FLAGS = ("pretrained_model_name_or_path", "cache_dir", "dataset_name", "instance_data_dir", "class_data_dir")
PATH_FLAGS += ("encodings_dir", "output_dir", "resume_from_checkpoint", "complex_human_instruction")
SECRET_FLAGS = ("hub_token",)


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
    add("--dataset_split", help="Split of the data set; default: train, or the only one.")
    add("--instance_data_dir", help="Folder of images; optional caption in a .txt of the same name.")
    add("--image_column", default="image", help="Column of the images.")
    add("--caption_column", help="Column of the captions; without it every image gets --instance_prompt.")
    add("--instance_prompt", help="Caption of images that have none, e.g. 'a photo of TOK dog'.")
    add("--repeats", type=int, default=1, help="Use each image this often per epoch, each time with its own crop.")
    add("--resolution", type=int, default=512, help="Side of the square training images, in pixels.")
    add("--center_crop", action="store_true", help="Crop the centre instead of a random place.")
    add("--random_flip", action="store_true", help="Flip images horizontally at random.")
    add("--skip_bad_images", action="store_true", help="Leave out images that cannot be read (named and counted).")
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
    add("--vae_batch_size", default="auto", help="Images per VAE call; 'auto' fits the free memory.")
    add("--cache_latents", action="store_true", help="Accepted; latents are always encoded once and kept.")
    add("--offload", action="store_true", help="Accepted; VAE and text encoder always leave memory after encoding.")

    group = parser.add_argument_group("prior preservation")
    add = group.add_argument
    add("--with_prior_preservation", action="store_true", help="Add a loss on images of the class.")
    add("--class_data_dir", help="Folder of class images; missing ones are generated there.")
    add("--class_prompt", help="Prompt of the class images.")
    add("--prior_loss_weight", type=float, default=1.0, help="Weight of the prior loss.")
    add("--num_class_images", type=int, default=100, help="How many class images there must be.")
    add("--sample_batch_size", type=int, default=4, help="Images per call when class images are generated.")

    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--seed", type=int, help="Seed of everything; without one a fresh seed is drawn and logged.")
    add("--train_batch_size", type=int, default=4, help="Images per device and micro-step.")
    add("--gradient_accumulation_steps", type=int, default=1, help="Micro-steps per update.")
    add("--num_train_epochs", type=int, default=1, help="Epochs, unless --max_train_steps is given.")
    add("--max_train_steps", type=int, help="Number of updates.")
    add("--gradient_checkpointing", action="store_true", help="Recompute blocks in the backward pass to save memory.")
    add("--gradient_checkpointing_interval", type=int, default=1, help="Recompute every n-th block only.")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="Default: what the accelerate config says.")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on CUDA.")
    add("--attention", choices=ATTENTION_CHOICES, default="auto", help="Kernel of the cross-attention.")
    add("--enable_npu_flash_attention", action="store_true", help="The same as --attention=npu_fusion.")
    add(
        "--fused_blocks",
        choices=("off", "auto"),
        default="off",
        help="Hand-written SANA blocks with fewer passes over memory, where they fit (experimental).",
    )
    add("--compile", action="store_true", help="torch.compile each transformer block (not on NPU).")
    add("--local_rank", type=int, default=-1, help="Set by launchers.")

    group = parser.add_argument_group("flow matching")
    add = group.add_argument
    add("--flow_shift", type=float, help="Time-step shift; default: the checkpoint's own.")
    add("--weighting_scheme", choices=WEIGHTING_SCHEMES, default="none", help="Time steps and weights.")
    add("--logit_mean", type=float, default=0.0, help="Mean of logit_normal.")
    add("--logit_std", type=float, default=1.0, help="Standard deviation of logit_normal.")
    add("--mode_scale", type=float, default=1.29, help="Scale of mode.")

    group = parser.add_argument_group("optimizer")
    add = group.add_argument
    add("--optimizer", default="AdamW", help="One of: " + ", ".join(OPTIMIZERS) + ".")
    add("--learning_rate", type=float, default=1e-4, help="Peak learning rate.")
    add("--scale_lr", action="store_true", help="Multiply the rate by batch size, accumulation and processes.")
    add("--lr_scheduler", default="constant", help="One of: " + ", ".join(LR_SCHEDULERS) + ".")
    add("--lr_warmup_steps", type=int, default=500, help="Updates of warm-up, for schedulers that have one.")
    add("--lr_num_cycles", type=int, default=1, help="Restarts of cosine_with_restarts.")
    add("--lr_power", type=float, default=1.0, help="Power of polynomial.")
    add("--use_8bit_adam", action="store_true", help="The same as --optimizer=adamw8bit.")
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
        help="A loss or gradient that is not finite: stop, or skip the update.",
    )
    add("--max_skipped_updates", type=int, default=20, help="So many skipped updates in a row end the run.")

    group = parser.add_argument_group("checkpoints and output")
    add = group.add_argument
    add("--output_dir", default="sana-dreambooth-lora", help="Everything is written there.")
    add("--checkpointing_steps", type=int, default=500, help="Write checkpoint-N every so many updates.")
    add("--checkpoints_total_limit", type=int, help="Keep at most so many checkpoints.")
    add("--resume_from_checkpoint", help="'latest', checkpoint-N, or a path.")
    add("--overwrite_output_dir", action="store_true", help="Set an earlier run in --output_dir aside and start anew.")
    add("--upcast_before_saving", action="store_true", help="Save the final adapter in float32.")
    add("--push_to_hub", action="store_true", help="Upload the result.")
    add("--hub_token", help="Token for the upload (better: log in beforehand).")
    add("--hub_model_id", help="Repository to upload to; default: the output folder's name.")

    group = parser.add_argument_group("validation")
    add = group.add_argument
    add("--validation_prompt", action="append", help="Prompt of images made during and after training; repeatable.")
    add("--num_validation_images", type=int, default=4, help="Images per prompt and validation.")
    add("--validation_epochs", type=int, default=50, help="Validate every so many epochs.")
    add("--validation_steps", type=int, help="Validate every so many updates instead.")
    add("--validation_resolution", type=int, help="Side of the validation images; default --resolution.")
    add("--validation_inference_steps", type=int, default=20, help="Denoising steps of the validation images.")
    add("--validation_guidance_scale", type=float, default=4.5, help="Guidance scale of the validation images.")
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
    for name in PATH_FLAGS:  # a shell leaves the ~ of --output_dir=~/out as it is
        value = getattr(args, name)
        if value is not None and value.startswith("~"):
            setattr(args, name, str(expand(value)))
    return args


def public_config(args: argparse.Namespace) -> dict:
    """The flags as a plain dict, secrets removed: for logs, trackers, the report and the model card."""
    return {k: v for k, v in vars(args).items() if k not in SECRET_FLAGS and k != "explicit"}


def validate_args(args: argparse.Namespace, device_type: str):
    """Gather every problem that can be seen without loading a weight and raise them all as one ValueError.

    Returns: the `sana_kit.models.Model` that --pretrained_model_name_or_path names.
    """

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
    expect(args.max_skipped_updates >= 1, "max_skipped_updates", "must be at least 1.")
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
    expect(args.lr_scheduler in LR_SCHEDULERS, "lr_scheduler", f"unknown; use one of {', '.join(LR_SCHEDULERS)}.")
    expect(args.report_to in TRACKERS, "report_to", f"unknown; use one of {', '.join(TRACKERS)}.")
    launch = LaunchConfig.read()
    settled, found = settle(launch, args, args.explicit, device_type)
    found += optimizer_problems(args, device_type, launch.deepspeed)
    problems += [problem.text(lambda field: f"--{field}") for problem in found]
    vars(args).update(vars(settled))
    accounts = tracker_problems(args.report_to, args.hub_token)
    accounts += upload_problems(args.push_to_hub, args.hub_model_id, args.hub_token, args.output_dir)
    problems += [problem.text(lambda field: f"--{field}") for problem in accounts]

    # devices and precision
    try:
        resolve_attention(args.attention, torch.device(device_type))
    except UserError as error:
        problems.append(str(error.as_flags()))
    if args.compile:
        expect(device_type != "npu", "compile", "torch.compile has no NPU backend here; leave the flag out.")

    # data
    if args.dataset_name is None and args.instance_data_dir is None:
        problems.append("--dataset_name / --instance_data_dir: neither is given; name the images to train on.")
    if args.dataset_name is not None and args.instance_data_dir is not None:
        problems.append(
            f"--dataset_name={args.dataset_name} and --instance_data_dir={args.instance_data_dir}: give one of them."
        )
    if args.instance_data_dir is not None and args.caption_column is not None:
        expect(False, "caption_column", "columns belong to --dataset_name; captions in a folder are .txt files.")
    if args.dataset_name is not None and args.caption_column is None and args.instance_prompt is None:
        problems.append(
            "--instance_prompt: needed, since no --caption_column is given; every image gets it as caption."
        )
    if args.with_prior_preservation:
        expect(args.class_data_dir is not None, "class_data_dir", "needed with --with_prior_preservation.")
        expect(args.class_prompt is not None, "class_prompt", "needed with --with_prior_preservation.")
        expect(args.num_class_images >= 1, "num_class_images", "must be at least 1.")
    else:
        for flag in ("class_data_dir", "class_prompt"):
            expect(getattr(args, flag) is None, flag, "has no effect without --with_prior_preservation.")

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
        fields=ModelFields(model="pretrained_model_name_or_path", base=None, dtype="mixed_precision", full="no"),
    )
    problems += [problem.text("--{}".format) for problem in found]
    if model is not None:
        problems += _size_and_layer_problems(args, model)

    # output
    problems += [problem.text("--{}".format) for problem in check_output_folder(args.output_dir, "output_dir")]
    if os.environ.get("RANK", "0") == "0":  # other machines may have no such folder
        problems += _checkpoint_problems(args)

    if problems:
        raise ValueError(f"{len(problems)} problem(s) with the arguments:\n  " + "\n  ".join(problems))
    return model


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

    modules = meta_transformer(transformer_config).named_modules()
    return [name for name, module in modules if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]


def _checkpoint_problems(args) -> list[str]:
    """Why the run can neither begin in its output folder nor go on from the checkpoint that it names."""
    output_dir, resume = Path(args.output_dir), args.resume_from_checkpoint
    problems = folder_problems(output_dir, resume, args.overwrite_output_dir)
    if resume not in (None, "latest"):
        try:
            find_checkpoint(output_dir, resume)
        except UserError as error:
            problems += error.problems
        except CheckpointError as error:
            problems.append(Problem("resume_from_checkpoint", resume, str(error)))
    return [problem.text(lambda field: f"--{field}") for problem in problems]


def validation_prompts(args) -> list[str]:
    """The prompts of --validation_prompt, each once."""
    return list(dict.fromkeys(args.validation_prompt or []))


def redacted_command() -> str:
    """The command line of this run without secrets."""
    from sana_kit.model_card import redact_command

    return redact_command(["accelerate", "launch", *sys.argv])
