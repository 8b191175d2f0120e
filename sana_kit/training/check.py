"""Everything that can be found wrong before a weight is loaded, all of it at once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from accelerate import PartialState

from sana_kit import devices
from sana_kit.data.discover import find_images
from sana_kit.data.sets import size_rule
from sana_kit.distributed import Ranks, force_cpu, process_group_handlers
from sana_kit.encodings.prompts import parse_instruction
from sana_kit.errors import CheckpointError, Problem, UserError, setting
from sana_kit.files import check_output_folder, expand
from sana_kit.flags import range_problems
from sana_kit.launchers import announced_wait, launched_world_size, local_rank
from sana_kit.models.attention import resolve_attention
from sana_kit.models.folder import Model, ModelFields, find_model, read_flow_shift
from sana_kit.training.accounts import upload_problems
from sana_kit.training.adapter_checks import adapter_problems, quantization_problems
from sana_kit.training.budget import budget_problems
from sana_kit.training.checkpoint_folders import find_checkpoint, folder_problems
from sana_kit.training.config import TrainConfig
from sana_kit.training.control import control_problems
from sana_kit.training.encoding import encoding_settings
from sana_kit.training.graphs import graph_problems
from sana_kit.training.launch_config import LaunchConfig, settle
from sana_kit.training.optim import optimizer_name, optimizer_problems
from sana_kit.training.optimizers import OPTIMIZERS
from sana_kit.training.settings import DataConfig
from sana_kit.training.streaming import disk_problems, stream_of, stream_problems
from sana_kit.training.trackers import tracker_problems

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Checked:
    """A run that can start.

    Attributes:
        config: with the precision, accumulation and clipping of the accelerate config, and the checkpoint's own flow
            shift, where the settings leave them open.
        base_model: found and checked, not loaded.
        launch: the accelerate config.
    """

    config: TrainConfig
    base_model: Model
    launch: LaunchConfig


def check(config: TrainConfig, shapes: bool = True) -> Checked:
    """Look at settings, model, data, output folder, logins and the accelerate config; nothing is loaded or written.

    Args:
        shapes: whether to hold the weights' shapes against their config. It takes the imports of diffusers and peft,
            so a launcher leaves it to its processes, which have them anyway.

    Raises:
        UserError: everything that was found wrong.
    """
    launch, device_type, problems = LaunchConfig.read(), devices.accelerator_type(), range_problems(config)
    settled, found = settle(launch, config, config.given, device_type)
    problems += found + optimizer_problems(config, device_type, launch.deepspeed)
    optimizer = OPTIMIZERS.get(optimizer_name(config))
    if launch.zero_stage == 3 and optimizer is not None and optimizer.averages:
        reason = "ZeRO-3 shows its masters only while a step runs, and the average is made of them"
        problems.append(Problem("optimizer", config.optimizer, reason, "Use zero_stage: 2, or AdamW."))
    if config.ema_decay is not None and launch.zero_stage == 3:
        reason = "ZeRO-3 shows the masters while an update runs only"
        problems.append(Problem("ema_decay", config.ema_decay, reason, "Use zero_stage: 2, or leave it out."))
    config = config.replaced(**dataclasses.asdict(settled))
    problems += tracker_problems(config.report_to, config.hub_token)
    problems += upload_problems(config.push_to_hub, config.hub_model_id, config.hub_token, config.output_dir)
    if config.chip is not None and devices.find_chip(config.chip) is None:
        remedy = f"Known: {', '.join(devices.chips())}."
        problems.append(Problem("chip", config.chip, "its peak is not known", remedy))
    problems += _device_problems(config, device_type) + _data_problems(config)
    model, found = _find_model(config, shapes)
    problems += found
    if model is not None:
        problems += _size_problems(config, model)
        if config.streaming:
            problems += disk_problems(config, encoding_settings(config, model, None), model)
        config, found = adapter_problems(config, model)
        problems += found
    config, found = control_problems(config, model, image_sources(config))
    problems += found
    problems += quantization_problems(config, model, device_type, launch.deepspeed)
    problems += budget_problems(config, device_type) + graph_problems(config, device_type, launch)
    problems += check_output_folder(config.output_dir, "output_dir")
    if os.environ.get("RANK", "0") == "0":  # other machines may have no such folder
        problems += _checkpoint_problems(config)
    if problems:
        raise UserError(problems, f"{len(problems)} problem(s) with the arguments:")
    if config.flow_shift is None:
        config = config.replaced(flow_shift=read_flow_shift(model.scheduler_config))
    return Checked(config, model, launch)


def tell_all_ranks(error: UserError) -> NoReturn:
    """Raise `error`, and with several processes what every rank found: this one meets those that may begin.

    They build the engine, and with it the same process group, and then ask what the others found
    (`Ranks.run_on_all`).
    """

    def again() -> NoReturn:
        raise error

    if launched_world_size() > 1:
        with announced_wait():
            state = PartialState(cpu=force_cpu(), **process_group_handlers()[0].to_kwargs())
        Ranks.of(state).run_on_all(again)
    raise error


def _found(action: Callable[[], T], field: str, value: object) -> tuple[T | None, list[Problem]]:
    """(what `action` returns, problems) of an action of a library that raises for what the user can mend."""
    try:
        return action(), []
    except UserError as error:
        return None, list(error.problems)
    except (ValueError, CheckpointError) as error:
        return None, [Problem("", None, str(error))]
    except ImportError as error:  # of httpx, for instance: a proxy variable asks for a package that is not there
        proxies = [name for name in os.environ if name.lower().endswith("_proxy") and os.environ[name]]
        remedy = f"Install it, or unset {', '.join(proxies)}." if proxies else "Install it."
        return None, [Problem(field, value, f"a package is missing: {error}", remedy)]


def _device_problems(config: TrainConfig, device_type: str) -> list[Problem]:
    _, problems = _found(
        lambda: resolve_attention(config.attention, torch.device(device_type)), "attention", config.attention
    )
    if config.compile and not devices.KINDS[device_type].compiles:
        problems.append(
            Problem("compile", None, f"torch.compile has no back end for {device_type} here", "Leave it out.")
        )
    return problems


def _source_problems(data: DataConfig) -> list[Problem]:
    """What is wrong with the settings that say where images and captions are."""
    sets = data.sets
    if not sets:
        reason = "neither is given"
        return [Problem("dataset_name and instance_data_dir", None, reason, "Name the images to train on.")]
    problems = [problem for data_set in sets for problem in data_set.problems()]
    if all(data_set.dataset_name is None for data_set in sets):
        for name, instead in (("caption_column", ".txt files"), ("mask_column", "files NAME.mask.png")):
            if getattr(data, name) is not None:
                reason = f"columns belong to {setting('dataset_name')}; in a folder there are {instead}"
                problems.append(Problem(name, getattr(data, name), reason))
    return list(dict.fromkeys(problems))


def _local_data_problems(config: TrainConfig) -> list[Problem]:
    """What is wrong with data sets that lie here, as far as no image is opened."""
    if config.streaming:
        return _found(lambda: stream_of(config), "dataset_name", config.sets[0].name)[1]
    problems, masks, counts = [], False, []
    for data_set, source in zip(config.sets, image_sources(config), strict=True):
        value = data_set.name
        if not (data_set.field == "instance_data_dir" or expand(value).exists() or value.startswith((".", "/"))):
            masks = True  # the hub's may have some
            counts.append(None)
            continue
        found, wrong = _found(partial(find_images, **source), data_set.field, value)
        problems += wrong
        counts.append(None if found is None else len(found[0].source))
        masks = masks or found is None or found[0].masks is not None
    if not masks and config.mask_outside:
        remedy = f"Name {setting('mask_column')}, or put NAME.mask.png beside the images."
        problems.append(Problem("mask_outside", config.mask_outside, "has no effect without masks", remedy))
    if None in counts or config.validation_dataset is not None:
        return problems
    return problems + held_out_count(config.validation_split, sum(counts))[1]  # copies of an image are told later


def held_out_count(share: float, images: int) -> tuple[int, list[Problem]]:
    """(how many of so many images are held out, what is wrong with that)."""
    count = round(share * images) if share < 1 else round(share)
    if not share or 0 < count < images:
        return count, []
    reason = f"it would hold out {count} of {images} images"
    return count, [Problem("validation_split", share, reason, "Keep some of both.")]


def _data_problems(config: TrainConfig) -> list[Problem]:
    """What is wrong with images and captions as far as no image is opened; local data only, a machine looks once."""
    data, prior, problems = config.data, config.prior, _source_problems(config.data) + stream_problems(config)
    for name in ("class_data_dir", "class_prompt"):
        value = getattr(prior, name)
        if prior.with_prior_preservation and value is None:
            problems.append(Problem(name, None, f"needed with {setting('with_prior_preservation')}"))
        if value is not None and not prior.with_prior_preservation:
            problems.append(Problem(name, value, f"has no effect without {setting('with_prior_preservation')}"))
    problems += size_rule(data).problems()
    if data.size_rules:
        for data_set in data.sets:
            problems += data_set.rule.problems("data_sets", data_set.name) if data_set.rule != size_rule(data) else []
        if prior.with_prior_preservation:
            reason = "class images have the run's own size, and a micro-step holds images of one size"
            problems.append(Problem("data_sets", None, reason, "Leave the sizes of data sets out, or class images."))
    if data.aspect_ratio_buckets and prior.with_prior_preservation:
        reason = "class images are square, and a micro-step holds images of one size"
        problems.append(Problem("aspect_ratio_buckets", None, reason, "Leave one of both out."))
    if config.early_stopping is not None and not (config.validation_split or config.validation_dataset):
        remedy = f"Give {setting('validation_split')} or {setting('validation_dataset')}."
        problems.append(Problem("early_stopping", config.early_stopping, "there is no held-out loss", remedy))
    if config.ema_only_final and config.ema_decay is None:
        problems.append(Problem("ema_only_final", None, f"has no effect without {setting('ema_decay')}"))
    instruction = data.complex_human_instruction
    if instruction is None or instruction.strip().lower() != "default":  # the pipeline's own, which takes its import
        _, found = _found(lambda: parse_instruction(instruction), "complex_human_instruction", instruction)
        problems += found
    if not problems and local_rank() == 0:
        problems += _local_data_problems(config)
    return problems


def image_sources(config: TrainConfig, crops: int | None = None) -> list[dict[str, Any]]:
    """Where the images of each data set are, as `find_images` and `load_images` take it.

    Args:
        crops: encoded of each image; None: as many as the settings say.
    """
    crops = config.crops_per_image if crops is None else crops
    shared = {"cache_dir": config.cache_dir}
    return [{**data_set.source(), **shared, "repeats": data_set.repeats * crops} for data_set in config.sets]


def _find_model(config: TrainConfig, shapes: bool) -> tuple[Model | None, list[Problem]]:
    name = config.pretrained_model_name_or_path
    found, problems = _found(
        lambda: find_model(
            name,
            revision=config.revision,
            variant=config.variant,
            cache_dir=config.cache_dir,
            dtype=torch.float16 if config.mixed_precision == "fp16" else torch.bfloat16,
            fields=ModelFields(model="pretrained_model_name_or_path", base=None, dtype="mixed_precision", full="no"),
            shapes=shapes,
        ),
        "pretrained_model_name_or_path",
        name,
    )
    return (None, problems) if found is None else found


def _size_problems(config: TrainConfig, model: Model) -> list[Problem]:
    problems, factor = [], model.pixel_multiple
    sides = [("resolution", side) for side in size_rule(config).sides]
    of_sets = {side for rule in config.size_rules for side in rule.sides}
    sides += [("data_sets", side) for side in sorted(of_sets - {side for _, side in sides})]
    for field, value in [*sides, ("validation_resolution", config.validation_resolution)]:
        if value and value % factor:
            lower, upper = max(value // factor, 1) * factor, (value // factor + 1) * factor
            reason = f"must be a multiple of {factor}, the VAE's factor: {lower} or {upper}"
            problems.append(Problem(field, value, reason))
    return problems


def _checkpoint_problems(config: TrainConfig) -> list[Problem]:
    """Why the run can neither begin in its output folder nor go on from the checkpoint that it names."""
    output_dir, resume = Path(config.output_dir), config.resume_from_checkpoint
    problems = folder_problems(output_dir, resume, config.overwrite_output_dir)
    if resume not in (None, "latest"):
        _, found = _found(lambda: find_checkpoint(output_dir, resume), "resume_from_checkpoint", resume)
        problems += found
    return problems
