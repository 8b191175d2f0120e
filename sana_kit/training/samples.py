"""The training samples of a run: images found and checked, class images drawn, everything encoded once."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import numpy as np

from sana_kit.data.controls import load_controls
from sana_kit.data.discover import load_class_images, load_images
from sana_kit.data.image_set import ImageSet, bad_image_problems, check_images, concat
from sana_kit.distributed import Ranks, StopSignal
from sana_kit.encodings.dataset import EncodedDataset
from sana_kit.encodings.encode import encode
from sana_kit.encodings.prompts import parse_instruction
from sana_kit.encodings.streamed import StreamedDataset
from sana_kit.errors import EncodingStopped, InputError, UserError
from sana_kit.models.folder import Model
from sana_kit.training.check import held_out_count, image_sources
from sana_kit.training.config import TrainConfig
from sana_kit.training.control import control_kinds
from sana_kit.training.encoding import encoding_settings, encodings_dir, extra_prompts
from sana_kit.training.order import BucketOrder, MixedOrder, PermutationOrder, WeightedSets, make_order
from sana_kit.training.prior import generate_class_images
from sana_kit.training.state import TrainState, check_same_images, data_digests
from sana_kit.training.streaming import StreamOrder, open_stream

if TYPE_CHECKING:
    from sana_kit.training.checkpoints import Resume

logger = logging.getLogger("sana")


class Notes(Protocol):
    """Who tells the user of the data: a run's `Recorder`."""

    def warn(self, text: str) -> None:
        """Something that is probably not meant."""

    def note(self, text: str) -> None:
        """Something worth keeping beside the run."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """What a run trains on.

    Attributes:
        encoded: latents and prompt embeddings by sample, under a ControlNet those of control images too; class images
            follow the instance images, held-out ones these.
        num_instance, num_class, num_held_out: how many there are of each.
        instruction: the lines before each caption, None for none.
        set_of: (num_instance,) the number of each instance sample's data set; empty of a stream.
    """

    encoded: EncodedDataset
    num_instance: int
    num_class: int
    num_held_out: int
    instruction: list[str] | None
    set_of: np.ndarray

    def order(self, config: TrainConfig, micro_step: int) -> PermutationOrder | MixedOrder | BucketOrder | StreamOrder:
        """The order of the instance images; `micro_step` is how many samples one takes over all processes."""
        crops, sets = config.crops_per_image, self.weighted_sets(config)
        return make_order(self.encoded.latent_shapes(), self.num_instance, micro_step, config.seed, crops, sets)

    def digests(self) -> dict[str, str]:
        """What stands for the images and captions, for `state.run_identity`."""
        return data_digests(self.encoded.images, self.encoded.control_images)

    def ready(self, state: TrainState, samples: int, paused: Callable[[], AbstractContextManager]) -> bool:
        """See that the `samples` positions of the next update can be read; every rank calls it.

        Args:
            paused: what is done inside counts as no training time.

        Returns:
            False where a signal ended that.
        """
        return True

    def weighted_sets(self, config: TrainConfig) -> WeightedSets | None:
        """Which samples are of which data set, where these have weights."""
        if config.set_weights is None:
            return None
        return WeightedSets(self.set_of, [data_set.share for data_set in config.sets])

    def counts_of_sets(self, sets: int, crops: int) -> list[int]:
        """Images of each data set, repeats included, `crops` of each encoded."""
        return (np.bincount(self.set_of, minlength=sets) // crops).tolist()

    @property
    def held_out(self) -> range:
        """Indices of the held-out images."""
        first = self.num_instance + self.num_class
        return range(first, first + self.num_held_out)


@dataclasses.dataclass(frozen=True)
class StreamedSamples(Samples):
    """Samples of a stream, where a window of them is known at a time.

    Attributes:
        digest: of the shards.
    """

    encoded: StreamedDataset
    digest: str

    def order(self, config: TrainConfig, micro_step: int) -> StreamOrder:
        """As they come."""
        return StreamOrder(self.num_instance)

    def digests(self) -> dict[str, str]:
        """What stands for the images and captions, for `state.run_identity`."""
        return {"data_digest": self.digest}

    def ready(self, state: TrainState, samples: int, paused: Callable[[], AbstractContextManager]) -> bool:
        """As of known samples; encodes the next window where one of the positions is the first of it."""
        try:
            with paused():
                self.encoded.prepare(state.samples_seen, samples)
        except EncodingStopped:
            return False
        state.stream = self.encoded.place(state.samples_seen + samples)
        return True

    def counts_of_sets(self, sets: int, crops: int) -> list[int]:
        """Images of the one data set."""
        return [self.num_instance]


def load_samples(
    config: TrainConfig,
    base_model: Model,
    ranks: Ranks,
    stop: StopSignal,
    recorder: Notes,
    resume: Resume | None = None,
) -> Samples:
    """Find the images and encode what is not encoded yet; VAE and text encoder have left memory afterwards.

    Every rank calls it. What a user should know of the data goes to the recorder. Of a stream, the window where the
    run begins or goes on is read and encoded.

    Raises:
        UserError, InputError: images or captions that cannot be used, all of them, on every rank.
        EncodingStopped: after a signal; a new start goes on from there.
    """
    instruction = parse_instruction(config.complex_human_instruction)
    if config.streaming:
        return _stream(config, base_model, ranks, stop, recorder, resume, instruction)
    images, bounds = _load_sets(config, ranks)
    check_same_images(images, ranks)
    for note in images.notes:
        recorder.warn(f"data: {note}")
    images, held_out = _hold_out(config, images)
    parts = [images]
    if config.with_prior_preservation:
        parts.append(_class_images(config, base_model, instruction, images, ranks, stop))
    parts += [held_out] if held_out is not None else []
    controls = None
    if config.train_mode == "controlnet":  # all of them looked at before a weight is loaded
        sources, remember_in = image_sources(config), f"{encodings_dir(config)}/images"
        controls = load_controls(control_kinds(config), sources, *parts, remember_in=remember_in, ranks=ranks)
    whole = functools.reduce(concat, parts)
    if config.size_rules:
        whole.rule_of_row = _rules_of_rows(config, parts, images, held_out, bounds)
    encoded = _encode(whole, config, base_model, ranks, instruction, stop, recorder)
    if controls is not None:
        own = controls.of(encoded.images, np.concatenate([part.rows() for part in parts]))
        encoded.controls = _encode(own, config, base_model, ranks, instruction, stop, recorder)
    counts = _counts(parts, encoded.images)
    num_class = counts[1] if config.with_prior_preservation else 0
    num_held_out = counts[-1] if held_out is not None else 0
    set_of = np.asarray(np.searchsorted(bounds, encoded.images.rows()[: counts[0]], side="right"))
    return Samples(encoded, counts[0], num_class, num_held_out, instruction, set_of)


def _stream(
    config: TrainConfig,
    base_model: Model,
    ranks: Ranks,
    stop: StopSignal,
    recorder: Notes,
    resume: Resume | None,
    instruction: list[str] | None,
) -> Samples:
    settings, prompts = encoding_settings(config, base_model, instruction), extra_prompts(config, instruction)
    encoded, shards = open_stream(config, base_model, settings, ranks, stop, recorder.warn, prompts, resume)
    samples = config.train_batch_size * config.gradient_accumulation_steps * ranks.world_size
    epoch = shards.rows or config.max_train_steps * samples
    return StreamedSamples(encoded, epoch, 0, 0, instruction, np.zeros(0, np.int64), shards.digest())


def _rules_of_rows(
    config: TrainConfig, parts: list[ImageSet], images: ImageSet, held_out: ImageSet | None, bounds: list[int]
) -> np.ndarray:
    """(rows of all parts,) the number of the data set of each row of a source, -1 where it is of none."""
    found = []
    for part in parts:
        of_sets = part is images or (part is held_out and config.validation_dataset is None)
        rows = np.arange(part.source_rows)
        found.append(np.searchsorted(bounds, rows, side="right") if of_sets else np.full(len(rows), -1))
    return np.concatenate(found)


def _load_sets(config: TrainConfig, ranks: Ranks) -> tuple[ImageSet, list[int]]:
    """(the images of all data sets one behind the other, the source's row behind the last of each set)."""
    parts = []
    for data_set, source in zip(config.sets, image_sources(config), strict=True):
        images = load_images(
            **source,
            instance_prompt=data_set.instance_prompt,
            skip_bad_images=config.skip_bad_images,
            remember_in=f"{encodings_dir(config)}/images",
            ranks=ranks,
        )
        if data_set.caption_prefix or data_set.caption_suffix:
            images.affix(data_set.caption_prefix, data_set.caption_suffix)
        parts.append(images)
    return functools.reduce(concat, parts), np.cumsum([images.source_rows for images in parts]).tolist()


def _hold_out(config: TrainConfig, images: ImageSet) -> tuple[ImageSet, ImageSet | None]:
    """(the images to train on, those that are held out or None).

    Chosen by the images' own digests, so that a set that grows keeps what was held out, and every copy and repeat of
    an image is on one side.

    Raises:
        UserError: nothing would be left.
    """
    if config.validation_dataset is not None:
        tables = [found for found in image_sources(config) if found["dataset_name"] is not None]
        source = (tables or image_sources(config))[0]
        source |= {"dataset_name": config.validation_dataset, "instance_data_dir": None, "repeats": 1}
        return images, load_images(**source, instance_prompt=config.instance_prompt)
    if not config.validation_split:
        return images, None
    digests = sorted({images.source_hash(i) for i in range(len(images))})
    count, problems = held_out_count(config.validation_split, len(digests))
    if problems:
        raise UserError(problems)
    chosen = set(digests[:count])
    held = [i for i in range(len(images)) if images.source_hash(i) in chosen]
    kept = [i for i in range(len(images)) if images.source_hash(i) not in chosen]
    trained, aside = images.without(held), images.without(kept)
    trained.report, aside.report = images.report, {}
    logger.info("held out: %d of %d images", count, len(digests))
    return trained, aside


def _counts(parts: list[ImageSet], left: ImageSet) -> list[int]:
    """How many samples of each part are left in their concatenation after bad images were left out."""
    if len(left) == sum(map(len, parts)):
        return [len(part) for part in parts]
    whole = functools.reduce(concat, parts)
    rows, begin, counts = [left.row(i) for i in range(len(left))], 0, []
    for part in parts:
        own = {whole.row(i) for i in range(begin, begin + len(part))}
        counts.append(sum(row in own for row in rows))
        begin += len(part)
    return counts


def _class_images(
    config: TrainConfig,
    base_model: Model,
    instruction: list[str] | None,
    images: ImageSet,
    ranks: Ranks,
    stop: StopSignal,
) -> ImageSet:
    if not config.skip_bad_images and (bad := check_images(images)):  # before weights load for the class images
        raise InputError("The training images cannot be used:\n- " + bad_image_problems([m for _, m in bad]))
    generate_class_images(config, base_model, instruction, ranks, stop)
    return load_class_images(config.class_data_dir, config.class_prompt, config.num_class_images)


def _encode(
    images: ImageSet,
    config: TrainConfig,
    base_model: Model,
    ranks: Ranks,
    instruction: list[str] | None,
    stop: StopSignal,
    recorder: Notes,
) -> EncodedDataset:
    encoded = encode(
        images,
        base_model,
        encoding_settings(config, base_model, instruction),
        seed=config.crop_seed,
        ranks=ranks,
        extra_prompts=extra_prompts(config, instruction),
        stop=stop,
        log=logger.warning,
    )
    facts = encoded.facts
    for message in facts.messages:
        recorder.note(message)
    size = facts.bytes
    logger.info(
        f"encodings{'' if images.follows is None else ' of the control images'}: {facts.encoded_images} images,"
        f" {facts.encoded_prompts} captions new;"
        f" {facts.reused_images}, {facts.reused_prompts} reused; {facts.seconds:.1f} s;"
        f" {size['latents'] / 1e6:.1f} MB of latents, {size['prompts'] / 1e6:.1f} MB of embeddings"
    )
    if images.follows is not None:
        return encoded
    logger.info(facts.store)
    encoded.add_masks(config.mask_outside, ranks)
    if encoded.masks is not None:
        count, empty = encoded.masks.counts()
        logger.info(f"loss masks: {count} of {len(encoded)} samples, weight {config.mask_outside:g} outside")
        if empty:
            told = f"{empty} sample(s) show nothing of their mask after the crop and count {config.mask_outside:g}"
            recorder.warn(f"data: {told}; --center_crop or --aspect_ratio_buckets keep more of an image")
    return encoded
