"""LoRA files: read, check against a transformer's shapes, apply."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path

import torch

from sana_kit.files import read_header
from sana_kit.models.folder import meta_transformer, some_of

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name, which the trainer writes


@dataclasses.dataclass
class Lora:
    """An adapter that was checked against a transformer's shapes. `weights` are as stored, without the prefix."""

    path: Path
    sha256: str
    weights: dict[str, torch.Tensor]
    rank: dict[str, int]  # module -> rank
    scaling: dict[str, float]  # module -> alpha / rank (or / sqrt(rank) with rsLoRA)


def lora_file(path: str) -> tuple[Path | None, str | None]:
    """(file, problem) for `--lora_weights`, which is a file or a folder that holds LORA_FILE."""
    found = Path(path)
    if found.is_dir():
        found = found / LORA_FILE
        if not found.is_file():
            return (
                None,
                f"--lora_weights={path}: the folder holds no {LORA_FILE}. Give the adapter's file or its folder.",
            )
    if not found.is_file():
        return None, (
            f"--lora_weights={path}: no such file. Train an adapter first (its output folder holds {LORA_FILE}), or"
            " give the path of one."
        )
    return found, None


def read_lora(path: str, transformer_config: dict) -> tuple[Lora | None, list[str]]:
    """(Lora, problems) of an adapter file in diffusers' format, checked against the transformer of that config.

    Rank and alpha come from diffusers' `lora_adapter_metadata`, or from `.alpha` tensors; without either alpha is the
    rank, as diffusers takes it. Every tensor must belong to a layer of the transformer and have its shape.
    """
    file, problem = lora_file(path)
    if problem:
        return None, [problem]
    what = f"--lora_weights={path}"
    try:
        tensors, header = read_header(file)
    except (OSError, ValueError) as error:
        return None, [f"{what}: {file} cannot be used: {error}. Adapters are read as safetensors only."]
    modules = dict(meta_transformer(transformer_config).named_modules())
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    alphas, unknown, problems = [], [], []
    for name, (_, shape) in tensors.items():
        match = re.fullmatch(r"transformer\.(.+)\.(lora_A|lora_B)\.weight", name)
        alpha = re.fullmatch(r"transformer\.(.+)\.alpha", name)
        if match and getattr(modules.get(match[1]), "weight", None) is not None:
            pairs.setdefault(match[1], {})[match[2]] = shape
        elif alpha and alpha[1] in modules:
            alphas.append(alpha[1])
        else:
            unknown.append(name)
    if unknown:
        problems.append(
            f"{what}: {len(unknown)} of {len(tensors)} tensors belong to no layer of this model: {some_of(unknown)}."
            " It is of another model, or in another format than diffusers' (transformer.LAYER.lora_A.weight)."
        )
    wrong, rank = [], {}
    for module, shapes in pairs.items():
        if len(shapes) != 2:
            wrong.append(f"{module} has {next(iter(shapes))} only")
            continue
        weight = modules[module].weight.shape
        down, up = shapes["lora_A"], shapes["lora_B"]
        rank[module] = down[0]
        inner, outer = (down[0], *weight[1:]), (weight[0], down[0], *(1 for _ in weight[2:]))
        if down != inner or up != outer:
            wrong.append(f"{module} {tuple(weight)} has lora_A {down} and lora_B {up}")
    if wrong:
        problems.append(
            f"{what}: made for a transformer of other shapes: {some_of(wrong)}. Give the adapter of this model, or"
            " --model_path of the model that it was trained on."
        )
    if not pairs and not unknown:
        problems.append(f"{what}: {file} holds no adapter weights.")
    settings = {}
    if not problems:
        settings, problem = _lora_settings(header)
        if problem:
            problems.append(f"{what}: {problem}")
    if problems:
        return None, problems
    from safetensors.torch import load_file

    stored = load_file(file)
    weights = {name[len("transformer.") :]: tensor for name, tensor in stored.items() if name.endswith(".weight")}
    bad = [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        return None, [f"{what}: holds NaN or infinite values in {some_of(bad)}. Take an earlier checkpoint's adapter."]
    scaling = {}
    for module, r in rank.items():
        if module in alphas:
            alpha = float(stored[f"transformer.{module}.alpha"])
        else:
            alpha = _for_module(settings.get("alpha_pattern"), module, settings.get("lora_alpha", r))
            stated = _for_module(settings.get("rank_pattern"), module, settings.get("r", r))
            if stated != r:
                return None, [f"{what}: its metadata says rank {stated} for {module}, its tensors have rank {r}."]
        scaling[module] = alpha / (math.sqrt(r) if settings.get("use_rslora") else r)
    return Lora(file, hashlib.sha256(file.read_bytes()).hexdigest(), weights, rank, scaling), []


def _lora_settings(header: dict[str, str]) -> tuple[dict, str | None]:
    """(peft settings of the transformer's adapter, problem) from diffusers' safetensors metadata."""
    text = header.get("lora_adapter_metadata")
    if text is None:
        return {}, None
    try:
        settings = {
            key[len("transformer.") :]: value
            for key, value in json.loads(text).items()
            if key.startswith("transformer.")
        }
    except (ValueError, AttributeError):
        return {}, "its lora_adapter_metadata is not JSON."
    if settings.get("use_dora") or settings.get("lora_bias"):
        return {}, "DoRA adapters and adapters with biases are not supported."
    return settings, None


def _for_module(pattern: dict | None, module: str, default):
    """peft's rank_pattern and alpha_pattern: keys are module names or their ends, or regular expressions."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def apply_lora(transformer, lora: Lora, lora_scale: float = 1.0, fuse: bool = True) -> None:
    """Put an adapter on a loaded SanaTransformer2DModel, scaled by alpha / rank and `lora_scale`.

    Fused: W + scaling * B @ A, computed in float32 and rounded once to W's dtype; no adapter stays, so a forward costs
    what the base model's costs. Apart: peft layers beside the base weights, in the transformer's dtype.
    """
    modules = dict(transformer.named_modules())
    if fuse:
        with torch.no_grad():
            for name, scaling in lora.scaling.items():
                weight = modules[name].weight
                down = lora.weights[f"{name}.lora_A.weight"].to(weight.device, torch.float32)
                up = lora.weights[f"{name}.lora_B.weight"].to(weight.device, torch.float32)
                # a convolution's A is (r, in, kh, kw) and its B (out, r, 1, 1)
                delta = (up.flatten(1) @ down.flatten(1)).view(weight.shape)
                weight.copy_(weight.float() + (scaling * lora_scale) * delta)
        return
    from peft import LoraConfig
    from peft.utils import set_peft_model_state_dict

    config = LoraConfig(
        r=1,
        lora_alpha=1,
        target_modules=list(lora.rank),
        rank_pattern=dict(lora.rank),
        alpha_pattern=dict(lora.rank),
        init_lora_weights=False,
    )
    transformer.add_adapter(config, adapter_name="default")
    result = set_peft_model_state_dict(transformer, dict(lora.weights), adapter_name="default")
    assert not result.unexpected_keys, result.unexpected_keys
    modules = dict(transformer.named_modules())
    for name, scaling in lora.scaling.items():
        modules[name].scaling["default"] = scaling * lora_scale
        modules[name].to(transformer.dtype)
    transformer.eval()
