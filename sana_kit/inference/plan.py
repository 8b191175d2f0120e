"""Everything about an inference run that is known before weights are loaded: checks, sizes, jobs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch

from sana_kit.encodings.prompts import parse_instruction
from sana_kit.errors import Problem, UserError, setting
from sana_kit.files import check_output_folder
from sana_kit.flags import range_problems
from sana_kit.generation.decode import check_decodable
from sana_kit.generation.jobs import Job, Prompt, group_jobs, plan_jobs
from sana_kit.generation.sizes import generation_size, nearest_bin
from sana_kit.inference.config import DEFAULT_PROMPTS, ImageSettings, InferConfig, LoraSettings, ModelSettings
from sana_kit.inference.inputs import InputPlan, plan_inputs
from sana_kit.inference.prompts import read_prompts
from sana_kit.models.adapter import Lora, adapter_file, check_fusing, parse_adapters, read_lora
from sana_kit.models.attention import resolve_attention
from sana_kit.models.folder import Model, find_model
from sana_kit.models.graphs import device_problems
from sana_kit.models.loading import SCHEDULERS, check_scheduler, default_vae_dtype
from sana_kit.models.members import MEMBERS
from sana_kit.models.parts import OwnPart, find_vae, with_vae
from sana_kit.models.quantize import QUANTIZATIONS, quantize_problems

T = TypeVar("T")
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@dataclasses.dataclass
class Plan:
    """Everything that is known before weights are loaded.

    Attributes:
        loras: the adapters, each with its strength.
        notes: lines for the user.
    """

    model: Model
    loras: list[tuple[Lora, float]]
    dtype: torch.dtype
    vae_dtype: torch.dtype
    instruction: list[str] | None
    jobs: list[Job]
    groups: list[list[Job]]
    notes: list[str]
    controlnet: OwnPart | None
    pag_layers: tuple[int, ...]


class _Checks:
    """Problems as they are found, each once."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems

    def add(self, found: list[Problem]) -> None:
        self.problems += found

    def say(self, field: str, value: object, reason: str, remedy: str = "") -> None:
        self.problems.append(Problem(field, value, reason, remedy))

    def run(self, action: Callable[[], T]) -> T | None:
        """The action's result, None where it has problems."""
        try:
            return action()
        except UserError as error:
            self.add(list(error.problems))
        except ValueError as error:
            self.say("", None, str(error))
        return None

    def end(self) -> None:
        if self.problems:
            raise UserError(dict.fromkeys(self.problems))


def check(config: InferConfig, device: torch.device, device_problem: Problem | None = None) -> Plan:
    """Check all settings, the model's and the adapter's files; plan the jobs. Loads nothing, writes nothing.

    `device_problem`: what was wrong with the device, told with the rest.

    Raises:
        UserError: every problem found.
    """
    checks = _Checks([device_problem] if device_problem else [])
    checks.add(range_problems(config))
    images, notes = config.images, []
    dtype = _DTYPES.get(config.model.dtype, torch.bfloat16)
    vae_dtype = _DTYPES.get(config.model.vae_dtype or "", default_vae_dtype(dtype))
    batch_size = _batch_size(config.run.batch_size, checks)
    if config.model.attention in ("auto", "sdpa", "npu_fusion"):
        checks.run(lambda: resolve_attention(config.model.attention, device))
    prompts = _prompts(images, checks)
    checks.add(check_output_folder(config.run.output_path, "output_path"))
    model = _find_model(config.model, dtype, checks)
    if config.model.quantize in QUANTIZATIONS:  # an unknown one is told with the ranges
        shapes = model.transformer_config if model is not None else None
        checks.add(quantize_problems(config.model.quantize, device, shapes))
    loras = _find_loras(config.lora, model, checks)
    instruction, size = _as_trained(images, loras, model, checks, notes)
    notes += [
        f"Adapter {lora.path.name}: {lora.kind}, {lora.layout} layout, {len(lora.rank)} layers, strength {factor:g}."
        for lora, factor in loras
    ]
    if model is not None:
        notes[:0] = model.notes
        _check_member(images, loras, model, prompts, checks, notes)
        model = _find_vae(config.model, model, checks, notes)
        steps = images.num_inference_steps or model.member.num_inference_steps
        inputs, found = plan_inputs(
            config.inputs, model, prompts, num_inference_steps=steps, scheduler=images.scheduler
        )
        checks.add(found)
        sizes = sorted({(p.height or size[0], p.width or size[1]) for p in prompts})
        checks.add(_graph_problems(config, device, sizes))
        told = [_check_size(*sides, model, images.resolution_binning, checks) for sides in sizes]
        notes += [note for note in told if note]
    checks.end()
    jobs = plan_jobs(
        prompts,
        images.seeds,
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        guidance_scale=model.member.guidance_scale if images.guidance_scale is None else images.guidance_scale,
        negative_prompt=images.negative_prompt,
        takes_negative=not model.member.sprint,
        inputs=inputs.of,
        fingerprint=_fingerprint(config, model, loras, vae_dtype, instruction, inputs),
    )
    asked = sum(len(entry.seeds or images.seeds) for entry in prompts)
    if asked != len(jobs):
        notes.append(f"{asked - len(jobs)} of {asked} images were asked for twice and are made once.")
    groups = group_jobs(jobs, batch_size, device=device, pixels_per_token=model.pixel_multiple**2)
    return Plan(model, loras, dtype, vae_dtype, instruction, jobs, groups, notes, inputs.controlnet, inputs.pag_layers)


def _graph_problems(config: InferConfig, device: torch.device, sizes: list[tuple[int, int]]) -> list[Problem]:
    """Why the steps of this run cannot be recorded as CUDA graphs."""
    if not config.model.cuda_graphs:
        return []
    problems, inputs = device_problems(device), config.inputs
    for wrong, reason in (
        (len(sizes) > 1, f"the images have {len(sizes)} sizes, each of which would hold the memory of a graph"),
        (config.model.fused_blocks != "off", "torch's compiler fuses diffusers' own blocks itself"),
        (config.model.quantize, "it was not tried with weights in few bits"),
        (inputs.controlnet, "it was not tried with a ControlNet"),
        (inputs.pag_scale, "perturbed attention changes the layers between the steps"),
    ):
        if wrong:
            problems.append(Problem("cuda_graphs", None, reason, "Leave one of them out."))
    return problems


def _batch_size(text: str, checks: _Checks) -> int | str:
    if text == "auto" or (text.isdecimal() and int(text) >= 1):
        return text if text == "auto" else int(text)
    checks.say("batch_size", text, "must be auto or a whole number of at least 1")
    return "auto"


def _prompts(images: ImageSettings, checks: _Checks) -> list[Prompt]:
    prompts = []
    for text in images.prompt:
        if text.strip():
            prompts.append(Prompt(text))
        else:
            checks.say("prompt", None, "must not be empty")
    if images.prompts_file is not None or not images.prompt:
        listed, found = read_prompts(images.prompts_file or str(DEFAULT_PROMPTS))
        prompts += listed
        checks.add(found)
    return prompts


def _find_model(settings: ModelSettings, dtype: torch.dtype, checks: _Checks) -> Model | None:
    model, found = find_model(
        settings.model_path,
        base_model=settings.base_model,
        revision=settings.revision,
        variant=settings.variant,
        cache_dir=settings.cache_dir,
        dtype=dtype,
        members=MEMBERS,
    )
    checks.add(found)
    return model


def _find_vae(settings: ModelSettings, model: Model, checks: _Checks, notes: list[str]) -> Model:
    """The model with the VAE that was named, if one was."""
    if settings.vae is None:
        return model
    part, problems, told = find_vae(settings.vae, model)
    checks.add(problems)
    notes += told
    return model if part is None else with_vae(model, part)


def _find_loras(settings: LoraSettings, model: Model | None, checks: _Checks) -> list[tuple[Lora, float]]:
    """The adapters with their strengths."""
    if not settings.lora_weights:
        if settings.lora_scale != 1.0 or not settings.fuse_lora:
            reason = f"they have no effect without {setting('lora_weights')}"
            checks.say("lora_scale and no_fuse_lora", None, reason, "Name an adapter, or leave them out.")
        return []
    loras = []
    for path, factor in checks.run(lambda: parse_adapters(settings.lora_weights)) or []:
        if model is None:
            checks.run(partial(adapter_file, path))
            continue
        lora, found = read_lora(path, model.transformer_config)
        checks.add(found)
        if lora is not None:
            checks.add(check_fusing(lora, settings.fuse_lora))
            loras.append((lora, factor * settings.lora_scale))
    return loras


def _agreed(loras: list[tuple[Lora, float]]) -> tuple[dict[str, Any], list[str]]:
    """(what the adapters say of their training, where those that say it agree; names of what they differ in)."""
    about, apart = {}, []
    for key in ("instruction", "resolution"):
        told = [lora.about[key] for lora, _ in loras if key in lora.about]
        if told and all(value == told[0] for value in told):
            about[key] = told[0]
        elif told:
            apart.append(key)
    return about, apart


def _check_member(
    images: ImageSettings,
    loras: list[tuple[Lora, float]],
    model: Model,
    prompts: list[Prompt],
    checks: _Checks,
    notes: list[str],
) -> None:
    """What only some members of the family can do, and what the user should know of this one."""
    if images.scheduler in SCHEDULERS:  # an unknown one is told with the ranges
        checks.add(check_scheduler(model, images.scheduler))
    if not model.member.sprint:
        return
    if images.negative_prompt:
        reason = f"{model.member.name} takes no negative prompt: its guidance is an input of the model"
        checks.say("negative_prompt", images.negative_prompt, reason, "Leave it out.")
    elif any(prompt.negative_prompt for prompt in prompts):
        notes.append(f"{model.member.name} takes no negative prompt: those of the prompts file are left out.")
    for lora, _ in loras:
        base = str(lora.about.get("base_model") or "a model that its file does not name")
        if "sprint" not in base.lower():
            notes.append(
                f"The LoRA was trained on {base}. Its layers fit {model.member.name} and are used as they are; the"
                " weights beneath have moved since by distillation, so it may act weaker, stronger or otherwise than"
                " on its own model. Compare with --lora_scale."
            )


def _as_trained(
    images: ImageSettings,
    loras: list[tuple[Lora, float]],
    model: Model | None,
    checks: _Checks,
    notes: list[str],
) -> tuple[list[str] | None, tuple[int, int]]:
    """(instruction, (height, width)): what flags say, else what the adapter's file says of its training, and told."""
    about, apart = _agreed(loras)
    chosen, told = images.complex_human_instruction, []
    if chosen is not None:
        instruction = checks.run(lambda: parse_instruction(chosen))
    elif "instruction" in about:
        instruction = about["instruction"] or None
        usual = parse_instruction("default")
        told.append(
            "without an instruction"
            if instruction is None
            else "with SanaPipeline's instruction"
            if instruction == usual
            else "with an instruction of its own"
        )
    else:
        instruction = parse_instruction("default")
    side = model.native_size if model is not None else 1
    if images.height is None and images.width is None and "resolution" in about:
        side = about["resolution"]
        told.append(f"at {side} px")
    height = images.height or images.width or side
    width = images.width or images.height or side
    if apart:
        notes.append(f"The adapters were trained with different {' and '.join(apart)}: the usual one is taken.")
    if told:
        changes = "--complex_human_instruction, --height and --width change that"
        notes.append(f"The LoRA was trained {' '.join(told)}, and is drawn so; {changes}.")
    return instruction, (height, width)


def _fingerprint(
    config: InferConfig,
    model: Model,
    loras: list[tuple[Lora, float]],
    vae_dtype: torch.dtype,
    instruction: list[str] | None,
    inputs: InputPlan,
) -> str:
    """Hex SHA-256 of everything besides a job itself that makes its image."""
    adapters = [[lora.sha256, factor, config.lora.fuse_lora] for lora, factor in loras]
    identity: dict[str, Any] = {
        "model": model.fingerprint,
        "lora": adapters[0] if len(adapters) == 1 else adapters or None,
        "dtype": config.model.dtype,
        "vae_dtype": str(vae_dtype),
        "instruction": instruction,
        "max_sequence_length": config.images.max_sequence_length,
        "binning": config.images.resolution_binning,
    }
    if config.model.fused_blocks != "off":
        identity["fused_blocks"] = config.model.fused_blocks
    if config.model.cuda_graphs:
        identity["cuda_graphs"] = True
    if config.images.scheduler != "checkpoint":
        identity["scheduler"] = config.images.scheduler
    if config.model.quantize is not None:
        identity["quantize"] = config.model.quantize
    if inputs.controlnet is not None:
        identity["controlnet"] = inputs.controlnet.identity
    if inputs.pag_layers:
        identity["pag_layers"] = inputs.pag_layers
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _check_size(height: int, width: int, model: Model, binning: bool, checks: _Checks) -> str | None:
    """A line for the log about one image size; its problems go to `checks`."""
    asked = f"{width}x{height} px"
    if height < 1 or width < 1:
        checks.say("height and width", asked, "must be positive")
        return None
    made = generation_size(height, width, model.transformer_config["sample_size"], binning)
    multiple = model.pixel_multiple
    if made[0] % multiple or made[1] % multiple:
        near = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
        reason = f"must be multiples of {multiple} px for this model"
        checks.say("height and width", asked, reason, f"The nearest is height {near[0]}, width {near[1]}.")
        return None
    try:
        check_decodable(*made, factor=model.vae_factor)
    except ValueError as error:
        checks.say("height and width", asked, str(error))
        return None
    if made != (height, width):
        trained = f"{made[1]}x{made[0]}, the nearest trained size"
        return f"Resolution binning: {width}x{height} is made at {trained}, and resized."
    at_bin = nearest_bin(height, width, model.transformer_config["sample_size"]) == (height, width)
    if binning and not at_bin:
        return f"Resolution binning is off for {width}x{height}: no trained size is near it."
    return None
