"""Everything about an inference run that is known before weights are loaded: checks, sizes, jobs."""

from __future__ import annotations

import dataclasses
import hashlib
import json

from sana_kit.encodings.prompts import parse_instruction
from sana_kit.files import check_output_folder
from sana_kit.generation.decode import check_decodable
from sana_kit.generation.jobs import Prompt, group_jobs, plan_jobs
from sana_kit.generation.sizes import generation_size, nearest_bin
from sana_kit.inference.config import DEFAULT_PROMPTS
from sana_kit.inference.prompts import read_prompts
from sana_kit.models.adapter import lora_file, read_lora
from sana_kit.models.attention import resolve_attention
from sana_kit.models.folder import find_model
from sana_kit.models.loading import default_vae_dtype


@dataclasses.dataclass
class Plan:
    """Everything that is known before weights are loaded."""

    model: object
    lora: object | None
    dtype: object
    vae_dtype: object
    instruction: list[str] | None
    jobs: list
    groups: list
    notes: list[str]


def check(args, device, device_problem: str | None = None) -> Plan:
    """Check all arguments, the model's and the adapter's files; plan the jobs. Loads nothing, writes nothing.

    `device_problem`: what was wrong with --device, told with the rest.

    Raises:
        ValueError: every problem found, one a line.
    """
    import torch

    problems: list[str] = [device_problem] if device_problem else []
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
    dtype = dtypes.get(args.dtype)
    if dtype is None:
        problems.append(f"--dtype={args.dtype}: unknown. Use bf16, fp32 or fp16.")
        dtype = torch.bfloat16
    if args.vae_dtype not in (None, "bf16", "fp32"):
        problems.append(
            f"--vae_dtype={args.vae_dtype}: use bf16 or fp32 (DC-AE was trained in bf16, and fp16 overflows in it)."
        )
    vae_dtype = dtypes.get(args.vae_dtype) or default_vae_dtype(dtype)
    for flag, value, low in (
        ("--num_inference_steps", args.num_inference_steps, 1),
        ("--max_sequence_length", args.max_sequence_length, 1),
    ):
        if value < low:
            problems.append(f"{flag}={value}: must be at least {low}.")
    for flag, value in (("--guidance_scale", args.guidance_scale), ("--lora_scale", args.lora_scale)):
        if not abs(value) < 1e6:
            problems.append(f"{flag}={value}: must be a finite number.")
    for seed in args.seeds:
        if not -(2**63) <= seed < 2**64:
            problems.append(f"--seeds {seed}: out of the range of a 64-bit number.")
    batch_size = args.batch_size
    if batch_size != "auto":
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            problems.append(f"--batch_size={batch_size}: must be auto or a whole number of at least 1.")
            batch_size = "auto"
        else:
            batch_size = int(batch_size)
    instruction = None
    try:
        instruction = parse_instruction(args.complex_human_instruction)
    except ValueError as error:
        problems.append(str(error))
    try:
        resolve_attention(args.attention, device)
    except ValueError as error:
        problems.append(str(error))

    prompts: list = []
    for text in args.prompt or []:
        if text.strip():
            prompts.append(Prompt(text))
        else:
            problems.append("--prompt: must not be empty.")
    if args.prompts_file is not None or not args.prompt:
        listed, found = read_prompts(args.prompts_file or str(DEFAULT_PROMPTS))
        prompts += listed
        problems += found
    problems += [problem.text("--{}".format) for problem in check_output_folder(args.output_path, "output_path")]

    model, found = find_model(
        args.model_path,
        base_model=args.base_model,
        revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
        dtype=dtype,
    )
    problems += found
    lora = None
    if args.lora_weights is not None:
        if model is None:
            _, problem = lora_file(args.lora_weights)
            problems += [problem] if problem else []
        else:
            lora, found = read_lora(args.lora_weights, model.transformer_config)
            problems += found
    elif args.lora_scale != 1.0 or not args.fuse_lora:
        problems.append(
            "--lora_scale and --no_fuse_lora have no effect without --lora_weights. Give it, or leave them out."
        )

    notes: list[str] = []
    jobs: list = []
    if model is not None:
        height = args.height or args.width or model.native_size
        width = args.width or args.height or model.native_size
        sizes = {(entry.height or height, entry.width or width) for entry in prompts}
        for h, w in sorted(sizes):
            size_problems, note = _check_size(h, w, model, args.resolution_binning)
            problems += size_problems
            notes += [note] if note else []
        identity = {
            "model": model.fingerprint,
            "lora": None if lora is None else [lora.sha256, args.lora_scale, args.fuse_lora],
            "dtype": args.dtype,
            "vae_dtype": str(vae_dtype),
            "instruction": instruction,
            "max_sequence_length": args.max_sequence_length,
            "binning": args.resolution_binning,
        }
        if not problems:
            jobs = plan_jobs(
                prompts,
                args.seeds,
                height=height,
                width=width,
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                negative_prompt=args.negative_prompt,
                fingerprint=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
            )
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    asked = sum(len(entry.seeds or args.seeds) for entry in prompts)
    if asked != len(jobs):
        notes.append(f"{asked - len(jobs)} of {asked} images were asked for twice and are made once.")
    groups = group_jobs(jobs, batch_size, device=device, pixels_per_token=model.pixel_multiple**2)
    return Plan(model, lora, dtype, vae_dtype, instruction, jobs, groups, notes)


def _check_size(height: int, width: int, model, binning: bool) -> tuple[list[str], str | None]:
    """(problems, a line for the log) of one image size."""

    if height < 1 or width < 1:
        return [f"--height={height} --width={width}: must be positive."], None
    made = generation_size(height, width, model.transformer_config["sample_size"], binning)
    multiple = model.pixel_multiple
    if made[0] % multiple or made[1] % multiple:
        near = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
        return [
            f"--height={height} --width={width}: must be multiples of {multiple} px for this model; the nearest is"
            f" --height={near[0]} --width={near[1]}."
        ], None
    try:
        check_decodable(*made, factor=model.vae_factor)
    except ValueError as error:
        return [f"--height={height} --width={width}: {error}"], None
    if made != (height, width):
        return [], (
            f"Resolution binning: {width}x{height} is made at {made[1]}x{made[0]}, the nearest trained size, and"
            " resized."
        )
    if binning:
        at_bin = nearest_bin(height, width, model.transformer_config["sample_size"]) == (height, width)
        return [], None if at_bin else f"Resolution binning is off for {width}x{height}: no trained size is near it."
    return [], None
