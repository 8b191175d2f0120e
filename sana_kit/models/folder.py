"""Model folders: find the parts, tell their identity, check everything that can be checked without loading weights.

A model is a diffusers folder of SanaPipeline, a hub name, or the output of a full fine-tuning (a `transformer/` folder
beside the name of its base model).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch

from sana_kit.files import read_header


def _file_fingerprint(path: Path) -> str:
    """Name, size and content of a file; of large weight files the header, the ends and the start of every tensor."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{path.name}:{size}:".encode())
    with open(path, "rb") as file:
        if size <= 64 * 2**20:
            digest.update(file.read())
            return digest.hexdigest()
        offsets = list(range(0, size, max(4096, size // 1024)))
        if path.suffix == ".safetensors":
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, 2**26))
            digest.update(header)
            tensors = json.loads(header)
            offsets += [8 + length + v["data_offsets"][0] for k, v in tensors.items() if k != "__metadata__"]
        for offset in sorted(offsets):
            file.seek(offset)
            digest.update(file.read(4096))
        for offset in (0, max(0, size - 2**20)):
            file.seek(offset)
            digest.update(file.read(2**20))
    return digest.hexdigest()


def component_folder(model: str, subfolder: str, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """The local folder of a pipeline's part; of a hub model its snapshot, with the part's config downloaded.

    Raises:
        ValueError: the model or the part is not there.
    """
    name = "tokenizer_config.json" if subfolder == "tokenizer" else "config.json"
    if os.path.isdir(model):
        folder = Path(model) / subfolder
        if not (folder / name).is_file():
            raise ValueError(
                f"--pretrained_model_name_or_path={model}: {subfolder}/{name} is missing; a complete SanaPipeline"
                " folder is needed."
            )
        return folder
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, f"{subfolder}/{name}", revision=revision, cache_dir=cache_dir)).parent
    except Exception as error:
        raise ValueError(
            f"--pretrained_model_name_or_path={model}: neither a folder here nor to be had from the hub"
            f" ({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''})."
        ) from None


def component_identity(
    model: str, subfolder: str, revision: str | None = None, variant: str | None = None, cache_dir: str | None = None
) -> str:
    """Hex SHA-256 that stands for a part's weights and configuration, without loading it.

    Of a hub model the resolved commit counts; of a local folder the content of its small files and the fingerprints of
    its weight files, so a copied folder has the same identity and an exchanged weight file another.

    Raises:
        ValueError: the model or the part is not there.
    """
    folder = component_folder(model, subfolder, revision, cache_dir)
    parts: list[str] = [f"variant={variant}"]
    commit = folder.parent.name if folder.parent.parent.name == "snapshots" else None
    if commit is not None and not os.path.isdir(model):
        parts += [f"{model}@{commit}/{subfolder}"]
    else:
        parts += [_file_fingerprint(f) for f in sorted(folder.iterdir()) if f.is_file() and not f.name.startswith(".")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def vae_geometry(model: str, revision: str | None = None, cache_dir: str | None = None) -> dict:
    """{"factor": pixels per latent, "latent_channels", "scaling_factor"} from the VAE's config alone."""
    config = json.loads((component_folder(model, "vae", revision, cache_dir) / "config.json").read_text("utf-8"))
    channels = config.get("encoder_block_out_channels") or [128, 256, 512, 512, 1024, 1024]
    return {
        "factor": 2 ** (len(channels) - 1),
        "latent_channels": config.get("latent_channels", 32),
        "scaling_factor": config.get("scaling_factor", 1.0),
    }


BASE_FILE = "sana_kit_base.json"  # {"base_model": folder or hub name}, written beside a fully fine-tuned transformer/


_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


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


def has_variant(folder: Path, stem: str, variant: str | None) -> str | None:
    """The variant to ask `from_pretrained` for: `variant` where this component has it, else None."""
    if variant is None:
        return None
    names = (f"{stem}.{variant}.safetensors", f"{stem}.safetensors.index.{variant}.json")
    return variant if any((folder / name).is_file() for name in names) else None


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
                f"{flag}={model.name}: the weights in {folder} do not fit its config: {some_of(wrong)}."
                " Fetch the folder again."
            )
        if part == "transformer" and dtype == torch.float16 and any(kind == "BF16" for kind, _ in tensors.values()):
            problems.append(
                f"--dtype=fp16: the transformer in {folder} is stored in bf16, whose range fp16 does not hold. Use"
                " --dtype=bf16 or fp32."
            )
    return problems


def some_of(items: list[str], limit: int = 4) -> str:
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def _fingerprint(model: Model) -> str:
    """SHA-256 that stands for transformer, VAE and text encoder: equal for equal files, wherever they lie."""

    where = {"revision": model.revision, "variant": model.variant, "cache_dir": model.cache_dir}
    parts = [component_identity(model.base, part, **where) for part in ("vae", "text_encoder")]
    if model.transformer_folder is None:
        parts.append(component_identity(model.base, "transformer", **where))
    else:
        folder = model.transformer_folder.resolve()
        parts.append(component_identity(str(folder.parent), folder.name, variant=model.variant))
    return hashlib.sha256("".join(parts).encode()).hexdigest()
