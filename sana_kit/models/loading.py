"""Load the parts of a checked model: transformer, VAE, scheduler, text encoder, or all of them as a SanaPipeline."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from sana_kit.errors import Problem, UserError
from sana_kit.models.adapter import Lora, apply_loras, check_fusing, read_lora
from sana_kit.models.attention import resolve_attention, set_attention
from sana_kit.models.folder import Model, base_of, find_model
from sana_kit.models.members import MEMBERS
from sana_kit.models.quantize import quantize_problems, quantize_weights
from sana_kit.models.weights import TEXT_ENCODER_STEM, TRANSFORMER_STEM, VAE_STEM, has_variant

# The first versions whose from_pretrained knows `dtype`; they and later ones warn of `torch_dtype`.
_DTYPE_SINCE = {"diffusers": Version("0.42"), "transformers": Version("4.56")}


def dtype_argument(library: str, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """{"dtype": ...} or {"torch_dtype": ...}: what the installed library takes."""
    installed = Version(Version(importlib.metadata.version(library)).base_version)
    return {"dtype" if installed >= _DTYPE_SINCE[library] else "torch_dtype": dtype}


def parts_folder(
    model: str, revision: str | None = None, variant: str | None = None, cache_dir: str | None = None
) -> Path:
    """The folder of a model's parts, of a fine-tuned model its base's; a hub name is fetched, or found in the cache.

    diffusers itself fetches it, variant files where a part has them and plain ones where not.
    """
    found = base_of(model, revision)
    if os.path.isdir(found.base):
        return Path(found.base)
    from diffusers import SanaPipeline

    fetched = SanaPipeline.download(
        found.base, revision=found.revision, variant=variant, cache_dir=cache_dir, use_safetensors=True
    )
    return Path(fetched)


def open_text_encoder(model: dict[str, Any], dtype: torch.dtype, device: torch.device) -> tuple[Any, torch.nn.Module]:
    """(tokenizer, text encoder in eval mode on the device) of a SanaPipeline.

    Args:
        model: pretrained_model_name_or_path, revision, variant and cache_dir.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():  # its redrawn bar would fill a log
        disable_progress_bar()

    folder, variant = _place(model)
    tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
    text_encoder = AutoModel.from_pretrained(
        folder,
        subfolder="text_encoder",
        variant=has_variant(folder / "text_encoder", TEXT_ENCODER_STEM, variant),
        **dtype_argument("transformers", dtype),
    )
    return tokenizer, text_encoder.to(device).eval().requires_grad_(False)


def open_vae(model: dict[str, Any], dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """The AutoencoderDC of a SanaPipeline in eval mode on the device; `model` as in `open_text_encoder`."""
    from diffusers import AutoencoderDC

    folder, variant = _place(model)
    vae = AutoencoderDC.from_pretrained(
        folder,
        subfolder="vae",
        variant=has_variant(folder / "vae", VAE_STEM, variant),
        **dtype_argument("diffusers", dtype),
    )
    return vae.to(device).eval().requires_grad_(False)


def _place(model: dict[str, Any]) -> tuple[Path, str | None]:
    """(folder of the parts, variant) of from_pretrained's arguments."""
    variant = model["variant"]
    folder = parts_folder(model["pretrained_model_name_or_path"], model["revision"], variant, model["cache_dir"])
    return folder, variant


def _arguments(model: Model) -> dict[str, Any]:
    """What `open_vae` and `open_text_encoder` take, for the base of a model."""
    return {
        "pretrained_model_name_or_path": model.base,
        "revision": model.revision,
        "variant": model.variant,
        "cache_dir": model.cache_dir,
    }


def load_transformer(model: Model, *, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The model's SanaTransformer2DModel on `device`, in eval mode."""
    from diffusers import SanaTransformer2DModel

    folder = model.transformer_folder
    if folder is None:
        folder = parts_folder(model.base, model.revision, model.variant, model.cache_dir) / "transformer"
    variant = has_variant(folder, TRANSFORMER_STEM, model.variant)
    loaded = SanaTransformer2DModel.from_pretrained(
        folder, variant=variant, use_safetensors=True, **dtype_argument("diffusers", dtype)
    )
    return loaded.to(device).eval().requires_grad_(False)


def load_vae(model: Model, *, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The model's AutoencoderDC on `device`, in eval mode; or that which was named instead of it."""
    if model.vae_part is not None:
        from diffusers import AutoencoderDC

        vae = AutoencoderDC.from_pretrained(**model.vae_part.arguments(), **dtype_argument("diffusers", dtype))
        return vae.to(device).eval().requires_grad_(False)
    return open_vae(_arguments(model), dtype, device)


def load_text_encoder(
    model: Model, *, device: torch.device, dtype: torch.dtype, quantize: str | None = None
) -> tuple[Any, torch.nn.Module]:
    """(tokenizer, text encoder on `device` in eval mode); `quantize` as in `load_pipeline`."""
    if quantize is None:
        return open_text_encoder(_arguments(model), dtype, device)
    tokenizer, encoder = open_text_encoder(_arguments(model), dtype, torch.device("cpu"))
    quantize_weights(encoder, quantize, dtype)
    return tokenizer, encoder.to(device)


SCHEDULERS = ("checkpoint", "flow-dpm", "flow-euler")


def check_scheduler(model: Model, scheduler: str) -> list[Problem]:
    """What is wrong with drawing with a scheduler of `SCHEDULERS`."""
    if scheduler not in SCHEDULERS:
        return [Problem("scheduler", scheduler, "unknown", f"Use one of {', '.join(SCHEDULERS)}.")]
    if model.member.sprint and scheduler != "checkpoint":
        reason = f"{model.member.name} mixes image and noise along a circle (SCMScheduler), not along a line"
        return [Problem("scheduler", scheduler, reason, "Use checkpoint.")]
    if scheduler != "checkpoint" and not {"flow_shift", "shift"} & set(model.scheduler_config):
        reason = f"the checkpoint's {model.scheduler_config.get('_class_name')} names no flow shift to take over"
        return [Problem("scheduler", scheduler, reason, "Use checkpoint.")]
    return []


def draws_along_flow(model: Model, scheduler: str) -> bool:
    """Whether a scheduler of `SCHEDULERS` mixes image and noise linearly, as sigma and 1 - sigma."""
    config = model.scheduler_config
    flow = bool(config.get("use_flow_sigmas")) or str(config.get("_class_name")).startswith("FlowMatch")
    return scheduler != "checkpoint" or flow


def load_scheduler(model: Model, scheduler: str = "checkpoint") -> Any:
    """The scheduler that draws: the checkpoint's own, of the class that model_index.json names, or another.

    Args:
        scheduler: "checkpoint"; "flow-dpm", DPM-Solver++ of order 2 on flow sigmas, as SANA's checkpoints have it; or
            "flow-euler", the first-order solver. Both take the flow shift from the checkpoint's config.

    Raises:
        UserError: a scheduler that does not fit the model.
    """
    import diffusers

    problems = check_scheduler(model, scheduler)
    if problems:
        raise UserError(problems)

    folder = parts_folder(model.base, model.revision, model.variant, model.cache_dir) / "scheduler"
    own = getattr(diffusers, model.index["scheduler"][1]).from_pretrained(folder)
    if scheduler == "checkpoint":
        return own
    shift = own.config.get("flow_shift") or own.config["shift"]
    if scheduler == "flow-euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    return diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        final_sigmas_type="zero",
    )


def text_dtype(dtype: torch.dtype) -> torch.dtype:
    """Gemma 2 computes in bf16 beside a bf16 or fp16 transformer (fp16 overflows in it), in fp32 beside fp32."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def default_vae_dtype(dtype: torch.dtype) -> torch.dtype:
    """bf16, in which DC-AE was trained; fp32 where the whole run is fp32."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def _read_loras(
    lora: str | Lora | Sequence[tuple[Lora, float]] | None, scale: float, model: Model | None
) -> tuple[list[tuple[Lora, float]], list[Problem]]:
    """(adapters with their strengths, problems) of what `load_pipeline` is given as adapters."""
    problems: list[Problem] = []
    if isinstance(lora, str):
        if model is None:  # which is told
            return [], []
        lora, problems = read_lora(lora, model.transformer_config)
    if isinstance(lora, Lora):
        return [(lora, scale)], problems
    return list(lora or ()), problems


def _fit_problems(
    model: Model | None, scheduler: str, attention: str, quantize: str | None, device: torch.device
) -> list[Problem]:
    """What a model, where there is one, or a device cannot do of what is asked."""
    problems = [] if model is None else list(check_scheduler(model, scheduler))
    try:
        resolve_attention(attention, device)
    except UserError as error:
        problems += error.problems
    if quantize is not None:
        problems += quantize_problems(quantize, device, model.transformer_config if model is not None else None)
    return problems


def _pipeline_class(model: Model) -> type[Any]:
    """The pipeline that a model is drawn with."""
    import diffusers

    return diffusers.SanaSprintPipeline if model.member.sprint else diffusers.SanaPipeline


def load_pipeline(
    model_path: str | Model,
    *,
    lora_weights: str | Lora | Sequence[tuple[Lora, float]] | None = None,
    lora_scale: float = 1.0,
    fuse_lora: bool = True,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    vae_dtype: torch.dtype | None = None,
    attention: str = "auto",
    scheduler: str = "checkpoint",
    base_model: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    quantize: str | None = None,
    text_encoder: bool = True,
) -> Any:
    """A SanaPipeline or SanaSprintPipeline on `device`; everything is checked before the first weights are read.

    Args:
        model_path: diffusers folder, hub name, output folder of a full fine-tuning, or what `find_model` returned.
        lora_weights: adapter file, folder with LORA_FILE, what `read_lora` returned, or several of these last, each
            with its strength.
        lora_scale: strength of an adapter that is given without one.
        dtype: of the transformer; vae_dtype defaults to `default_vae_dtype`, the text encoder has `text_dtype`.
        scheduler: see `load_scheduler`.
        quantize: a name of QUANTIZATIONS: how the weights of the transformer's blocks and of the text encoder are
            kept. They are turned on the CPU, after the adapter was merged, so the device never holds them whole.
        text_encoder: False leaves tokenizer and text encoder out (None), for prompts that are encoded already.

    Raises:
        UserError: all problems with model, adapter and attention at once.
    """
    model, problems = model_path, []
    if not isinstance(model, Model):
        where: dict[str, Any] = {"base_model": base_model, "revision": revision, "variant": variant}
        model, problems = find_model(model, dtype=dtype, members=MEMBERS, cache_dir=cache_dir, **where)
    loras, found = _read_loras(lora_weights, lora_scale, model)
    problems += found + [problem for lora, _ in loras for problem in check_fusing(lora, fuse_lora)]
    problems += _fit_problems(model, scheduler, attention, quantize, device)
    if problems:
        raise UserError(problems)
    tokenizer = encoder = None
    if text_encoder:
        tokenizer, encoder = load_text_encoder(model, device=device, dtype=text_dtype(dtype), quantize=quantize)
    transformer = load_transformer(model, device=device if quantize is None else torch.device("cpu"), dtype=dtype)
    if loras:
        apply_loras(transformer, loras, fuse=fuse_lora)
    if quantize is not None:
        quantize_weights(transformer.transformer_blocks, quantize, dtype)
        transformer.to(device)
    set_attention(transformer, attention, device)
    return _pipeline_class(model)(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=load_vae(model, device=device, dtype=vae_dtype or default_vae_dtype(dtype)),
        transformer=transformer,
        scheduler=load_scheduler(model, scheduler),
    )
