"""At the end of a run: are its validation images copies of training images? `reports/memorisation.py` measures it."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from sana_kit.data.image_set import default_workers, prefetch
from sana_kit.data.transform import TransformPlan, crop_box
from sana_kit.distributed import Ranks, StopSignal
from sana_kit.encodings.dataset import EncodedDataset
from sana_kit.errors import ImageError
from sana_kit.files import remove_tree, write_atomic
from sana_kit.reports.memorisation import COPY, SIDE, copies_told, nearest_images, small_copy
from sana_kit.reports.pages import spread

T = TypeVar("T")

FOLDER = "nearest_training_images"
MOST = 20_000  # samples that are looked at; more are evenly spread
SHOWN = 12  # pairs that the report shows
_SIDE = 512  # longest side of a training image that is written, pixels


@dataclasses.dataclass(frozen=True)
class Memorisation:
    """What the comparison found.

    Attributes:
        looked_at: crops of training images that were compared.
        spread: whether these were some of more, evenly spread.
        rows: of each generated image, nearest first: file, prompt, seed, ratio, copy, expected (a copy whose prompt is
            the caption of one training image alone), mirrored, training_image (its name), caption, nearest (file below
            the output folder, None beyond the first ones), prompt_in_set (training images with this caption).
    """

    looked_at: int
    spread: bool
    rows: list[dict[str, Any]]

    @property
    def copies(self) -> list[dict[str, Any]]:
        """The rows that an eye would take for their training image."""
        return [row for row in self.rows if row["copy"]]

    @property
    def unexpected(self) -> list[dict[str, Any]]:
        """The copies that nobody asked for by a training image's own caption."""
        return [row for row in self.copies if not row["expected"]]

    def figures(self) -> dict[str, Any]:
        """For log and summary."""
        counts = {"copies": len(self.copies), "expected_copies": len(self.copies) - len(self.unexpected)}
        counts |= {"images": len(self.rows), "training_crops": self.looked_at}
        return {**counts, "only_some_of_them": self.spread, "copy_below": COPY, "rows": self.rows}

    def told(self) -> str:
        """What a log tells, on one line."""
        of = f"{self.looked_at} crops of training images{', evenly spread among more' if self.spread else ''}"
        if not self.copies:
            nearest = self.rows[0]
            return (
                f"memorisation: {len(self.rows)} validation images held against {of}: no copy; the nearest is"
                f" {nearest['file']}, {nearest['ratio']:.2f} of the distance among training images from"
                f" {nearest['training_image']}"
            )
        worst = (self.unexpected or self.copies)[0]
        told = copies_told(len(self.copies), len(self.copies) - len(self.unexpected), len(self.rows))
        return (
            f"memorisation: {told}. Held against {of}; {worst['file']} of {worst['training_image']}, for example;"
            " the report shows each beside its training image"
        )


def compare_with_training_images(
    encoded: EncodedDataset, num_instance: int, drawn: Sequence[dict], output_dir: Path, ranks: Ranks, stop: StopSignal
) -> Memorisation | None:
    """Hold the images that were drawn against those that were trained on, every rank a share of these; collective.

    The nearest training images, as they were cropped, are written to `output_dir`/nearest_training_images.

    Args:
        num_instance: the first so many samples are trained on.
        drawn: [{"file", "prompt", "seed"}], files below the first rank's output folder.

    Returns:
        What was found, on the first rank; None on the others, without images, or after a signal.

    Raises:
        ImageError: a file cannot be read any more, or not written; on every rank.
    """
    if not drawn or stop.agreed():
        return None
    chosen = _distinct(encoded, spread(range(num_instance), MOST))
    own = chosen[ranks.rank :: ranks.world_size]
    shares = ranks.gather(ranks.run_on_all(lambda: _readable(lambda: _small_copies(encoded, own, stop))))
    if stop.agreed():
        return None
    trained = np.concatenate(shares)  # rank by rank
    order = [sample for rank in range(ranks.world_size) for sample in chosen[rank :: ranks.world_size]]

    def compare() -> list[dict[str, Any]]:
        return _compare(encoded, order, trained, drawn, Path(output_dir)) if ranks.is_main else []

    rows = ranks.run_on_all(lambda: _readable(compare))
    return Memorisation(len(order), num_instance > MOST, rows) if ranks.is_main else None


def _readable(action: Callable[[], T]) -> T:
    """What `action` returns; ImageError for what it meets on the disk or in a file."""
    try:
        return action()
    except (OSError, ValueError) as error:
        raise ImageError(str(error)) from error


def _distinct(encoded: EncodedDataset, samples: Sequence[int]) -> list[int]:
    """Each crop of each image once: the first sample that has it."""
    rows, transform, seen = encoded.images.rows(), encoded.transform, {}
    for sample in samples:
        seen.setdefault((int(rows[sample]), transform(sample)), sample)
    return list(seen.values())


def _small_copies(encoded: EncodedDataset, samples: Sequence[int], stop: StopSignal) -> np.ndarray:
    """(N, side, side, 3) uint8 of samples as they are trained; those after a signal stay black."""
    transform = encoded.transform
    found = np.zeros((len(samples), SIDE, SIDE, 3), np.uint8)
    workers = default_workers()
    trained = prefetch(lambda i: small_copy(_as_trained(encoded, i, transform(i))), samples, workers, 4 * workers)
    for number, copy in enumerate(trained):
        found[number] = copy
        if stop.requested:
            break
    encoded.images.release()
    return found


def _as_trained(encoded: EncodedDataset, sample: int, plan: TransformPlan) -> Image.Image:
    """The crop of a sample, mirrored where it is trained so, unscaled."""
    image = encoded.images.load(sample)
    left, top, right, bottom = (round(edge) for edge in crop_box(image.size, plan))
    image = image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if plan.flip else image


def _compare(
    encoded: EncodedDataset, samples: Sequence[int], trained: np.ndarray, drawn: Sequence[dict], output_dir: Path
) -> list[dict[str, Any]]:
    """The rows of `Memorisation`; `trained` are the small copies of `samples`."""
    generated = []
    for entry in drawn:
        with Image.open(output_dir / entry["file"]) as image:
            generated.append(small_copy(image))
    _, image_of = np.unique(encoded.images.source_digests()[samples], axis=0, return_inverse=True)
    image_of = image_of.reshape(-1)
    found = nearest_images(np.stack(generated), trained, image_of)
    described = _images_by_caption(encoded, samples, image_of, {_plain(entry["prompt"]) for entry in drawn})
    rows = []
    remove_tree(output_dir / FOLDER)
    for place, number in enumerate(sorted(range(len(drawn)), key=lambda number: found[number].ratio)):
        nearest, sample = found[number], samples[found[number].index]
        named = described[_plain(drawn[number]["prompt"])]
        row = {**drawn[number], "ratio": round(nearest.ratio, 4), "copy": nearest.is_copy}
        row |= {"expected": nearest.is_copy and len(named) == 1, "prompt_in_set": len(named)}
        row |= {"mirrored": nearest.mirrored, "training_image": encoded.images.name(sample)}
        row |= {"caption": encoded.images.captions[sample], "nearest": None}
        if place < SHOWN:
            row["nearest"] = f"{FOLDER}/{place:02d}.png"
            _write(encoded, sample, nearest.mirrored, output_dir / row["nearest"])
        rows.append(row)
    return rows


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _images_by_caption(
    encoded: EncodedDataset, samples: Sequence[int], image_of: np.ndarray, prompts: set[str]
) -> dict[str, set[int]]:
    """For each prompt the images, as numbered in `image_of`, that have it as a caption."""
    described: dict[str, set[int]] = {prompt: set() for prompt in prompts}
    images = encoded.images
    for sample, image in zip(samples, image_of.tolist(), strict=True):
        first, last = (sample, sample + 1) if images.choices is None else images.choices.starts[sample : sample + 2]
        for number in range(int(first), int(last)):
            if (plain := _plain(images.all_captions[number])) in described:
                described[plain].add(image)
    return described


def _write(encoded: EncodedDataset, sample: int, mirrored: bool, path: Path) -> None:
    """A training image as PNG, turned as it is nearest."""
    image = _as_trained(encoded, sample, encoded.transform(sample))
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image
    data = io.BytesIO()
    image.save(data, format="PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda handle: handle.write(data.getvalue()), durable=False)
