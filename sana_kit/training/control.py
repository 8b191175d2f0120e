"""What a run that trains a ControlNet asks of its settings, and the control images of its validation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sana_kit.arithmetic import default_controlnet_layers
from sana_kit.data.controls import ControlKind, find_all_controls
from sana_kit.data.decode import inspect_image
from sana_kit.data.discover import find_images
from sana_kit.data.sets import several
from sana_kit.errors import ImageError, Problem, UserError, setting
from sana_kit.files import expand
from sana_kit.generation.inputs import InputImage, Inputs
from sana_kit.launchers import local_rank
from sana_kit.models.folder import Model
from sana_kit.models.parts import find_controlnet
from sana_kit.training.config import TrainConfig
from sana_kit.training.settings import AdapterConfig, ControlConfig

SOURCES = ("control_column", "control_data_dir", "control_edges")


def control_kinds(config: TrainConfig) -> list[ControlKind]:
    """Where the control images of each data set of a checked run come from."""
    count, folders = len(config.sets), several(config.control_data_dir) or (None,)
    folders = folders * count if len(folders) == 1 else folders
    return [ControlKind(config.control_column, folder, config.control_edges) for folder in folders]


def control_problems(
    config: TrainConfig, model: Model | None, image_sources: Sequence[dict[str, Any]]
) -> tuple[TrainConfig, list[Problem]]:
    """(the settings with the ControlNet's number of blocks, what is wrong with them); local data only is looked at.

    Args:
        model: None where it was not found.
        image_sources: arguments of `find_images` for each data set.
    """
    if config.train_mode != "controlnet":
        given = [field.name for field in dataclasses.fields(ControlConfig) if getattr(config, field.name)]
        reason = f"has no effect without {setting('train_mode')} controlnet"
        return config, [Problem(name, _shown(config, name), reason) for name in given]
    problems = _refused(config)
    if model is not None:
        config, found = _layers(config, model)
        problems += found
    named = [name for name in SOURCES if getattr(config, name)]
    if len(named) != 1:
        reason = f"{'several' if named else 'none'} of them given"
        remedy = "Say where the control images come from, by one of them."
        problems.append(Problem(", ".join(SOURCES), None, reason, remedy))
    elif not image_sources:
        pass  # told with the images
    elif config.control_column is not None and any(source["dataset_name"] is None for source in image_sources):
        remedy = f"Use {setting('control_data_dir')}, or a data set."
        problems.append(Problem("control_column", config.control_column, "a folder has no columns", remedy))
    elif len(several(config.control_data_dir)) not in (0, 1, len(image_sources)):
        reason = f"{len(several(config.control_data_dir))} folders for {len(image_sources)} data set(s)"
        remedy = "Name one for all, or one for each, in the order of the data sets."
        problems.append(Problem("control_data_dir", None, reason, remedy))
    elif local_rank() == 0:
        problems += _missing(config, image_sources)
    return config, problems + _validation_problems(config)


def _refused(config: TrainConfig) -> list[Problem]:
    """Settings that mean nothing to a ControlNet, or that were not made for one."""
    lora = [field.name for field in dataclasses.fields(AdapterConfig) if field.name in config.given]
    problems = [Problem(name, _shown(config, name), "has no effect without LoRA") for name in lora]
    if config.base_quantization is not None:
        reason = "it was made for a base under a LoRA"
        problems.append(Problem("base_quantization", config.base_quantization, reason, "Leave it out."))
    for field, wrong, reason, remedy in (
        ("with_prior_preservation", config.with_prior_preservation, "class images have no control images", ""),
        ("validation_dataset", config.validation_dataset, "its images have no control images", "Use a split."),
        ("skip_bad_images", config.skip_bad_images, "an image and its control image go together", "Repair them."),
        ("fused_blocks", config.fused_blocks != "off", "the fused blocks were made for LoRA and full training", ""),
        ("memory_budget", config.memory_budget, "it was not tried with a ControlNet", "Use gradient_checkpointing."),
        ("compile", config.compile, "compiled blocks were not tried with a ControlNet", ""),
    ):
        if wrong:
            problems.append(Problem(field, _shown(config, field), reason, remedy or "Leave it out."))
    return problems


def _shown(config: TrainConfig, name: str) -> object:
    """A setting's value for a message; a switch has none."""
    value = getattr(config, name)
    return None if isinstance(value, bool) else value


def _layers(config: TrainConfig, model: Model) -> tuple[TrainConfig, list[Problem]]:
    shapes, layers = model.transformer_config, config.controlnet_layers
    problems = []
    if shapes.get("qk_norm") is not None:
        reason = "it norms queries and keys (SANA-1.5), and diffusers' SanaControlNetModel has no such norms to copy"
        problems.append(Problem("pretrained_model_name_or_path", model.name, reason, "Use SANA 1.0."))
    most = shapes["num_layers"] - 1
    if most < 1:
        reason = "its transformer has one block, and a ControlNet adds behind the second and later ones"
        problems.append(Problem("pretrained_model_name_or_path", model.name, reason))
    elif layers is not None and layers > most:
        reason = f"block i is added behind block i + 1 of the model, which has {most + 1}"
        problems.append(Problem("controlnet_layers", layers, reason, f"Use at most {most}."))
    if config.init_controlnet is not None and not problems:
        return _begin_with(config, model)
    return config.replaced(controlnet_layers=layers or default_controlnet_layers(shapes)), problems


def _begin_with(config: TrainConfig, model: Model) -> tuple[TrainConfig, list[Problem]]:
    """The settings that hold where the run goes on with a ControlNet."""
    field, name, layers = "init_controlnet", config.init_controlnet, config.controlnet_layers
    part, problems = find_controlnet(name, model)
    problems = [dataclasses.replace(problem, field=field) for problem in problems]
    if part is None:
        return config, problems
    own, most = part.config["num_layers"], model.transformer_config["num_layers"] - 1
    if own > most:
        problems.append(Problem(field, name, f"it has {own} blocks, and the model has a place for {most}"))
    if layers is not None and layers != own:
        problems.append(Problem("controlnet_layers", layers, f"{name} has {own} blocks", "Leave it out."))
    return config.replaced(controlnet_layers=own), problems


def _missing(config: TrainConfig, image_sources: Sequence[dict[str, Any]]) -> list[Problem]:
    """Images without a control image; what is wrong with the images themselves is told elsewhere."""
    kinds, tables, sources = [], [], []
    for kind, source in zip(control_kinds(config), image_sources, strict=True):
        name = source["dataset_name"]
        if name is not None and not (expand(name).exists() or name.startswith((".", "/"))):
            continue  # of the hub: looked at once it is there
        try:
            tables.append(find_images(**source)[0])
        except UserError:
            continue
        kinds.append(kind)
        sources.append(source)
    try:
        find_all_controls(kinds, tables, sources)
    except UserError as error:
        return list(error.problems)
    return []


def _validation_problems(config: TrainConfig) -> list[Problem]:
    field, files, prompts = "validation_control_image", config.validation_control_image, config.validation.prompts
    if not prompts:
        return [Problem(field, files[0], "has no effect without validation prompts")] if files else []
    if len(files) not in (1, len(prompts)):
        reason = f"{len(files)} given for {len(prompts)} validation prompt(s)"
        return [Problem(field, None, reason, "Name one for all, or one for each prompt, in their order.")]
    problems = []
    for file in dict.fromkeys(files):
        try:
            _open(file)
        except OSError as error:
            problems.append(Problem(field, file, f"cannot be read ({error.strerror})"))
        except ImageError as error:
            problems.append(Problem(field, file, str(error)))
    return problems


def _open(file: str) -> InputImage:
    path = expand(file)
    facts = inspect_image(Path(path).read_bytes(), file)
    return InputImage(str(path), facts.sha256.hex(), facts.width, facts.height)


def validation_inputs(config: TrainConfig) -> dict[str, Inputs]:
    """{prompt: what guides its images}; empty where no ControlNet is trained.

    Raises:
        OSError, ImageError: a file that could be read when the run was checked can be no more.
    """
    files, prompts = config.validation_control_image, config.validation.prompts
    if config.train_mode != "controlnet" or not prompts:
        return {}
    files = files * len(prompts) if len(files) == 1 else files
    return {prompt: Inputs(control_image=_open(file)) for prompt, file in zip(prompts, files, strict=True)}
