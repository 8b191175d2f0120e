"""Tiny shards for the tests of streaming: tar and parquet files, and readers; an image's caption says which it is."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from helpers.ranks import ALONE
from sana_kit.data.assemble import Asked
from sana_kit.data.tables import Wanted
from sana_kit.data.windows import WindowReader


def image_bytes(number: int, side: int = 40) -> bytes:
    """A PNG file of one colour, another for each number."""
    colour = (number * 37 % 256, number * 91 % 256, number % 256)
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, numbers, side: int = 40) -> Path:
    """A WebDataset shard with columns png and txt."""
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            for ending, data in (("png", image_bytes(number, side)), ("txt", f"drawing {number}".encode())):
                member = tarfile.TarInfo(f"{number:06d}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def write_parquet(path: Path, numbers, side: int = 40, **columns) -> Path:
    """A shard with columns image and text, and those given, lists of a cell per row."""
    cells = [{"bytes": image_bytes(number, side), "path": None} for number in numbers]
    texts = [f"drawing {number}" for number in numbers]
    pq.write_table(pa.table({"image": cells, "text": texts, **columns}), path, row_group_size=3)
    return path


def write_shards(folder: Path, counts, kind: str = "tar") -> Path:
    """A folder of shards with so many rows each; the captions count on from shard to shard."""
    folder.mkdir(parents=True)
    first = 0
    for number, count in enumerate(counts):
        write = write_tar if kind == "tar" else write_parquet
        write(folder / f"train-{number:04d}.{kind}", range(first, first + count))
        first += count
    return folder


def wanted(name, caption="txt", **more) -> Wanted:
    """What a run asks of a data set; tar shards keep their captions in txt, parquet ones in text."""
    settings = {"config": None, "image_column": "image", "split": None, "cache_dir": None, **more}
    return Wanted(name=str(name), caption_column=caption, **settings)


def reader(shards, size=8, seed=3, ranks=ALONE, **asked) -> WindowReader:
    return WindowReader(shards, Asked(None, **asked), size=size, seed=seed, ranks=ranks)


def windows(source: WindowReader, folder: Path, count: int, room: int = 10**9) -> list[list[str]]:
    """The captions of `count` windows, in order."""
    return [list(source.read(folder, room, lambda: False).captions) for _ in range(count)]
