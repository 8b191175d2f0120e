"""Load the parts of a checked model: transformer, VAE, scheduler, text encoder, or all of them as a SanaPipeline."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch

from sana_kit.models.adapter import Lora, apply_lora, read_lora
from sana_kit.models.attention import resolve_attention, set_attention
from sana_kit.models.folder import Model, find_model, has_variant


def dtype_argument(cls, dtype: torch.dtype) -> dict:
    """{"dtype": ...} or {"torch_dtype": ...}: whichever `cls.from_pretrained` of the installed version knows."""
    try:
        source = inspect.getsource(inspect.unwrap(cls.from_pretrained))
    except (OSError, TypeError):
        source = ""
    return {"dtype" if 'pop("dtype"' in source else "torch_dtype": dtype}


def open_text_encoder(model: dict, dtype: torch.dtype, device: torch.device):
    """(tokenizer, text encoder in eval mode on the device) of a SanaPipeline; `model`: from_pretrained's arguments."""
    from transformers import AutoModel, AutoTokenizer, PreTrainedModel

    path, cache = model["pretrained_model_name_or_path"], model["cache_dir"]
    where = {"revision": model["revision"], "cache_dir": cache}
    tokenizer = AutoTokenizer.from_pretrained(path, subfolder="tokenizer", **where)
    text_encoder = AutoModel.from_pretrained(
        path,
        subfolder="text_encoder",
        variant=model["variant"],
        **where,
        **dtype_argument(PreTrainedModel, dtype),
    )
    return tokenizer, text_encoder.to(device).eval().requires_grad_(False)


def open_vae(model: dict, dtype: torch.dtype, device: torch.device):
    """The AutoencoderDC of a SanaPipeline in eval mode on the device."""
    from diffusers import AutoencoderDC

    vae = AutoencoderDC.from_pretrained(
        model["pretrained_model_name_or_path"],
        subfolder="vae",
        revision=model["revision"],
        variant=model["variant"],
        cache_dir=model["cache_dir"],
        **dtype_argument(AutoencoderDC, dtype),
    )
    return vae.to(device).eval().requires_grad_(False)


def _local_base(model: Model) -> Path:
    """The base's folder; a hub name is fetched (or found in the cache) as diffusers itself does it."""
    if model.local:
        return Path(model.base)
    from diffusers import SanaPipeline

    return Path(
        SanaPipeline.download(
            model.base,
            revision=model.revision,
            variant=model.variant,
            cache_dir=model.cache_dir,
            use_safetensors=True,
        )
    )


def load_transformer(model: Model, *, device: torch.device, dtype: torch.dtype):
    """The model's SanaTransformer2DModel on `device`, in eval mode."""
    from diffusers import SanaTransformer2DModel

    folder = model.transformer_folder or _local_base(model) / "transformer"
    variant = has_variant(folder, "diffusion_pytorch_model", model.variant)
    loaded = SanaTransformer2DModel.from_pretrained(
        folder, variant=variant, use_safetensors=True, **dtype_argument(SanaTransformer2DModel, dtype)
    )
    return loaded.to(device).eval().requires_grad_(False)


def _component(model: Model, part: str, stem: str) -> dict:
    """What encodings.py's loaders take, for a part of the base."""
    base = _local_base(model)
    variant = has_variant(base / part, stem, model.variant)
    return {"pretrained_model_name_or_path": str(base), "revision": None, "variant": variant, "cache_dir": None}


def load_vae(model: Model, *, device: torch.device, dtype: torch.dtype):
    """The model's AutoencoderDC on `device`, in eval mode."""

    return open_vae(_component(model, "vae", "diffusion_pytorch_model"), dtype, device)


def load_scheduler(model: Model):
    """The checkpoint's own scheduler, of the class that model_index.json names."""
    import diffusers

    return getattr(diffusers, model.index["scheduler"][1]).from_pretrained(_local_base(model) / "scheduler")


def load_text_encoder(model: Model, *, device: torch.device, dtype: torch.dtype):
    """(tokenizer, text encoder on `device` in eval mode)."""

    return open_text_encoder(_component(model, "text_encoder", "model"), dtype, device)


def text_dtype(dtype: torch.dtype) -> torch.dtype:
    """Gemma 2 computes in bf16 beside a bf16 or fp16 transformer (fp16 overflows in it), in fp32 beside fp32."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def default_vae_dtype(dtype: torch.dtype) -> torch.dtype:
    """bf16, in which DC-AE was trained; fp32 where the whole run is fp32."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def load_pipeline(
    model_path: str | Model,
    *,
    lora_weights: str | Lora | None = None,
    lora_scale: float = 1.0,
    fuse_lora: bool = True,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    vae_dtype: torch.dtype | None = None,
    attention: str = "auto",
    base_model: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    text_encoder: bool = True,
):
    """A SanaPipeline on `device`; everything is checked before the first weights are read.

    Args:
        model_path: diffusers folder, hub name, output folder of a full fine-tuning, or what `find_model` returned.
        lora_weights: adapter file, folder with LORA_FILE, or what `read_lora` returned.
        dtype: of the transformer; vae_dtype defaults to `default_vae_dtype`, the text encoder has `text_dtype`.
        text_encoder: False leaves tokenizer and text encoder out (None), for prompts that are encoded already.

    Raises:
        ValueError: all problems with model, adapter and attention at once.
    """
    from diffusers import SanaPipeline

    problems: list[str] = []
    model = model_path if isinstance(model_path, Model) else None
    if model is None:
        model, problems = find_model(
            model_path, base_model=base_model, revision=revision, variant=variant, cache_dir=cache_dir, dtype=dtype
        )
    lora = lora_weights if isinstance(lora_weights, Lora) else None
    if lora is None and lora_weights is not None and model is not None:
        lora, lora_problems = read_lora(lora_weights, model.transformer_config)
        problems += lora_problems
    try:
        resolve_attention(attention, device)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    tokenizer = encoder = None
    if text_encoder:
        tokenizer, encoder = load_text_encoder(model, device=device, dtype=text_dtype(dtype))
    transformer = load_transformer(model, device=device, dtype=dtype)
    if lora is not None:
        apply_lora(transformer, lora, lora_scale, fuse=fuse_lora)
    set_attention(transformer, attention, device)
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=load_vae(model, device=device, dtype=vae_dtype or default_vae_dtype(dtype)),
        transformer=transformer,
        scheduler=load_scheduler(model),
    )
