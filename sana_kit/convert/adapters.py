"""Write an adapter in another layout (see `sana_kit/models/layouts.py`), so that the way back gives the same bytes.

What a layout cannot hold is kept in the file's metadata: peft's settings stay there as they were, and under
`sana_kit_converted` stand how the first file wrote its names, which entries were added to its metadata, and the ranks
of what was stacked. The way back uses these only where they agree with the tensors.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import patch_sana
from sana_kit.convert.writing import write_tensors
from sana_kit.errors import Problem, UserError
from sana_kit.files import write_atomic
from sana_kit.models.factors import as_pair, check_factors, factor_rank, shaped_pair
from sana_kit.models.keys import to_nvlabs
from sana_kit.models.layouts import (
    CONVERTED,
    LORA_FILE,
    PEFT_CONFIG,
    PEFT_FILE,
    SPELLINGS,
    OpenAdapter,
    Spelling,
    for_module,
    open_any_adapter,
    peft_magnitude,
    settings_of,
)
from sana_kit.models.weights import some_of

_ADDED = "added"  # in CONVERTED: entries of the metadata that a conversion made
_SPRINT_ONLY = ("time_embed.timestep_embedder.", "time_embed.guidance_embedder.")
Layer = dict[str, torch.Tensor]


def convert_adapter(source: str, target: str, layout: str) -> list[str]:
    """Write the adapter `source` to `target` in `layout`; returns lines for the user.

    Args:
        target: a file, or a folder, which then gets the name that the layout's readers expect; peft's is a folder.
        layout: diffusers, peft, kohya, comfyui or lycoris.

    Raises:
        UserError: it cannot be read, or the layout cannot hold it; all that is wrong at once.
    """
    adapter = open_any_adapter(source)
    notes = [f"{adapter.path}: {len(adapter.modules())} layers, {adapter.layout} layout"]
    problems = _faults(adapter, source)
    if not problems:
        notes += _factors_to_pairs(adapter, layout, problems)
        problems += _unsupported(adapter, source, layout)
        notes += _rounded(adapter, layout)
    if problems:
        raise UserError(problems)
    record = json.loads(adapter.metadata.get(CONVERTED, "{}"))
    spelling = _spelling_for(layout, record)
    stacked: dict[str, list[int]] = {}
    tensors = _written(adapter, spelling, stacked)
    metadata = _metadata(adapter, spelling, record, stacked)
    path = _write(Path(target), layout, tensors, metadata, adapter)
    return [*notes, f"{path}: {len(tensors)} tensors, {layout} layout"]


def _faults(adapter: OpenAdapter, source: str) -> list[Problem]:
    problems = []
    if adapter.unknown:
        reason = f"{len(adapter.unknown)} of {adapter.total} tensors belong to no layer: {', '.join(adapter.unknown)}"
        problems.append(Problem("in", source, reason))
    half = [module for module, pair in adapter.pairs.items() if None in pair]
    if half:
        problems.append(Problem("in", source, f"one of the two factors is missing for {', '.join(half)}"))
    for module, factors in adapter.factors.items():
        fault = check_factors(factors)
        problems += [Problem("in", source, f"{module}: {fault}")] if fault else []
    if not adapter.modules() and not adapter.unknown:
        problems.append(Problem("in", source, "holds no adapter weights"))
    return problems


def _factors_to_pairs(adapter: OpenAdapter, layout: str, problems: list[Problem]) -> list[str]:
    """Make LoRA pairs of LyCORIS' factors where the target needs them and that is exact; lines about it."""
    if not adapter.factors or layout == adapter.layout:
        return []
    apart, ranks = [], {}
    for module, factors in list(adapter.factors.items()):
        pair, rank = as_pair(factors), factor_rank(factors)
        if pair is None:
            apart.append(module)
            continue
        scale = adapter.alphas.get(module, rank or 1) / (rank or 1)
        adapter.pairs[module] = shaped_pair(module, *pair)
        adapter.alphas[module] = scale * pair[0].shape[0]
        ranks[module] = pair[0].shape[0]
        del adapter.factors[module]
    if apart:
        reason = f"what LyCORIS adds to {some_of(apart)} is no LoRA of a smaller rank than the layer"
        remedy = "Draw with it as it is (--lora_weights reads it), or keep the lycoris layout."
        problems.append(Problem("in", str(adapter.path), reason, remedy))
    if not ranks:
        return []
    low, high = min(ranks.values()), max(ranks.values())
    return [f"LyCORIS' factors made a LoRA, exact but for float32's rounding: {len(ranks)} layers, rank {low}-{high}"]


def _rounded(adapter: OpenAdapter, layout: str) -> list[str]:
    """A line where alpha / rank differs within a stack, so that one part's values are scaled, and rounded."""
    if not SPELLINGS[layout].nvlabs:
        return []
    alphas, stacks = _alphas(adapter), []
    for stack, parts in _stacks(sorted(adapter.pairs)).items():
        scalings = [alphas[m] / adapter.pairs[m][0].shape[0] for m in parts if m]
        if any(math.frexp(scaling / scalings[0])[0] != 0.5 for scaling in scalings):
            stacks.append(stack)
    if not stacks:
        return []
    return [
        f"alpha / rank differs between the layers of {some_of(stacks)}, and a stack has one: the others' values are"
        " scaled, so images and the way back are equal but for rounding"
    ]


def _unsupported(adapter: OpenAdapter, source: str, layout: str) -> list[Problem]:
    """What the target cannot hold."""
    problems, spelling = [], SPELLINGS[layout]
    homeless = [m for m, (end, _) in adapter.biases.items() if spelling.nvlabs or (end == "diff_b") != spelling.flat]
    if homeless:
        reason = f"it adds to the biases of {some_of(homeless)}, which the {layout} layout has no place for"
        problems.append(Problem("in", source, reason, "Draw with it as it is (--lora_weights reads it)."))
    per_input = adapter.per_input()
    if per_input and not spelling.flat:
        reason = f"DoRA's magnitudes of {some_of(sorted(per_input))} have one value for each input"
        remedy = "Only kohya's and LyCORIS' layouts hold such; drawing reads it as it is (--lora_weights)."
        problems.append(Problem("in", source, reason, remedy))
    if not spelling.nvlabs or not adapter.magnitudes or per_input:
        return problems
    lacking = []
    for stack, parts in _stacks(adapter.modules()).items():
        have = [module for module in parts if module in adapter.magnitudes]
        if have and len(have) < len(parts):
            lacking.append(stack)
    if lacking:
        reason = f"DoRA's magnitudes of {some_of(lacking)} are needed for all stacked layers, and some have no adapter"
        remedy = "Take kohya's or LyCORIS' layout, whose layers are not stacked."
        problems.append(Problem("in", source, reason, remedy))
    return problems


def _stacks(modules: list[str]) -> dict[str, list[str | None]]:
    """{NVlabs' layer: diffusers' layers in their order, None where the adapter has none} of a list of layers."""
    stacks: dict[str, list[str | None]] = {}
    for module in modules:
        place = to_nvlabs(module)
        if place is None:
            raise UserError(Problem("in", module, "is no layer of SANA in NVlabs' layout"))
        stacks.setdefault(place.name, [None] * place.parts)[place.part] = module
    return stacks


def _spelling_for(layout: str, record: Mapping[str, Any]) -> Spelling:
    """How to write the names: as the first file did where this is the way back to it, else as is usual."""
    first = record.get("first")
    if first and first["layout"] == layout:
        return Spelling(**first)
    return SPELLINGS[layout]


def _alphas(adapter: OpenAdapter) -> dict[str, float]:
    """Layer -> alpha such that alpha / rank is the scaling, whatever the file's settings are."""
    settings, found = settings_of(adapter), {}
    for module, (down, _) in adapter.pairs.items():
        rank = down.shape[0]
        alpha = adapter.alphas.get(module)
        if alpha is None:
            alpha = for_module(settings.get("alpha_pattern"), module, settings.get("lora_alpha", rank))
            alpha *= math.sqrt(rank) if settings.get("use_rslora") else 1
        found[module] = float(alpha)
    return found


def _written(adapter: OpenAdapter, spelling: Spelling, stacked: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """{name: tensor} of the target; `stacked` gets the ranks of what was stacked."""
    alphas = _alphas(adapter)
    layers: dict[str, Layer] = {}
    if spelling.nvlabs:
        for name, parts in _stacks(sorted(adapter.pairs)).items():
            present = [module for module in parts if module]
            if len(parts) == 1:
                layers[name] = _layer(adapter, present[0], alphas)
            else:
                layers[name], stacked[name] = _stack(adapter, parts, alphas)
    else:
        layers = {module: _layer(adapter, module, alphas) for module in adapter.pairs}
    written = {}
    for name, layer in layers.items():
        stem = spelling.prefix + (name.replace(".", "_") if spelling.flat else name)
        ends = {"down": spelling.down, "up": spelling.up, "alpha": "alpha"}
        ends |= dict.fromkeys(("magnitude", "per_input"), spelling.magnitude)
        for what, tensor in layer.items():
            if what != "alpha" or spelling.alpha:
                written[f"{stem}.{ends[what]}"] = _shaped(tensor, what, spelling, layer)
    for module, factors in adapter.factors.items():
        stem = spelling.prefix + (module.replace(".", "_") if spelling.flat else module)
        written |= {f"{stem}.{name}": tensor for name, tensor in factors.items()}
        if module in adapter.alphas:
            like = next(iter(factors.values()))
            written[f"{stem}.alpha"] = _alpha_tensor(adapter.alphas[module], like)
        if module in adapter.magnitudes:
            written[f"{stem}.{spelling.magnitude}"] = adapter.magnitudes[module]
    for module, (end, tensor) in adapter.biases.items():
        stem = spelling.prefix + (module.replace(".", "_") if spelling.flat else module)
        written[f"{stem}.{end}"] = tensor
    return written


def _layer(adapter: OpenAdapter, module: str, alphas: Mapping[str, float]) -> Layer:
    down, up = adapter.pairs[module]
    layer = {"down": down, "up": up, "alpha": _alpha_tensor(alphas[module], down)}
    if module in adapter.magnitudes:
        if module in adapter.per_input():
            layer["per_input"] = adapter.magnitudes[module]
        else:
            layer["magnitude"] = peft_magnitude(adapter, module)
    return layer


def _alpha_tensor(alpha: float, like: torch.Tensor) -> torch.Tensor:
    """A scalar in the adapter's dtype, as kohya's tools write it; in float32 where that would round it."""
    rounded = torch.tensor(alpha, dtype=like.dtype)
    return rounded if float(rounded) == alpha else torch.tensor(alpha, dtype=torch.float32)


def _shaped(tensor: torch.Tensor, what: str, spelling: Spelling, layer: Layer) -> torch.Tensor:
    """DoRA's magnitude as the layout has it: (out, 1, ...) for LyCORIS' and kohya's readers."""
    if what == "magnitude" and spelling.magnitude == "dora_scale":
        return tensor.reshape(-1, *(1 for _ in layer["down"].shape[1:])).contiguous()
    return tensor.contiguous()


def _stack(adapter: OpenAdapter, parts: list[str | None], alphas: Mapping[str, float]) -> tuple[Layer, list[int]]:
    """(one layer for stacked ones, ranks of the parts; [] where all of them share down).

    The factors of different parts stand in blocks of their own, so the product of the stack holds each part's product.
    One alpha serves all: where alpha / rank differs between parts, the differing parts' up is scaled.
    """
    present = [module for module in parts if module]
    pairs = [adapter.pairs[module] for module in present]
    scalings = [alphas[module] / pair[0].shape[0] for module, pair in zip(present, pairs, strict=True)]
    downs = [pair[0] for pair in pairs]
    outputs = {pair[1].shape[0] for pair in pairs}
    height = outputs.pop()  # query, key and value have as many outputs as each other
    same = len(pairs) == len(parts) and len(set(scalings)) == 1
    if same and all(torch.equal(downs[0], down) for down in downs[1:]):
        layer, ranks = {"down": downs[0], "up": torch.cat([pair[1] for pair in pairs])}, []
        alpha = alphas[present[0]]
    else:
        down = torch.cat(downs)
        up = down.new_zeros((height * len(parts), down.shape[0]))
        column, ranks = 0, []
        for index, module in enumerate(parts):
            rank = adapter.pairs[module][0].shape[0] if module else 0
            ranks.append(rank)
            if module:
                factor = (alphas[module] / rank) / scalings[0]
                part = adapter.pairs[module][1]
                block = part if factor == 1 else (part.float() * factor).to(part.dtype)
                up[index * height : (index + 1) * height, column : column + rank] = block
            column += rank
        layer = {"down": down, "up": up}
        alpha = sum(alphas[module] for module in present) if len(set(scalings)) == 1 else scalings[0] * down.shape[0]
    layer["alpha"] = _alpha_tensor(alpha, layer["down"])
    if present[0] in adapter.magnitudes:
        layer["magnitude"] = torch.cat([adapter.magnitudes[module].flatten() for module in present])
    return layer, ranks


def _metadata(
    adapter: OpenAdapter, spelling: Spelling, record: Mapping[str, Any], stacked: Mapping[str, list[int]]
) -> dict[str, str]:
    """The target's metadata: all of the source's, what the layout needs, and what the way back needs."""
    first = Spelling(**record["first"]) if "first" in record else adapter.spelling
    added = list(record.get(_ADDED, []))
    kept = {key: value for key, value in adapter.metadata.items() if key != CONVERTED and key not in added}
    added = []
    if spelling.layout == "diffusers" and not spelling.alpha and not _settings_hold(adapter):
        plain = dataclasses.replace(adapter, config=None, alphas=_alphas(adapter))
        settings = {patch_sana.KEY_PREFIX + key: value for key, value in settings_of(plain).items()}
        if patch_sana.LORA_METADATA_KEY not in kept:
            added.append(patch_sana.LORA_METADATA_KEY)
        kept[patch_sana.LORA_METADATA_KEY] = json.dumps(settings, indent=2, sort_keys=True)
    if spelling == first:
        return kept
    note: dict[str, Any] = {"first": first._asdict(), _ADDED: sorted(added), "stacked": dict(sorted(stacked.items()))}
    if any(to_nvlabs(name) and name.startswith(_SPRINT_ONLY) for name in adapter.modules()):
        note["sprint"] = True  # NVlabs' names of the time embedding are those of the other members
    return {**kept, CONVERTED: json.dumps(note, sort_keys=True)}


def _settings_hold(adapter: OpenAdapter) -> bool:
    """Whether peft's settings in the metadata give the ranks and scalings that the tensors and alphas give."""
    settings = adapter.config or {}
    if adapter.config is not None and bool(settings.get("use_dora")) != bool(adapter.magnitudes):
        return False
    for module, alpha in _alphas(adapter).items():
        rank = adapter.pairs[module][0].shape[0]
        stated = for_module(settings.get("rank_pattern"), module, settings.get("r", rank))
        told = for_module(settings.get("alpha_pattern"), module, settings.get("lora_alpha", rank))
        told *= math.sqrt(rank) if settings.get("use_rslora") else 1
        if stated != rank or not math.isclose(told, alpha, rel_tol=1e-6):
            return False
    return True


def _write(
    target: Path, layout: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], adapter: OpenAdapter
) -> Path:
    if layout == "peft":
        plain = dataclasses.replace(adapter, config=None, alphas=_alphas(adapter))
        settings = settings_of(adapter) if _settings_hold(adapter) else settings_of(plain)
        config = {"peft_type": "LORA", "base_model_name_or_path": None, **settings, "inference_mode": True}
        text = json.dumps(config, indent=2, sort_keys=True)
        path = write_tensors(target / PEFT_FILE, tensors, metadata)
        write_atomic(target / PEFT_CONFIG, lambda file: file.write(text.encode()))
        return path
    if target.is_dir() or target.suffix != ".safetensors":
        target = target / (LORA_FILE if layout == "diffusers" else f"{layout}_lora.safetensors")
    return write_tensors(target, tensors, metadata)
