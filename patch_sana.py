"""LoRA save and load hooks for SANA training under DeepSpeed, and the tool that puts them into diffusers' own trainer.

This file stands alone: it imports no other file of the kit, so it also works beside diffusers' own script.

In a trainer (ours, or diffusers' after the edits below):
    from patch_sana import create_load_model_hook, create_save_model_hook
    accelerator.register_save_state_pre_hook(create_save_model_hook(accelerator, unwrap_model, transformer))
    accelerator.register_load_state_pre_hook(create_load_model_hook(accelerator, unwrap_model, transformer, args))

On diffusers' trainer (from commit cd0a4a82 of March 2025 to the one of August 2026):
    python patch_sana.py PATH/train_dreambooth_lora_sana.py --dry-run    # show the difference, write nothing
    python patch_sana.py PATH/train_dreambooth_lora_sana.py              # patch it, keep the original as *.orig
    python patch_sana.py PATH/train_dreambooth_lora_sana.py --revert     # restore the original, byte for byte

The adapter file, pytorch_lora_weights.safetensors, has the layout of diffusers: keys
`transformer.<module>.lora_A.weight` and `lora_B.weight`, and under the metadata key `lora_adapter_metadata` the peft
configuration (rank, alpha, target modules). A second metadata key, `sana_base_model`, describes the base model, so
that a load on another one is an error. A trainer may add keys of its own.

Names that accelerate and DeepSpeed do not promise, each with a test that fails when it goes away:
    `model._orig_mod` of torch.compile (torch 2.1 to 2.13); `parameter.ds_id` of ZeRO-3 (DeepSpeed 0.15 to 0.19), which
    DeepSpeed's own `safe_get_full_fp32_param` reads as well; the folder `pytorch_model` that accelerate gives the
    DeepSpeed engine as its tag (accelerate 0.33 to 1.15).
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
import re
import struct
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

ADAPTER_FILE = "pytorch_lora_weights.safetensors"

KEY_PREFIX = "transformer."

LORA_METADATA_KEY = "lora_adapter_metadata"  # diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY since 0.34

BASE_METADATA_KEY = "sana_base_model"

ENGINE_FOLDER = "pytorch_model"  # the tag under which accelerate lets the DeepSpeed engine save and load

# In the names of an adapter's parameters: LoRA's, LoKr's, LoHa's.
ADAPTER_PARTS = ("lora_", "lokr_", "hada_")

# Settings that decide what the tensors mean; a file and a model that differ in one of them do not fit.
SCALE_SETTINGS = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "alpha", "peft_type")


def _adapter_name(model):
    """The adapter that is trained: `default` (what `transformer.add_adapter` makes), or the only one there is."""
    names = list(getattr(model, "peft_config", None) or {})
    if "default" in names:
        return "default"
    if len(names) == 1:
        return names[0]
    found = f"the adapters {', '.join(names)}" if names else "no LoRA adapter"
    raise ValueError(
        f"{type(model).__name__} has {found}; expected one named 'default'. Call "
        "transformer.add_adapter(LoraConfig(...)) first."
    )


def _adapter_tensors(model):
    """{file key: tensor} in sorted order, sharing storage with the live parameters: writing to one trains it."""
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name=_adapter_name(model), save_embedding_layers=False)
    # torch.compile of a block puts `_orig_mod.` into the names below it; the file must not depend on that.
    return {KEY_PREFIX + key.replace("_orig_mod.", ""): state[key] for key in sorted(state)}


@contextlib.contextmanager
def _gathered(model):
    """ZeRO-3 keeps a slice of each parameter per rank: make the trainable ones whole. Every rank must enter."""
    partitioned = [p for p in model.parameters() if p.requires_grad and hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=None):
        yield


def _lora_config(model):
    """The adapter's peft configuration as plain JSON values, without what merely repeats peft's own defaults.

    diffusers' `_collate_lora_metadata` writes every field; a reader with an older peft then fails on fields that it
    does not know. `LoraConfig(**fields)` gives the same configuration either way.
    """
    config = model.peft_config[_adapter_name(model)]
    plain = json.loads(json.dumps(config.to_dict(), default=_plain))
    defaults = json.loads(json.dumps(type(config)().to_dict(), default=_plain))
    always = SCALE_SETTINGS + ("target_modules", "lora_dropout")
    if plain.get("peft_type") == "LORA":  # what files without the entry are
        plain.pop("peft_type")
    return {key: value for key, value in plain.items() if key in always or value != defaults.get(key, value)}


def _warn_of_unread_alpha(lora_config):
    """diffusers before 0.34 reads no metadata of a LoRA and takes alpha = rank: silently another strength."""
    from diffusers.loaders import lora_base

    rank, alpha = lora_config["r"], lora_config.get("lora_alpha", lora_config["r"])  # LoKr and LoHa have another name
    if rank != alpha and not hasattr(lora_base, "LORA_ADAPTER_METADATA_KEY"):
        logger.warning(
            f"This diffusers ignores lora_alpha {alpha} of a saved LoRA and takes the rank, {rank}. In its pipeline "
            f"apply it with set_adapters(name, {alpha / rank:g}), train with lora_alpha {rank}, or install diffusers "
            "0.34 or newer."
        )


def _plain(value):
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return getattr(value, "value", None) or str(value)


def base_model_fingerprint(model: torch.nn.Module) -> dict[str, Any]:
    """A small description of the frozen base of `model`, cheap to take: 16 values of each parameter are read.

    Returns a dict of JSON values: `class`, `name` (hub name, or the last part of a local path), `config` (without
    private keys), `dtype`, `sha256` (of names, shapes and the values read, in that dtype) and `sample` (at most 32 of
    the values as floats: they let models be compared that were cast to different dtypes). `sha256` and `sample` are
    None where ZeRO-3 has already cut the weights up. A trainer that changes how the weights are kept (quantised, say)
    leaves what this function gave before as the model's attribute `sana_base_model`.
    """
    import torch

    before = getattr(model, "sana_base_model", None)
    if before is not None:
        return before

    config = dict(getattr(model, "config", None) or {})
    name = str(config.get("_name_or_path") or "")
    described = {
        "class": type(model).__name__,
        "name": os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name,
        "config": {key: value for key, value in sorted(config.items()) if not key.startswith("_")},
    }
    described = json.loads(json.dumps(described, default=_plain))

    parameters = {
        key.replace("_orig_mod.", "").replace(".base_layer.", "."): parameter.detach()
        for key, parameter in model.named_parameters()
        if not any(part in key for part in ADAPTER_PARTS)
    }
    names = sorted(parameters)
    if any(hasattr(parameters[key], "ds_id") or parameters[key].numel() == 0 for key in names):
        return {**described, "dtype": None, "sha256": None, "sample": None}

    read = {}
    by_dtype = {}
    for key in names:
        by_dtype.setdefault(parameters[key].dtype, []).append(key)
    for keys in by_dtype.values():  # one copy from the device per dtype, not one per parameter
        values = [parameters[key].reshape(-1) for key in keys]
        values = [value[:: max(1, value.numel() // 16)][:16] for value in values]
        counts = [value.numel() for value in values]
        read.update(zip(keys, torch.cat(values).cpu().split(counts), strict=True))

    digest = hashlib.sha256()
    for key in names:
        digest.update(f"{key} {tuple(parameters[key].shape)}\n".encode())
        digest.update(read[key].contiguous().view(torch.uint8).numpy().tobytes())
    matrices = [key for key in names if parameters[key].ndim > 1]
    chosen = matrices[:: max(1, -(-len(matrices) // 32))]
    return {
        **described,
        "dtype": "+".join(sorted(str(dtype).removeprefix("torch.") for dtype in by_dtype)),
        "sha256": digest.hexdigest(),
        "sample": [float(read[key][-1]) for key in chosen],
    }


def _called(base):
    return f"{base['class']} {base['name'] or '(no name)'}"


def _base_differences(trained_on, present):
    """What tells the two fingerprints apart, in words; an empty list when they are the same model."""
    if trained_on["class"] != present["class"]:
        return [f"class {trained_on['class']} in the file, {present['class']} here"]
    # Only settings that both know: other diffusers versions have more or fewer of them.
    shared = sorted(set(trained_on["config"]) & set(present["config"]))
    found = [
        f"{key} {trained_on['config'][key]} in the file, {present['config'][key]} here"
        for key in shared
        if trained_on["config"][key] != present["config"][key]
    ]
    if found or not trained_on["sha256"] or not present["sha256"]:
        return found
    if trained_on["dtype"] == present["dtype"]:
        if trained_on["sha256"] != present["sha256"]:
            found.append(
                f"other weights (sha256 {trained_on['sha256'][:12]} in the file, {present['sha256'][:12]} here)"
            )
        return found
    # Cast to another dtype: a bfloat16 value is within 2^-8 of what it was rounded from.
    pairs = list(zip(trained_on["sample"], present["sample"], strict=False))
    apart = sum(abs(a - b) > 2**-7 * max(abs(a), abs(b)) + 1e-6 for a, b in pairs)
    if apart or len(trained_on["sample"]) != len(present["sample"]):
        found.append(f"other weights ({apart} of {len(pairs)} sampled values differ by more than the dtypes explain)")
    return found


def write_adapter(
    folder: str | os.PathLike,
    tensors: Mapping[str, torch.Tensor],
    lora_config: Mapping[str, Any],
    base_model: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `tensors` ({file key: tensor, any dtype}) to `folder`/pytorch_lora_weights.safetensors.

    With them go the peft configuration, the base model's fingerprint and further `metadata`. The file appears whole
    or not at all: it is written under another name, flushed to the disk and renamed. Equal input gives equal bytes.
    Raises OSError (disk full, no permission) and leaves an older file untouched.
    """
    import safetensors.torch

    lora_config = {KEY_PREFIX + key: value for key, value in lora_config.items()}
    metadata = {
        **(metadata or {}),
        "format": "pt",
        LORA_METADATA_KEY: json.dumps(lora_config, indent=2, sort_keys=True),
        BASE_METADATA_KEY: json.dumps(base_model, sort_keys=True),
    }
    data = safetensors.torch.save({key: tensor.contiguous() for key, tensor in tensors.items()}, metadata=metadata)
    # safetensors writes the metadata in the random order of a hash map: sort it. The header is padded to 8 bytes.
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    header = json.dumps(header, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    os.makedirs(folder, exist_ok=True)
    write_atomically(os.path.join(folder, ADAPTER_FILE), struct.pack("<Q", len(header)) + header + data[8 + length :])


def write_atomically(path: str, data: bytes) -> None:
    """Write `data` to `path` so that it is there whole or not at all."""
    folder = os.path.dirname(os.path.abspath(path))
    temporary = os.path.join(folder, f".{os.path.basename(path)}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the rename itself reaches the disk with its folder
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with contextlib.suppress(OSError):  # some network file systems refuse to sync a folder
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Adapter(NamedTuple):
    """What an adapter file holds.

    Attributes:
        tensors: by file key, on the CPU, as stored.
        lora_config: the peft configuration, keys without prefix; None in files written by older diffusers.
        base_model: the base model's fingerprint; None in files that `write_adapter` did not write.
        metadata: all of the file's metadata.
    """

    tensors: dict[str, torch.Tensor]
    lora_config: dict[str, Any] | None
    base_model: dict[str, Any] | None
    metadata: dict[str, str]


def open_adapter(path: str | os.PathLike) -> Adapter:
    """Read one adapter file; ValueError unless it is a whole safetensors file with metadata that can be read."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            metadata = file.metadata() or {}
        lora_config = json.loads(metadata[LORA_METADATA_KEY]) if LORA_METADATA_KEY in metadata else None
        base_model = json.loads(metadata[BASE_METADATA_KEY]) if BASE_METADATA_KEY in metadata else None
        if lora_config is not None:
            lora_config = {key.removeprefix(KEY_PREFIX): value for key, value in lora_config.items()}
    except (safetensors.SafetensorError, OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({os.path.getsize(path)} bytes: {error}). "
            "It was cut off or is of another format; choose another checkpoint."
        ) from error
    return Adapter(tensors, lora_config, base_model, metadata)


def read_adapter(
    folder: str | os.PathLike,
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None, dict[str, Any] | None]:
    """(tensors, peft configuration, base model's fingerprint) of `folder`/pytorch_lora_weights.safetensors.

    Raises ValueError when there is no such file or it is not a whole safetensors file.
    """
    path = os.path.join(folder, ADAPTER_FILE)
    if not os.path.isfile(path):
        others = sorted(os.path.basename(p) for p in glob.glob(os.path.join(glob.escape(str(folder)), "*lora*")))
        raise ValueError(
            f"No LoRA weights at {path}"
            + (f" (found {', '.join(others)}: only {ADAPTER_FILE} is read, never pickled files)" if others else "")
            + ". Choose a whole checkpoint; on several machines the output folder must be shared."
        )
    adapter = open_adapter(path)
    return adapter.tensors, adapter.lora_config, adapter.base_model


def _named(keys, details=None):
    """All `keys` in words, blocks written as one: `transformer.transformer_blocks.{0-19}.attn1.to_q...`."""
    blocks = {}
    for key in keys:
        before, number, after = re.match(r"(.*?_blocks\.)?(\d*)(.*)", key).groups()
        blocks.setdefault((before or "", after, (details or {}).get(key, "")), []).append(number)
    named = []
    for (before, after, detail), numbers in sorted(blocks.items()):
        if len(numbers) > 1:
            numbers = sorted(map(int, numbers))
            whole = numbers == list(range(numbers[0], numbers[-1] + 1))
            numbers = [f"{{{numbers[0]}-{numbers[-1]}}}" if whole else "{" + ",".join(map(str, numbers)) + "}"]
        named.append(f"{before}{numbers[0]}{after}{detail}")
    return ", ".join(named)


def _misfits(tensors, lora_config, base_model, model, live, base_here):
    """Every reason, in words, why the adapter file does not belong to `model`, whose tensors `live` are by key."""
    found = []
    if base_model is not None:
        differences = _base_differences(base_model, base_here)
        if differences:
            found.append(
                f"trained on another base model: {_called(base_model)}, but this is {_called(base_here)}: "
                + "; ".join(differences)
            )
    if lora_config is not None:
        here = _lora_config(model)
        settings = [
            f"{key} {lora_config[key]} in the file, {here[key]} here"
            for key in SCALE_SETTINGS
            if key in lora_config and key in here and lora_config[key] != here[key]
        ]
        if settings:
            found.append("other LoRA settings (rank, lora_alpha): " + "; ".join(settings))
    unexpected, missing = set(tensors) - set(live), set(live) - set(tensors)
    if unexpected:
        found.append(f"{len(unexpected)} unexpected keys (not in this model; lora_layers?): {_named(unexpected)}")
    if missing:
        found.append(f"{len(missing)} missing keys (in this model, not in the file; lora_layers?): {_named(missing)}")
    shapes = {
        key: f" {tuple(tensors[key].shape)} in the file, {tuple(live[key].shape)} here"
        for key in set(tensors) & set(live)
        if tensors[key].shape != live[key].shape
    }
    if shapes:
        found.append(f"{len(shapes)} tensors of another shape (another rank or model): {_named(shapes, shapes)}")
    return found


def _raise_all(folder, found):
    if found:
        lines = "".join(f"\n  - {line}" for line in found)
        raise ValueError(f"{os.path.join(folder, ADAPTER_FILE)} does not fit this run:{lines}")


def _engine_name(accelerator):
    """accelerate's distributed type by name, such as DEEPSPEED; ValueError for engines that shard otherwise."""
    name = getattr(accelerator.distributed_type, "name", str(accelerator.distributed_type))
    if name in ("FSDP", "MEGATRON_LM", "TP"):
        raise ValueError(
            f"The SANA LoRA hooks cannot save or load under distributed_type {name}: its weights are sharded in a "
            "way of its own. Use distributed_type DEEPSPEED (ZeRO 1 to 3), "
            "MULTI_GPU, MULTI_NPU or MULTI_CPU in the accelerate config."
        )
    return name


def _the_transformer(models, unwrap_model, transformer):
    """The one prepared model, without wrappers (DDP, DeepSpeedEngine, torch.compile)."""
    kind = type(_bare(transformer, unwrap_model))
    bare = [_bare(model, unwrap_model) for model in models]
    strangers = sorted({type(model).__name__ for model in bare if not isinstance(model, kind)})
    if strangers or len(bare) != 1:
        raise ValueError(
            f"The SANA LoRA hooks handle exactly one prepared {kind.__name__}; accelerate passed {len(bare)} models"
            + (f", among them {', '.join(strangers)}" if strangers else "")
            + ". Prepare the transformer only."
        )
    return bare[0]


def _bare(model, unwrap_model):
    model = unwrap_model(model)
    return getattr(model, "_orig_mod", model)


def create_save_model_hook(
    accelerator: Any,
    unwrap_model: Callable,
    transformer: torch.nn.Module,
    metadata: Callable[[], Mapping[str, str]] | None = None,
) -> Callable[[list, list, str], None]:
    """The hook for `accelerator.register_save_state_pre_hook`: writes the LoRA adapter into each checkpoint.

    Create it after `transformer.add_adapter(...)` and before `accelerator.prepare(...)`: the base model is described
    now, while its weights are whole. `unwrap_model(model)` takes wrappers off a prepared model. `metadata()` gives
    further entries of the file's metadata at each save.

    The hook(models, weights, output_dir) writes output_dir/pytorch_lora_weights.safetensors once, on the main process,
    and empties `weights`, so that accelerate does not save the base model. It holds the live weights in the dtype that
    the model computes with: float32 or as cast without DeepSpeed; under DeepSpeed bf16, the float32 masters rounded
    (those are in the engine's own state beside it, which is what a resumed run goes on from). Collectives happen under
    ZeRO-3 only, where every rank must call `save_state`, as DeepSpeed needs anyway; elsewhere the main process may
    call it alone. No barrier follows: wait for everyone before moving the checkpoint.

    The adapter of the finished run is written by the same hook: `hook([transformer], [], output_dir)`, on every rank.

    Raises ValueError for FSDP and Megatron-LM and for prepared models other than the one transformer, OSError when the
    disk is full.
    """
    base_model = base_model_fingerprint(_bare(transformer, unwrap_model))
    if accelerator.is_main_process:
        _warn_of_unread_alpha(_lora_config(_bare(transformer, unwrap_model)))

    def save_model_hook(models, weights, output_dir):
        _engine_name(accelerator)
        model = _the_transformer(models, unwrap_model, transformer)
        with _gathered(model):  # joined by every rank, hence before asking which one writes
            if accelerator.is_main_process:
                tensors = {key: tensor.to("cpu", copy=True) for key, tensor in _adapter_tensors(model).items()}
        weights.clear()  # one entry per model, none under DeepSpeed
        if accelerator.is_main_process:
            write_adapter(output_dir, tensors, _lora_config(model), base_model, metadata() if metadata else None)

    return save_model_hook


def create_load_model_hook(
    accelerator: Any, unwrap_model: Callable, transformer: torch.nn.Module, args: Any
) -> Callable[[list, str], None]:
    """The hook for `accelerator.register_load_state_pre_hook`: restores the LoRA adapter; under DeepSpeed checks it.

    Create it after `transformer.add_adapter(...)` and before `accelerator.prepare(...)`. Of `args` only
    `mixed_precision` is read.

    Without DeepSpeed the hook(models, input_dir) copies the file into the live parameters in place, so that the
    optimizer keeps them, in their own dtype (with `--mixed_precision fp16` the trainable ones become float32 first),
    and empties `models`, so that accelerate loads no base model. Under DeepSpeed the engine has loaded its state
    before the hooks run; weights copied in now would be overwritten by its float32 masters at the next step. So
    nothing is written: file, live weights and masters must agree.

    Raises one ValueError with every misfit: no safetensors file, another base model, rank, alpha, keys or shapes;
    under DeepSpeed also an engine that did not load, that holds other weights, or whose masters belong to another
    step. Nothing is changed then.
    """
    base_here = base_model_fingerprint(_bare(transformer, unwrap_model))

    def load_model_hook(models, input_dir):
        if _engine_name(accelerator) == "DEEPSPEED":
            models.clear()
            _check_engine(accelerator, unwrap_model, transformer, input_dir, base_here)
            return

        model = _the_transformer(models, unwrap_model, transformer)
        tensors, lora_config, base_model = read_adapter(input_dir)
        _raise_all(input_dir, _misfits(tensors, lora_config, base_model, model, _adapter_tensors(model), base_here))
        models.clear()
        _warn_without_fingerprint(accelerator, input_dir, base_model)

        import torch

        if getattr(args, "mixed_precision", None) == "fp16":
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()  # keeps the Parameter, and so the optimizer's reference
        rounded = []
        with torch.no_grad():
            for key, live in _adapter_tensors(model).items():
                live.copy_(tensors[key])
                if not torch.equal(live.to("cpu", tensors[key].dtype), tensors[key]):
                    rounded.append(key)
        if rounded:
            dtypes = sorted({str(tensors[key].dtype) for key in rounded})
            logger.warning(
                f"{ADAPTER_FILE} holds {', '.join(dtypes)} values that this run's {live.dtype} weights cannot hold "
                f"exactly: {len(rounded)} tensors were rounded. Resume with the first run's mixed precision to avoid "
                "that."
            )

    return load_model_hook


def check_adapter(folder: str | os.PathLike, transformer: torch.nn.Module, same_weights: bool) -> None:
    """Raise one ValueError with every reason why the adapter in `folder` is not that of `transformer`.

    Nothing is changed.

    For trainers that keep optimizer and masters in files of their own, as this kit's does: it calls this before they
    are read (`same_weights` False: base model, rank, alpha, keys, shapes) and after (True: the weights too, compared
    in the coarser of both dtypes, since one engine keeps float32 weights where another keeps bfloat16).
    """
    import torch

    model = _bare(transformer, lambda module: module)
    tensors, lora_config, base_model = read_adapter(folder)
    live = _adapter_tensors(model)
    found = _misfits(tensors, lora_config, base_model, model, live, base_model_fingerprint(model))
    if same_weights and not found:
        differing = set()
        for key, tensor in live.items():
            coarser = min(tensor.dtype, tensors[key].dtype, key=lambda dtype: dtype.itemsize)
            if not torch.equal(tensor.cpu().to(coarser), tensors[key].to(coarser)):
                differing.add(key)
        if differing:
            found.append(
                f"{len(differing)} of {len(live)} tensors differ from the float32 masters beside it; the files are of"
                f" different runs or steps: {_named(differing)}"
            )
    _raise_all(folder, found)


def _warn_without_fingerprint(accelerator, folder, base_model):
    if base_model is None and accelerator.is_main_process:
        logger.warning(
            f"{os.path.join(folder, ADAPTER_FILE)} was not written by patch_sana and does not say which base model "
            "it belongs to; only its keys and shapes were checked."
        )


def _check_engine(accelerator, unwrap_model, transformer, folder, base_here):
    """ValueError unless the DeepSpeed engine's weights and masters and the adapter file in `folder` say the same."""
    import torch

    model = _bare(transformer, unwrap_model)
    # Collectives: joined by every rank before anything that can fail on one rank alone.
    with _gathered(model):
        live = {key: tensor.to("cpu", copy=True) for key, tensor in _adapter_tensors(model).items()}
        trained = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}
    stale, total = _stale_masters(model, trained)

    found = []
    engine_folder = os.path.join(folder, ENGINE_FOLDER)
    if not os.path.isdir(engine_folder):
        found.append(
            f"there is no DeepSpeed engine state ({engine_folder}): the checkpoint was written without DeepSpeed or "
            "was cut off. Resume it with the accelerate config that wrote it."
        )
    tensors, lora_config, base_model = read_adapter(folder)
    found += _misfits(tensors, lora_config, base_model, model, live, base_here)
    differing = {
        key
        for key in set(tensors) & set(live)
        if tensors[key].shape == live[key].shape and not torch.equal(tensors[key].to(live[key].dtype), live[key])
    }
    if differing:
        found.append(
            f"{len(differing)} of {len(live)} tensors differ from what the DeepSpeed engine loaded; file and engine "
            f"state are of different runs or steps: {_named(differing)}"
        )
    if stale:
        found.append(
            f"{stale} of {total} float32 masters do not round to the live weights, so the next step would replace "
            "those: the optimizer state is of another run or step. Choose another checkpoint, or load it with "
            "load_optimizer_states=False, which makes the masters from the weights and loses the moments."
        )
    _raise_all(folder, found)
    _warn_without_fingerprint(accelerator, folder, base_model)


def _stale_masters(model, trained):
    """(how many, of how many) float32 master values do not round to the 16-bit weights that they stand for.

    `trained`: {parameter name: whole weight on the CPU}. Every rank must call it: DeepSpeed gathers each master.
    Without ZeRO (stage 0 in float32) there is none to compare: (0, 0).
    """
    from deepspeed.utils import safe_get_full_fp32_param

    stale = total = 0
    for name, parameter in model.named_parameters():
        master = safe_get_full_fp32_param(parameter) if name in trained else None
        if master is not None:
            weights = trained[name]
            total += weights.numel()
            stale += int((master.detach().to("cpu", weights.dtype).view_as(weights) != weights).sum())
    return stale, total


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: done, or nothing to do; 1: refused, nothing was written; 2: wrong command line."""
    try:
        from sana_kit.patch_upstream import run
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("sana_kit"):
            raise
        print(
            f"{os.path.basename(__file__)}: the edits of diffusers' trainer are in {error.name}, and there is no "
            f"such file beside {os.path.abspath(__file__)}. Copy the kit's folder sana_kit there as well, or run "
            "patch_sana.py where the kit is. The hooks in this file need nothing else.",
            file=sys.stderr,
        )
        return 2

    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
