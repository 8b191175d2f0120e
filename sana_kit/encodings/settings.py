"""What an encoding is made with: settings under the names of the trainer's flags, and their checks."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import torch

from sana_kit.data.buckets import Assignment, assign, in_squares
from sana_kit.data.image_set import ImageSet
from sana_kit.data.sets import SizeRule
from sana_kit.data.transform import TransformPlan, plan_transform
from sana_kit.devices import DTYPES
from sana_kit.encodings.keys import distinct
from sana_kit.errors import Problem, UserError
from sana_kit.models.folder import Model, component_folder, component_identity

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class EncodingSettings:
    """How images and captions are encoded.

    Attributes:
        encodings_dir: the store; runs, flags, models and data sets may share it.
        resolution: side of the square images, in pixels; of buckets the largest resolution.
        resolutions: with buckets, all resolutions; empty for squares. See `data/buckets.py`.
        bucket_no_upscale: with buckets, enlarge no image.
        pixel_multiple: every side of a bucket is a multiple of this.
        complex_human_instruction: the lines before each caption, None for none.
        vae_batch_size: images per VAE pass; "auto" fits the device's free memory. Halved when memory runs out.
        text_batch_size: captions per pass of the text encoder.
        skip_bad_images: leave out images that cannot be decoded instead of ending with an error.
        num_workers: threads that decode ahead; None takes this process's share of the cores.
        set_rules: sizes and crops of the images whose `ImageSet.rules` have these numbers, where sets have rules of
            their own; the last one is of all others (-1). `resolution` is the largest of all then.
    """

    encodings_dir: str
    resolution: int
    resolutions: tuple[int, ...] = ()
    bucket_no_upscale: bool = False
    pixel_multiple: int = 32
    center_crop: bool = False
    random_flip: bool = False
    max_sequence_length: int = 300
    complex_human_instruction: tuple[str, ...] | None = None
    vae_dtype: torch.dtype = torch.bfloat16
    text_encoder_dtype: torch.dtype = torch.bfloat16
    vae_batch_size: int | str = "auto"
    text_batch_size: int = 16
    skip_bad_images: bool = False
    num_workers: int | None = None
    set_rules: tuple[SizeRule, ...] = ()

    @property
    def own_rule(self) -> SizeRule:
        """The rule of all images that have none of their own."""
        sizes = (self.resolutions or self.resolution, bool(self.resolutions), self.bucket_no_upscale)
        return SizeRule(*sizes, self.center_crop, self.random_flip)


class Transform:
    """The decision of `plan_transform` for each sample of a data set.

    Args:
        seed: random crops and flips are keyed by it and the image's position in the data set; None: they belong to the
            image, wherever it stands, so every run finds them again.
    """

    def __init__(self, images: ImageSet, settings: EncodingSettings, seed: int | None = None):
        images = images if images.follows is None else images.follows
        self._images, self._settings = images, settings
        self._seed = seed or 0
        self._index = images.positions() if seed is not None else _own_numbers(images)
        self._rules = settings.set_rules or (settings.own_rule,)
        self._rule_of = images.rules() if settings.set_rules else None
        self.buckets: Assignment | None = None
        if settings.resolutions or self._rule_of is not None:
            self.buckets = self._assign(images.sizes())

    def _assign(self, sizes: np.ndarray) -> Assignment:
        """The size of each image by its own rule."""
        rule_of = np.full(len(sizes), -1) if self._rule_of is None else self._rule_of
        found = Assignment(np.zeros((len(sizes), 2), np.int64), np.zeros(len(sizes)), np.zeros(len(sizes), bool))
        for number in np.unique(rule_of).tolist():
            rule, own = self._rules[number], np.flatnonzero(rule_of == number)
            if rule.aspect_ratio_buckets:
                part = self._in_buckets(sizes[own], rule)
            else:
                part = in_squares(sizes[own], rule.sides[0])
            for name in ("sizes", "lost", "enlarged"):
                getattr(found, name)[own] = getattr(part, name)
        return found

    def _in_buckets(self, sizes: np.ndarray, rule: SizeRule) -> Assignment:
        try:
            return assign(sizes, rule.sides, self._settings.pixel_multiple, rule.bucket_no_upscale)
        except ValueError as error:
            problem = Problem("bucket_no_upscale", None, str(error), "Leave it out, or take small images out.")
            raise UserError(problem) from None

    def _rule(self, i: int) -> SizeRule:
        return self._rules[-1 if self._rule_of is None else self._rule_of[i]]

    def target(self, i: int) -> tuple[int, int]:
        """(width, height) that sample i is trained at."""
        if self.buckets is None:
            return self._settings.resolution, self._settings.resolution
        width, height = self.buckets.sizes[i]
        return int(width), int(height)

    def __call__(self, i: int) -> TransformPlan:
        """The decision for sample i."""
        rule = self._rule(i)
        return plan_transform(
            self._images.size(i),
            target=self.target(i),
            center_crop=rule.center_crop,
            random_flip=rule.random_flip,
            seed=self._seed,
            index=int(self._index[i]),
        )


def _own_numbers(images: ImageSet) -> np.ndarray:
    """(N,) int64: a number from each image's content, another for each of its repeats."""
    digests = images.source_digests()
    if not len(digests):
        return np.zeros(0, np.int64)
    _, rows = distinct(digests)
    order = np.argsort(rows, kind="stable")
    starts = np.flatnonzero(np.diff(rows[order], prepend=-1))
    repeat = np.empty(len(rows), np.int64)
    repeat[order] = np.arange(len(rows)) - np.repeat(starts, np.diff(np.append(starts, len(rows))))
    return (np.ascontiguousarray(digests[:, :8]).view(">u8").ravel() >> np.uint64(16)).astype(np.int64) + repeat


@dataclasses.dataclass(frozen=True)
class Identity:
    """The hashes that stand for the parts of the model that encode."""

    vae: str
    text_encoder: str
    tokenizer: str

    @classmethod
    def of(cls, model: Model) -> Identity:
        """Of a checked model; nothing is loaded."""
        where = {"revision": model.revision, "variant": model.variant, "cache_dir": model.cache_dir}
        parts = {field.name: component_identity(model.base, field.name, **where) for field in dataclasses.fields(cls)}
        return cls(**parts)


def fingerprint(
    settings: EncodingSettings, identity: Identity, extra_prompts: list, data: str, seed: int | None
) -> str:
    """Hex SHA-256 of all that decides which encodings a run needs; `data` stands for the images and captions."""
    values = dataclasses.asdict(settings)
    for name in ("encodings_dir", "vae_batch_size", "text_batch_size", "skip_bad_images", "num_workers"):
        values.pop(name)  # these change how the work is done, not what it gives
    if not settings.set_rules:  # plans of runs without them keep their names
        values.pop("set_rules")
    values |= {"vae_dtype": str(settings.vae_dtype), "text_encoder_dtype": str(settings.text_encoder_dtype)}
    line = json.dumps([2, seed, values, dataclasses.asdict(identity), [list(map(_plain, extra_prompts)), data]])
    return hashlib.sha256(line.encode()).hexdigest()


def _plain(extra: tuple) -> list:
    prompt, instruction = extra
    return [prompt, list(instruction) if instruction else None]


def check_settings(settings: EncodingSettings, model: Model) -> None:
    """Raise UserError with everything that is wrong with the settings and with the model's encoding parts."""
    problems = []

    def expect(condition: bool, field: str, reason: str, remedy: str = "") -> None:
        if not condition:
            problems.append(Problem(field, getattr(settings, field), reason, remedy))

    for part in ("vae", "text_encoder", "tokenizer"):
        try:
            component_folder(model.base, part, model.revision, model.cache_dir)
        except UserError as error:
            problems += error.problems
        except ValueError as error:
            problems.append(Problem("", None, str(error)))
    factor, resolution = model.vae_factor, settings.resolution
    nearest = max(factor, round(resolution / factor) * factor)
    expect(
        resolution >= factor and resolution % factor == 0,
        "resolution",
        f"must be a multiple of {factor}, the VAE's factor",
        f"The nearest is {nearest}.",
    )
    names = ", ".join(DTYPES)
    expect(settings.vae_dtype in DTYPE_NAMES, "vae_dtype", f"is none of {names}")
    expect(settings.text_encoder_dtype in DTYPE_NAMES, "text_encoder_dtype", f"is none of {names}")
    if settings.text_encoder_dtype == torch.float16:
        problems.append(Problem("text_encoder_dtype", "fp16", "Gemma-2 gives NaN in fp16", "Use bf16 or fp32."))
    expect(settings.max_sequence_length >= 1, "max_sequence_length", "must be at least 1")
    batch = settings.vae_batch_size
    expect(batch == "auto" or (isinstance(batch, int) and batch >= 1), "vae_batch_size", "is not 'auto' or at least 1")
    expect(settings.text_batch_size >= 1, "text_batch_size", "must be at least 1")
    if problems:
        raise UserError(problems, "The images cannot be encoded:")
