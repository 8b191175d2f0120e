"""Layouts of adapter files in the wild, told from the names of their tensors and read into one.

    diffusers  transformer.transformer_blocks.0.attn1.to_q.lora_A.weight   this kit's and diffusers' own
    peft       base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight, adapter_config.json beside it
    kohya      lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight and .alpha (older: lora_transformer_...)
    comfyui    diffusion_model.blocks.0.attn.qkv.lora_A.weight and .alpha: NVlabs' layers, query, key, value stacked
    lycoris    lycoris_transformer_blocks_0_attn1_to_q.lora_down.weight, or .lokr_w1, .hada_w1_a, ...

Read, all of them are by diffusers' layers: two factors (down (r, in), up (out, r), of a convolution with its window),
alpha, DoRA's magnitude; what LyCORIS adds otherwise stays as it is (`sana_kit/models/factors.py`), and so do biases.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

import patch_sana
from sana_kit.errors import Problem, UserError
from sana_kit.files import expand, read_header
from sana_kit.models.factors import FACTORS, factor_rank
from sana_kit.models.keys import from_nvlabs, is_nvlabs, unflatten

LORA_FILE = patch_sana.ADAPTER_FILE  # diffusers' name, which the trainer writes
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
FIELD = "lora_weights"
CONVERTED = "sana_kit_converted"  # metadata key: what a conversion has to remember for the way back


class Spelling(NamedTuple):
    """How a file writes its names: `prefix` of all, names of the two factors and of the magnitude, and so on."""

    layout: str
    prefix: str
    down: str
    up: str
    magnitude: str = "lora_magnitude_vector"
    alpha: bool = False  # whether each layer has a tensor of its alpha
    flat: bool = False  # underscores for the dots of a layer's name
    nvlabs: bool = False  # NVlabs' layers


SPELLINGS = {
    found.layout: found
    for found in (
        Spelling("diffusers", "transformer.", "lora_A.weight", "lora_B.weight"),
        Spelling("peft", "base_model.model.", "lora_A.weight", "lora_B.weight"),
        Spelling("kohya", "lora_unet_", "lora_down.weight", "lora_up.weight", "dora_scale", alpha=True, flat=True),
        Spelling("lycoris", "lycoris_", "lora_down.weight", "lora_up.weight", "dora_scale", alpha=True, flat=True),
        Spelling(
            "comfyui", "diffusion_model.", "lora_A.weight", "lora_B.weight", "dora_scale", alpha=True, nvlabs=True
        ),
    )
}
LAYOUTS = tuple(SPELLINGS)
_DOTTED = ("base_model.model.transformer.", "base_model.model.", "transformer.", "diffusion_model.", "")
_FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")
_DOWN = ("lora_A.weight", "lora_down.weight", "lora.down.weight", "lora_A.default.weight")
_UP = ("lora_B.weight", "lora_up.weight", "lora.up.weight", "lora_B.default.weight")
_MAGNITUDES = (
    "lora_magnitude_vector",
    "lora_magnitude_vector.weight",
    "lora_magnitude_vector.default.weight",
    "dora_scale",
)
BIASES = ("lora_B.bias", "diff_b")  # what is added to a bias: peft's, scaled as the weight's is; ComfyUI's, as it is
_KNOWN = (*_DOWN, *_UP, *_MAGNITUDES, *BIASES, "alpha", *FACTORS)
_ENDS = re.compile(r"(.+?)\.(" + "|".join(map(re.escape, _KNOWN)) + ")")


@dataclasses.dataclass
class OpenAdapter:
    """An adapter file, its tensors by diffusers' layers, as stored.

    Attributes:
        spelling: how the file writes them.
        pairs: layer -> (down (r, in, ...), up (out, r, ...)); one of them is None where the file has only the other.
        alphas: layer -> alpha, where the file has a tensor of it.
        magnitudes: layer -> DoRA's m, as stored.
        factors: layer -> LyCORIS' factors, by their names.
        biases: layer -> (one of BIASES, what is added to the bias (out,)).
        unknown: names that belong to no layer.
        config: peft's settings, from the metadata or the config beside it; None where there are none.
        metadata: all of the file's metadata.
        total: number of tensors in the file.
    """

    path: Path
    spelling: Spelling
    pairs: dict[str, tuple[torch.Tensor | None, torch.Tensor | None]] = dataclasses.field(default_factory=dict)
    alphas: dict[str, float] = dataclasses.field(default_factory=dict)
    magnitudes: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    factors: dict[str, dict[str, torch.Tensor]] = dataclasses.field(default_factory=dict)
    biases: dict[str, tuple[str, torch.Tensor]] = dataclasses.field(default_factory=dict)
    unknown: list[str] = dataclasses.field(default_factory=list)
    config: dict[str, Any] | None = None
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    total: int = 0

    @property
    def layout(self) -> str:
        """Its layout's name, one of LAYOUTS."""
        return self.spelling.layout

    def modules(self) -> list[str]:
        """The layers that it changes, in order."""
        return sorted({*self.pairs, *self.factors, *self.biases})

    def per_input(self) -> set[str]:
        """The layers whose magnitude has one value per input, (1, in, ...), as LyCORIS' older files have it."""
        return {module for module, magnitude in self.magnitudes.items() if _per_input(magnitude)}


def _per_input(magnitude: torch.Tensor) -> bool:
    # peft's of a convolution is (1, out, 1, 1) under a name of its own, and is turned on reading
    return magnitude.ndim > 1 and magnitude.shape[0] == 1


def is_adapter_name(name: str) -> bool:
    """Whether a tensor of that name is one of an adapter's, in any layout."""
    return _ENDS.fullmatch(name) is not None


def adapter_file(path: str) -> Path:
    """The adapter file that `path` names: itself, or the file of diffusers' or peft's name in that folder.

    Raises:
        UserError: there is none.
    """
    found = expand(path)
    if found.is_dir():
        inside = [found / name for name in (LORA_FILE, PEFT_FILE) if (found / name).is_file()]
        if not inside:
            remedy = "Give the adapter's file or its folder."
            reason = f"the folder holds no {LORA_FILE} (nor peft's {PEFT_FILE})"
            raise UserError(Problem(FIELD, path, reason, remedy))
        return inside[0]
    if not found.is_file():
        remedy = f"Train an adapter first (its output folder holds {LORA_FILE}), or give the path of one."
        raise UserError(Problem(FIELD, path, "no such file", remedy))
    return found


def open_any_adapter(path: str, sprint: bool = False) -> OpenAdapter:
    """Read an adapter file of any layout.

    Args:
        path: a safetensors file, or a folder that holds one of diffusers' or peft's name.
        sprint: whether it is for SANA-Sprint, whose time embedding NVlabs' names do not tell.

    Raises:
        UserError: no such file, or none that can be read. What merely does not fit is in `unknown`.
    """
    file = adapter_file(path)
    try:
        read_header(file)  # tells a cut-off file from another kind of file
        stored = patch_sana.open_adapter(file)
    except (OSError, ValueError) as error:
        reason = f"{file} cannot be used: {error}"
        raise UserError(Problem(FIELD, path, reason, "Adapters are read as safetensors only.")) from None
    config = stored.lora_config
    if config is None and (file.parent / PEFT_CONFIG).is_file() and file.name == PEFT_FILE:
        config = json.loads((file.parent / PEFT_CONFIG).read_text(encoding="utf-8"))
    spelling = _spelling(stored.tensors)
    adapter = OpenAdapter(file, spelling, config=config, metadata=stored.metadata, total=len(stored.tensors))
    sprint = sprint or any("cfg_embedder" in name or "guidance_embedder" in name for name in stored.tensors)
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in stored.tensors.items():
        layer, end = _parse(name, spelling)
        if layer is None:
            adapter.unknown.append(name)
        else:
            layers.setdefault(layer, {})[end] = tensor
    record = json.loads(stored.metadata.get(CONVERTED, "{}"))
    ranks, sprint = record.get("stacked", {}), sprint or record.get("sprint", False)
    for layer, tensors in layers.items():
        _take(adapter, layer, tensors, sprint, ranks.get(layer))
    if config is not None and "alpha" in config:  # peft's of LoKr and LoHa, whose files have no tensors of it
        for module, factors in adapter.factors.items():
            if factor_rank(factors) is not None:
                adapter.alphas.setdefault(module, float(config["alpha"]))
    return adapter


def _spelling(tensors: Mapping[str, torch.Tensor]) -> Spelling:
    """How the file writes its names: each of its ways as most of its tensors have it."""
    matches = [match for match in map(_ENDS.fullmatch, tensors) if match]
    stems, ends = [match[1] for match in matches], Counter(match[2] for match in matches)

    def most(known: tuple[str, ...]) -> str:
        return max(known, key=lambda end: ends[end])

    prefix = next((p for p in (*_FLAT, *_DOTTED) if p and any(stem.startswith(p) for stem in stems)), "")
    nvlabs = any(is_nvlabs(_layer(stem, prefix) or "") for stem in stems)
    layout = {"lora_unet_": "kohya", "lora_transformer_": "kohya", "lycoris_": "lycoris", "transformer.": "diffusers"}
    name = layout.get(prefix) or ("comfyui" if nvlabs or prefix == "diffusion_model." else "peft")
    if any(end in FACTORS for end in ends):
        name = "lycoris"
    return Spelling(
        name, prefix, most(_DOWN), most(_UP), most(_MAGNITUDES), bool(ends["alpha"]), prefix in _FLAT, nvlabs
    )


def _layer(stem: str, prefix: str) -> str | None:
    """The layer's dotted name, of either layout; None where the prefix is another or the flat name is unknown."""
    if not stem.startswith(prefix):
        return None
    rest = stem[len(prefix) :]
    return unflatten(rest) if prefix in _FLAT else rest


def _parse(name: str, spelling: Spelling) -> tuple[str | None, str]:
    """(layer as the file's layout calls it, what of it: down, up, alpha, magnitude or a factor's name)."""
    match = _ENDS.fullmatch(name)
    layer = _layer(match[1], spelling.prefix) if match else None
    if match is None or layer is None:
        return None, ""
    kinds = {**dict.fromkeys(_DOWN, "down"), **dict.fromkeys(_UP, "up"), **dict.fromkeys(_MAGNITUDES, "magnitude")}
    return layer, kinds.get(match[2], match[2])


def _take(
    adapter: OpenAdapter, layer: str, tensors: dict[str, torch.Tensor], sprint: bool, ranks: list[int] | None
) -> None:
    """Put one layer of the file into `adapter`, taken apart where it is a stack of diffusers' layers."""
    modules = from_nvlabs(layer, sprint) if adapter.spelling.nvlabs and is_nvlabs(layer) else [layer]
    factors = {name: tensor for name, tensor in tensors.items() if name in FACTORS}
    alpha = float(tensors["alpha"]) if "alpha" in tensors else None
    magnitude = tensors.get("magnitude")
    if magnitude is not None and adapter.spelling.magnitude != "dora_scale":
        magnitude = magnitude.flatten()
    down, up = tensors.get("down"), tensors.get("up")
    whole = factors if magnitude is None or not _per_input(magnitude) else {*factors, adapter.spelling.magnitude}
    if whole and len(modules) > 1:  # what belongs to the stack as a whole
        adapter.unknown += [f"{adapter.spelling.prefix}{layer}.{name}" for name in whole]
        return
    if "lora_mid.weight" in factors:
        factors |= {f"lora_{n}.weight": t for n, t in (("down", down), ("up", up)) if t is not None}
        down = up = None
    for name in BIASES:
        if name in tensors:
            parts = tensors[name].chunk(len(modules))
            adapter.biases |= {m: (name, part) for m, part in zip(modules, parts, strict=True)}
    taken: Iterable[tuple] = [(down, up, alpha, magnitude)]
    if len(modules) > 1:
        taken = _unstack(down, up, alpha, magnitude, len(modules), ranks)
    for module, (part_down, part_up, part_alpha, part_magnitude) in zip(modules, taken, strict=True):
        if factors:
            adapter.factors[module] = factors
        elif part_down is not None or part_up is not None:
            adapter.pairs[module] = (part_down, part_up)
        if part_alpha is not None and (factors or module in adapter.pairs):
            adapter.alphas[module] = part_alpha
        if part_magnitude is not None and (factors or module in adapter.pairs):
            adapter.magnitudes[module] = part_magnitude


def _unstack(
    down: torch.Tensor | None,
    up: torch.Tensor | None,
    alpha: float | None,
    magnitude: torch.Tensor | None,
    parts: int,
    ranks: list[int] | None,
) -> Iterator[tuple]:
    """(down, up, alpha, magnitude) of each part of a stack along the outputs.

    Where up is block-diagonal, each part has its own columns of it and rows of down; else all share down. Either way
    the part's product is the stack's, exactly, and alpha / rank stays what it is.
    """
    if down is None or up is None:
        yield from [(down, up, alpha, magnitude)] + [(None, None, None, None)] * (parts - 1)
        return
    rank = down.shape[0]
    rows = up.chunk(parts, dim=0)
    if ranks == []:  # a conversion found all parts to share down
        ranks = None
    elif ranks is None and rank % parts == 0 and _block_diagonal(rows, [rank // parts] * parts):
        ranks = [rank // parts] * parts
    if ranks is not None and (sum(ranks) != rank or not _block_diagonal(rows, ranks)):
        ranks = None  # somebody changed the tensors since they were stacked
    magnitudes = [None] * parts if magnitude is None else magnitude.flatten().chunk(parts)
    start = 0
    for index, row in enumerate(rows):
        if ranks is None:
            yield down.clone(), row.contiguous(), alpha, magnitudes[index]
            continue
        own = slice(start, start + ranks[index])
        start = own.stop
        if ranks[index] == 0:
            yield None, None, None, None
            continue
        part_alpha = None if alpha is None else alpha * ranks[index] / rank
        yield down[own].contiguous(), row[:, own].contiguous(), part_alpha, magnitudes[index]


def _block_diagonal(rows: tuple[torch.Tensor, ...], ranks: list[int]) -> bool:
    """Whether each of the row blocks is zero outside its own columns."""
    start = 0
    for row, own in zip(rows, ranks, strict=True):
        if bool(row[:, :start].any()) or bool(row[:, start + own :].any()):
            return False
        start += own
    return True


def for_module(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """peft's rank_pattern and alpha_pattern: keys are module names or their ends, or regular expressions."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def settings_of(adapter: OpenAdapter) -> dict[str, Any]:
    """peft's settings of an adapter: those that it has, else what its tensors and alphas say.

    Without any alpha it is the rank, as diffusers takes it.
    """
    if adapter.config is not None and not adapter.alphas:
        return dict(adapter.config)
    ranks = {module: down.shape[0] for module, (down, _) in adapter.pairs.items() if down is not None}
    alphas = {module: adapter.alphas.get(module, float(rank)) for module, rank in ranks.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 0
    alpha = Counter(alphas.values()).most_common(1)[0][0] if alphas else 0.0
    whole = {module: int(value) if value == int(value) else value for module, value in alphas.items()}
    return {
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "use_dora": bool(adapter.magnitudes),
        "use_rslora": False,
        "rank_pattern": {module: r for module, r in sorted(ranks.items()) if r != rank},
        "alpha_pattern": {module: a for module, a in sorted(whole.items()) if a != alpha},
        "target_modules": sorted(ranks),
    }


def peft_magnitude(adapter: OpenAdapter, module: str) -> torch.Tensor:
    """DoRA's m of a layer in the shape that peft has: (out,), of a convolution (1, out, 1, 1)."""
    down = adapter.pairs[module][0]
    shape = (1, -1, *(1 for _ in down.shape[2:])) if down is not None and down.ndim > 2 else (-1,)
    return adapter.magnitudes[module].reshape(shape)
