"""The set of captioned images that a run trains on, opened one at a time; checked before weights load."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import Image

from sana_kit.data.captions import Choices, affixed
from sana_kit.data.decode import decode_image, open_image
from sana_kit.data.masks import NoMasks, decode_mask
from sana_kit.data.sources import JoinedSource
from sana_kit.data.texts import Texts
from sana_kit.data.transform import TransformPlan, apply_transform
from sana_kit.errors import ImageError
from sana_kit.progress import Bar, console_bar

if TYPE_CHECKING:
    from sana_kit.data.sources import ImageSource

_BLOCK = 8192  # samples that are hashed at a time
LISTED_PROBLEMS = 20  # how many bad images an error names; the rest are counted


@dataclasses.dataclass(frozen=True)
class Masks:
    """The loss masks of a source's images.

    Attributes:
        source: their encoded bytes by row of the images' source; b"" for an image without one.
        digests: (rows, 32) uint8, SHA-256 of the bytes.
        present: bool (rows,).
    """

    source: ImageSource
    digests: np.ndarray
    present: np.ndarray

    @classmethod
    def none(cls, count: int) -> Masks:
        """Of so many images without masks."""
        return cls(NoMasks(count), np.zeros((count, 32), np.uint8), np.zeros(count, bool))


class ImageSet:
    """Captioned images, opened one at a time. Picklable; safe to use from several threads.

    Attributes:
        captions: one string per sample, a `Texts`; any sequence of strings may be assigned. Where a sample has several
            captions, its first.
        choices: all captions by sample; None where each sample has one.
        masks: of the source's images; None where no image has one.
        names: file name relative to the folder, or "train[17]" for row 17 of a table, per sample.
        report: counts of what was found and skipped, for the log and the summary.
        notes: the same as sentences, each told once by the trainer.
        follows: the set whose scale, crop and flip this one's samples take; None: their own.
        rule_of_row: (rows of the source,) the number of the rule of sizes that each row follows, where there are
            several (`encodings.settings`); None: all follow one.
    """

    follows: ImageSet | None = None
    rule_of_row: np.ndarray | None = None

    def __init__(
        self,
        source: ImageSource,
        rows: np.ndarray,
        captions: Sequence[str],
        positions: np.ndarray,
        digests: np.ndarray,
        sizes: np.ndarray,
        report: dict[str, int],
        notes: list[str],
        choices: Choices | None = None,
        masks: Masks | None = None,
    ):
        self._source = source
        self._rows = _narrow(rows)  # (N,), the source's row of each sample
        self._positions = _narrow(positions)  # (N,), the index that random decisions are keyed by
        self._digests = digests  # (rows of the source, 32) uint8
        self._sizes = sizes  # (rows of the source, 2) int32: width, height when upright
        self.captions = captions
        self.choices: Choices | None = choices
        self.masks: Masks | None = masks
        self.report: dict[str, int] = report
        self.notes: list[str] = notes

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def captions(self) -> Texts:
        return self._captions

    @captions.setter
    def captions(self, captions: Sequence[str]) -> None:
        self._captions = captions if isinstance(captions, Texts) else Texts(captions)
        self._digest: str | None = None
        self.choices = None

    @property
    def all_captions(self) -> Texts:
        """Every caption that a sample may take."""
        return self.captions if self.choices is None else self.choices.texts

    def affix(self, prefix: str, suffix: str) -> None:
        """Put something before and behind every caption."""
        choices = None if self.choices is None else self.choices.affixed(prefix, suffix)
        self.captions = affixed(self.captions, prefix, suffix)
        self.choices = choices

    @property
    def source_rows(self) -> int:
        """Rows of the source, those that no sample uses included."""
        return len(self._source)

    @property
    def names(self) -> list[str]:
        return [self.name(i) for i in range(len(self))]

    def name(self, i: int) -> str:
        """The image's name in messages."""
        return self._source.name(int(self._rows[i]))

    def read(self, i: int) -> bytes:
        """The encoded source bytes. Raises ImageError when they cannot be read or changed since they were hashed."""
        data = self._source.read(int(self._rows[i]))
        if hashlib.sha256(data).digest() != self._digests[self._rows[i]].tobytes():
            raise ImageError(f"{self.name(i)}: the image changed while the run was using it; start again.")
        return data

    def load(self, i: int) -> Image.Image:
        """The image, 8-bit RGB and upright (see `decode_image`). Raises ImageError when it is corrupt."""
        return decode_image(self.read(i), self.name(i))

    def has_mask(self) -> np.ndarray:
        """bool (N,): which samples' images have a loss mask."""
        return np.zeros(len(self), bool) if self.masks is None else self.masks.present[self._rows]

    def load_mask(self, i: int) -> Image.Image:
        """The loss mask of an image that has one, 8-bit grey, of the image's size when upright.

        Raises:
            ImageError: it cannot be read, or changed since it was checked.
        """
        row = int(self._rows[i])
        data, name = self.masks.source.read(row), self.masks.source.name(row)
        if hashlib.sha256(data).digest() != self.masks.digests[row].tobytes():
            raise ImageError(f"{name}: the mask changed while the run was using it; start again.")
        return decode_mask(data, name)

    def pixels(self, i: int, plan: TransformPlan) -> np.ndarray:
        """The image as it is encoded: uint8 (height, width, 3)."""
        return apply_transform(self.load(i), plan)

    def source_hash(self, i: int) -> str:
        """Hex SHA-256 of the encoded source bytes."""
        return self._digests[self._rows[i]].tobytes().hex()

    def size(self, i: int) -> tuple[int, int]:
        """(width, height) in pixels when upright."""
        width, height = self._sizes[self._rows[i]]
        return int(width), int(height)

    def position(self, i: int) -> int:
        """The index for `plan_transform`: it stays when other samples are skipped."""
        return int(self._positions[i])

    def source_digests(self) -> np.ndarray:
        """(N, 32) uint8: `source_hash` of all samples."""
        return self._digests[self._rows]

    def sizes(self) -> np.ndarray:
        """(N, 2) int32: `size` of all samples."""
        return self._sizes[self._rows]

    def positions(self) -> np.ndarray:
        """(N,) int64: `position` of all samples."""
        return self._positions.astype(np.int64)

    def row(self, i: int) -> int:
        """The source's row number: equal for repeats of one image."""
        return int(self._rows[i])

    def rows(self) -> np.ndarray:
        """(N,) int64: `row` of all samples."""
        return self._rows.astype(np.int64)

    def digest(self) -> str:
        """Hex SHA-256 of the whole set: images, captions, order and positions; equal on every rank of a sound run."""
        if self._digest is None:
            whole = hashlib.sha256()
            for start in range(0, len(self), _BLOCK):
                whole.update(self._digests[self._rows[start : start + _BLOCK]].tobytes())
            for start in range(0, len(self), _BLOCK):
                whole.update(self._positions[start : start + _BLOCK].astype(np.int64).tobytes())
                if self.masks is not None:
                    whole.update(self.masks.digests[self._rows[start : start + _BLOCK]].tobytes())
            for block in self.captions.blocks():
                whole.update("".join([f"{len(caption)}:{caption}" for caption in block]).encode())
            if self.choices is not None:
                whole.update(self.choices.starts.tobytes() + self.choices.weights.tobytes())
                for block in self.choices.texts.blocks():
                    whole.update("".join([f"{len(caption)}:{caption}" for caption in block]).encode())
            self._digest = whole.hexdigest()
        return self._digest

    def shift_positions(self, first: int) -> None:
        """Count the positions from `first` on: of a part of a stream, whose earlier parts had those before."""
        self._positions, self._digest = _narrow(self._positions.astype(np.int64) + first), None

    def without(self, indices: Sequence[int]) -> ImageSet:
        """A set without these samples and the other repeats of their images; the rest keep their decisions."""
        bad = np.unique(self._rows[np.asarray(indices, np.int64)])
        keep = ~np.isin(self._rows, bad)
        report = {**self.report, "bad images skipped": self.report.get("bad images skipped", 0) + len(bad)}
        left = ImageSet(
            self._source,
            self._rows[keep],
            self.captions.where(keep),
            self._positions[keep],
            self._digests,
            self._sizes,
            report,
            list(self.notes),
            None if self.choices is None else self.choices.where(keep),
            self.masks,
        )
        left.rule_of_row = self.rule_of_row
        return left

    def rules(self) -> np.ndarray | None:
        """(N,) `rule_of_row` of all samples, None where all follow one."""
        return None if self.rule_of_row is None else self.rule_of_row[self._rows]

    def release(self) -> None:
        """Give source data held in memory back; the set stays usable."""
        for source in (self._source, None if self.masks is None else self.masks.source):
            if hasattr(source, "release"):
                source.release()


def _narrow(numbers: np.ndarray) -> np.ndarray:
    """int32 where that holds them, else int64."""
    return numbers.astype(np.int32 if not len(numbers) or numbers.max() < 2**31 else np.int64, copy=False)


def concat(first: ImageSet, second: ImageSet) -> ImageSet:
    """The samples of both, in this order; each keeps its random decisions (prior preservation: instance, class)."""
    choices = None
    if first.choices is not None or second.choices is not None:
        own, other = (part.choices or Choices.single(part.captions) for part in (first, second))
        choices = own + other
    masks = None
    if first.masks is not None or second.masks is not None:
        one, two = (part.masks or Masks.none(len(part._source)) for part in (first, second))
        joined = (np.concatenate([getattr(one, n), getattr(two, n)]) for n in ("digests", "present"))
        masks = Masks(JoinedSource(one.source, two.source), *joined)
    report = {k: first.report.get(k, 0) + second.report.get(k, 0) for k in {**first.report, **second.report}}
    return ImageSet(
        JoinedSource(first._source, second._source),
        np.concatenate([first._rows, second._rows.astype(np.int64) + len(first._source)]),
        first.captions + second.captions,
        np.concatenate([first._positions, second._positions]),
        np.concatenate([first._digests, second._digests]),
        np.concatenate([first._sizes, second._sizes]),
        report,
        first.notes + second.notes,
        choices,
        masks,
    )


A = TypeVar("A")
B = TypeVar("B")


def prefetch(function: Callable[[A], B], items: Iterable[A], workers: int, window: int) -> Iterator[B]:
    """Yield function(item) in order, computed ahead by threads; at most `window` results wait. workers 0: no threads.

    PIL releases the interpreter lock while it decodes and resizes, so threads scale without a copy between processes.
    """
    if workers <= 0:
        yield from map(function, items)
        return
    pending: deque = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= max(1, window):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def default_workers() -> int:
    """Threads for decoding: this process's share of the host's cores, 1 to 16."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min(16, cores // max(1, local)))


def progress_bar(total: int, description: str, unit: str = "image") -> Bar:
    """A bar of this process's share, on the first rank only; nothing is shown of what takes less than two seconds."""
    main = int(os.environ.get("RANK", "0") or 0) == 0
    return console_bar(total, description, unit=unit, main_process=main, after=2.0)


def check_images(
    images: ImageSet,
    indices: Iterable[int] | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int | None = None,
) -> list[tuple[int, str]]:
    """Decode every image of this rank's share completely: [(sample index, message)] of the bad ones.

    JPEG files are decoded at an eighth of their size, which still reads all their data, so truncation shows at a
    fraction of the cost. Each distinct image is decoded once. No model is needed, so it runs before weights load.
    """
    first_of_row: dict[int, int] = {}
    for i in range(len(images)) if indices is None else indices:
        first_of_row.setdefault(images.row(i), i)
    share = list(first_of_row.values())[rank::world_size]
    workers = default_workers() if num_workers is None else num_workers
    bad = []

    def check(i: int) -> tuple[int, str] | None:
        try:
            data, name = images.read(i), images.name(i)
            image = open_image(data, name)
            if image.format == "JPEG" and image.mode in ("RGB", "L"):
                image.draft(image.mode, (max(1, image.width // 8), max(1, image.height // 8)))
                try:
                    image.load()
                except Exception as error:
                    raise ImageError(
                        f"{name}: corrupt or truncated image ({type(error).__name__}: {error})."
                    ) from None
            else:
                decode_image(data, name)
        except ImageError as error:
            return i, str(error)
        return None

    with progress_bar(len(share), "Checking images") as bar:
        for result in prefetch(check, share, workers, 4 * max(1, workers)):
            bar.update()
            if result is not None:
                bad.append(result)
    images.release()
    return bad


def bad_image_problems(messages: list[str]) -> str:
    """One text for an error that names bad images and the remedy."""
    shown = "".join(f"\n    {m}" for m in messages[:LISTED_PROBLEMS])
    more = f"\n    ... and {len(messages) - LISTED_PROBLEMS} more" if len(messages) > LISTED_PROBLEMS else ""
    return (
        f"{len(messages)} image(s) cannot be used; repair or remove them, or leave them out (skip_bad_images):"
        f"{shown}{more}"
    )
