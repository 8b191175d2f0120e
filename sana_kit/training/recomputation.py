"""How many blocks must be recomputed so that a step fits a device: bytes counted, then the least recomputation.

A setting recomputes every n-th block in the backward pass, or a budget of memory lets the kit choose n. A recomputed
block keeps its input only, and costs one more forward pass of it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator

import torch

from patch_sana import ADAPTER_PARTS
from sana_kit import devices
from sana_kit.arithmetic import training_bytes
from sana_kit.errors import Problem, UserError
from sana_kit.models.attention import set_attention
from sana_kit.models.controlnet import ControlledTransformer, begin_controlnet
from sana_kit.models.folder import Model
from sana_kit.models.fused import fuse_blocks
from sana_kit.models.lora import recompute_blocks
from sana_kit.models.quantize import saved_bytes
from sana_kit.roofline import StepCount, build_on_meta, count_training_step
from sana_kit.training.adapter import put_adapter
from sana_kit.training.budget import AUTO
from sana_kit.training.config import TrainConfig
from sana_kit.training.engine import Engine

logger = logging.getLogger("sana")

# Of the free memory: workspaces of kernels and what an allocator cannot give out are not counted.
USABLE = 0.94
# Captions have at most so many tokens: a batch of the longest must fit, too.
MOST_TOKENS = 300


@dataclasses.dataclass(frozen=True)
class ActivationBytes:
    """Bytes of one image's step beside weights and optimizer, by whether blocks are recomputed.

    Attributes:
        blocks: of the transformer.
        kept: kept for the backward pass, if no block is recomputed.
        block: of it, what one recomputed block does not keep.
        passing: alive beyond what is kept at the peak, if no block is recomputed.
        passing_recomputed: the same if one is; the block at work is whole in memory then.
    """

    blocks: int
    kept: int
    block: int
    passing: int
    passing_recomputed: int

    @classmethod
    def counted(cls, count: Callable[[int | None], StepCount], blocks: int) -> ActivationBytes:
        """From `count(interval)`, a step counted on meta tensors with every so many blocks recomputed (None: none)."""
        none, all_blocks = count(None), count(1)
        return cls(
            blocks=blocks,
            kept=none.kept // none.images,
            block=(none.kept - all_blocks.kept) // blocks // none.images,
            passing=(none.peak - none.kept) // none.images,
            passing_recomputed=(all_blocks.peak - all_blocks.kept) // all_blocks.images,
        )

    def peak(self, interval: int | None) -> int:
        """Bytes of one image at the peak of a step that recomputes every `interval`-th block (None: none)."""
        if interval is None:
            return self.kept + self.passing
        return self.kept - math.ceil(self.blocks / interval) * self.block + self.passing_recomputed


@dataclasses.dataclass(frozen=True)
class Recomputation:
    """A choice: every `interval`-th block (None: none), so many blocks in all, bytes of the batch at the peak."""

    interval: int | None
    blocks: int
    peak: int


def recomputations(activations: ActivationBytes, images: int) -> Iterator[Recomputation]:
    """All choices for a batch of `images`, the fastest first; intervals that recompute as many blocks come once."""
    yield Recomputation(None, 0, images * activations.peak(None))
    former = 0
    for interval in range(activations.blocks, 0, -1):
        blocks = math.ceil(activations.blocks / interval)
        if blocks != former:
            yield Recomputation(interval, blocks, images * activations.peak(interval))
        former = blocks


def choose_recomputation(
    budget_bytes: int, *, images: int, activations: ActivationBytes, held_bytes: int = 0
) -> Recomputation:
    """The least recomputation with which a step of `images` fits into `budget_bytes`.

    Args:
        held_bytes: of the budget, what weights, gradients and optimizer take.

    Raises:
        UserError: it does not fit even where every block is recomputed.
    """
    for choice in recomputations(activations, images):
        if choice.peak <= budget_bytes - held_bytes:
            return choice
    most = max(budget_bytes - held_bytes, 0) // activations.peak(1)
    remedy = f"Use a batch of {most} or less." if most else "Use a smaller resolution or a larger device."
    reason = f"a step of {images} images needs {choice.peak / 1e9:.1f} GB with every block recomputed"
    if held_bytes:
        reason += f", and weights and optimizer {held_bytes / 1e9:.1f} GB"
    raise UserError(Problem("memory_budget", f"{budget_bytes / 1e9:.1f} GB", reason, remedy))


def held_bytes(config: TrainConfig, model: Model, world_size: int) -> dict[str, int]:
    """Bytes on one device beside the activations, by part: see `arithmetic.training_bytes`."""
    settings = (config.train_mode, config.rank, world_size, config.controlnet_layers)
    held = training_bytes(model.transformer_config, *settings, adapter_weights=_adapter_weights(config, model))
    if config.base_quantization is not None:
        held["weights"] -= saved_bytes(config.base_quantization, model.transformer_config)
    return held


def _adapter_weights(config: TrainConfig, model: Model) -> int | None:
    """Weights of an adapter that is not a LoRA on the usual layers, counted on tensors without data; else None."""
    adapter = config.adapter
    plain = adapter.adapter_type == "lora" and not adapter.use_dora and adapter.init_lora is None
    if config.train_mode != "lora" or (plain and adapter.lora_layers is None):
        return None
    adapter = dataclasses.replace(adapter, init_lora_weights="gaussian")
    with torch.random.fork_rng(devices=[]):  # a run that goes on draws what it would have drawn
        transformer = build_on_meta(model.transformer_config, torch.float32, lambda model: put_adapter(model, adapter))
    return sum(p.numel() for name, p in transformer.named_parameters() if any(part in name for part in ADAPTER_PARTS))


def count_run_step(config: TrainConfig, model: Model, *, side: int, tokens: int, interval: int | None) -> StepCount:
    """One image's step of a run, counted on tensors without data.

    Args:
        side: of the latents; tokens: of the caption.
        interval: every so many blocks are recomputed; None: none.
    """
    dtype = torch.float32 if config.mixed_precision == "no" else torch.bfloat16

    def prepare(transformer: torch.nn.Module) -> None:
        if config.train_mode == "lora":
            put_adapter(transformer, config.adapter)
        set_attention(transformer, "sdpa", torch.device("cpu"))
        fuse_blocks(transformer, config.fused_blocks, autocast=False, compiled=config.compile)
        if interval is not None:
            recompute_blocks(transformer, interval)

    transformer = build_on_meta(model.transformer_config, dtype, prepare)
    if config.train_mode == "controlnet":
        transformer = _with_controlnet(transformer, config, prepare)
    return count_training_step(transformer, 1, (side, side), tokens)


def _with_controlnet(
    transformer: torch.nn.Module, config: TrainConfig, prepare: Callable[[torch.nn.Module], None]
) -> ControlledTransformer:
    controlnet = begin_controlnet(transformer.requires_grad_(False), config.controlnet_layers)
    prepare(controlnet)
    model = ControlledTransformer(transformer, controlnet)
    for part in model.trained_parts():
        part.requires_grad_(True)
    return model


def fit_memory(
    config: TrainConfig, model: Model, world_size: int, free_bytes: int | None
) -> tuple[TrainConfig, str | None]:
    """(the settings with the recomputation that the budget needs, a sentence that tells it); as they are without one.

    Counted for the largest image and the longest caption, so that no batch is too large.

    Args:
        free_bytes: free memory of the device, for the budget "auto".

    Raises:
        UserError: nothing fits.
    """
    if config.memory_budget is None:
        return config, None
    budget = int(USABLE * free_bytes) if config.memory_budget == AUTO else int(float(config.memory_budget) * 1e9)
    held = held_bytes(config, model, world_size)
    if config.mixed_precision != "bf16":  # the arithmetic counts bf16
        held["weights"] *= 2
    side = config.side // model.vae_factor
    activations = ActivationBytes.counted(
        lambda interval: count_run_step(config, model, side=side, tokens=MOST_TOKENS, interval=interval),
        model.transformer_config["num_layers"],
    )
    images = config.train_batch_size * (2 if config.with_prior_preservation else 1)
    choice = choose_recomputation(budget, images=images, activations=activations, held_bytes=sum(held.values()))
    settings = {"memory_budget": None, "gradient_checkpointing": choice.interval is not None}
    config = config.replaced(**settings, gradient_checkpointing_interval=choice.interval or 1)
    needed = (choice.peak + sum(held.values())) / 1e9
    what = f"{choice.blocks} of {activations.blocks} blocks recomputed"
    return config, f"{what}: a step needs {needed:.3g} GB of the budget of {budget / 1e9:.3g} GB"


def fit_to_device(config: TrainConfig, model: Model, engine: Engine) -> TrainConfig:
    """`fit_memory` on the device of a run, logged; alike on all ranks, by the one that has the least memory free."""
    if config.memory_budget is None:
        return config
    ranks, free = engine.ranks, None
    if config.memory_budget == AUTO:
        free = min(ranks.gather(devices.free_memory_bytes(engine.device)))
    config, told = ranks.run_on_all(lambda: fit_memory(config, model, ranks.world_size, free))
    logger.info("memory: %s", told)
    return config
