"""Parts that a user names beside a model: a ControlNet, another VAE. Found and checked without loading weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sana_kit.errors import Problem, UserError
from sana_kit.files import expand
from sana_kit.models.folder import HUB_NAME, Model, first_line, folder_identity
from sana_kit.models.loading import dtype_argument
from sana_kit.models.weights import Part, check_part, has_variant, load_tensors, meta_vae, weight_files

STEM = "diffusion_pytorch_model"


@dataclasses.dataclass(frozen=True)
class OwnPart:
    """A part named by itself.

    Attributes:
        place: folder or hub name; subfolder within it, "" for itself.
        folder: on this disk, None for a hub name.
        identity: stands for weights and config.
    """

    place: str
    subfolder: str
    folder: Path | None
    config: dict
    identity: str
    variant: str | None = None
    cache_dir: str | None = None

    def arguments(self) -> dict[str, Any]:
        """What from_pretrained takes, the first under the name pretrained_model_name_or_path."""
        folder = self.folder
        variant = self.variant if folder is None else has_variant(folder, STEM, self.variant)
        where = {"pretrained_model_name_or_path": self.place, "subfolder": self.subfolder or None}
        return {**where, "variant": variant, "cache_dir": self.cache_dir, "use_safetensors": True}


def find_part(field: str, name: str, class_name: str, subfolder: str, model: Model) -> OwnPart:
    """The part that `name` holds, itself or in its `subfolder`: a folder, or a hub name.

    Raises:
        UserError: it is not there, or of another class.
    """
    path = expand(name)
    if path.is_dir():
        places = [where for where in ("", subfolder) if (path / where / "config.json").is_file()]
        if not places:
            raise UserError(Problem(field, name, f"the folder holds neither config.json nor {subfolder}/config.json"))
        where, folder = places[0], path / places[0]
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        identity = folder_identity(folder, model.variant)
    elif path.exists() or not HUB_NAME.fullmatch(name):
        raise UserError(Problem(field, name, "no such folder", f"Give its folder ({class_name}), or a hub name."))
    else:
        folder = None
        config, where, commit = _fetch_config(field, name, subfolder, model)
        identity = hashlib.sha256(f"{name}@{commit}/{where}".encode()).hexdigest()
    if config.get("_class_name") != class_name:
        reason = f"its config.json is of {config.get('_class_name')}, and {class_name} is needed"
        raise UserError(Problem(field, name, reason))
    return OwnPart(str(path), where, folder, config, identity, model.variant, model.cache_dir)


def _fetch_config(field: str, name: str, subfolder: str, model: Model) -> tuple[dict, str, str]:
    """(config, the subfolder where it was found, the commit) of a hub name."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError

    for where in ("", subfolder):
        try:
            file = hf_hub_download(name, "/".join(filter(None, (where, "config.json"))), cache_dir=model.cache_dir)
        except EntryNotFoundError:
            continue
        except Exception as error:
            reason = f"neither a folder here nor to be had from the hub ({type(error).__name__}: {first_line(error)})"
            raise UserError(Problem(field, name, reason)) from None
        path = Path(file).parent
        commit = (path.parent if where else path).name
        return json.loads(Path(file).read_text(encoding="utf-8")), where, commit
    raise UserError(Problem(field, name, f"holds neither config.json nor {subfolder}/config.json"))


def _weights_problem(field: str, part: OwnPart, build: Callable[[dict], torch.nn.Module]) -> list[Problem]:
    """What is wrong with the weights files of a part on this disk."""
    if part.folder is None:
        return []
    _, fault = check_part(Part(field, part.folder, STEM, part.config, build), part.variant)
    return [] if fault is None else [Problem(field, part.place, fault, "Fetch the folder again.")]


# ---------------------------------------------------------------------------------------------------------------------
# ControlNet


def meta_controlnet(config: dict) -> torch.nn.Module:
    """A SanaControlNetModel without memory."""
    from diffusers import SanaControlNetModel

    with torch.device("meta"):
        return SanaControlNetModel.from_config(config)


def find_controlnet(name: str, model: Model) -> tuple[OwnPart | None, list[Problem]]:
    """(ControlNet, problems): a SanaControlNetModel whose residuals fit the model's transformer.

    `name`: its folder, a pipeline's folder with controlnet/ in it, or a hub name of either.
    """
    if model.member.sprint:
        reason = f"{model.member.name} is distilled, and a ControlNet is trained for the steps of SANA"
        return None, [Problem("controlnet", name, reason, "Draw with SANA.")]
    try:
        part = find_part("controlnet", name, "SanaControlNetModel", "controlnet", model)
    except UserError as error:
        return None, list(error.problems)
    own, base = part.config, model.transformer_config
    widths = {
        "width": [config["num_attention_heads"] * config["attention_head_dim"] for config in (own, base)],
        "latent channels": [config["in_channels"] for config in (own, base)],
        "width of captions": [config["caption_channels"] for config in (own, base)],
        "patch size": [config.get("patch_size") or 1 for config in (own, base)],
    }
    problems = [
        Problem("controlnet", name, f"its {what} is {mine}, that of the model's transformer {theirs}")
        for what, (mine, theirs) in widths.items()
        if mine != theirs
    ]
    problems = problems or _weights_problem("controlnet", part, meta_controlnet)
    return (None if problems else part), problems


def load_controlnet(part: OwnPart, *, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The SanaControlNetModel on `device`, in eval mode."""
    from diffusers import SanaControlNetModel

    loaded = SanaControlNetModel.from_pretrained(**part.arguments(), **dtype_argument("diffusers", dtype))
    return loaded.to(device).eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Another VAE


def find_vae(name: str, model: Model) -> tuple[OwnPart | None, list[Problem], list[str]]:
    """(AutoencoderDC, problems, notes): one whose decoder reads the latents that the model's transformer makes.

    Latents must have the same channels, the same pixels and the same scale. That they mean the same is told by the
    encoder: DC-AE 1.1 and DC-AE-Lite kept the one of 1.0, and only their decoders differ.

    `name`: its folder, a pipeline's folder with vae/ in it, or a hub name of either.
    """
    try:
        part = find_part("vae", name, "AutoencoderDC", "vae", model)
    except UserError as error:
        return None, list(error.problems), []
    own, base = part.config, model.vae_config
    features = {
        "latent channels": [config["latent_channels"] for config in (own, base)],
        "pixels per latent": [2 ** (len(config["encoder_block_out_channels"]) - 1) for config in (own, base)],
        "scaling factor": [config.get("scaling_factor", 1.0) for config in (own, base)],
    }
    problems = [
        Problem("vae", name, f"its {what}: {mine}; that of the model's own VAE: {theirs}", "Their latents differ.")
        for what, (mine, theirs) in features.items()
        if mine != theirs
    ]
    problems = problems or _weights_problem("vae", part, meta_vae)
    return (None if problems else part), problems, [] if problems else _encoder_notes(part, model)


def _encoder_notes(part: OwnPart, model: Model) -> list[str]:
    """A line where the encoders differ, or could not be compared: then the latents may be of another space."""
    if part.folder is None or not model.local:
        return [
            f"The encoder of the VAE {part.place} was not compared with the model's: they are not both on this disk."
        ]
    mine, theirs = (
        load_tensors(weight_files(folder, STEM, model.variant), "encoder.conv_out.")
        for folder in (part.folder, Path(model.base, "vae"))
    )
    if mine.keys() == theirs.keys() and all(_nearly_equal(mine[key], theirs[key]) for key in mine):
        return []
    return [
        f"The encoder of the VAE {part.place} is not the model's own: its decoder was trained for other latents, and"
        " may draw something else than the model means."
    ]


def _nearly_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two weights differ by no more than bf16 rounds."""
    return a.shape == b.shape and torch.allclose(
        a.float(), b.float(), rtol=1e-2, atol=1e-3 * float(b.float().abs().max())
    )


def with_vae(model: Model, part: OwnPart) -> Model:
    """The model with another VAE."""
    together = hashlib.sha256(f"{model.fingerprint}:{part.identity}".encode()).hexdigest()
    return dataclasses.replace(model, vae_config=part.config, vae_part=part, fingerprint=together)
