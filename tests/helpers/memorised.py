"""Images of a training, and files as its validation leaves them: what memorisation is looked for in."""

from __future__ import annotations

import types
from pathlib import Path

import numpy as np
from PIL import Image

from sana_kit.data.discover import load_images
from sana_kit.data.transform import apply_transform
from sana_kit.encodings.settings import EncodingSettings, Transform


class NoStop:
    requested = False

    def agreed(self):
        return self.requested


def fields(folder: Path) -> types.SimpleNamespace:
    """What the comparison asks of an EncodedDataset: five wide images twice, the last held out."""
    folder.mkdir()
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((150, 100), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    images = load_images(instance_data_dir=str(folder), instance_prompt="a field", repeats=2)
    settings = EncodingSettings("", 64, random_flip=True)
    return types.SimpleNamespace(images=images, transform=Transform(images, settings))


def drawn(output: Path, *images) -> list[dict]:
    """Files as the validator leaves them."""
    (output / "validation").mkdir(parents=True, exist_ok=True)
    entries = []
    for number, image in enumerate(images):
        Image.fromarray(np.asarray(image)).save(output / f"validation/{number}.png")
        entries.append({"file": f"validation/{number}.png", "prompt": f"prompt {number}", "seed": number})
    return entries


def as_trained(encoded, sample: int) -> np.ndarray:
    """The crop of a sample that is trained on."""
    return apply_transform(encoded.images.load(sample), encoded.transform(sample))
