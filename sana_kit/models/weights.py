"""Weight files of a part of a model: which they are, whether they are whole and fit, and what stands for them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from sana_kit.files import read_header

TRANSFORMER_STEM = VAE_STEM = "diffusion_pytorch_model"
TEXT_ENCODER_STEM = "model"


def some_of(items: Iterable[str], limit: int = 4) -> str:
    """The first few of many, and how many more there are."""
    items = list(items)
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def weight_files(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """The safetensors files of a part: the shards that its index names, or the single file.

    A variant (such as 'fp16') that this part does not have falls to its plain files; see `has_variant`.

    Raises:
        ValueError: there is none; an index that cannot be read or names a missing file.
    """
    name = has_variant(folder, stem, variant)
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
    variants = sorted({path.name.split(".")[1].split("-")[0] for path in folder.glob(f"{stem}.*.safetensors")})
    beside = f", but of variant {' and '.join(variants)}, which has to be named" if variants else ""
    raise ValueError(f"{folder} holds no {stem}.safetensors (nor its index){beside}; other formats are not loaded")


def has_variant(folder: Path, stem: str, variant: str | None) -> str | None:
    """The variant to ask `from_pretrained` for: `variant` where this part has it, else None.

    The one place of the fallback: every part of a model is found and loaded by it, each for itself.
    """
    if variant is None:
        return None
    names = (f"{stem}.{variant}.safetensors", f"{stem}.safetensors.index.{variant}.json")
    return variant if any((folder / name).is_file() for name in names) else None


def file_fingerprint(path: Path) -> str:
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


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a model on this disk. `build(config)` makes it on the meta device; None: shapes are not checked."""

    name: str
    folder: Path
    stem: str
    config: dict | None = None
    build: Callable[[dict], torch.nn.Module] | None = None


def meta_transformer(config: dict) -> torch.nn.Module:
    """A SanaTransformer2DModel without memory, for its names and shapes."""
    from diffusers import SanaTransformer2DModel

    with torch.device("meta"):
        return SanaTransformer2DModel.from_config(config)


def meta_vae(config: dict) -> torch.nn.Module:
    """An AutoencoderDC without memory."""
    from diffusers import AutoencoderDC

    with torch.device("meta"):
        return AutoencoderDC.from_config(config)


def check_part(part: Part, variant: str | None) -> tuple[set[str], str | None]:
    """({dtypes of its weights, such as "BF16"}, what is wrong with its files) by their headers alone."""
    try:
        files = weight_files(part.folder, part.stem, variant)
    except ValueError as error:
        return set(), str(error)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        try:
            tensors.update(read_header(file)[0])
        except (OSError, ValueError) as error:
            return set(), f"{file}: {error}"
    kinds = {kind for kind, _ in tensors.values()}
    if part.build is None:
        return kinds, None
    wrong = [
        f"{name} {tuple(tensor.shape)} ({'missing' if name not in tensors else f'is {tensors[name][1]}'})"
        for name, tensor in part.build(part.config).state_dict().items()
        if tensors.get(name, ("", None))[1] != tuple(tensor.shape)
    ]
    if wrong:
        return kinds, f"the weights in {part.folder} do not fit its config: {some_of(wrong)}"
    return kinds, None


def load_tensors(files: Iterable[Path], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of safetensors files whose names begin with `prefix`; nothing else is read."""
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            found.update({name: tensors.get_tensor(name) for name in tensors.keys() if name.startswith(prefix)})
    return found
