"""LoRA files: read, check against a transformer's shapes, apply."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sana_kit.errors import Problem, UserError
from sana_kit.files import expand, file_sha256
from sana_kit.models.about import read_about
from sana_kit.models.factors import KINDS, check_factors, factor_delta, factor_rank
from sana_kit.models.layouts import FIELD, LORA_FILE, OpenAdapter, adapter_file, for_module, open_any_adapter
from sana_kit.models.weights import meta_transformer, some_of

__all__ = [
    "LORA_FILE",
    "Lora",
    "adapter_file",
    "apply_lora",
    "apply_loras",
    "check_fusing",
    "parse_adapters",
    "read_lora",
]


@dataclasses.dataclass
class Lora:
    """An adapter that was checked against a transformer's shapes.

    Attributes:
        layout: of its file, see `layouts.py`.
        weights: as stored, by the names LAYER.lora_A.weight and LAYER.lora_B.weight, in the shapes that peft has.
        rank: layer -> rank; of LoKr and LoHa the rank of their factors, 1 where these are whole.
        scaling: layer -> alpha / rank (or / sqrt(rank) with rsLoRA).
        magnitude: layer -> DoRA's m, one value per output, in peft's shape; empty for a plain LoRA.
        per_input: the layers whose magnitude has one value per input instead, (1, in, ...).
        factors: layer -> LyCORIS' factors, for the layers that are no LoRA.
        bias: layer -> what is added to its bias (out,), float32.
        about: what the file says of its training (`about.read_about`).
    """

    path: Path
    sha256: str
    weights: dict[str, torch.Tensor]
    rank: dict[str, int]
    scaling: dict[str, float]
    magnitude: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    factors: dict[str, dict[str, torch.Tensor]] = dataclasses.field(default_factory=dict)
    layout: str = "diffusers"
    per_input: frozenset[str] = frozenset()
    bias: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What it is: LoRA, DoRA, LoKr, LoHa and so on."""
        names = {name.split("_")[0] for factors in self.factors.values() for name in factors}
        found = [shown for name, shown in KINDS.items() if name in names]
        found = found or ["DoRA" if self.magnitude else "LoRA"]
        return " and ".join([*found, *(["biases"] if self.bias else [])])


def _number(text: str) -> float:
    """NaN where it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def parse_adapters(values: Sequence[str]) -> list[tuple[str, float]]:
    """(path, factor) of each adapter in texts such as "a.safetensors:0.8,folder"; the factor is 1 unless given.

    A text that is a file or folder as it stands, or but for the factor behind its last colon, is one adapter, whatever
    commas and colons its name has.

    Raises:
        UserError: an empty part, or a factor that is no finite number.
    """
    found, problems = [], []
    for value in values:
        name, _, behind = value.rpartition(":")
        whole = expand(value).exists() or (name and math.isfinite(_number(behind)) and expand(name).exists())
        for part in [value] if whole else value.split(","):
            path, colon, text = part.strip().rpartition(":")
            if expand(part.strip()).exists() or not colon:
                path, text = part.strip(), "1"
            factor = _number(text)
            if not path:
                problems.append(Problem(FIELD, value, "holds an empty part", "Separate adapters by one comma each."))
            elif not math.isfinite(factor):
                reason = f"{part.strip()} is no file, and '{text}' behind its colon no number"
                problems.append(Problem(FIELD, value, reason, "Give PATH or PATH:FACTOR, such as a.safetensors:0.8."))
            else:
                found.append((path, factor))
    if problems:
        raise UserError(problems)
    return found


_OTHER_KINDS = {"OFT": ".oft_blocks", "GLoRA": ".a1.weight", "(IA)3": ".on_input", "trained norms": ".w_norm"}


def read_lora(path: str, transformer_config: dict) -> tuple[Lora | None, list[Problem]]:
    """(Lora, problems) of an adapter file of any layout, checked against the transformer of that config.

    Rank and alpha come from the file's alphas, or from peft's settings in its metadata; without either alpha is the
    rank, as diffusers takes it. Every tensor must belong to a layer of the transformer and have its shape.
    """
    try:
        return _read_lora(path, transformer_config), []
    except UserError as error:
        return None, list(error.problems)


def _read_lora(path: str, transformer_config: dict) -> Lora:
    found = open_any_adapter(path, sprint=bool(transformer_config.get("guidance_embeds")))
    modules = dict(meta_transformer(transformer_config).named_modules())
    problems = [Problem(FIELD, path, *told) for told in _misfits(found, modules)]
    settings, fault = _settings(found.config, found)
    if not problems and fault:
        problems.append(Problem(FIELD, path, fault))
    if problems:
        raise UserError(problems)
    rank = {module: down.shape[0] for module, (down, _) in found.pairs.items()}
    scaling = {}
    for module, r in rank.items():
        if module in found.alphas:  # the file's own tensor, which is alpha / rank whatever peft's settings say
            scaling[module] = found.alphas[module] / r
            continue
        alpha, stated = _alpha(module, r, settings)
        if stated != r:
            reason = f"its metadata says rank {stated} for {module}, its tensors have rank {r}"
            raise UserError(Problem(FIELD, path, reason))
        scaling[module] = alpha / (math.sqrt(r) if settings.get("use_rslora") else r)
    for module, factors in found.factors.items():
        r = factor_rank(factors)
        rank[module] = r or 1
        scaling[module] = found.alphas[module] / r if r and module in found.alphas else 1.0
    weights = {}
    for module, (down, up) in found.pairs.items():
        for half, tensor, shape in zip(
            ("lora_A", "lora_B"), (down, up), _pair_shapes(down, modules[module]), strict=True
        ):
            weights[f"{module}.{half}.weight"] = tensor.reshape(shape)
    per_input, magnitudes = found.per_input(), {}
    for module, magnitude in found.magnitudes.items():
        convolution = modules[module].weight.ndim > 2
        magnitudes[module] = magnitude if module in per_input else magnitude.view((1, -1, 1, 1) if convolution else -1)
    bias = {m: t.float() * (scaling[m] if end == "lora_B.bias" else 1.0) for m, (end, t) in found.biases.items()}
    return Lora(
        found.path,
        file_sha256(found.path),
        weights,
        rank,
        scaling,
        magnitudes,
        read_about(found.metadata),
        found.factors,
        found.layout,
        frozenset(per_input),
        bias,
    )


def _pair_shapes(down: torch.Tensor, module: torch.nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B of a layer; some tools write those of 1 x 1 convolutions as of linear layers."""
    weight, rank = module.weight.shape, down.shape[0]
    return (rank, *weight[1:]), (weight[0], rank, *(1 for _ in weight[2:]))


def _misfits(found: OpenAdapter, modules: Mapping[str, torch.nn.Module]) -> list[tuple[str, str]]:
    """(reason, remedy) for everything that tells the file is not of this transformer."""
    told = []
    strange = {name for name in found.modules() if getattr(modules.get(name), "weight", None) is None}
    unknown = sorted({*found.unknown, *strange})
    if unknown:
        reason = f"{len(unknown)} of its {found.total} tensors or layers belong to no layer of this model"
        remedy = "It is of another model, or in a layout that is not read (docs/formats.md lists those that are)."
        for kind, end in _OTHER_KINDS.items():
            if any(name.endswith(end) for name in unknown):
                remedy = f"It seems to be {kind}, which is not read (docs/formats.md lists what is)."
        told.append((f"{reason}: {some_of(unknown)}", remedy))
    wrong = []
    for module, (down, up) in found.pairs.items():
        if down is None or up is None:
            wrong.append(f"{module} has {'lora_B' if down is None else 'lora_A'} only")
            continue
        if module in strange:
            continue
        wanted = [torch.Size(shape) for shape in _pair_shapes(down, modules[module])]
        fits = all(
            half.shape in (shape, torch.Size((shape[0], shape[1:].numel())))
            for half, shape in zip((down, up), wanted, strict=True)
        )
        if not fits:
            shapes = f"lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)}"
            wrong.append(f"{module} {tuple(modules[module].weight.shape)} has {shapes}")
    for module in set(found.factors) - strange:
        fault = check_factors(found.factors[module])
        try:
            if fault is None:
                factor_delta(found.factors[module], modules[module].weight.shape)
        except (ValueError, RuntimeError) as error:
            fault = str(error)
        wrong += [f"{module}: {fault}"] if fault else []
    for module, (_, bias) in found.biases.items():
        own = getattr(modules.get(module), "bias", None)
        if module not in strange and (own is None or own.shape != bias.shape):
            wrong.append(
                f"{module} has a bias of {tuple(bias.shape)}, {'none' if own is None else tuple(own.shape)} here"
            )
    wrong += [f"{module} has a DoRA magnitude of {shape}" for module, shape in _odd_magnitudes(found, modules)]
    if wrong:
        remedy = "Give the adapter of this model, or the model that it was trained on."
        told.append((f"made for a transformer of other shapes: {some_of(wrong)}", remedy))
    if not found.modules() and not found.unknown:
        told.append((f"{found.path} holds no adapter weights", ""))
    bad = [name for name, tensor in _tensors(found) if not bool(torch.isfinite(tensor).all())]
    if bad:
        told.append((f"holds NaN or infinite values in {some_of(bad)}", "Take an earlier checkpoint's adapter."))
    return told


def _odd_magnitudes(found: OpenAdapter, modules: Mapping[str, torch.nn.Module]) -> list[tuple[str, tuple]]:
    """The layers whose magnitude has another number of values than the layer has outputs, or inputs."""
    odd, per_input = [], found.per_input()
    for module, magnitude in found.magnitudes.items():
        outputs, inputs = (*getattr(getattr(modules.get(module), "weight", None), "shape", ()), None, None)[:2]
        if magnitude.numel() != (inputs if module in per_input else outputs):
            odd.append((module, tuple(magnitude.shape)))
    return odd


def _tensors(found: OpenAdapter) -> list[tuple[str, torch.Tensor]]:
    """(name, tensor) of all that an adapter holds."""
    listed = [(f"{m}.{half}", t) for m, pair in found.pairs.items() for half, t in zip("AB", pair, strict=True)]
    listed += [(f"{m}.magnitude", t) for m, t in found.magnitudes.items()]
    listed += [(f"{m}.{end}", t) for m, (end, t) in found.biases.items()]
    listed += [(f"{m}.{name}", t) for m, factors in found.factors.items() for name, t in factors.items()]
    return [(name, tensor) for name, tensor in listed if tensor is not None]


def _settings(config: Mapping[str, Any] | None, found: OpenAdapter) -> tuple[Mapping[str, Any], str | None]:
    """(peft settings of the adapter, what of them is not supported)."""
    settings = config or {}
    bare = sorted(
        module for module, (end, _) in found.biases.items() if end == "lora_B.bias" and module not in found.pairs
    )
    if bare:
        return settings, f"it holds lora_B.bias and no lora_B for {some_of(bare)}"
    lacking = sorted({*found.pairs} - {*found.magnitudes})
    if settings.get("use_dora") and lacking:
        return settings, f"its metadata says DoRA, and it holds no magnitude for {some_of(lacking)}"
    return settings, None


def _alpha(module: str, rank: int, settings: Mapping[str, Any]) -> tuple[float, int]:
    """(alpha, the rank that the metadata says) of a module."""
    alpha = for_module(settings.get("alpha_pattern"), module, settings.get("lora_alpha", rank))
    return alpha, for_module(settings.get("rank_pattern"), module, settings.get("r", rank))


def check_fusing(lora: Lora, fuse: bool) -> list[Problem]:
    """Problems of keeping an adapter beside the weights."""
    if fuse or lora.kind == "LoRA":
        return []
    reason = f"a {lora.kind} adapter can only be merged into the weights"
    return [Problem("no_fuse_lora", None, reason, "Leave it out.")]


def apply_lora(transformer: torch.nn.Module, lora: Lora, lora_scale: float = 1.0, fuse: bool = True) -> None:
    """Put one adapter on a loaded SanaTransformer2DModel; see `apply_loras`."""
    apply_loras(transformer, [(lora, lora_scale)], fuse)


def apply_loras(transformer: torch.nn.Module, loras: Sequence[tuple[Lora, float]], fuse: bool = True) -> None:
    """Put adapters on a loaded SanaTransformer2DModel, each scaled by alpha / rank and its own factor.

    Fused: W + the sum of factor * scaling * B @ A, computed in float32 and rounded once to W's dtype; no adapter
    stays, so a forward costs what the base model's costs. Apart: peft layers beside the base weights, in the
    transformer's dtype.

    A DoRA adapter (arXiv 2402.09353) gives W' = m * V / |V| with V = W + alpha / rank * B @ A and |V| the norm over
    an output's inputs; its factor goes from W (0) to W' (1) along a straight line. Of several adapters each adds what
    it would add alone, so their order does not matter but for the rounding of float32.

    Raises:
        UserError: not fused, and one of them is no plain LoRA.
    """
    if fuse:
        modules = dict(transformer.named_modules())
        with torch.no_grad():
            for name in sorted({name for lora, _ in loras for name in lora.scaling}):
                weight = modules[name].weight
                merged = weight.float()
                for lora, factor in loras:
                    if name in lora.scaling:
                        merged = merged + _addition(weight, name, lora, factor)
                weight.copy_(merged)
            for name in sorted({name for lora, _ in loras for name in lora.bias}):
                bias = modules[name].bias
                added = [factor * lora.bias[name].to(bias.device) for lora, factor in loras if name in lora.bias]
                bias.copy_(bias.float() + torch.stack(added).sum(0))
        return
    problems = [problem for lora, _ in loras for problem in check_fusing(lora, fuse)]
    if problems:
        raise UserError(problems)
    names = ["default", *(f"adapter_{index}" for index in range(1, len(loras)))]
    for name, (lora, factor) in zip(names, loras, strict=True):
        _put_beside(transformer, name, lora, factor)
    if len(loras) > 1:
        transformer.set_adapter(names)
    transformer.eval()


def _put_beside(transformer: torch.nn.Module, adapter_name: str, lora: Lora, factor: float) -> None:
    """peft layers of an adapter beside the weights."""
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
    transformer.add_adapter(config, adapter_name=adapter_name)
    result = set_peft_model_state_dict(transformer, dict(lora.weights), adapter_name=adapter_name)
    assert not result.unexpected_keys, result.unexpected_keys
    modules = dict(transformer.named_modules())
    for name, scaling in lora.scaling.items():
        modules[name].scaling[adapter_name] = scaling * factor
        modules[name].to(transformer.dtype)


def _addition(weight: torch.Tensor, name: str, lora: Lora, factor: float) -> torch.Tensor:
    """What an adapter adds to the weight of a layer, float32."""
    if name in lora.factors:
        factors = {key: tensor.to(weight.device) for key, tensor in lora.factors[name].items()}
        delta = factor_delta(factors, weight.shape)
    else:
        down = lora.weights[f"{name}.lora_A.weight"].to(weight.device, torch.float32)
        up = lora.weights[f"{name}.lora_B.weight"].to(weight.device, torch.float32)
        # a convolution's A is (r, in, kh, kw) and its B (out, r, 1, 1)
        delta = (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    if name not in lora.magnitude:
        return (lora.scaling[name] * factor) * delta
    magnitude = lora.magnitude[name].to(weight.device, torch.float32).flatten()
    along = int(name in lora.per_input)  # 0: a norm for each output, 1: for each input
    directed = (weight.float() + lora.scaling[name] * delta).transpose(0, along)
    norm = directed.flatten(1).norm(dim=1)
    directed = directed * (magnitude / norm).view(-1, *(1 for _ in directed.shape[1:]))
    return factor * (directed.transpose(0, along) - weight.float())
