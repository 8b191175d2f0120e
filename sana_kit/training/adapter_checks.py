"""What can be wrong with the trained adapter and with a base in few bits, before a weight is loaded.

No peft, transformers or diffusers are imported for the usual settings: the launcher's checks begin with it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import torch

from sana_kit.errors import Problem, did_you_mean, setting
from sana_kit.models.adapter import Lora
from sana_kit.models.adapter_start import read_start
from sana_kit.models.folder import Model
from sana_kit.models.lora_layers import FACTOR_KINDS, PRESETS, parse_layers, unmatched_layers
from sana_kit.models.quantize import QUANTIZATIONS, quantize_problems
from sana_kit.models.weights import meta_transformer
from sana_kit.training.config import TrainConfig

# Starts that move a part of the weights into the adapter, which then fits the changed weights alone.
_CHANGES_BASE = ("pissa", "olora")
_ONLY_LOKR = f"has no effect without {setting('adapter_type')} lokr"
# Kinds that peft knows and the kit does not train, and why.
REFUSED = {
    "oft": (
        "it turns the weights instead of adding to them: neither SanaPipeline nor the layouts of other tools for SANA"
        " hold one, and each step would solve for a rotation of every layer"
    ),
}


def adapter_problems(config: TrainConfig, model: Model) -> tuple[TrainConfig, list[Problem]]:
    """(the settings with alpha, and with rank and kind of the adapter to begin with; what is wrong with them)."""
    adapter = config.adapter
    if config.train_mode == "controlnet":  # see control.py
        return config, []
    if config.train_mode != "lora":
        names = ("use_rslora", "use_dora", "init_lora", "save_merged")
        useless = [name for name in names if getattr(adapter, name)]
        return config, [Problem(name, None, "has no effect without LoRA") for name in useless]
    problems = []
    kind = adapter.adapter_type.lower()
    if kind in FACTOR_KINDS:
        return _with_factors(kind, config, model)
    if kind != "lora":
        reason = REFUSED.get(kind, "there is no such adapter")
        remedy = f"Use lora, with {setting('use_dora')} for DoRA, {' or '.join(FACTOR_KINDS)}."
        remedy += did_you_mean(kind, FACTOR_KINDS)
        problems.append(Problem("adapter_type", adapter.adapter_type, reason, remedy))
    if adapter.lokr_factor != -1:
        problems.append(Problem("lokr_factor", adapter.lokr_factor, _ONLY_LOKR))
    if adapter.init_lora_weights in _CHANGES_BASE:
        reason = (
            "it moves a part of the base's weights into the adapter by a decomposition that differs between devices:"
            " neither could the adapter be used on the unchanged base, nor would a resume elsewhere be exact"
        )
        problems.append(Problem("init_lora_weights", adapter.init_lora_weights, reason, "Use gaussian or orthogonal."))
    if adapter.init_lora is None:
        problems += _layer_problems(config, model)
        if adapter.init_lora_weights == "orthogonal" and adapter.rank % 2:
            reason = f"must be even with {setting('init_lora_weights')} orthogonal"
            problems.append(Problem("rank", adapter.rank, reason))
        return config.replaced(lora_alpha=adapter.alpha), problems
    lora, found = read_start(adapter.init_lora, model.transformer_config)
    if lora is None:
        return config, [*problems, *(Problem("init_lora", p.value, p.reason, p.remedy) for p in found)]
    return _begin_with(lora, config, problems)


def _with_factors(kind: str, config: TrainConfig, model: Model) -> tuple[TrainConfig, list[Problem]]:
    """`adapter_problems` of LoKr and LoHa."""
    adapter, shown = config.adapter, FACTOR_KINDS[kind]
    config = config.replaced(adapter_type=kind, lora_alpha=adapter.alpha)
    problems = _layer_problems(config, model)
    for name, wrong, reason in (
        ("use_dora", adapter.use_dora, f"{shown} has no magnitudes here"),
        ("use_rslora", adapter.use_rslora, f"{shown} is scaled by alpha / rank"),
        ("init_lora", adapter.init_lora is not None, f"a run begins with a LoRA, and this one trains a {shown}"),
        ("init_lora_weights", adapter.init_lora_weights != "gaussian", f"{shown} has a start of its own"),
        ("lora_dropout", adapter.lora_dropout > 0, f"{shown} has no first matrix"),
        ("lora_plus_ratio", config.lora_plus_ratio != 1, f"{shown} has no second matrix"),
        ("base_quantization", config.base_quantization is not None, f"it was not tried under a {shown}"),
        ("lokr_factor", kind != "lokr" and adapter.lokr_factor != -1, _ONLY_LOKR),
    ):
        if wrong:
            value = getattr(config, name)
            problems.append(Problem(name, None if value is True else value, reason, "Leave it out."))
    if kind == "lokr" and adapter.lokr_factor == 0:
        problems.append(Problem("lokr_factor", 0, "no layer has a factor of that size", "Use -1, 4, 8 or 16."))
    if kind == "lokr" and adapter.alpha != adapter.rank:
        reason = (
            f"LoKr's whole factors have no rank to be scaled by, and readers take a scale of 1 (rank {adapter.rank})"
        )
        problems.append(Problem("lora_alpha", adapter.lora_alpha, reason, "Leave it out."))
    return config, problems


def quantization_problems(config: TrainConfig, model: Model | None, device: str, deepspeed: bool) -> list[Problem]:
    """Why the base's weights cannot be kept in few bits."""
    name, field = config.base_quantization, "base_quantization"
    if name not in QUANTIZATIONS or config.train_mode == "controlnet":  # None, told with the choices, in control.py
        return []
    shapes = None if model is None else model.transformer_config
    problems = [dataclasses.replace(p, field=field) for p in quantize_problems(name, torch.device(device), shapes)]
    for wrong, reason, remedy in (
        (config.train_mode != "lora", "such weights cannot be trained", "Use train_mode lora."),
        (deepspeed, "DeepSpeed casts the base's weights to its own dtype", "Use one process or DDP."),
        (config.use_dora, "DoRA needs the norms of whole weights", "Leave use_dora out."),
        (config.compile, "compiled blocks were not tried with it", "Leave compile out."),
        (config.mixed_precision == "fp16", "fp16 was not tried with it", "Use bf16."),
    ):
        if wrong:
            problems.append(Problem(field, name, reason, remedy))
    return problems


def _begin_with(lora: Lora, config: TrainConfig, problems: list[Problem]) -> tuple[TrainConfig, list[Problem]]:
    """The settings that hold where the run begins with an adapter."""
    adapter = config.adapter
    # most layers' own; the others get theirs as patterns of peft's, see adapter.put_adapter
    rank = Counter(lora.rank.values()).most_common(1)[0][0]
    scaling = Counter(scale for name, scale in lora.scaling.items() if lora.rank[name] == rank).most_common(1)[0][0]
    alpha = scaling * (rank**0.5 if adapter.use_rslora else rank)
    alpha = int(alpha) if alpha == int(alpha) else alpha
    for name, own in (("rank", rank), ("lora_alpha", alpha), ("lora_layers", None)):
        given = getattr(adapter, name)
        if name in config.given and given is not None and given != own:
            told = "names its layers" if own is None else f"has {name} {own}"
            problems.append(Problem(name, given, f"the adapter to begin with {told}", "Leave it out."))
    if adapter.use_dora and not lora.magnitude:
        problems.append(Problem("use_dora", None, "the adapter to begin with has no magnitudes", "Leave it out."))
    return config.replaced(rank=rank, lora_alpha=alpha, use_dora=bool(lora.magnitude)), problems


def _layer_problems(config: TrainConfig, model: Model) -> list[Problem]:
    """Layers that are asked for and not there, by the model's configuration alone (meta tensors, no memory)."""
    if config.lora_layers is None or config.lora_layers in PRESETS:  # every SANA has them
        return []
    modules = meta_transformer(model.transformer_config).named_modules()
    names = [name for name, module in modules if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]
    ends = sorted({".".join(name.split(".")[2:]) for name in names if name.startswith("transformer_blocks")})
    return [
        Problem("lora_layers", config.lora_layers, f"'{layer}' {why}", f"Names in a block: {', '.join(ends)}.")
        for layer, why in unmatched_layers(parse_layers(config.lora_layers), names)
    ]
