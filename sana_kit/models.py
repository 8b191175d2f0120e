"""Model folders: find the parts, check everything that can be checked without loading weights, then load.

Used by inference.py; `load_pipeline` is the whole of it in one call. A model is a diffusers folder of SanaPipeline, a
hub name, or the output of a full fine-tuning (a `transformer/` folder beside the name of its base model).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path

import torch

from sana_kit import devices

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name, which the trainer writes
BASE_FILE = "sana_kit_base.json"  # {"base_model": folder or hub name}, written beside a fully fine-tuned transformer/
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


# ---------------------------------------------------------------------------------------------------------------------
# safetensors, read from the header alone


def read_header(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]:
    """({tensor name: (dtype such as 'BF16', shape)}, metadata) of a safetensors file, without reading a tensor.

    Raises:
        ValueError: not a safetensors file, or cut off; the message says which.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise ValueError("it is not a safetensors file, or was cut off")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            tensors = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ValueError("it is not a safetensors file: its header is no JSON of tensors") from None
    if size != 8 + length + end:
        raise ValueError(f"it was cut off: {size:,} bytes instead of {8 + length + end:,}")
    return tensors, metadata


def weight_files(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """The safetensors files of a component: the shards that its index names, or the single file.

    A variant (such as 'fp16') that this component does not have falls to its plain files, as diffusers' pipelines do.

    Raises:
        ValueError: there is none; an index that cannot be read or names a missing file.
    """
    for name in dict.fromkeys((variant, None)):
        index = folder / (f"{stem}.safetensors.index.{name}.json" if name else f"{stem}.safetensors.index.json")
        single = folder / (f"{stem}.{name}.safetensors" if name else f"{stem}.safetensors")
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise ValueError(f"{index} cannot be read ({error!r})") from None
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing:
                raise ValueError(f"{folder} lacks {', '.join(missing)}, which {index.name} names")
            return [folder / shard for shard in shards]
        if single.is_file():
            return [single]
    raise ValueError(f"{folder} holds no {stem}.safetensors (nor its index); other formats are not loaded")


def _has_variant(folder: Path, stem: str, variant: str | None) -> str | None:
    """The variant to ask `from_pretrained` for: `variant` where this component has it, else None."""
    if variant is None:
        return None
    names = (f"{stem}.{variant}.safetensors", f"{stem}.safetensors.index.{variant}.json")
    return variant if any((folder / name).is_file() for name in names) else None


# ---------------------------------------------------------------------------------------------------------------------
# Finding and checking a model


@dataclasses.dataclass
class Model:
    """Where a model's parts are, and their configs. Nothing is loaded."""

    name: str  # as the user gave it
    base: str  # diffusers folder or hub name
    transformer_folder: Path | None  # of a full fine-tuning; None: the base's own
    revision: str | None
    variant: str | None
    cache_dir: str | None
    index: dict
    transformer_config: dict
    vae_config: dict
    fingerprint: str  # stands for the weights: equal for equal files, wherever they lie

    @property
    def local(self) -> bool:
        return Path(self.base).is_dir()

    @property
    def vae_factor(self) -> int:
        """Pixels per latent along an axis."""
        return 2 ** (len(self.vae_config["encoder_block_out_channels"]) - 1)

    @property
    def pixel_multiple(self) -> int:
        """Sizes must be a multiple of this: the VAE's factor times the transformer's patch."""
        return self.vae_factor * (self.transformer_config.get("patch_size") or 1)

    @property
    def native_size(self) -> int:
        """The pixels of a side that the checkpoint was trained at."""
        return self.transformer_config["sample_size"] * self.vae_factor


def _read_json(model: str, file: str, *, local: bool, revision, cache_dir) -> dict:
    if local:
        return json.loads((Path(model) / file).read_text(encoding="utf-8"))
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(model, file, revision=revision, cache_dir=cache_dir)
    return json.loads(Path(path).read_text(encoding="utf-8"))


def _full_finetune(path: Path, base_model: str | None, flag: str) -> tuple[Path | None, str | None, str | None]:
    """(transformer folder, base model, problem) of a folder without model_index.json."""
    folder = path / "transformer" if (path / "transformer" / "config.json").is_file() else None
    if folder is None and (path / "config.json").is_file():
        folder = path
    if folder is None:
        return (
            None,
            None,
            (
                f"{flag}={path}: holds neither model_index.json (a diffusers folder) nor transformer/config.json (the"
                " output of a full fine-tuning). Give one of these, or a hub name."
            ),
        )
    if base_model is not None:
        return folder, base_model, None
    for place in (path, folder, folder.parent):
        note = place / BASE_FILE
        if note.is_file():
            try:
                base = json.loads(note.read_text(encoding="utf-8"))["base_model"]
            except (ValueError, KeyError, TypeError) as error:
                return None, None, f"{flag}={path}: {note} cannot be read ({error!r}). Name the base by --base_model."
            beside = place / base
            return folder, str(beside) if not Path(base).exists() and beside.is_dir() else base, None
    return (
        None,
        None,
        (
            f"{flag}={path}: a fine-tuned transformer without {BASE_FILE}, so its base model is unknown. Give"
            " --base_model."
        ),
    )


def find_model(
    model_path: str,
    *,
    base_model: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    flag: str = "--model_path",
) -> tuple[Model | None, list[str]]:
    """(Model, problems): everything about a model that can be told without loading weights.

    Checks the pipeline's class, that the parts' widths fit one another, and for local files that no weights file is
    missing, cut off, or of other shapes than its config says. From the hub only the small config files are fetched.
    """
    path = Path(model_path)
    transformer_folder, base = None, model_path
    if path.is_file():
        return None, [f"{flag}={model_path}: is a file. Give a diffusers folder or a hub name."]
    if path.is_dir() and not (path / "model_index.json").is_file():
        transformer_folder, base, problem = _full_finetune(path, base_model, flag)
        if problem:
            return None, [problem]
    elif base_model is not None:
        return None, [
            f"--base_model={base_model}: {flag}={model_path} is a whole model, which needs no base. Leave one of them"
            " out."
        ]
    local = Path(base).is_dir()
    if not local and not _HUB_NAME.fullmatch(base):
        which = f"{flag}={base}" if transformer_folder is None else f"the base model {base} of {flag}={model_path}"
        return None, [f"{which}: no such folder. Give a diffusers folder or a hub name such as owner/name."]
    if local and not (Path(base) / "model_index.json").is_file():
        return None, [f"the base model {base} of {flag}={model_path} holds no model_index.json."]

    def read(file: str) -> dict:
        return _read_json(base, file, local=local, revision=revision, cache_dir=cache_dir)

    try:
        index = read("model_index.json")
        if transformer_folder is None:
            transformer_config = read("transformer/config.json")
        else:
            transformer_config = json.loads((transformer_folder / "config.json").read_text(encoding="utf-8"))
        vae_config, text_config = read("vae/config.json"), read("text_encoder/config.json")
        read("scheduler/scheduler_config.json")
    except (OSError, ValueError) as error:  # huggingface_hub's errors are OSErrors or ValueErrors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        what = "cannot be read" if local else "is no folder here and could not be fetched from the hub"
        return None, [f"{flag}={model_path}: {base} {what}: {reason}"]
    problems = _check_configs(f"{flag}={model_path}", index, transformer_config, vae_config, text_config)
    if problems:
        return None, problems
    model = Model(
        name=model_path,
        base=base,
        transformer_folder=transformer_folder,
        revision=revision,
        variant=variant,
        cache_dir=cache_dir,
        index=index,
        transformer_config=transformer_config,
        vae_config=vae_config,
        fingerprint="",
    )
    problems = _check_weights(model, dtype, flag)
    if not problems:
        model.fingerprint = _fingerprint(model)
    return model, problems


def _check_configs(what: str, index: dict, transformer: dict, vae: dict, text: dict) -> list[str]:
    name = index.get("_class_name")
    if name != "SanaPipeline":
        return [f"{what}: model_index.json names {name}, and this kit runs SanaPipeline only."]
    problems = []
    try:
        if transformer.get("guidance_embeds"):
            problems.append(f"{what}: a SANA-Sprint transformer (guidance_embeds), which SanaPipeline cannot run.")
        if transformer["in_channels"] != vae["latent_channels"]:
            problems.append(
                f"{what}: the transformer takes {transformer['in_channels']} latent channels, the VAE gives"
                f" {vae['latent_channels']}. They belong to different models."
            )
        if transformer["caption_channels"] != text["hidden_size"]:
            problems.append(
                f"{what}: the transformer takes captions of width {transformer['caption_channels']}, the text encoder"
                f" gives {text['hidden_size']}. They belong to different models."
            )
        len(vae["encoder_block_out_channels"]), int(transformer["sample_size"])
    except (KeyError, TypeError) as error:
        problems.append(f"{what}: a config lacks or spoils the entry {error}.")
    return problems


def meta_transformer(config: dict):
    """A SanaTransformer2DModel without memory, for its names and shapes."""
    from diffusers import SanaTransformer2DModel

    with torch.device("meta"):
        return SanaTransformer2DModel.from_config(config)


def _check_weights(model: Model, dtype: torch.dtype, flag: str) -> list[str]:
    """What is wrong with the weights files on this disk: names, sizes and shapes, by their headers."""
    from diffusers import AutoencoderDC

    def meta_vae(config):
        with torch.device("meta"):
            return AutoencoderDC.from_config(config)

    parts: list[tuple[str, Path, str, Callable | None, dict | None]] = []
    if model.transformer_folder is not None:
        parts.append(
            (
                "transformer",
                model.transformer_folder,
                "diffusion_pytorch_model",
                meta_transformer,
                model.transformer_config,
            )
        )
    if model.local:
        base = Path(model.base)
        if model.transformer_folder is None:
            folder = base / "transformer"
            parts.append(
                ("transformer", folder, "diffusion_pytorch_model", meta_transformer, model.transformer_config)
            )
        parts.append(("vae", base / "vae", "diffusion_pytorch_model", meta_vae, model.vae_config))
        parts.append(("text_encoder", base / "text_encoder", "model", None, None))
    problems = []
    for part, folder, stem, build, config in parts:
        try:
            found = weight_files(folder, stem, model.variant)
        except ValueError as error:
            problems.append(f"{flag}={model.name}: {error}.")
            continue
        tensors = {}
        try:
            for file in found:
                tensors.update(read_header(file)[0])
        except (OSError, ValueError) as error:
            problems.append(f"{flag}={model.name}: {file}: {error}.")
            continue
        if build is None:
            continue
        wrong = [
            f"{name} {tuple(tensor.shape)} ({'missing' if name not in tensors else f'is {tensors[name][1]}'})"
            for name, tensor in build(config).state_dict().items()
            if tensors.get(name, ("", None))[1] != tuple(tensor.shape)
        ]
        if wrong:
            problems.append(
                f"{flag}={model.name}: the weights in {folder} do not fit its config: {_some(wrong)}. Fetch the folder"
                " again."
            )
        if part == "transformer" and dtype == torch.float16 and any(kind == "BF16" for kind, _ in tensors.values()):
            problems.append(
                f"--dtype=fp16: the transformer in {folder} is stored in bf16, whose range fp16 does not hold. Use"
                " --dtype=bf16 or fp32."
            )
    return problems


def _some(items: list[str], limit: int = 4) -> str:
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def _fingerprint(model: Model) -> str:
    """SHA-256 that stands for transformer, VAE and text encoder: equal for equal files, wherever they lie."""
    from sana_kit.encodings import component_identity

    where = {"revision": model.revision, "variant": model.variant, "cache_dir": model.cache_dir}
    parts = [component_identity(model.base, part, **where) for part in ("vae", "text_encoder")]
    if model.transformer_folder is None:
        parts.append(component_identity(model.base, "transformer", **where))
    else:
        folder = model.transformer_folder.resolve()
        parts.append(component_identity(str(folder.parent), folder.name, variant=model.variant))
    return hashlib.sha256("".join(parts).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# LoRA


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
            f"{what}: {len(unknown)} of {len(tensors)} tensors belong to no layer of this model: {_some(unknown)}. It"
            " is an adapter of another model, or of another format than diffusers' (transformer.LAYER.lora_A.weight)."
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
            f"{what}: made for a transformer of other shapes: {_some(wrong)}. Give the adapter of this model, or"
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
        return None, [f"{what}: holds NaN or infinite values in {_some(bad)}. Take an earlier checkpoint's adapter."]
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


# ---------------------------------------------------------------------------------------------------------------------
# Loading


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

    from sana_kit.encodings import dtype_argument

    folder = model.transformer_folder or _local_base(model) / "transformer"
    variant = _has_variant(folder, "diffusion_pytorch_model", model.variant)
    loaded = SanaTransformer2DModel.from_pretrained(
        folder, variant=variant, use_safetensors=True, **dtype_argument(SanaTransformer2DModel, dtype)
    )
    return loaded.to(device).eval().requires_grad_(False)


def _component(model: Model, part: str, stem: str) -> dict:
    """What encodings.py's loaders take, for a part of the base."""
    base = _local_base(model)
    variant = _has_variant(base / part, stem, model.variant)
    return {"pretrained_model_name_or_path": str(base), "revision": None, "variant": variant, "cache_dir": None}


def load_vae(model: Model, *, device: torch.device, dtype: torch.dtype):
    """The model's AutoencoderDC on `device`, in eval mode."""
    from sana_kit import encodings

    return encodings.load_vae(_component(model, "vae", "diffusion_pytorch_model"), dtype, device)


def load_scheduler(model: Model):
    """The checkpoint's own scheduler, of the class that model_index.json names."""
    import diffusers

    return getattr(diffusers, model.index["scheduler"][1]).from_pretrained(_local_base(model) / "scheduler")


def load_text_encoder(model: Model, *, device: torch.device, dtype: torch.dtype):
    """(tokenizer, text encoder on `device` in eval mode)."""
    from sana_kit import encodings

    return encodings.load_text_encoder(_component(model, "text_encoder", "model"), dtype, device)


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
        devices.resolve_attention(attention, device)
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
    devices.set_attention(transformer, attention, device)
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=load_vae(model, device=device, dtype=vae_dtype or default_vae_dtype(dtype)),
        transformer=transformer,
        scheduler=load_scheduler(model),
    )
