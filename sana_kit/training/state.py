"""What a resumed run needs to be the same run: where it stands, who it is, its random states."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import uuid
from collections.abc import Callable

import numpy as np

from sana_kit.data.image_set import ImageSet
from sana_kit.distributed import Ranks
from sana_kit.errors import Problem, UserError
from sana_kit.flags import names_where
from sana_kit.training.config import TrainConfig
from sana_kit.training.settings import AdapterConfig

logger = logging.getLogger("sana")

# What a run shares with the one that it goes on from; a difference is told. Beside the flags of training/settings.py
# what several data sets make of them together.
IDENTITY = (*names_where(TrainConfig, lambda flag: flag.resume is not None), "set_weights", "size_rules")
# Without these the checkpoint's tensors do not fit the run at all.
DECISIVE = names_where(TrainConfig, lambda flag: flag.resume == "fixed")
# The decisive ones that say nothing about a run that trains all weights.
OF_LORA = (*names_where(AdapterConfig, lambda flag: flag.resume == "fixed"), "lora_plus_ratio")


@dataclasses.dataclass
class TrainState:
    """Where a run stands; the one thing about it that changes while it trains.

    Attributes:
        seed: of the whole run.
        run: what it is made of (`run_identity`).
        run_id: made at a fresh start, kept by every resume: whose a checkpoint is.
        global_step: updates made.
        samples_seen: position in the stream of samples.
        sequence: number of the newest checkpoint of the output folder, in the order of writing.
        best_loss, best_step, since_best: lowest held-out loss, its update, measurements since; None, 0, 0 without any.
        stream: of a run with --streaming, where the window of `samples_seen` begins; None in others.
        epoch, learning_rate: for people who read the file.
    """

    seed: int
    run: dict
    run_id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    global_step: int = 0
    samples_seen: int = 0
    sequence: int = 0
    best_loss: float | None = None
    best_step: int = 0
    since_best: int = 0
    stream: dict | None = None
    epoch: float = 0.0
    learning_rate: float = 0.0

    @classmethod
    def begin(
        cls, config: TrainConfig, num_images: int, ranks: Ranks, digests: Callable[[], dict[str, str]]
    ) -> TrainState:
        """The start of a run, the same on every rank; its images' `digests` are asked for on the main one."""
        found = ranks.agree(digests() if ranks.is_main else None)
        state = cls(config.seed, run_identity(config, num_images, ranks.world_size, found))
        state.run_id = ranks.agree(state.run_id)
        return state

    def advance(self, samples: int, epoch_samples: int, learning_rate: float) -> None:
        """One update of so many samples was made."""
        self.global_step += 1
        self.samples_seen += samples
        self.epoch, self.learning_rate = self.samples_seen / epoch_samples, learning_rate

    def go_on_from(self, saved: dict) -> None:
        """Stand where a checkpoint stands; a value that it does not hold, being older, begins anew.

        Its seed and what the run is made of are this run's own, and the folder may hold a newer checkpoint.
        """
        sequence = max(self.sequence, saved["sequence"])
        for field in dataclasses.fields(self):
            if field.name not in ("seed", "run"):
                setattr(self, field.name, saved.get(field.name, getattr(self, field.name)))
        self.sequence = sequence


def run_identity(settings: TrainConfig, num_images: int, world_size: int, data: dict[str, str] | None = None) -> dict:
    """What a resumed run should share with the one that wrote the checkpoint.

    Args:
        settings: anything with the names of IDENTITY.
        data: digests of images and captions (`data_digests`).
    """
    found = {key: getattr(settings, key) for key in IDENTITY}
    found["size_rules"] = list(map(str, found["size_rules"])) or None
    found = {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
    return {**found, "images": num_images, "world_size": world_size, **(data or {})}


def data_digests(images: ImageSet, controls: ImageSet | None = None) -> dict[str, str]:
    """{"data_digest", "captions_digest"}: of the whole set, of its captions alone; "control_digest" of `controls`."""
    captions = hashlib.sha256("\0".join(images.all_captions).encode())
    if images.choices is not None:
        captions.update(images.choices.starts.tobytes() + images.choices.weights.tobytes())
    own = {} if controls is None else {"control_digest": controls.digest()}
    return {"data_digest": images.digest(), "captions_digest": captions.hexdigest(), **own}


def differences(before: dict, now: dict) -> list[str]:
    """One sentence per setting that differs from the checkpoint's, and one for the data."""
    changed = [key for key in now if key in before and before[key] != now[key]]
    digests = [key for key in changed if key.endswith("_digest")]
    found = [
        f"{key} was {before[key]} when the checkpoint was written and is {now[key]} now"
        for key in changed
        if key not in digests
    ]
    if digests:
        what = "control images" if digests == ["control_digest"] else "images (or their order)"
        what = "captions" if "captions_digest" in digests else what
        found.append(f"the {what} are other ones than when the checkpoint was written")
    return found


def check_same_images(images: ImageSet, ranks: Ranks) -> None:
    """Raise UserError on every rank unless all ranks found the same images and captions.

    Machines whose folders differ by one file would train on permutations of different sets without a word.
    """
    found = ranks.gather((images.digest(), len(images), os.uname().nodename))
    odd = [rank for rank, (digest, _, _) in enumerate(found) if digest != found[0][0]]
    if odd:
        rank = odd[0]
        counts = f"{found[0][1]} samples on rank 0 ({found[0][2]}), {found[rank][1]} on rank {rank} ({found[rank][2]})"
        reason = f"ranks {odd} found other images or captions than rank 0: {counts}"
        raise UserError(Problem("dataset_name", None, reason, "Give every machine the same files."))


# ---------------------------------------------------------------------------------------------------------------------
# Random states


def pack_random_state(state: dict) -> dict:
    """devices.random_state() without anything that needs a pickle of a class."""
    version, internal, gauss = state["python"]
    name, keys, pos, has_gauss, cached = state["numpy"]
    packed = {
        "python": [version, list(internal), gauss],
        "numpy": [str(name), [int(k) for k in keys], int(pos), int(has_gauss), float(cached)],
        "torch": state["torch"],
    }
    if "device" in state:
        packed["device"] = state["device"].cpu()
    return packed


def unpack_random_state(packed: dict) -> dict:
    """The inverse of `pack_random_state`."""
    version, internal, gauss = packed["python"]
    name, keys, pos, has_gauss, cached = packed["numpy"]
    state = {
        "python": (version, tuple(internal), gauss),
        "numpy": (name, np.array(keys, dtype=np.uint32), pos, has_gauss, cached),
        "torch": packed["torch"],
    }
    if "device" in packed:
        state["device"] = packed["device"]
    return state


def with_seeds(config: TrainConfig, found: dict | None, ranks: Ranks) -> TrainConfig:
    """The settings with a seed: the one given, else the checkpoint's, else one drawn now; its crops stay, too.

    Args:
        found: the state of the checkpoint that the run goes on from.
    """
    before = ranks.agree(found or {"seed": int.from_bytes(os.urandom(4), "little"), "run": {}})
    if config.crop_seed is None and before["run"].get("crop_seed") is not None:
        config = config.replaced(crop_seed=before["run"]["crop_seed"])
    if config.seed is not None:
        return config
    config = config.replaced(seed=before["seed"])
    logger.info("seed: %d (drawn; --seed=%d repeats this run)", config.seed, config.seed)
    return config
