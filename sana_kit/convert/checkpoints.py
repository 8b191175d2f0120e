"""Checkpoints between NVlabs' one file and diffusers' folders: transformer and ControlNet of every SANA member.

NVlabs' file (.pth: {"state_dict": ...}, or .safetensors) holds a ControlNet together with its base; in diffusers they
are two folders, `controlnet/` and `transformer/`. What diffusers has no place for (`pos_embed`, `y_embedding`,
`logvar_linear`) is kept beside the transformer in EXTRA_FILE, so that the way back gives the same tensors.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sana_kit.convert.writing import write_tensors
from sana_kit.errors import Problem, UserError, setting
from sana_kit.files import apply_umask, expand, remove_tree, unique_name, write_atomic
from sana_kit.models.keys import NVLABS_BLOCKS, to_nvlabs
from sana_kit.models.weights import TRANSFORMER_STEM, some_of, weight_files

EXTRA_FILE = "nvlabs_extra.safetensors"
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
HEADS = {1152: (36, 16), 2240: (70, 20)}  # width: heads of the self-attention, heads of the cross-attention
INTERPOLATION = {16: None, 32: None, 64: 1.0, 128: 2.0}  # sample_size: interpolation_scale
LINEAR_HEAD_DIM = 32  # of all members
CAPTION_TOKENS = 300
_CONTROLNET = "controlnet."
_EXTRA = ("pos_embed", "y_embedder.y_embedding", "logvar_linear.weight", "logvar_linear.bias")
Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass
class Options:
    """What tensors cannot tell.

    Attributes:
        image_size: pixels of a side, where the file has no `pos_embed` that tells it.
        config: a config.json of diffusers whose heads are taken, for widths that no published member has.
        base: of a ControlNet: its transformer in diffusers' layout, for the way to NVlabs.
    """

    image_size: int | None = None
    config: str | None = None
    base: str | None = None


def model_class(name: str) -> type[Any]:
    """diffusers' class of a folder's config."""
    import diffusers

    return {
        "SanaTransformer2DModel": diffusers.SanaTransformer2DModel,
        "SanaControlNetModel": diffusers.SanaControlNetModel,
    }[name]


def meta_model(name: str, config: Mapping[str, Any]) -> torch.nn.Module:
    """A model without memory, for its names and shapes."""
    with torch.device("meta"):
        return model_class(name).from_config(dict(config))


def nvlabs_name(key: str, controlnet: bool = False) -> tuple[str, int, int] | None:
    """(NVlabs' name, part, parts) of a tensor of diffusers' transformer or ControlNet; None for what is none."""
    module, _, end = key.rpartition(".")
    if controlnet and key.startswith("input_block."):
        return f"{_CONTROLNET}0.before_proj.{end}", 0, 1
    if controlnet and key.startswith("controlnet_blocks."):
        return f"{_CONTROLNET}{module.split('.')[1]}.after_proj.{end}", 0, 1
    if end == "scale_shift_table":
        name = f"{NVLABS_BLOCKS}.{module.split('.')[1]}.{end}" if module else f"final_layer.{end}"
        found = name, 0, 1
    else:
        place = to_nvlabs(module)
        if place is None:
            return None
        found = f"{place.name}.{end}", place.part, place.parts
    if controlnet and found[0].startswith(f"{NVLABS_BLOCKS}."):
        number, rest = found[0].removeprefix(f"{NVLABS_BLOCKS}.").split(".", 1)
        return f"{_CONTROLNET}{number}.copied_block.{rest}", *found[1:]
    return found


def from_diffusers(state: Mapping[str, torch.Tensor], controlnet: bool = False) -> Tensors:
    """The same tensors under NVlabs' names, stacked where NVlabs stacks them; dtypes and values as they are.

    Raises:
        UserError: names that are none of the model's, all of them.
    """
    parts: dict[str, list[torch.Tensor | None]] = {}
    unknown = []
    for key, tensor in state.items():
        found = nvlabs_name(key, controlnet)
        if found is None:
            unknown.append(key)
        else:
            name, part, count = found
            parts.setdefault(name, [None] * count)[part] = tensor
    unknown += [name for name, stack in parts.items() if any(tensor is None for tensor in stack)]
    if unknown:
        reason = f"{len(unknown)} tensors are none of a SANA model's, or miss their partners: {', '.join(unknown)}"
        raise UserError(Problem("in", None, reason))
    return {name: stack[0] if len(stack) == 1 else torch.cat(stack) for name, stack in parts.items()}


def to_diffusers(state: Mapping[str, torch.Tensor], model: torch.nn.Module) -> tuple[Tensors, set[str]]:
    """(the tensors of `model` (on the meta device) out of NVlabs' `state`, the names that were used).

    Raises:
        UserError: tensors that are missing or have another shape, all of them.
    """
    controlnet = type(model).__name__ == "SanaControlNetModel"
    tensors, used, missing, odd = {}, set(), [], []
    for key, wanted in model.state_dict().items():
        found = nvlabs_name(key, controlnet)
        if found is None:
            raise KeyError(f"{key} of diffusers' {type(model).__name__} has no name in NVlabs' layout")
        name, part, parts = found
        if name not in state:
            missing += [] if name in missing else [name]
            continue
        used.add(name)
        tensor = state[name].chunk(parts)[part] if parts > 1 else state[name]
        if tensor.shape != wanted.shape and key == "patch_embed.proj.weight" and tensor.numel() == wanted.numel():
            tensor = tensor.view(wanted.shape)
        if tensor.shape != wanted.shape:
            odd.append(f"{name} {tuple(state[name].shape)}")
        tensors[key] = tensor.contiguous()
    problems = []
    if missing:
        problems.append(Problem("in", None, f"{len(missing)} tensors are missing: {', '.join(missing)}"))
    if odd:
        problems.append(Problem("in", None, f"{len(odd)} tensors do not fit the config: {', '.join(odd)}"))
    if problems:
        raise UserError(problems)
    return tensors, used


def read_nvlabs(path: Path) -> tuple[Tensors, list[str]]:
    """(tensors, what else the file holds) of NVlabs' checkpoint; a pickle is read with weights_only.

    Raises:
        UserError: it cannot be read so.
    """
    try:
        stored = load_file(path) if path.suffix == ".safetensors" else _load_pickle(path)
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        reason = f"cannot be read as tensors alone ({type(error).__name__}: {first})"
        remedy = "Pickles that hold more than tensors are not opened: they can run any program."
        raise UserError(Problem("in", path, reason, remedy)) from None
    inner = stored.get("state_dict")
    rest = [] if inner is None else sorted(map(str, set(stored) - {"state_dict"}))
    tensors = {str(name).removeprefix("module."): tensor for name, tensor in (inner or stored).items()}
    others = [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
    if others or not tensors:
        reason = f"holds no state_dict of tensors, but {some_of(others) or 'nothing'}"
        raise UserError(Problem("in", path, reason))
    return tensors, rest


def _load_pickle(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def config_of(state: Mapping[str, torch.Tensor], options: Options, controlnet: bool = False) -> dict[str, Any]:
    """diffusers' config of NVlabs' tensors, by their shapes.

    Raises:
        UserError: a width that no published member has, and no config that tells its heads; sizes that disagree.
    """
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        caption = state["y_embedder.y_proj.fc1.weight"].shape[1]
        block = f"{_CONTROLNET}0.copied_block" if controlnet else f"{NVLABS_BLOCKS}.0"
        ratio = state[f"{block}.mlp.inverted_conv.conv.weight"].shape[0] / (2 * width)
    except KeyError as error:
        reason = f"lacks {error}, which every SANA checkpoint of NVlabs has"
        own = any(name.startswith("transformer_blocks.") for name in state)
        instead = f"Its names are diffusers': name the folder that it lies in, and go {setting('to')} nvlabs."
        raise UserError(Problem("in", None, reason, instead if own else "")) from None
    given = _given_config(options.config) if options.config else None
    problems = []
    if given is not None:
        heads, cross = given["num_attention_heads"], given["num_cross_attention_heads"]
    elif width in HEADS:
        heads, cross = HEADS[width]
    else:
        reason = f"is {width} wide, which no published member is, so its heads are unknown"
        problems.append(Problem("in", None, reason, "Give a config.json of diffusers that tells them."))
        heads = cross = 1
    sample_size = _sample_size(state, options, given, patch, problems)
    if problems:
        raise UserError(problems)
    config = {
        "in_channels": channels,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "num_layers": _layers(state, _CONTROLNET if controlnet else f"{NVLABS_BLOCKS}."),
        "num_cross_attention_heads": cross,
        "cross_attention_head_dim": width // cross,
        "cross_attention_dim": width,
        "caption_channels": caption,
        "mlp_ratio": ratio,
        "sample_size": sample_size,
        "patch_size": patch,
        "interpolation_scale": given.get("interpolation_scale") if given else INTERPOLATION.get(sample_size),
    }
    if controlnet:
        return config
    config["out_channels"] = state["final_layer.linear.weight"].shape[0] // patch**2
    config["qk_norm"] = "rms_norm_across_heads" if f"{block}.attn.q_norm.weight" in state else None
    config["guidance_embeds"] = "cfg_embedder.mlp.0.weight" in state
    return config


def _given_config(path: str) -> dict[str, Any]:
    """The config.json that the user named: the file, or the folder that holds it."""
    file = expand(path)
    file = file / "config.json" if file.is_dir() else file
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
        lacking = [n for n in ("num_attention_heads", "num_cross_attention_heads", "sample_size") if n not in given]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(Problem("config", path, f"cannot be read ({error})")) from None
    if lacking:
        reason = f"lacks {', '.join(lacking)}"
        raise UserError(Problem("config", path, reason, "Name the config.json of a SANA transformer of diffusers."))
    return given


def _layers(state: Mapping[str, torch.Tensor], prefix: str) -> int:
    numbers = {int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix)}
    return max(numbers, default=-1) + 1


def _sample_size(
    state: Mapping[str, torch.Tensor], options: Options, given: dict | None, patch: int, problems: list[Problem]
) -> int:
    """Latents of a side that the checkpoint was trained at."""
    asked = options.image_size // 32 if options.image_size else None
    asked = given["sample_size"] if given and asked is None else asked
    stored = None
    if "pos_embed" in state:
        stored = round(state["pos_embed"].shape[-2] ** 0.5) * patch
    if asked is not None and stored is not None and asked != stored:
        reason = f"{asked * 32} px were asked for, and its pos_embed is of {stored * 32} px"
        problems.append(Problem("image_size", options.image_size, reason))
    return asked or stored or 32


def position_table(width: int, side: int, interpolation: float) -> torch.Tensor:
    """NVlabs' `pos_embed` (1, side * side, width), float32: sines and cosines of columns, then of rows."""
    steps = np.arange(side, dtype=np.float32) / interpolation
    omega = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))

    def of(positions: np.ndarray) -> np.ndarray:
        angles = positions.reshape(-1)[:, None] * omega
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    columns, rows = np.meshgrid(steps, steps)
    return torch.from_numpy(np.concatenate([of(columns), of(rows)], axis=1)).float()[None]


def nvlabs_to_folder(source: Path, target: Path, options: Options) -> list[str]:
    """Write transformer/ (and controlnet/ of a ControlNet) of NVlabs' checkpoint below `target`; lines for the user.

    Raises:
        UserError: tensors that are unknown, missing or of another shape, all of them at once.
    """
    state, rest = read_nvlabs(source)
    is_controlnet = any(name.startswith(_CONTROLNET) for name in state)
    names = ["SanaTransformer2DModel", *(["SanaControlNetModel"] if is_controlnet else [])]
    models, used, problems = [], set(_EXTRA), []
    for name in names:
        model = meta_model(name, config_of(state, options, name == "SanaControlNetModel"))
        try:
            tensors, taken = to_diffusers(state, model)
        except UserError as error:
            problems += error.problems
            continue
        used |= taken
        models.append((model, tensors))
    unknown = sorted(set(state) - used)
    if unknown:
        problems.append(Problem("in", source, f"{len(unknown)} unknown tensors: {', '.join(unknown)}"))
    if problems:
        raise UserError(dict.fromkeys(problems))
    notes = [f"{source}: NVlabs' layout, {len(state)} tensors"]
    # whole or not at all: a folder that was cut off would look like one that is there already
    making = target.with_name(unique_name(target.name))
    try:
        notes += _write_folders(models, {name: state[name] for name in _EXTRA if name in state}, making, target)
        os.replace(making, target)
    except BaseException:
        remove_tree(making)
        raise
    notes += [f"Left behind, since diffusers has no place for it: {', '.join(rest)}"] if rest else []
    more = f" --controlnet={target}" if is_controlnet else ""
    return [*notes, f"To draw with it: --model_path={target} --base_model=PIPELINE (for its other parts){more}"]


def _write_folders(
    models: Sequence[tuple[torch.nn.Module, Tensors]], extra: Tensors, making: Path, target: Path
) -> list[str]:
    """Write the models and what diffusers has no place for below `making`; lines that name them below `target`."""
    notes = []
    for model, tensors in models:
        name = "controlnet" if type(model).__name__ == "SanaControlNetModel" else "transformer"
        _save(model, tensors, making / name)
        count = sum(tensor.numel() for tensor in tensors.values())
        notes.append(
            f"{target / name}: {type(model).__name__}, {model.config.num_layers} layers, {count:,} parameters"
        )
    if extra:
        write_tensors(making / "transformer" / EXTRA_FILE, extra, {"format": "pt"})
        notes.append(f"Kept in {EXTRA_FILE} for the way back: {', '.join(extra)}")
    return notes


def _save(model: torch.nn.Module, tensors: Tensors, folder: Path) -> None:
    """A diffusers folder, by diffusers itself, in the dtype of the tensors."""
    model.load_state_dict(tensors, strict=True, assign=True)
    model.save_pretrained(folder, safe_serialization=True, max_shard_size="5GB")
    apply_umask(path for path in folder.iterdir() if path.is_file())


def read_folder(folder: Path) -> tuple[str, dict[str, Any], Tensors, Tensors]:
    """(class, config, tensors, NVlabs' extras) of a diffusers folder of a transformer or ControlNet.

    Raises:
        UserError: no such model, or a weights file that is missing.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = config["_class_name"]
        model_class(name)
        files = weight_files(folder, TRANSFORMER_STEM, None)
        tensors = {key: tensor for file in files for key, tensor in load_file(file).items()}
        extra = load_file(folder / EXTRA_FILE) if (folder / EXTRA_FILE).is_file() else {}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = f"is no folder of SanaTransformer2DModel or SanaControlNetModel ({error})"
        raise UserError(Problem("in", folder, reason)) from None
    return name, config, tensors, extra


def folder_to_nvlabs(source: Path, target: Path, options: Options) -> list[str]:
    """Write diffusers' transformer (with its ControlNet, if it has one) as one file of NVlabs; lines for the user.

    Args:
        source: a folder of one model, or one that holds transformer/ and, if wanted, controlnet/.
        target: .pth or .safetensors.

    Raises:
        UserError: what NVlabs' layout cannot hold, all of it at once.
    """
    control, base = _two_folders(source, options)
    _, config, tensors, extra = read_folder(base)
    state = from_diffusers(tensors)
    notes = [f"{base}: SanaTransformer2DModel, {config['num_layers']} layers"]
    if control is not None:
        other = from_diffusers(read_folder(control)[2], controlnet=True)
        shared = [name for name in other if not name.startswith(_CONTROLNET)]
        apart = [name for name in shared if name not in state or not torch.equal(state[name], other[name])]
        if apart:
            reason = f"differs from the base in {', '.join(apart)}, and NVlabs' file has room for one of them"
            raise UserError(Problem("in", control, reason, "Give the base that it was made from."))
        state |= {name: tensor for name, tensor in other.items() if name.startswith(_CONTROLNET)}
        notes.append(f"{control}: SanaControlNetModel")
    state, made = _with_extras(state, config, extra)
    notes += [f"Made again: {line}" for line in made]
    order = dict(sorted(state.items()))
    if target.suffix == ".safetensors":
        write_tensors(target, order, {"format": "pt"})
    else:
        write_atomic(target, lambda file: torch.save({"state_dict": order}, file))
    return [*notes, f"{target}: NVlabs' layout, {len(order)} tensors"]


def _two_folders(source: Path, options: Options) -> tuple[Path | None, Path]:
    """(folder of the ControlNet, folder of the transformer)."""
    base = expand(options.base or "")
    if (source / "config.json").is_file():
        name = json.loads((source / "config.json").read_text(encoding="utf-8")).get("_class_name")
        if name != "SanaControlNetModel":
            return None, source
        if options.base is None:
            raise _no_base()
        return source, base / "transformer" if (base / "transformer").is_dir() else base
    control, own = source / "controlnet", source / "transformer"
    if control.is_dir() and not own.is_dir():  # the output of a ControlNet's training
        if options.base is None:
            raise _no_base()
        return control, base / "transformer" if (base / "transformer").is_dir() else base
    return control if control.is_dir() else None, own


def _no_base() -> UserError:
    reason = "needed: it is a ControlNet, and NVlabs' file holds one together with its base"
    return UserError(Problem("base", None, reason, "Name the base's transformer folder."))


def _with_extras(state: Tensors, config: Mapping[str, Any], extra: Tensors) -> tuple[Tensors, list[str]]:
    """(state with what only NVlabs has, lines about what had to be made)."""
    if extra:
        return {**state, **extra}, []
    width, patch = state["x_embedder.proj.weight"].shape[0], config.get("patch_size") or 1
    like = state["x_embedder.proj.weight"]
    side = config["sample_size"] // patch
    table = position_table(width, side, config.get("interpolation_scale") or 1.0)
    empty = like.new_zeros((CAPTION_TOKENS, config["caption_channels"]))
    made = [
        f"pos_embed, the fixed table of {side} x {side} positions",
        "y_embedder.y_embedding, zeros: NVlabs' trainer puts its own embedding of the empty prompt there",
    ]
    return {**state, "pos_embed": table.to(like.dtype), "y_embedder.y_embedding": empty}, made
