"""Model folders: find the parts, tell their identity, check everything that can be checked without loading weights.

A model is a diffusers folder of one of `members.MEMBERS`, a hub name, or the output of a full fine-tuning (a
`transformer/` folder beside the name of its base model). `base_of` is the one place that leads from the last to its
base, for training, drawing and encoding alike.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from sana_kit.errors import Problem, UserError
from sana_kit.files import expand
from sana_kit.models.members import MEMBERS, NOT_TRAINED, TRAINED, Member
from sana_kit.models.weights import (
    TEXT_ENCODER_STEM,
    TRANSFORMER_STEM,
    VAE_STEM,
    Part,
    check_part,
    file_fingerprint,
    meta_transformer,
    meta_vae,
)

BASE_FILE = "sana_kit_base.json"  # {"base_model": folder or hub name}, written beside a fully fine-tuned transformer/
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_DEEPEST = 8  # fine-tunings of fine-tunings that are followed to their base
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclasses.dataclass(frozen=True)
class ModelFields:
    """What a command line calls the settings that `find_model` speaks about.

    Attributes:
        model, base, dtype: names of the settings; base is None where there is no such setting.
        full: what the dtype setting calls float32.
    """

    model: str = "model_path"
    base: str | None = "base_model"
    dtype: str = "dtype"
    full: str = "fp32"


# Encoding, which looks for parts, belongs to training.
_PARTS_FIELDS = ModelFields(model="pretrained_model_name_or_path", base=None)


@dataclasses.dataclass(frozen=True)
class Base:
    """Where a model's parts come from: `transformer_folder` is that of a full fine-tuning, else None."""

    base: str  # diffusers folder or hub name
    revision: str | None
    transformer_folder: Path | None


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
    scheduler_config: dict
    fingerprint: str  # stands for the weights: equal for equal files, wherever they lie
    notes: list[str] = dataclasses.field(default_factory=list)  # what a user should know of it; to be logged
    vae_part: Any = None  # parts.OwnPart of a VAE that a user named instead of the model's own

    @property
    def member(self) -> Member:
        """Which member of the SANA family it is."""
        return MEMBERS[self.index["_class_name"]]

    @property
    def local(self) -> bool:
        """Whether the base is a folder of this disk."""
        return Path(self.base).is_dir()

    @property
    def pipeline_class(self) -> str:
        """The pipeline's class, as model_index.json names it."""
        return self.index["_class_name"]

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


def base_of(
    model: str, revision: str | None = None, base_model: str | None = None, fields: ModelFields = ModelFields()
) -> Base:
    """The base of a model, which is itself for a diffusers folder or a hub name.

    Args:
        base_model: the base of a fully fine-tuned transformer, instead of what its BASE_FILE names.

    Raises:
        UserError: a file, or a folder of which no base is known.
    """
    path, tuned = expand(model), None
    for _ in range(_DEEPEST):
        if path.is_file():
            raise UserError(Problem(fields.model, model, "is a file", "Give a diffusers folder or a hub name."))
        if not path.is_dir() or (path / "model_index.json").is_file():
            break
        transformer, named, named_revision = _fine_tuned(path, model, base_model, fields)
        tuned = tuned or transformer
        base_model, revision, path = None, revision or named_revision, expand(named)
    if base_model is not None:
        reason = f"{fields.model}={model} is a whole model, which needs no base"
        raise UserError(Problem(fields.base or fields.model, base_model, reason, "Leave one of them out."))
    return Base(str(path), revision, tuned)


def _fine_tuned(path: Path, model: str, base_model: str | None, fields: ModelFields) -> tuple[Path, str, str | None]:
    """(transformer folder, its base, the base's revision) of a folder without model_index.json."""
    folder = path / "transformer" if (path / "transformer" / "config.json").is_file() else None
    if folder is None and (path / "config.json").is_file():
        folder = path
    if folder is None:
        what = "a diffusers folder has model_index.json, the output of a full fine-tuning transformer/config.json"
        where = "it" if str(path) == str(expand(model)) else str(path)
        reason = f"{where} holds neither: {what}"
        raise UserError(Problem(fields.model, model, reason, "Give one of these, or a hub name."))
    if base_model is not None:
        return folder, base_model, None
    for place in (path, folder, folder.parent):
        note = place / BASE_FILE
        if note.is_file():
            try:
                noted = json.loads(note.read_text(encoding="utf-8"))
                base, revision = noted["base_model"], noted.get("revision")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(Problem(fields.model, model, f"{note} cannot be read ({error!r})")) from None
            beside = place / base
            return folder, str(beside) if not Path(base).exists() and beside.is_dir() else base, revision
    remedy = f"Put {BASE_FILE} beside it."
    if fields.base:
        remedy = f"Name it by {fields.base}, or put {BASE_FILE} beside it."
    reason = f"a fine-tuned transformer without {BASE_FILE}, so its base model is unknown"
    raise UserError(Problem(fields.model, model, reason, remedy))


def first_line(error: Exception) -> str:
    """The first line of an error's text."""
    text = str(error).strip()
    return text.splitlines()[0] if text else repr(error)


def component_folder(model: str, subfolder: str, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """The local folder of a pipeline's part, of a fine-tuned model its base's; of a hub model its snapshot.

    Raises:
        UserError: the model or the part is not there.
    """
    fields = _PARTS_FIELDS
    found = base_of(model, revision, fields=fields)
    if subfolder == "transformer" and found.transformer_folder is not None:
        return found.transformer_folder
    name = "tokenizer_config.json" if subfolder == "tokenizer" else "config.json"
    if os.path.isdir(found.base):
        folder = Path(found.base) / subfolder
        if not (folder / name).is_file():
            reason = f"{folder / name} is missing"
            raise UserError(Problem(fields.model, model, reason, "A complete SanaPipeline folder is needed."))
        return folder
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(found.base, f"{subfolder}/{name}", revision=found.revision, cache_dir=cache_dir)
    except Exception as error:
        reason = f"neither a folder here nor to be had from the hub ({type(error).__name__}: {first_line(error)})"
        raise UserError(Problem(fields.model, model, reason)) from None
    return Path(file).parent


def component_identity(
    model: str, subfolder: str, revision: str | None = None, variant: str | None = None, cache_dir: str | None = None
) -> str:
    """Hex SHA-256 that stands for a part's weights and configuration, without loading it.

    Of a hub model the resolved commit counts; of a local folder the content of its small files and the fingerprints of
    its weight files, so a copied folder has the same identity and an exchanged weight file another.

    Raises:
        UserError: the model or the part is not there.
    """
    folder = component_folder(model, subfolder, revision, cache_dir)
    name = base_of(model, fields=_PARTS_FIELDS).base
    if os.path.isdir(name) or folder.parent.parent.name != "snapshots":
        return folder_identity(folder, variant)
    return _digest([f"variant={variant}", f"{name}@{folder.parent.name}/{subfolder}"])


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def folder_identity(folder: Path, variant: str | None) -> str:
    """Hex SHA-256 of a part's folder: its files' names and contents (`file_fingerprint`)."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith(".")]
    return _digest([f"variant={variant}", *map(file_fingerprint, files)])


def vae_geometry(model: str, revision: str | None = None, cache_dir: str | None = None) -> dict:
    """{"factor": pixels per latent, "latent_channels", "scaling_factor"} from the VAE's config alone."""
    config = json.loads((component_folder(model, "vae", revision, cache_dir) / "config.json").read_text("utf-8"))
    channels = config.get("encoder_block_out_channels") or [128, 256, 512, 512, 1024, 1024]
    return {
        "factor": 2 ** (len(channels) - 1),
        "latent_channels": config.get("latent_channels", 32),
        "scaling_factor": config.get("scaling_factor", 1.0),
    }


def read_flow_shift(scheduler_config: dict) -> float:
    """The checkpoint's own time-step shift from its scheduler's config.

    A DPMSolver config calls it `flow_shift`, a FlowMatchEuler config `shift`; 1.0, no shift, where neither is named.
    diffusers' trainer reads the DPMSolver config of the SANA checkpoints as FlowMatchEuler and trains with 1.0.
    """
    for key in ("flow_shift", "shift"):
        if scheduler_config.get(key) is not None:
            return float(scheduler_config[key])
    return 1.0


def find_model(
    model_path: str,
    *,
    base_model: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    members: Collection[str] = TRAINED,
    fields: ModelFields = ModelFields(),
    shapes: bool = True,
) -> tuple[Model | None, list[Problem]]:
    """(Model, problems): everything about a model that can be told without loading weights.

    Checks the pipeline's class, that the parts' widths fit one another, and for local files that no weights file is
    missing, cut off, or of other shapes than its config says. From the hub only the small config files are fetched.

    Args:
        dtype: what the transformer will compute in.
        members: pipeline classes that may be, of `MEMBERS`: those that train, or all of them for drawing.
        fields: what the settings are called in problems.
        shapes: whether to hold the weights against their config, which takes the imports of diffusers.
    """
    try:
        found = base_of(model_path, revision, base_model, fields)
        configs = _read_configs(found, model_path, cache_dir, fields)
    except UserError as error:
        return None, list(error.problems)
    index, transformer, vae, _, scheduler = configs
    problems = [Problem(fields.model, model_path, *told) for told in _misfits(*configs, members)]
    if problems:
        return None, problems
    model = Model(
        name=model_path,
        base=found.base,
        transformer_folder=found.transformer_folder,
        revision=found.revision,
        variant=variant,
        cache_dir=cache_dir,
        index=index,
        transformer_config=transformer,
        vae_config=vae,
        scheduler_config=scheduler,
        fingerprint="",
    )
    problems = _check_weights(model, dtype, fields, shapes)
    if not problems:
        model.fingerprint = _fingerprint(model)
    return model, problems


def _read_configs(
    found: Base, model_path: str, cache_dir: str | None, fields: ModelFields
) -> tuple[dict, dict, dict, dict, dict]:
    """The configs of pipeline, transformer, VAE, text encoder and scheduler; UserError where one cannot be had."""
    local = os.path.isdir(found.base)
    what = "" if found.transformer_folder is None else f"its base model {found.base}: "
    if not local and not HUB_NAME.fullmatch(found.base):
        remedy = "Give a diffusers folder or a hub name such as owner/name."
        raise UserError(Problem(fields.model, model_path, f"{what}no such folder", remedy))
    if local and not (Path(found.base) / "model_index.json").is_file():
        raise UserError(Problem(fields.model, model_path, f"{what}it holds no model_index.json"))

    def read(file: str) -> dict:
        path = Path(found.base) / file
        if not local:
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(found.base, file, revision=found.revision, cache_dir=cache_dir))
        return json.loads(path.read_text(encoding="utf-8"))

    try:
        transformer = found.transformer_folder
        configs = (
            read("model_index.json"),
            read("transformer/config.json")
            if transformer is None
            else json.loads((transformer / "config.json").read_text(encoding="utf-8")),
            read("vae/config.json"),
            read("text_encoder/config.json"),
            read("scheduler/scheduler_config.json"),
        )
    except (OSError, ValueError) as error:  # huggingface_hub's errors are OSErrors or ValueErrors
        failed = "cannot be read" if local else "is no folder here and could not be fetched from the hub"
        reason = f"{found.base} {failed}: {first_line(error)}"
        raise UserError(Problem(fields.model, model_path, reason)) from None
    return configs


def _misfits(
    index: dict, transformer: dict, vae: dict, text: dict, scheduler: dict, members: Collection[str]
) -> list[tuple[str, ...]]:
    """(reason, remedy) for everything that is wrong with a model by its configs."""
    name = index.get("_class_name")
    if name not in MEMBERS:
        return [(f"model_index.json names {name}, and this kit runs {', '.join(MEMBERS)} only",)]
    member = MEMBERS[name]
    if name not in members:
        if member.sprint:
            return [(NOT_TRAINED, "Train on SANA or SANA-1.5. The infer_*.py scripts draw with this one.")]
        return [(f"model_index.json names {name}, and the trainer takes {', '.join(members)} only",)]
    told: list[tuple[str, ...]] = _member_misfits(name, transformer, scheduler)
    apart = "They belong to different models."
    try:
        taken, given = transformer["in_channels"], vae["latent_channels"]
        if taken != given:
            told.append((f"the transformer takes {taken} latent channels, the VAE gives {given}", apart))
        taken, given = transformer["caption_channels"], text["hidden_size"]
        if taken != given:
            reason = f"the transformer takes captions of width {taken}, the text encoder gives {given}"
            told.append((reason, apart))
        len(vae["encoder_block_out_channels"]), int(transformer["sample_size"])
    except (KeyError, TypeError) as error:
        told.append((f"a config lacks or spoils the entry {error}",))
    return told


def _member_misfits(name: str, transformer: dict, scheduler: dict) -> list[tuple[str, ...]]:
    """What of transformer and scheduler does not belong to the member that the pipeline's class names."""
    told: list[tuple[str, ...]] = []
    remedy = "Its model_index.json is of another member of the family than its parts."
    if MEMBERS[name].sprint:
        if not transformer.get("guidance_embeds"):
            told.append((f"{name} needs a transformer that takes the guidance scale (guidance_embeds)", remedy))
        own = scheduler.get("_class_name")
        if own != "SCMScheduler":
            told.append((f"{name} draws with SCMScheduler, and its scheduler is {own}", remedy))
    elif transformer.get("guidance_embeds"):
        told.append((f"a SANA-Sprint transformer (guidance_embeds), which {name} cannot run", remedy))
    return told


def _local_parts(model: Model) -> list[Part]:
    """The parts whose files lie on this disk."""
    parts = []
    base, tuned = Path(model.base), model.transformer_folder
    if tuned is not None or model.local:
        folder = tuned or base / "transformer"
        parts.append(Part("transformer", folder, TRANSFORMER_STEM, model.transformer_config, meta_transformer))
    if model.local:
        parts.append(Part("VAE", base / "vae", VAE_STEM, model.vae_config, meta_vae))
        parts.append(Part("text encoder", base / "text_encoder", TEXT_ENCODER_STEM))
    return parts


def _check_weights(model: Model, dtype: torch.dtype, fields: ModelFields, shapes: bool) -> list[Problem]:
    """What is wrong with the weights files on this disk: names, sizes, shapes and dtypes, by their headers.

    What is merely worth knowing is added to the model's notes.
    """
    problems = []
    for part in _local_parts(model):
        kinds, fault = check_part(part if shapes else dataclasses.replace(part, build=None), model.variant)
        if fault is not None:
            remedy = "Fetch the folder again." if "do not fit" in fault else ""
            problems.append(Problem(fields.model, model.name, fault, remedy))
        elif part.name == "transformer" and dtype == torch.float16 and "BF16" in kinds:
            reason = f"the transformer in {part.folder} is stored in bf16, whose range fp16 does not hold"
            problems.append(Problem(fields.dtype, "fp16", reason, f"Use bf16 or {fields.full}."))
        elif "F16" in kinds and (part.name != "transformer" or dtype != torch.float16):
            model.notes.append(_fp16_note(part, dtype))
    return problems


def _fp16_note(part: Part, dtype: torch.dtype) -> str:
    """A line about weights that are stored in fp16 and run in another dtype."""
    if part.name == "transformer":
        return (
            f"The transformer in {part.folder} is stored in fp16 and runs in {_NAMES[dtype]}."
            " SANA's bf16 weights, where they are to be had, lose nothing."
        )
    runs = "fp32" if dtype == torch.float32 else "bf16"
    return (
        f"The {part.name} in {part.folder} is stored in fp16, in which SANA's overflows; it runs in {runs}."
        " What was rounded or cut off when it was stored stays so."
    )


def _fingerprint(model: Model) -> str:
    """SHA-256 that stands for transformer, VAE and text encoder: equal for equal files, wherever they lie."""
    where = {"revision": model.revision, "variant": model.variant, "cache_dir": model.cache_dir}
    parts = [component_identity(model.base, part, **where) for part in ("vae", "text_encoder")]
    if model.transformer_folder is None:
        parts.append(component_identity(model.base, "transformer", **where))
    else:
        folder = model.transformer_folder.resolve()
        parts.append(folder_identity(folder, model.variant))
    return hashlib.sha256("".join(parts).encode()).hexdigest()
