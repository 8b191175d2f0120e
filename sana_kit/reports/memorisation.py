"""How near generated images come to the images that a run was trained on: what it has learnt by heart.

The measure is the correlation of small copies (16 x 16 pixels of the middle, each colour's mean taken off), at the
best of a few shifts, zooms and the mirror image. So brightness, contrast, noise, sharpness and a slightly other crop
hide no copy, and a background of one colour, which many images share, makes none. A distance says something
only beside others: it is given relative to how far the nearest training image lies from those that are nearest to it.
1 means as different as training images are from one another, 0 the same image.

On 60 drawings of one style, each changed a little (shifted by 2 or 4 %, zoomed by 5 or 10 %, darker, paler, less
contrast, blurred, noisy, a bad JPEG, mirrored), a ratio below 0.5 finds 57 of the 60 paler ones and all others; of the
drawings themselves, each held against all others, it takes two: hearts that differ in their shade alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

SIDE = 32  # of a small copy, pixels
COPY = 0.5  # below this ratio a generated image is told as a copy

_FEATURE = 16
_MIDDLE = 0.88  # of each side of a training image
_ZOOMS, _SHIFTS = (0.82, 0.88, 0.94), (-0.5, 0.0, 0.5)
_NEIGHBOURS = 8
_FLAT = 1e-3  # deviation of an image without any contrast, in units of white
# Where training images are nearly the same, or there is one only, there is no telling scale among them.
_LEAST_SCALE, _SCALE_OF_ONE = 0.2, 1.0


@dataclasses.dataclass(frozen=True)
class Nearest:
    """The training image that a generated one is nearest to.

    Attributes:
        index: of the training image.
        ratio: its distance in units of that between it and its own nearest ones.
        mirrored: whether it is nearest as its mirror image.
    """

    index: int
    ratio: float
    mirrored: bool

    @property
    def is_copy(self) -> bool:
        """Whether an eye would take both for one image."""
        return self.ratio < COPY


def small_copy(image: Image.Image | np.ndarray) -> np.ndarray:
    """uint8 (SIDE, SIDE, 3) of an image of any size and shape: what is compared."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX))


def _features(copies: np.ndarray, zoom: float, across: float, down: float) -> np.ndarray:
    """(N, 768) float32 unit vectors of a part of small copies: `zoom` of each side, moved by shares of the rest."""
    room = SIDE * (1 - zoom) / 2
    left, top, side = room * (1 + across), room * (1 + down), SIDE * zoom
    box = (left, top, left + side, top + side)
    parts = [Image.fromarray(c).resize((_FEATURE, _FEATURE), Image.Resampling.BILINEAR, box=box) for c in copies]
    pixels = np.stack([np.asarray(part, np.float32) for part in parts]) / 255
    vectors = (pixels - pixels.mean(axis=(1, 2), keepdims=True)).reshape(len(copies), -1)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, _FLAT * np.sqrt(vectors.shape[1]))


def _distances(copies: np.ndarray, middles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(M, N) distances of small copies from training images, 0 to 2, and whether the mirror image is nearer."""
    best = []
    for turned in (copies, np.ascontiguousarray(copies[:, :, ::-1])):
        found = np.full((len(copies), len(middles)), -1.0, np.float32)
        for zoom in _ZOOMS:
            for across in _SHIFTS:
                for down in _SHIFTS:
                    part = _features(turned, zoom, across, down)
                    np.maximum(found, part @ middles.T, out=found)
        best.append(found)
    correlation = np.maximum(*best)
    return np.sqrt(np.clip(2 - 2 * correlation, 0, None)), best[1] > best[0]


def nearest_images(generated: np.ndarray, trained: np.ndarray, image_of: Sequence[int]) -> list[Nearest]:
    """For each generated image the nearest training image.

    Args:
        generated, trained: (M, SIDE, SIDE, 3) and (N, SIDE, SIDE, 3) uint8 small copies; N at least 1.
        image_of: (N,) a number per training sample; samples of one number are crops or repeats of one image.
    """
    image_of = np.asarray(image_of)
    middles = _features(trained, _MIDDLE, 0, 0)
    distances, mirrored = _distances(generated, middles)
    chosen, found = distances.argmin(axis=1), []
    for row, index in enumerate(chosen.tolist()):
        among = _distances(trained[index : index + 1], middles)[0][0]
        # one distance for each other image: its nearest sample's
        others = among[image_of != image_of[index]]
        numbers = image_of[image_of != image_of[index]]
        order = np.argsort(others, kind="stable")
        _, first = np.unique(numbers[order], return_index=True)
        apart = np.sort(others[order][first])[:_NEIGHBOURS]
        scale = max(float(np.median(apart)), _LEAST_SCALE) if len(apart) else _SCALE_OF_ONE
        found.append(Nearest(index, float(distances[row, index]) / scale, bool(mirrored[row, index])))
    return found


def copies_told(copies: int, expected: int, images: int) -> str:
    """Sentences on the copies of training images among validation images; one line.

    Args:
        copies: of the `images`, those that are copies, at least 1.
        expected: of the copies, those whose prompt is the caption of one training image alone: they show that the
            run has learnt this image, not that it draws nothing else.
    """
    verb = "is a copy of a training image" if copies == 1 else "are copies of training images"
    told = f"{copies} of {images} validation images {verb}. "
    if expected == copies:
        prompt = "Its prompt is the caption" if copies == 1 else "Their prompts are captions"
        each = "" if copies == 1 else " each"
        return f"{told}{prompt} of one training image{each}, so this is expected"
    if expected:
        told += f"{expected} of them {'is' if expected == 1 else 'are'} expected, the prompt being the caption of one"
        told += " training image; the rest shows that"
    else:
        told += "So"
    return f"{told} the run has learnt images by heart. Fewer updates, a lower rank or more images help"
