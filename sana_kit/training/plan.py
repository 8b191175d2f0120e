"""The plan of a run: how many updates of how many images, what they cost, told before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence

import numpy as np

from sana_kit import devices
from sana_kit.arithmetic import checkpoint_bytes, training_flops_per_image
from sana_kit.data.discover import find_images
from sana_kit.data.sets import size_rule
from sana_kit.launchers import launched_world_size
from sana_kit.models.folder import Model
from sana_kit.training.budget import AUTO
from sana_kit.training.check import image_sources
from sana_kit.training.config import TrainConfig
from sana_kit.training.order import BucketOrder, MixedOrder, PermutationOrder
from sana_kit.training.recomputation import count_run_step, fit_memory, held_bytes
from sana_kit.training.streaming import stream_of

# An image's latents of 32 channels in bf16, and a caption's embeddings: what the store needs a sample, for the plan.
_PLAN_CAPTION_TOKENS = 80
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"))


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a run walks through its samples.

    Attributes:
        steps: updates of the whole run, those before a resume included.
        batch_size: images per device and micro-step.
        accumulation: micro-steps per update.
        world_size: processes.
        num_instance, num_class: images of each kind; class images come with prior preservation.
        num_weighted: samples of an epoch by the weights of several data sets; None: one of each instance image.
        sets: a line on each of several data sets.
    """

    steps: int
    batch_size: int
    accumulation: int
    world_size: int
    num_instance: int
    num_class: int = 0
    num_weighted: int | None = None
    sets: tuple[str, ...] = ()

    @property
    def samples_per_step(self) -> int:
        """Positions of the sample stream that one update takes, over all processes."""
        return self.batch_size * self.accumulation * self.world_size

    @property
    def epoch_samples(self) -> int:
        """Positions of one epoch: as many as the larger set has images, so that an epoch shows every one of both.

        The smaller set is gone through more often then, as in diffusers' DreamBooth data set.
        """
        return max(self.num_weighted or self.num_instance, self.num_class)

    @property
    def epochs(self) -> float:
        """Length of the run."""
        return self.steps * self.samples_per_step / self.epoch_samples

    def epoch(self, samples_seen: int) -> float:
        """Where a run stands after so many samples."""
        return samples_seen / self.epoch_samples


def make_plan(
    config: TrainConfig,
    counts: Sequence[int],
    num_class: int,
    world_size: int,
    order: PermutationOrder | MixedOrder | BucketOrder | None = None,
) -> tuple[TrainConfig, Plan]:
    """(the settings with the number of updates and the scaled learning rate that now hold, the plan).

    Args:
        counts: images of each data set, repeats included.
        order: of the images; epochs of several buckets are a little longer.
    """
    batch_size, accumulation = config.train_batch_size, config.gradient_accumulation_steps
    weighted, lines = _weighted(config, counts)
    sizes = (sum(counts), num_class, weighted, lines)
    plan = Plan(config.max_train_steps or 0, batch_size, accumulation, world_size, *sizes)
    if config.max_train_steps is None:
        samples = config.num_train_epochs * plan.epoch_samples
        if order is not None:
            samples = max(1, order.count(config.num_train_epochs), config.num_train_epochs * num_class)
        steps = math.ceil(samples / plan.samples_per_step)
        plan = dataclasses.replace(plan, steps=steps)
    rate = config.learning_rate * (plan.samples_per_step if config.scale_lr else 1)
    return config.replaced(max_train_steps=plan.steps, learning_rate=rate), plan


def _weighted(config: TrainConfig, counts: Sequence[int]) -> tuple[int | None, tuple[str, ...]]:
    """(samples of an epoch where data sets have weights, else None; a line on each of several sets)."""
    sets, lines = config.sets, []
    if len(sets) < 2:
        counts = [sum(counts)]
    samples = [data_set.share * count for data_set, count in zip(sets, counts, strict=True)]
    for data_set, count, of_epoch in zip(sets, counts, samples, strict=True):
        share = 100 * float(of_epoch / sum(samples)) if sum(samples) else 0
        repeats = f" (repeats {data_set.repeats})" if data_set.repeats > 1 else ""
        weight = f" x weight {data_set.weight:g}" if config.set_weights else ""
        lines.append(
            f"data set {data_set.name}: {count} images{repeats}{weight} = {float(of_epoch):g} samples an epoch,"
            f" {share:.0f} %{f', at {data_set.rule}' if config.size_rules else ''}"
        )
    whole = None if config.set_weights is None else max(1, round(sum(samples)))
    return whole, tuple(lines) if len(sets) > 1 else ()


def print_plan(config: TrainConfig, model: Model) -> int:
    """What --dry_run tells: the plan with the bytes of the kept activations; loads and writes nothing. Exit code 0."""
    if os.environ.get("RANK", "0") != "0":
        return 0
    counts = (
        [stream_of(config).rows or 1]
        if config.streaming
        else [len(find_images(**source)[0].source) * source["repeats"] for source in image_sources(config, crops=1)]
    )
    num_class = config.num_class_images if config.with_prior_preservation else 0
    processes = config.dry_run_processes or launched_world_size()
    config, plan = make_plan(config, counts, num_class, processes)
    device = devices.pick_device()
    free = devices.free_memory_bytes(device) if config.memory_budget == AUTO else None
    config, fits = fit_memory(config, model, processes, free)
    name = config.chip or devices.device_name(device)
    lines = describe(config, plan, model, devices.find_chip(name))
    kept = activation_bytes(config, model)
    side = config.validation_resolution or config.side
    lines.append(
        f"activations: {_size(kept)} an image kept for the backward pass, {_size(kept * plan.batch_size)} a device"
    )
    if fits is not None:
        lines.append(f"recomputation: {fits}")
    if config.validation.prompts:
        many = len(config.validation.prompts) * config.num_validation_images
        lines.append(f"validation: {many} images at {side} px each time")
    print("\n".join(["The run can start. Its plan:", *(f"  {line}" for line in lines)]), flush=True)
    return 0


def activation_bytes(config: TrainConfig, model: Model) -> int:
    """Bytes that one sample's forward pass keeps for its backward pass, counted on tensors without data."""
    interval = config.gradient_checkpointing_interval if config.gradient_checkpointing else None
    side, tokens = config.side // model.vae_factor, _PLAN_CAPTION_TOKENS
    return count_run_step(config, model, side=side, tokens=tokens, interval=interval).kept


def flops_per_image(
    config: TrainConfig, plan: Plan, transformer_config: Mapping, shapes: np.ndarray, tokens: float
) -> float:
    """FLOPs of a sample, forward and backward, its class image included; recomputation is no work of the model.

    Args:
        shapes: (N, 2) height and width of the samples' latents; the mean over them is taken.
        tokens: mean of the captions.
    """
    found, counts = np.unique(np.asarray(shapes).reshape(-1, 2), axis=0, return_counts=True)
    each = [
        training_flops_per_image(
            transformer_config, shape, tokens, mode=config.train_mode, controlnet_layers=config.controlnet_layers
        )
        for shape in map(tuple, found.tolist())
    ]
    return float(np.average(each, weights=counts)) * (2 if plan.num_class else 1)


def _size(count: float) -> str:
    unit, name = next(((unit, name) for unit, name in _UNITS if count >= unit), (1e3, "kB"))
    return f"{count / unit:.3g} {name}"


def _sizes(config: TrainConfig) -> str:
    if config.size_rules:
        return "the sizes of their data sets" if len(config.sets) > 1 else str(config.size_rules[0])
    sides = ", ".join(map(str, size_rule(config).sides))
    return f"{sides} px in buckets" if config.aspect_ratio_buckets else f"{sides} px"


def describe(config: TrainConfig, plan: Plan, model: Model, chip: devices.Chip | None) -> list[str]:
    """The plan in a few lines: samples, updates, arithmetic, memory, disk, and the least time on a known chip."""
    side = config.side // model.vae_factor
    flops = flops_per_image(config, plan, model.transformer_config, np.array([[side, side]]), _PLAN_CAPTION_TOKENS)
    mode, layers = config.train_mode, config.controlnet_layers
    held = held_bytes(config, model, plan.world_size)
    trained = held["masters"] * plan.world_size // 4
    checkpoint = checkpoint_bytes(held, mode, plan.world_size)
    channels = model.transformer_config["in_channels"]
    latents = 2 * channels * side * side * (2 if mode == "controlnet" else 1)
    latents += 2 * _PLAN_CAPTION_TOKENS * model.transformer_config["caption_channels"]
    of_class = f" (+ {plan.num_class} of the class)" if plan.num_class else ""
    kept = config.checkpoints_total_limit or math.ceil(plan.steps / config.checkpointing_steps)
    stored = f"about {_size(latents * (plan.num_instance + plan.num_class))}"
    stored = f"at most {config.encodings_disk_gb:g} GB" if config.streaming else stored
    what = f"{config.adapter.kind} of rank {config.rank}" if mode == "lora" else "every weight"
    what = f"ControlNet of {layers} blocks" if mode == "controlnet" else what
    lines = [
        f"model: {model.name}; trained: {what}, {trained:,d} weights, {config.mixed_precision} precision",
        f"images: {plan.num_instance}{of_class} at {_sizes(config)}",
        *plan.sets,
        f"updates: {plan.steps} of {plan.samples_per_step} images ({plan.batch_size} per device x"
        f" {plan.accumulation} accumulation x {plan.world_size} processes), {plan.epochs:.2f} epochs",
        f"arithmetic: {flops / 1e12:.3g} TFLOP an image, {flops * plan.steps * plan.samples_per_step / 1e15:.3g} PFLOP"
        " the run",
        f"memory: {_size(sum(held.values()))} a device beside the activations (weights {_size(held['weights'])},"
        f" masters and moments {_size(held['masters'] + held['moments'])})",
        f"disk: {stored} of encodings, {_size(checkpoint)} a checkpoint, {kept} kept",
    ]
    if chip is not None:
        seconds = flops * plan.steps * plan.samples_per_step / (chip.tflops * 1e12 * plan.world_size)
        lines.append(f"time: at least {seconds / 3600:.3g} h on {plan.world_size} x {chip.name}, at all of its peak")
    return lines
