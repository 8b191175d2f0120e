"""Loss masks: where they lie beside images, what a mask file must be, and what of it a training sample sees."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sana_kit.data.decode import TRANSPOSITIONS, ImageFacts, open_image, orientation, to_rgb
from sana_kit.data.sources import DatasetSource, FileSource, ParquetSource
from sana_kit.data.transform import TransformPlan, crop_box
from sana_kit.errors import ImageError, NoImageError

MASK_ENDING = ".mask.png"
# A file whose brightest pixel is darker was drawn with other values than 0 to 255: numbers of classes, or 0 and 1.
_BRIGHT = 128


def is_mask(name: str) -> bool:
    """Whether a file name is a mask's; such a file is never a training image."""
    return name.lower().endswith(MASK_ENDING)


class MaskFiles(FileSource):
    """Mask files by image; an empty name for an image without one, whose bytes are b""."""

    remembered_as = "masks"

    def read(self, row: int) -> bytes:
        return super().read(row) if self.names[row] else b""


class MaskColumn:
    """A column of masks of a table, by image; b"" for null."""

    def __init__(self, source: ParquetSource | DatasetSource):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def name(self, row: int) -> str:
        return f"mask of {self._source.name(row)}"

    def read(self, row: int) -> bytes:
        try:
            return self._source.read(row)
        except NoImageError:
            return b""

    def identity(self) -> str | None:
        """What changes when the masks do."""
        found = self._source.identity()
        return found and f"masks {found}"

    def release(self) -> None:
        """Give row groups in memory back."""
        if hasattr(self._source, "release"):
            self._source.release()


class NoMasks:
    """So many images without masks."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def name(self, row: int) -> str:
        return f"mask {row}"

    def read(self, row: int) -> bytes:
        return b""


def masks_beside(root: str | os.PathLike, names: Sequence[str]) -> MaskFiles | None:
    """The files NAME.mask.png beside the images NAME.*; None where no image has one."""
    found: list[str] = []
    for folder in {os.path.dirname(name) for name in names}:
        try:
            with os.scandir(Path(root, folder)) as entries:
                files = [entry.name for entry in entries if is_mask(entry.name) and entry.is_file()]
        except OSError:  # the images there are told to be missing
            continue
        found += [os.path.join(folder, file) for file in files]
    return masks_of(root, names, found)


def masks_of(root: str | os.PathLike, names: Sequence[str], masks: Sequence[str]) -> MaskFiles | None:
    """Of these mask files the one of each image; None where no image has one. All are named relative to `root`."""
    present = {mask[: -len(MASK_ENDING)]: mask for mask in masks}
    found = [present.get(os.path.splitext(name)[0], "") for name in names] if present else []
    return MaskFiles(root, found) if any(found) else None


def decode_mask(data: bytes, name: str) -> Image.Image:
    """A mask as 8-bit grey, upright: 255 inside, 0 outside; what is transparent lies outside.

    Raises:
        ImageError: corrupt data, or pixels without a known range.
    """
    image = open_image(data, name)
    try:
        image.load()
        turn = TRANSPOSITIONS.get(orientation(image, data))
        image = image if turn is None else image.transpose(turn)
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
        return to_rgb(image, png=data.startswith(b"\x89PNG")).convert("L")
    except Exception as error:
        raise ImageError(f"{name}: the mask cannot be read ({type(error).__name__}: {error}).") from None


def inspect_mask(data: bytes, name: str) -> ImageFacts:
    """Hash and size of a mask, width and height 0 for an image without one.

    Raises:
        ImageError: as `decode_mask`, and for a mask with nothing inside.
    """
    if not data:
        return ImageFacts(hashlib.sha256(data).digest(), 0, 0, False)
    mask = decode_mask(data, name)
    brightest = mask.getextrema()[1]
    if brightest == 0:
        raise ImageError(f"{name}: the mask is black all over, so nothing of the image would be trained.")
    if brightest < _BRIGHT:
        raise ImageError(f"{name}: the mask's brightest pixel is {brightest} of 255; what lies inside is white (255).")
    return ImageFacts(hashlib.sha256(data).digest(), mask.width, mask.height, False)


def mask_of_sample(mask: Image.Image, plan: TransformPlan, size: tuple[int, int]) -> np.ndarray:
    """What a training sample sees of its image's mask: uint8 (height, width), means over the pixels of each place.

    Args:
        mask: of the whole image, grey.
        plan: the image's crop and flip.
        size: (width, height) of the sample's latents.
    """
    part = mask.resize(size, Image.Resampling.BOX, box=crop_box(mask.size, plan))
    return np.asarray(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if plan.flip else part)
