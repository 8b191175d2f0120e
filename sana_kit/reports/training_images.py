"""Some of a run's training images with their captions and crops, for its report page."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from sana_kit.data.image_set import ImageSet
from sana_kit.data.transform import TransformPlan, crop_box
from sana_kit.reports.pages import spread

FOLDER = "training_images"
COUNT = 12
SIDE = 256  # pixels of a written image's longer side, at most
_CUT = 0.35  # brightness of what is cropped away
_MASKED, _SHARE = (214, 40, 40), 0.6  # colour over what a loss mask leaves out, and how much of it


@dataclasses.dataclass(frozen=True)
class TrainingImage:
    """One sample before it is scaled.

    Attributes:
        image: the upright image, RGB, any size.
        crop: (left, top, right, bottom) of what is trained on, in pixels of `image`, fractions allowed.
        caption: what it is trained with.
        name: the file's name, or the row of a table.
        mirrored: whether it is flipped after the crop.
        mask: its loss mask, grey, of the image's size: white counts, black does not; None for none.
    """

    image: Image.Image
    crop: tuple[float, float, float, float]
    caption: str
    name: str = ""
    mirrored: bool = False
    mask: Image.Image | None = None


class CroppedImages(Sequence[TrainingImage]):
    """The samples of an `ImageSet` with the crops that a run trains on, each opened when it is asked for."""

    def __init__(self, images: ImageSet, transform: Callable[[int], TransformPlan]):
        """`transform(i)` is the decision for sample i (`encodings.settings.Transform`)."""
        self.images, self.transform, self._has_mask = images, transform, images.has_mask()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        images = self.images
        image = images.load(index)
        plan = self.transform(index)
        mask = images.load_mask(index) if self._has_mask[index] else None
        crop = crop_box(image.size, plan)
        return TrainingImage(image, crop, images.captions[index], images.name(index), plan.flip, mask)


def draw_crop(sample: TrainingImage, side: int = SIDE) -> Image.Image:
    """The image, its longer side at most `side` pixels, with all that the crop leaves out darkened.

    What a loss mask leaves out is red, half of it where the mask is grey.
    """
    scale = min(1.0, side / max(sample.image.size))
    size = tuple(max(1, round(length * scale)) for length in sample.image.size)
    small = sample.image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    if sample.mask is not None:
        share = sample.mask.convert("L").resize(size, Image.Resampling.BOX).point(lambda v: round(_SHARE * (255 - v)))
        small.paste(_MASKED, (0, 0, *size), share)
    left, top, right, bottom = (round(edge * scale) for edge in sample.crop)
    box = (max(0, left), max(0, top), min(size[0], max(right, left + 1)), min(size[1], max(bottom, top + 1)))
    if box != (0, 0, *size):
        kept = small.crop(box)
        small = Image.eval(small, lambda value: int(value * _CUT))
        small.paste(kept, box[:2])
        ImageDraw.Draw(small).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline="white")
    return small.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if sample.mirrored else small


def write_training_images(
    images: Sequence[TrainingImage], output_dir: str | os.PathLike, count: int = COUNT
) -> Path | None:
    """Write `count` of the images, evenly spread, to `output_dir/training_images`, where the report finds them.

    PNG files with a manifest.jsonl; a folder of that name is replaced once the new one is whole. Only the images that
    are written are asked for, so `images` may make each one when it is indexed.

    Returns:
        The folder; None where there is no image.
    """
    if not len(images):
        return None
    output_dir = Path(output_dir)
    fresh = output_dir / f".{FOLDER}-{uuid.uuid4().hex}"
    fresh.mkdir(parents=True)
    try:
        lines = []
        for number, index in enumerate(spread(range(len(images)), count)):
            sample = images[index]
            file = f"{number:03d}.png"
            draw_crop(sample).save(fresh / file)
            facts = {"name": sample.name, "size": sample.image.size, "crop": sample.crop, "mirrored": sample.mirrored}
            facts["masked"] = sample.mask is not None
            lines.append(json.dumps({"file": file, "prompt": sample.caption, **facts}, ensure_ascii=False) + "\n")
        (fresh / "manifest.jsonl").write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
        shutil.rmtree(output_dir / FOLDER, ignore_errors=True)
        fresh.rename(output_dir / FOLDER)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return output_dir / FOLDER
