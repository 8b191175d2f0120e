"""Loss masks at the latents' size: made once a data set, kept in the store as one mapped file."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch

from sana_kit.data.image_set import ImageSet, default_workers, prefetch, progress_bar
from sana_kit.data.masks import mask_of_sample
from sana_kit.distributed import Ranks
from sana_kit.encodings.settings import Transform
from sana_kit.errors import StoreError
from sana_kit.files import write_atomic

FOLDER = "masks"


class LossMasks:
    """The weights of the loss by place, for each sample; picklable.

    Args:
        path: a .npy file of uint8, the masks of the samples that have one, one after the other.
        shapes: (N, 2) height and width of each sample's latents.
        present: bool (N,), which samples have a mask.
        outside: weight where a mask is black; 1 where it is white, between for grey.
    """

    def __init__(self, path: Path, shapes: np.ndarray, present: np.ndarray, outside: float):
        self.path, self.shapes, self.outside = path, shapes, outside
        self._starts = _starts(shapes, present)
        self._masks: np.ndarray | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_masks": None}

    def _mapped(self) -> np.ndarray:
        if self._masks is None:
            self._masks = np.load(self.path, mmap_mode="r")
        return self._masks

    def weights(self, i: int) -> torch.Tensor:
        """(1, h, w) float32 with a mean of 1, so that a sample's loss is the weighted mean over its places.

        Ones for a sample without a mask. Where a crop holds nothing of its image's mask, `outside` at every place: the
        sample counts that much.
        """
        height, width = (int(side) for side in self.shapes[i])
        first, last = int(self._starts[i]), int(self._starts[i + 1])
        if first == last:
            return torch.ones(1, height, width)
        mask = np.array(self._mapped()[first:last]).reshape(1, height, width)
        weights = 1.0 - (1.0 - self.outside) * (1.0 - mask / 255.0)
        if mask.any():
            weights /= weights.mean()
        return torch.from_numpy(weights.astype(np.float32))

    def counts(self) -> tuple[int, int]:
        """(samples with a mask, those of them whose crop holds nothing of it)."""
        starts = np.unique(self._starts)[:-1]
        if not len(starts):
            return 0, 0
        return len(starts), int((np.maximum.reduceat(self._mapped(), starts) == 0).sum())


def _starts(shapes: np.ndarray, present: np.ndarray) -> np.ndarray:
    """(N + 1,) int64: where each sample's mask begins; samples without one have no room."""
    return np.concatenate([[0], np.cumsum(np.where(present, shapes.prod(axis=1), 0))]).astype(np.int64)


def make_loss_masks(
    images: ImageSet,
    transform: Transform,
    shapes: np.ndarray,
    store: Path,
    name: str,
    *,
    outside: float,
    ranks: Ranks,
) -> LossMasks | None:
    """The masks of a data set, from the store where an earlier start made them; None where no image has one.

    A collective call; the first rank of each machine makes what is missing.

    Args:
        transform: scale, crop and flip of each sample.
        shapes: (N, 2) height and width of each sample's latents.
        name: what stands for images, masks and transforms (the plan's fingerprint).

    Raises:
        ImageError: a mask that changed since it was checked.
        StoreError: the store cannot be written.
    """
    if images.masks is None:
        return None
    path, present = Path(store, FOLDER, f"{name}.npy"), images.has_mask()
    ranks.run_on_all(
        lambda: _make(images, transform, shapes, path, present) if ranks.is_local_main and not path.exists() else None
    )
    with suppress(OSError):
        os.utime(path)  # used now, for the pruning of the store
    return LossMasks(path, shapes, present, outside)


def _make(images: ImageSet, transform: Transform, shapes: np.ndarray, path: Path, present: np.ndarray) -> None:
    """Reduce every mask to its sample's latents and write them as one file."""
    starts, own = _starts(shapes, present), np.flatnonzero(present)
    masks = np.zeros(int(starts[-1]), np.uint8)

    def reduced(i: int) -> np.ndarray:
        size = (int(shapes[i][1]), int(shapes[i][0]))
        return mask_of_sample(images.load_mask(i), transform(i), size)

    workers = default_workers()
    with progress_bar(len(own), "Masks") as bar:
        for i, mask in zip(own, prefetch(reduced, own.tolist(), workers, 4 * workers), strict=True):
            masks[starts[i] : starts[i + 1]] = mask.reshape(-1)
            bar.update()
    images.release()
    try:
        write_atomic(path, partial(np.save, arr=masks), durable=False)
    except OSError as error:
        raise StoreError(f"Masks: {path} cannot be written ({error.strerror}).") from None
