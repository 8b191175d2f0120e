"""The encodings of a stream: a window of images at a time is read, encoded, trained on, and removed again.

Each window has a store of its own below encodings_dir/stream, so that what it holds depends on its images alone. While
one window trains, the next one is encoded when its first image is due; windows that are behind go. All of it together
stays below a limit: what a window can need at most is reckoned before it is written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from sana_kit import devices
from sana_kit.data.image_set import ImageSet
from sana_kit.data.windows import SPOOL, SpooledSource, WindowReader, window_order
from sana_kit.distributed import Ranks
from sana_kit.encodings.dataset import EncodedDataset, EncodingFacts
from sana_kit.encodings.encode import encode
from sana_kit.encodings.encoders import Encoders
from sana_kit.encodings.peers import Peers, Stop
from sana_kit.encodings.plan import PARTS, ExtraPrompts
from sana_kit.encodings.settings import EncodingSettings, Transform
from sana_kit.errors import Problem, StoreError, UserError, setting
from sana_kit.files import remove_tree
from sana_kit.locks import lock_folder
from sana_kit.models.folder import Model

logger = logging.getLogger("sana")

FOLDER = "stream"
# Beside its tensors a row costs names and checksums in the shards' headers, and a place in the remembered plan.
ROW_OVERHEAD = 1024
# What an image as it was read is taken to need, for the advice before any was read.
IMAGE_GUESS = 400_000


@dataclasses.dataclass(frozen=True)
class RowBytes:
    """Most bytes that the encodings of an image and of a caption take on disk."""

    latents: int
    caption: int

    @classmethod
    def of(cls, settings: EncodingSettings, model: Model) -> RowBytes:
        """Under these settings: a caption may have as many tokens as reach the transformer."""
        side, width = settings.resolution // model.vae_factor, torch.finfo(settings.vae_dtype).bits // 8
        text = torch.finfo(settings.text_encoder_dtype).bits // 8
        channels, wide = model.vae_config["latent_channels"], model.transformer_config["caption_channels"]
        caption = settings.max_sequence_length * wide * text
        return cls(channels * side * side * width + ROW_OVERHEAD, caption + ROW_OVERHEAD)

    @property
    def row(self) -> int:
        """Of an image with one caption."""
        return self.latents + self.caption

    def least_limit(self, window: int) -> int:
        """Bytes that windows of this size surely need: two of them, and one's images as they were read."""
        return window * (2 * self.row + IMAGE_GUESS)


def limit_problems(limit_gb: float, window: int, rows: RowBytes) -> list[Problem]:
    """Why windows of this size do not fit a limit on the disk."""
    limit = limit_gb * 1e9
    if limit <= 0 or rows.least_limit(window) <= limit:  # one out of its range is told by itself
        return []
    fits = int(limit // rows.least_limit(1))
    reason = f"two windows of {window} images can need {rows.least_limit(window) / 1e9:.3g} GB"
    lower = f"{setting('stream_window')}={fits}, or " if fits else ""
    remedy = f"Give {lower}a limit of at least {rows.least_limit(window) / 1e9 + 0.0005:.3f}."
    return [Problem("encodings_disk_gb", limit_gb, reason, remedy)]


class StreamedDataset(torch.utils.data.Dataset):
    """Latents and prompt embeddings by position in the stream, of the windows that are there.

    Attributes:
        images, facts, transform: of the first window that this start encoded, for the report and the log.
        masks, control_images: none.
        several_captions: positions may draw one of several captions.
    """

    masks = control_images = None
    several_captions = True

    def __init__(
        self,
        reader: WindowReader,
        base_model: Model,
        settings: EncodingSettings,
        *,
        seed: int,
        crop_seed: int | None,
        limit_gb: float,
        extra_prompts: ExtraPrompts,
        ranks: Ranks,
        stop: Stop,
        warn: Callable[[str], None],
    ):
        """Args:
        seed: of the run: the order within a window.
        crop_seed: see `encode`; with one, an image gets another crop each time that it comes.
        limit_gb: most gigabytes (1e9 bytes) on the disk.
        extra_prompts: (prompt, instruction) pairs to encode once for the run.
        warn: called with what the user should know of the data, on every rank.

        Raises:
            UserError: another run streams into the same folder; the machines do not share it.
        """
        self.reader, self._model, self._settings, self._ranks = reader, base_model, settings, ranks
        self._seed, self._crop_seed, self._limit, self._stop, self._warn = seed, crop_seed, limit_gb * 1e9, stop, warn
        self._rows, self._encoders = RowBytes.of(settings, base_model), Encoders(base_model, keep=True)
        self.root = Path(settings.encodings_dir) / FOLDER
        self._windows: dict[int, EncodedDataset] = {}
        self._orders: dict[int, np.ndarray] = {}
        self._places: dict[int, dict] = {}
        self._told: set[str] = set()
        self._seconds = 0.0
        self._open = ExitStack()
        ranks.run_on_all(self._lock)
        self._check_shared()
        values = [
            dataclasses.asdict(dataclasses.replace(settings, encodings_dir="")),
            reader.shards.digest(),
            seed,
            crop_seed,
            reader.size,
        ]
        self._name = hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()[:12]
        self._forget(lambda name: not name.startswith(f"{self._name}-"))
        self._extra = self._encode_extra(extra_prompts)
        self.images: ImageSet
        self.first: EncodedDataset

    def _lock(self) -> None:
        try:
            self._open.enter_context(lock_folder(self.root, self._ranks.is_main, "encodings_dir"))
        except OSError as error:
            raise StoreError(
                f"Encodings: {self.root} cannot be written ({error.strerror}). Choose another folder for them."
            ) from None

    def _check_shared(self) -> None:
        with Peers(self._ranks, self.root) as peers:
            peers.find()
            apart = len(peers.members) < self._ranks.world_size
        if apart:
            reason = "the machines do not share this folder, and each trains on what the others encode"
            remedy = f"Name a folder with {setting('encodings_dir')} on a file system that all of them share."
            raise UserError(Problem("encodings_dir", self._settings.encodings_dir, reason, remedy))

    # -------------------------------------------------------------------------------------------------------- the disk

    def used_bytes(self, without: Path | None = None) -> int:
        """Bytes of the stream on the disk now, but for the encodings in the folder `without`."""
        left_out = () if without is None else tuple(str(without / part) for part in PARTS)
        folders = ((folder, names) for folder, _, names in os.walk(self.root) if folder not in left_out)
        return sum(_size(Path(folder) / name) for folder, names in folders for name in names)

    def _folder(self, window: int) -> Path:
        return self.root / f"{self._name}-{window:08d}"

    def _forget(self, gone: Callable[[str], bool]) -> None:
        """Remove the folders of windows whose names are `gone`; afterwards they are gone for every rank."""
        self._ranks.barrier()
        if self._ranks.is_main:
            for path in sorted(self.root.iterdir()):
                if path.is_dir() and gone(path.name):
                    remove_tree(path)
        self._ranks.barrier()

    def _drop_before(self, window: int) -> None:
        for number in [number for number in self._windows if number < window]:
            self._windows.pop(number).close()
            self._orders.pop(number)
            self._places.pop(number, None)
        keep = {self._folder(number).name for number in (window, window + 1)}
        self._forget(lambda name: name not in keep and not name.startswith(f"{self._name}-prompts"))

    # --------------------------------------------------------------------------------------------------- what is there

    def start(self, position: int, place: dict | None) -> None:
        """Go to a position; a collective call.

        Args:
            place: what `place` gave for it; None: the stream's beginning.
        """
        self.reader.go_to(place)
        if self.reader.window != position // self.reader.size:
            raise ValueError(f"position {position} is not in window {self.reader.window}")
        self.prepare(position, 1)
        (self.first,) = self._windows.values()
        self.images = self.first.images

    def prepare(self, position: int, count: int) -> None:
        """See that the `count` positions from `position` on can be read; windows behind them go. A collective call.

        Raises:
            UserError: images or shards that cannot be used, or the limit of the disk does not suffice.
            EncodingStopped: after a signal; what was encoded is kept.
        """
        first, last = position // self.reader.size, (position + count - 1) // self.reader.size
        if all(number in self._windows for number in range(first, last + 1)):
            return
        random_state = devices.random_state(self._ranks.device)  # dropout goes on as if nothing had been encoded
        started = time.monotonic()
        try:
            self._drop_before(first)
            while self.reader.window <= last:
                self._encode_next()
        finally:
            devices.set_random_state(random_state, self._ranks.device)
            self._seconds += time.monotonic() - started

    def place(self, position: int) -> dict:
        """Where the window of a position begins, for the checkpoint: a window that is there, or the next one."""
        window = position // self.reader.size
        return self.reader.place() if window == self.reader.window else self._places[window]

    def _encode_next(self) -> None:
        """Read and encode the reader's next window."""
        place = self.reader.place()
        number, folder = place["window"], self._folder(place["window"])
        self._clear_spools()  # the report shows images of the window before
        images = self.reader.read(folder, self._room(folder), lambda: self._stop.requested)
        for note in images.notes:
            if not self._windows or note.startswith("skip_bad_images"):
                self._warn(f"data: {note}")
        settings = dataclasses.replace(self._settings, encodings_dir=str(folder))
        try:
            self._check_room(images, folder)
            encoded = encode(
                images,
                self._model,
                settings,
                ranks=self._ranks,
                seed=self._crop_seed,
                stop=self._stop,
                log=self._tell_once,
                encoders=self._encoders,
            )
        except BaseException:
            self.reader.go_to(place)
            raise
        self._windows[number], self._places[number] = encoded, place
        self._orders[number] = window_order(self._seed, number, len(encoded))
        logger.info(
            f"window {number}: {len(encoded)} images encoded in {encoded.facts.seconds:.1f} s"
            f" ({encoded.facts.reused_images} were there); {self.used_bytes() / 1e9:.3g} of {self._limit / 1e9:g} GB"
            " on the disk"
        )

    def _tell_once(self, text: str) -> None:
        """A note of the encoding, unless one that differs in its numbers alone was told for an earlier window."""
        kind = re.sub(r"\d+", "", text)
        if kind not in self._told:
            self._told.add(kind)
            logger.warning(text)

    def _clear_spools(self) -> None:
        """Remove the images that were read for windows that are encoded; a collective call."""
        self._ranks.barrier()
        if self._ranks.is_main:
            for path in self.root.glob(f"*/{SPOOL}*"):
                path.unlink(missing_ok=True)
        self._ranks.barrier()

    def _room(self, folder: Path) -> int:
        """Bytes that a window's images may take as they are read: what its encodings can need is left free."""
        used = self._ranks.agree(self.used_bytes(without=folder))
        return max(0, int(self._limit) - used - self.reader.size * self._rows.row)

    def _check_room(self, images: ImageSet, folder: Path) -> None:
        """Raise UserError where the window's encodings might pass the limit: of several captions each is encoded."""
        needed = len(images) * self._rows.latents + len(set(images.all_captions)) * self._rows.caption
        used = self._ranks.agree(self.used_bytes(without=folder))
        if used + needed > self._limit:
            reason = f"the next window can need {needed / 1e9:.3g} GB, and {used / 1e9:.3g} GB are taken"
            remedy = f"Raise it, or lower {setting('stream_window')}."
            raise UserError(Problem("encodings_disk_gb", self._limit / 1e9, reason, remedy))

    def _encode_extra(self, prompts: ExtraPrompts) -> EncodedDataset | None:
        """The prompts that are no captions, once for the run."""
        if not prompts:
            return None
        none = SpooledSource(self.root, np.zeros((0, 3), np.int64), [])
        numbers = np.zeros(0, np.int64)
        facts = (np.zeros((0, 32), np.uint8), np.zeros((0, 2), np.int32), {}, [])
        settings = dataclasses.replace(self._settings, encodings_dir=str(self.root / f"{self._name}-prompts"))
        return encode(
            ImageSet(none, numbers, [], numbers, *facts),
            self._model,
            settings,
            ranks=self._ranks,
            extra_prompts=prompts,
            stop=self._stop,
            encoders=self._encoders,
        )

    # -------------------------------------------------------------------------------------------------- as a data set

    def _at(self, position: int) -> tuple[EncodedDataset, int]:
        """(window, sample in it): a place that a bad image left is taken by another image of its window."""
        window, turn = divmod(position, self.reader.size)
        order = self._orders[window]
        return self._windows[window], int(order[turn % len(order)])

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        """{"latents": (C, h, w), "prompt_embeds": (T, D)} at a position, on the CPU."""
        window, i = self._at(position)
        return window[i]

    def drawn_prompt_embeds(self, position: int, u: float) -> torch.Tensor:
        """(T, D) of the caption that a position takes for a number u in [0, 1), by the captions' weights."""
        window, i = self._at(position)
        return window.drawn_prompt_embeds(i, u) if window.several_captions else window.prompt_embeds(i)

    def prompt(self, prompt: str, instruction: list[str] | None = None) -> torch.Tensor:
        """(T, D) of one of the extra prompts. Raises KeyError for any other."""
        if self._extra is None:
            raise KeyError(f"this prompt was not encoded: {prompt[:80]!r}")
        return self._extra.prompt(prompt, instruction)

    @property
    def facts(self) -> EncodingFacts:
        """What the encoding of the first window did; the seconds are those of all windows."""
        return dataclasses.replace(self.first.facts, seconds=self._seconds)

    @property
    def transform(self) -> Transform:
        """The decision of scale, crop and flip for each image of the first window."""
        return self.first.transform

    def latent_shapes(self) -> np.ndarray:
        """(N, 2) int64: height and width of the first window's latents."""
        return self.first.latent_shapes()

    def prompt_tokens(self) -> np.ndarray:
        """(N,) int32: valid tokens of the first window's captions."""
        return self.first.prompt_tokens()

    def close(self) -> None:
        """Let go of the windows and of the folder; what is encoded stays there."""
        for window in (*self._windows.values(), *([self._extra] if self._extra is not None else [])):
            window.close()
        self._open.close()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # it went meanwhile
        return 0
