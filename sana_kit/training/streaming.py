"""A run that reads its images from shards as it goes (--streaming): what it cannot go with, and its samples."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from sana_kit.data.assemble import Asked
from sana_kit.data.sets import DataSet
from sana_kit.data.streaming import Shards, find_shards
from sana_kit.data.tables import Wanted
from sana_kit.data.windows import WindowReader
from sana_kit.distributed import Ranks
from sana_kit.encodings.plan import ExtraPrompts
from sana_kit.encodings.settings import EncodingSettings
from sana_kit.encodings.streamed import RowBytes, StreamedDataset, limit_problems
from sana_kit.encodings.usage import size_text
from sana_kit.errors import Problem, UserError, setting
from sana_kit.models.folder import Model
from sana_kit.training.config import TrainConfig
from sana_kit.training.settings import DataConfig, EncodingConfig

if TYPE_CHECKING:
    from sana_kit.encodings.peers import Stop
    from sana_kit.training.checkpoints import Resume

logger = logging.getLogger("sana")

# What does not go with a stream: a setting, whether it is asked for, why not, and what to do instead.
_NOT: tuple[tuple[str, Callable[[TrainConfig], object], str, str], ...] = (
    (
        "instance_data_dir",
        lambda config: config.instance_data_dir,
        "a stream reads shards, not a folder of images",
        f"Pack the images into .tar or .parquet shards and name them with {setting('dataset_name')}.",
    ),
    ("data_sets", lambda config: config.data_sets, "a stream has one data set", "Put its shards into one folder."),
    (
        "with_prior_preservation",
        lambda config: config.with_prior_preservation,
        "class images are counted against a known number of images",
        "Leave it out.",
    ),
    (
        "aspect_ratio_buckets",
        lambda config: config.aspect_ratio_buckets,
        "a batch of one bucket needs the sizes of all images beforehand",
        "Leave it out, or pack the shards by shape and train on each.",
    ),
    (
        "crops_per_image",
        lambda config: config.crops_per_image > 1,
        "each image is encoded anew whenever it comes",
        f"{setting('crop_seed')}=1 gives it a fresh crop and flip each time.",
    ),
    ("repeats", lambda config: config.repeats > 1, "epochs follow one another without an end", "Leave it out."),
    ("mask_column", lambda config: config.mask_column, "loss masks are not streamed", "Leave it out."),
    (
        "train_mode",
        lambda config: config.train_mode == "controlnet",
        "control images are not streamed",
        "Use lora or full.",
    ),
    (
        "validation_split",
        lambda config: config.validation_split,
        "images cannot be held out of rows that are not listed",
        f"Keep a shard back, and compare the results of {setting('validation_prompt')}.",
    ),
    (
        "validation_dataset",
        lambda config: config.validation_dataset,
        "the held-out loss needs its images encoded beside the stream",
        f"Leave it out, and compare the results of {setting('validation_prompt')}.",
    ),
    (
        "validation_epochs",
        lambda config: "validation_epochs" in config.given,
        "how long an epoch is, is not known",
        f"Give {setting('validation_steps')}.",
    ),
    (
        "dataloader_num_workers",
        lambda config: config.dataloader_num_workers,
        "the windows are known to the training process alone",
        "Leave it out; encodings are read from the disk in no time.",
    ),
)


def stream_problems(config: TrainConfig) -> list[Problem]:
    """What of a run's settings does not go with --streaming, or is of use with it alone; no file is looked at."""
    if not config.streaming:
        reason, remedy = f"has no effect without {setting('streaming')}", "Add it, or leave this out."
        # held against the defaults, since a run's own run.yaml gives every setting
        defaults = {"stream_window": DataConfig.stream_window, "encodings_disk_gb": EncodingConfig.encodings_disk_gb}
        asked = [name for name, default in defaults.items() if getattr(config, name) != default]
        return [Problem(name, getattr(config, name), reason, remedy) for name in asked]
    problems = [
        Problem(name, getattr(config, name) or None, f"{reason} ({setting('streaming')})", remedy)
        for name, asked, reason, remedy in _NOT
        if asked(config)
    ]
    if config.max_train_steps is None:
        reason = f"needed with {setting('streaming')}, since how long an epoch is, is not known"
        problems.append(Problem("max_train_steps", None, reason, "Say how many updates."))
    if len(config.sets) > 1 and not config.data_sets:
        reason = f"a stream has one data set ({setting('streaming')})"
        problems.append(Problem("dataset_name", ", ".join(s.name for s in config.sets), reason, "Name one."))
    return problems


def stream_of(config: TrainConfig) -> Shards:
    """The shards that a run reads.

    Raises:
        UserError: there are none, or some cannot be read; by name.
    """
    (one,) = config.sets
    return find_shards(_wanted(config, one))


def _wanted(config: TrainConfig, one: DataSet) -> Wanted:
    return Wanted(
        one.name,
        one.dataset_config_name,
        one.image_column,
        one.caption_column,
        one.dataset_split,
        config.cache_dir,
    )


def disk_problems(config: TrainConfig, settings: EncodingSettings, model: Model) -> list[Problem]:
    """Why the limit of the disk does not suffice for windows of this size."""
    return limit_problems(config.encodings_disk_gb, config.stream_window, RowBytes.of(settings, model))


def window_problems(config: TrainConfig, window: int, world_size: int) -> list[Problem]:
    """Why a window is too small for a run."""
    samples = config.train_batch_size * config.gradient_accumulation_steps * world_size
    if samples <= window:
        return []
    reason = f"an update takes {samples} images, more than a window of {window}"
    return [Problem("stream_window", config.stream_window, reason, f"Give at least {samples + 16}.")]


def open_stream(
    config: TrainConfig,
    base_model: Model,
    settings: EncodingSettings,
    ranks: Ranks,
    stop: Stop,
    warn: Callable[[str], None],
    prompts: ExtraPrompts,
    resume: Resume | None,
) -> tuple[StreamedDataset, Shards]:
    """The stream at the place where a run begins or goes on, its window encoded; every rank calls it.

    Raises:
        UserError: shards, images or the limit of the disk cannot be used, or the checkpoint is of another stream.
        EncodingStopped: after a signal.
    """
    shards = ranks.run_on_all(lambda: stream_of(config))
    first = ranks.agree(shards.digest())
    ranks.run_on_all(lambda: _check_same(shards.digest(), first, config))
    asked = Asked(config.instance_prompt, 1, config.skip_bad_images, config.caption_column)
    reader = WindowReader(shards, asked, size=config.stream_window, seed=config.seed, ranks=ranks)
    problems = window_problems(config, reader.size, ranks.world_size)
    state: dict = resume.state if resume is not None else {"samples_seen": 0, "stream": None}
    problems += _resume_problems(config, shards, state) if resume is not None else []
    if problems:
        raise UserError(problems)
    total = f", {size_text(sum(shards.bytes))}" if sum(shards.bytes) else ""
    about = f", about {shards.rows:,d} images" if shards.rows else ""
    logger.info(
        f"streaming: {len(shards)} shard(s) of {shards.wanted.name}{total}{about}; {reader.lanes} open at once,"
        f" windows of {reader.size} images, at most {config.encodings_disk_gb:g} GB of encodings"
    )
    if shards.rows and 2 * shards.rows <= reader.size:
        warn(
            f"data: a window of {reader.size} images is more than the about {shards.rows} that there are: each is read"
            " several times for it; without --streaming they are encoded once, or lower --stream_window"
        )
    encoded = StreamedDataset(
        reader,
        base_model,
        settings,
        seed=config.seed,
        crop_seed=config.crop_seed,
        limit_gb=config.encodings_disk_gb,
        extra_prompts=prompts,
        ranks=ranks,
        stop=stop,
        warn=warn,
    )
    reader.go_to(state["stream"])
    for line in reader.split():
        logger.info(f"streaming: {line}")
    encoded.start(state["samples_seen"], state["stream"])
    return encoded, shards


def _check_same(here: str, first: str, config: TrainConfig) -> None:
    if here != first:
        reason = "this machine sees other shards, or shards of other sizes, than the first"
        raise UserError(Problem("dataset_name", config.sets[0].name, reason, "Give every machine the same shards."))


def _resume_problems(config: TrainConfig, shards: Shards, state: dict) -> list[Problem]:
    """Why a run cannot go on exactly where a checkpoint stands."""
    before, field = state["run"], "resume_from_checkpoint"
    if not state.get("stream"):
        reason = f"the checkpoint is of a run without {setting('streaming')}, so it has no place in a stream"
        remedy = f"Begin anew, with {setting('init_lora')} for its weights."
        return [Problem(field, config.resume_from_checkpoint, reason, remedy)]
    problems = []
    if before["stream_window"] != config.stream_window:
        reason = f"the run was begun with {before['stream_window']}, and its place is counted in windows"
        remedy = f"Give {setting('stream_window')}={before['stream_window']}."
        problems.append(Problem("stream_window", config.stream_window, reason, remedy))
    if before["data_digest"] != shards.digest():
        reason = "the shards are other ones, or of other sizes, than when the checkpoint was written"
        remedy = f"Give the same shards, or begin anew, with {setting('init_lora')} for its weights."
        problems.append(Problem("dataset_name", shards.wanted.name, reason, remedy))
    if before["seed"] != config.seed:
        reason = f"the order of the shards was drawn with {before['seed']}"
        problems.append(Problem("seed", config.seed, reason, f"Give {setting('seed')}={before['seed']}, or none."))
    return problems


class StreamOrder:
    """The order of a stream: its positions are its samples.

    Attributes:
        size: images of an epoch, where that is known or estimated; else of the whole run.
    """

    def __init__(self, size: int):
        self.size = size

    def __call__(self, position: int) -> int:
        """The sample at a position."""
        return position

    def count(self, epochs: int) -> int:
        """Samples of so many epochs, about."""
        return epochs * self.size

    def first_position(self, samples_seen: int) -> int:
        """Where the order goes on after so many samples."""
        return samples_seen
