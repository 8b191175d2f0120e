"""LoRA files: read, check against a transformer's shapes, apply."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import patch_sana
from sana_kit.errors import Problem, UserError
from sana_kit.files import expand, file_sha256, read_header
from sana_kit.models.about import read_about
from sana_kit.models.weights import meta_transformer, some_of

LORA_FILE = patch_sana.ADAPTER_FILE  # diffusers' name, which the trainer writes
FIELD = "lora_weights"
_PREFIX = patch_sana.KEY_PREFIX
_MAGNITUDES = ("lora_magnitude_vector", "dora_scale")  # peft's and kohya's names of DoRA's m


@dataclasses.dataclass
class Lora:
    """An adapter that was checked against a transformer's shapes.

    Attributes:
        weights: as stored, by name without the prefix.
        rank: module -> rank.
        scaling: module -> alpha / rank (or / sqrt(rank) with rsLoRA).
        magnitude: module -> DoRA's m, one value per output; empty for a plain LoRA.
        about: what the file says of its training (`about.read_about`).
    """

    path: Path
    sha256: str
    weights: dict[str, torch.Tensor]
    rank: dict[str, int]
    scaling: dict[str, float]
    magnitude: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    about: dict[str, Any] = dataclasses.field(default_factory=dict)


def lora_file(path: str) -> Path:
    """The adapter file that `path` names: itself, or LORA_FILE in that folder.

    Raises:
        UserError: there is none.
    """
    found = expand(path)
    if found.is_dir():
        found = found / LORA_FILE
        if not found.is_file():
            remedy = "Give the adapter's file or its folder."
            raise UserError(Problem(FIELD, path, f"the folder holds no {LORA_FILE}", remedy))
    if not found.is_file():
        remedy = f"Train an adapter first (its output folder holds {LORA_FILE}), or give the path of one."
        raise UserError(Problem(FIELD, path, "no such file", remedy))
    return found


def read_lora(path: str, transformer_config: dict) -> tuple[Lora | None, list[Problem]]:
    """(Lora, problems) of an adapter file in diffusers' format, checked against the transformer of that config.

    Rank and alpha come from diffusers' `lora_adapter_metadata`, or from `.alpha` tensors; without either alpha is the
    rank, as diffusers takes it. Every tensor must belong to a layer of the transformer and have its shape.
    """
    try:
        return _read_lora(path, transformer_config), []
    except UserError as error:
        return None, list(error.problems)


def _read_lora(path: str, transformer_config: dict) -> Lora:
    file = lora_file(path)
    try:
        read_header(file)  # tells a cut-off file from another kind of file
        adapter = patch_sana.open_adapter(file)
    except (OSError, ValueError) as error:
        reason = f"{file} cannot be used: {error}"
        raise UserError(Problem(FIELD, path, reason, "Adapters are read as safetensors only.")) from None
    modules = dict(meta_transformer(transformer_config).named_modules())
    sorted_out = _sort_out(adapter.tensors, modules)
    problems = [Problem(FIELD, path, *told) for told in _misfits(sorted_out, modules, file)]
    settings, fault = _settings(adapter.lora_config, sorted_out)
    if not problems and fault:
        problems.append(Problem(FIELD, path, fault))
    if problems:
        raise UserError(problems)
    rank = {module: pair["lora_A"].shape[0] for module, pair in sorted_out.pairs.items()}
    scaling = {}
    for module, r in rank.items():
        alpha, stated = _alpha(module, r, settings, sorted_out.alphas)
        if stated != r:
            reason = f"its metadata says rank {stated} for {module}, its tensors have rank {r}"
            raise UserError(Problem(FIELD, path, reason))
        scaling[module] = alpha / (math.sqrt(r) if settings.get("use_rslora") else r)
    weights = {f"{m}.{half}.weight": t for m, pair in sorted_out.pairs.items() for half, t in pair.items()}
    about = read_about(adapter.metadata)
    return Lora(file, file_sha256(file), weights, rank, scaling, sorted_out.magnitudes, about)


@dataclasses.dataclass
class _Sorted:
    """The tensors of a file by what they are; `unknown` are the names of those that belong to no layer."""

    pairs: dict[str, dict[str, torch.Tensor]] = dataclasses.field(default_factory=dict)
    alphas: dict[str, float] = dataclasses.field(default_factory=dict)
    magnitudes: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    unknown: list[str] = dataclasses.field(default_factory=list)
    total: int = 0


def _sort_out(tensors: Mapping[str, torch.Tensor], modules: Mapping[str, torch.nn.Module]) -> _Sorted:
    result = _Sorted(total=len(tensors))
    names = "|".join(("lora_A.weight", "lora_B.weight", "alpha", *_MAGNITUDES))
    pattern = re.compile(rf"{re.escape(_PREFIX)}(.+)\.({names})(?:\.weight)?")
    for name, tensor in tensors.items():
        match = pattern.fullmatch(name)
        module, what = match.groups() if match else ("", "")
        if getattr(modules.get(module), "weight", None) is None:
            result.unknown.append(name)
        elif what == "alpha":
            result.alphas[module] = float(tensor)
        elif what in _MAGNITUDES:
            result.magnitudes[module] = tensor
        else:
            result.pairs.setdefault(module, {})[what.removesuffix(".weight")] = tensor
    return result


def _misfits(found: _Sorted, modules: Mapping[str, torch.nn.Module], file: Path) -> list[tuple[str, str]]:
    """(reason, remedy) for everything that tells the file is not of this transformer."""
    told = []
    if found.unknown:
        reason = f"{len(found.unknown)} of {found.total} tensors belong to no layer of this model"
        remedy = "It is of another model, or in another format than diffusers' (transformer.LAYER.lora_A.weight)."
        told.append((f"{reason}: {some_of(found.unknown)}", remedy))
    wrong = []
    for module, pair in found.pairs.items():
        if len(pair) != 2:
            wrong.append(f"{module} has {next(iter(pair))} only")
            continue
        weight = modules[module].weight.shape
        down, up = (tuple(pair[half].shape) for half in ("lora_A", "lora_B"))
        if down != (down[0], *weight[1:]) or up != (weight[0], down[0], *(1 for _ in weight[2:])):
            wrong.append(f"{module} {tuple(weight)} has lora_A {down} and lora_B {up}")
    for module, magnitude in found.magnitudes.items():
        if module not in found.pairs or magnitude.numel() != modules[module].weight.shape[0]:
            wrong.append(f"{module} has a DoRA magnitude of {tuple(magnitude.shape)}")
    if wrong:
        remedy = "Give the adapter of this model, or the model that it was trained on."
        told.append((f"made for a transformer of other shapes: {some_of(wrong)}", remedy))
    if not found.pairs and not found.unknown:
        told.append((f"{file} holds no adapter weights", ""))
    tensors = {f"{m}.{half}": t for m, pair in found.pairs.items() for half, t in pair.items()}
    tensors |= {f"{m}.{_MAGNITUDES[0]}": t for m, t in found.magnitudes.items()}
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        told.append((f"holds NaN or infinite values in {some_of(bad)}", "Take an earlier checkpoint's adapter."))
    return told


def _settings(config: Mapping[str, Any] | None, found: _Sorted) -> tuple[Mapping[str, Any], str | None]:
    """(peft settings of the adapter, what of them is not supported)."""
    settings = config or {}
    if settings.get("lora_bias"):
        return settings, "adapters with biases (lora_bias) are not supported"
    if settings.get("use_dora") and set(found.magnitudes) != set(found.pairs):
        lacking = sorted(set(found.pairs) - set(found.magnitudes))
        return settings, f"its metadata says DoRA, and it holds no magnitude for {some_of(lacking)}"
    return settings, None


def _alpha(module: str, rank: int, settings: Mapping[str, Any], alphas: Mapping[str, float]) -> tuple[float, int]:
    """(alpha, the rank that the metadata says) of a module."""
    if module in alphas:
        return alphas[module], rank
    alpha = _for_module(settings.get("alpha_pattern"), module, settings.get("lora_alpha", rank))
    return alpha, _for_module(settings.get("rank_pattern"), module, settings.get("r", rank))


def _for_module(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """peft's rank_pattern and alpha_pattern: keys are module names or their ends, or regular expressions."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def check_fusing(lora: Lora, fuse: bool) -> list[Problem]:
    """Problems of keeping an adapter beside the weights."""
    if fuse or not lora.magnitude:
        return []
    return [Problem("no_fuse_lora", None, "a DoRA adapter can only be merged into the weights", "Leave it out.")]


def apply_lora(transformer: torch.nn.Module, lora: Lora, lora_scale: float = 1.0, fuse: bool = True) -> None:
    """Put an adapter on a loaded SanaTransformer2DModel, scaled by alpha / rank and `lora_scale`.

    Fused: W + scaling * B @ A, computed in float32 and rounded once to W's dtype; no adapter stays, so a forward costs
    what the base model's costs. Apart: peft layers beside the base weights, in the transformer's dtype.

    A DoRA adapter (arXiv 2402.09353) gives W' = m * V / |V| with V = W + alpha / rank * B @ A and |V| the norm over
    an output's inputs; `lora_scale` goes from W (0) to W' (1) along a straight line.
    """
    modules = dict(transformer.named_modules())
    if fuse:
        with torch.no_grad():
            for name in lora.scaling:
                weight = modules[name].weight
                weight.copy_(_merged(weight, name, lora, lora_scale))
        return
    if lora.magnitude:
        raise UserError(check_fusing(lora, fuse))
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


def _merged(weight: torch.Tensor, name: str, lora: Lora, lora_scale: float) -> torch.Tensor:
    """The weight of a layer with its adapter, in float32."""
    down = lora.weights[f"{name}.lora_A.weight"].to(weight.device, torch.float32)
    up = lora.weights[f"{name}.lora_B.weight"].to(weight.device, torch.float32)
    # a convolution's A is (r, in, kh, kw) and its B (out, r, 1, 1)
    delta = (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    if name not in lora.magnitude:
        return weight.float() + (lora.scaling[name] * lora_scale) * delta
    magnitude = lora.magnitude[name].to(weight.device, torch.float32).flatten()
    directed = (weight.float() + lora.scaling[name] * delta).flatten(1)
    directed = directed * (magnitude / directed.norm(dim=1))[:, None]
    return weight.float() + lora_scale * (directed.view(weight.shape) - weight.float())
