"""The encoder as the map function of an engine that goes through a large data set, such as Ray Data or Spark.

    ray.data.read_parquet("shards/").map_batches(
        BatchEncoder, fn_constructor_kwargs={"model": MODEL, "store": STORE, "resolution": 1024},
        batch_size=256, concurrency=8, num_gpus=1,
    ).sum("samples")

Each batch becomes shards of the store, which a training with the same images, captions and settings finds. No batch
looks at another's shards, so a store may have any number of writers.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sana_kit import devices
from sana_kit.data.assemble import Asked, assemble
from sana_kit.data.decode import ImageFacts, inspect_image
from sana_kit.data.image_set import ImageSet
from sana_kit.data.memory import Headers, Memory
from sana_kit.data.sources import cell_bytes
from sana_kit.data.tables import Named, Table
from sana_kit.distributed import Ranks
from sana_kit.encodings.encode import encode
from sana_kit.encodings.encoders import Encoders
from sana_kit.encodings.plan import PARTS
from sana_kit.encodings.prompts import parse_instruction
from sana_kit.encodings.settings import EncodingSettings
from sana_kit.errors import ImageError
from sana_kit.files import expand
from sana_kit.models.folder import Model, find_model


class MemorySource:
    """Encoded images in memory, by row."""

    def __init__(self, images: Sequence[bytes], names: Sequence[str]):
        self.images, self.labels = images, names

    def __len__(self) -> int:
        return len(self.images)

    def identity(self) -> None:
        """Nothing is remembered of it."""

    def name(self, row: int) -> str:
        """For messages."""
        return self.labels[row]

    def read(self, row: int) -> bytes:
        """The encoded image."""
        return self.images[row]


class BatchEncoder:
    """Encodes batches into a store; call it with a batch of columns. The models are loaded once and stay.

    Args:
        model: folder or hub name of a SanaPipeline.
        store: the trainings' --encodings_dir; shared by all writers.
        resolution: as --resolution.
        image_column, caption_column: their names in a batch.
        complex_human_instruction: as the flag: 'default', 'none', a JSON list or a file.
        skip_bad_images: leave them out and count them, instead of an error that ends the job.
        settings: more of `EncodingSettings`, such as center_crop or vae_batch_size.

    Raises:
        UserError: model, settings or images that cannot be used.
    """

    def __init__(
        self,
        model: str,
        store: str,
        resolution: int,
        *,
        image_column: str = "image",
        caption_column: str = "text",
        complex_human_instruction: str = "default",
        skip_bad_images: bool = True,
        device: str = "auto",
        **settings: Any,
    ):
        self._image, self._caption, self._skip_bad = image_column, caption_column, skip_bad_images
        found: Model = find_model(model)[0]
        instruction = parse_instruction(complex_human_instruction)
        self._settings = {
            "resolution": resolution,
            "complex_human_instruction": None if instruction is None else tuple(instruction),
            "skip_bad_images": skip_bad_images,
            **settings,
        }
        self._store, self._model, self._encoders = Path(expand(store)), found, Encoders(found, keep=True)
        self._ranks = Ranks(0, 1, devices.pick_device(device))
        for part in PARTS:
            (self._store / part).mkdir(parents=True, exist_ok=True)

    def __call__(self, batch: Mapping[str, Sequence]) -> dict[str, np.ndarray]:
        """One row of counts: {"samples", "skipped", "latent_bytes", "prompt_bytes"}, (1,) int64 each."""
        images = self._images(batch)
        with tempfile.TemporaryDirectory(prefix=".batch-", dir=self._store) as folder:
            settings = EncodingSettings(encodings_dir=folder, **self._settings)
            encoded = encode(images, self._model, settings, ranks=self._ranks, encoders=self._encoders)
            encoded.close()
            for part in PARTS:
                for path in Path(folder, part).glob("*.safetensors"):
                    os.replace(path, self._store / part / path.name)
        counts = {
            "samples": len(encoded),
            "skipped": len(batch[self._image]) - len(encoded),
            "latent_bytes": encoded.facts.bytes["latents"],
            "prompt_bytes": encoded.facts.bytes["prompts"],
        }
        return {name: np.array([count], np.int64) for name, count in counts.items()}

    def _images(self, batch: Mapping[str, Sequence]) -> ImageSet:
        """The image set of a batch."""
        cells = batch[self._image]
        names = [f"row {row} of the batch" for row in range(len(cells))]
        data: list[bytes] = []
        found: list[ImageFacts | str] = []
        for cell, name in zip(cells, names, strict=True):
            data.append(b"")
            try:
                data[-1] = cell_bytes(cell, name, None)
                found.append(inspect_image(data[-1], name))
            except ImageError as error:
                found.append(str(error))
        headers = Headers.of(found, len(found))
        table = Table(MemorySource(data, names), list(batch[self._caption]), [], [], {})
        return assemble(table, Named("dataset_name", "the batch"), headers, Asked(None, 1, self._skip_bad), Memory())
