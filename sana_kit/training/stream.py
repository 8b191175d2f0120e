"""Training samples by their position in an endless stream, and the batches of a rank."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from sana_kit.distributed import Ranks
from sana_kit.encodings.prompts import collate_prompt_embeds
from sana_kit.training.order import BucketOrder, PermutationOrder, generator
from sana_kit.training.recipes import FlowMatching
from sana_kit.workers import prepare_worker

if TYPE_CHECKING:
    from sana_kit.encodings.dataset import EncodedDataset
    from sana_kit.training.config import TrainConfig
    from sana_kit.training.plan import Plan
    from sana_kit.training.state import TrainState

# Padding captions to a multiple keeps the number of distinct shapes small, which compilers and the NPU's kernel cache
# need.
CAPTION_PAD_MULTIPLE = 16

_DROPOUT_SALT, _CROP_SALT, _CAPTION_SALT = 0xD20, 0xC20, 0xCA9


def caption_multiple(config: TrainConfig) -> int:
    """Tokens that captions are padded to a multiple of: with graphs the most there are, which makes one shape."""
    return config.max_sequence_length if config.cuda_graphs else CAPTION_PAD_MULTIPLE


class SampleStream(torch.utils.data.Dataset):
    """Training samples by their position in an endless stream: epoch after epoch all images, in the order of `order`.

    The noise and the time step of position p are drawn from (seed, p). What a sample is depends on no rank, batch size
    or worker, so that a resumed run, on any number of processes, sees exactly the samples that an undisturbed one
    would: none twice and none left out within an epoch.
    """

    def __init__(
        self,
        encoded: EncodedDataset,
        order: PermutationOrder | BucketOrder,
        num_class: int = 0,
        *,
        seed: int,
        recipe: FlowMatching,
        caption_dropout: float = 0.0,
        crops: int = 1,
        several_captions: bool = False,
    ):
        """Args:
        encoded: `encoded[i]` is {"latents" (C, h, w), "prompt_embeds" (T, D)}; class images follow the instance
            images. `encoded.prompt("", None)` is the empty caption's, where captions are dropped.
        order: of the instance images.
        num_class: class images.
        caption_dropout: share of the positions that get the empty caption.
        crops: samples of each instance image in `encoded`, one after the other; each position takes one of them.
        several_captions: draw the caption of each position: `encoded.drawn_prompt_embeds(i, u)`.
        """
        self.encoded, self.order, self.crops, self.num_instance = encoded, order, crops, order.size * crops
        self.class_order = PermutationOrder(num_class, seed, salt=1) if num_class else None
        self.seed, self.recipe, self.caption_dropout = seed, recipe, caption_dropout
        self.several_captions = several_captions

    def image_index(self, position: int) -> int:
        """Index of the instance image's sample at a position."""
        image = self.order(position)
        if self.crops == 1:
            return image
        return image * self.crops + int(generator(self.seed, position, _CROP_SALT).integers(self.crops))

    def _sample(self, index: int, position: int) -> dict[str, torch.Tensor]:
        item = self.encoded[index]
        if self.caption_dropout and self._drops(position):
            item = {**item, "prompt_embeds": self.encoded.prompt("", None)}
        elif self.several_captions:
            u = generator(self.seed, position, _CAPTION_SALT).random()
            item = {**item, "prompt_embeds": self.encoded.drawn_prompt_embeds(index, u)}
        noise, u = self.recipe.draw(tuple(item["latents"].shape), self.seed, position)
        return {**item, "noise": noise, "u": u}

    def _drops(self, position: int) -> bool:
        """Whether the sample at a position trains with the empty caption; drawn apart from its noise."""
        return bool(generator(self.seed, position, _DROPOUT_SALT).random() < self.caption_dropout)

    def __getitem__(self, position: int) -> list[dict[str, torch.Tensor]]:
        """The sample at a position, followed by its class sample under prior preservation."""
        samples = [self._sample(self.image_index(position), 2 * position)]
        if self.class_order is not None:
            index = self.num_instance + self.class_order(position)
            samples.append(self._sample(index, 2 * position + 1))
        return samples


class StreamBatchSampler(torch.utils.data.Sampler):
    """Positions of this rank's micro-batches from `start` on, for `steps` updates."""

    def __init__(self, start: int, steps: int, batch_size: int, accumulation: int, rank: int, world_size: int):
        self.start, self.micro_steps = start, steps * accumulation
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size

    def __len__(self) -> int:
        return self.micro_steps

    def __iter__(self) -> Iterator[list[int]]:
        for micro_step in range(self.micro_steps):
            first = self.start + (micro_step * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))


def build_stream(
    config: TrainConfig,
    encoded: EncodedDataset,
    order: PermutationOrder | BucketOrder,
    num_class: int,
    recipe: FlowMatching,
) -> SampleStream:
    """The stream of a run; see `SampleStream`."""
    return SampleStream(
        encoded,
        order,
        num_class,
        seed=config.seed,
        recipe=recipe,
        caption_dropout=config.caption_dropout,
        crops=config.crops_per_image,
        several_captions=encoded.several_captions,
    )


def build_loader(
    config: TrainConfig,
    stream: SampleStream,
    plan: Plan,
    state: TrainState,
    ranks: Ranks,
    device: torch.device,
) -> torch.utils.data.DataLoader:
    """This rank's micro-batches (see `collate`) from where the run stands to its end.

    Args:
        plan: steps, batch_size and accumulation of the run (`plan.Plan`).
        state: global_step and samples_seen (`state.TrainState`).
        device: that they go to.
    """
    workers = config.dataloader_num_workers
    steps_left = max(plan.steps - state.global_step, 0)
    return torch.utils.data.DataLoader(
        stream,
        batch_sampler=StreamBatchSampler(
            state.samples_seen, steps_left, plan.batch_size, plan.accumulation, ranks.rank, ranks.world_size
        ),
        collate_fn=functools.partial(collate, multiple=caption_multiple(config)),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        persistent_workers=workers > 0,
        pin_memory=device.type != "cpu",
        worker_init_fn=prepare_worker,
        # The loader's own draw must not move the state that dropout continues from.
        generator=torch.Generator(),
    )


def collate(
    samples: list[list[dict[str, torch.Tensor]]], multiple: int = CAPTION_PAD_MULTIPLE
) -> dict[str, torch.Tensor]:
    """Stack samples; instance samples come first, then their class samples.

    Returns: latents (B, C, h, w) in their stored dtype, noise (B, C, h, w) float32, u (B,) float32, prompt_embeds
    (B, T, D) padded to the longest caption, rounded up to `multiple`, prompt_mask (B, T) bool; with loss masks also
    loss_weights (B, 1, h, w) float32, with control images control (B, C, h, w).
    """
    ordered = [sample[part] for part in range(len(samples[0])) for sample in samples]
    embeds, mask = collate_prompt_embeds([s["prompt_embeds"] for s in ordered], multiple=multiple)
    batch = {
        "latents": torch.stack([s["latents"] for s in ordered]),
        "noise": torch.stack([s["noise"] for s in ordered]),
        "u": torch.cat([s["u"] for s in ordered]),
        "prompt_embeds": embeds,
        "prompt_mask": mask,
    }
    for name in ("loss_weights", "control"):
        if name in ordered[0]:
            batch[name] = torch.stack([s[name] for s in ordered])
    return batch
