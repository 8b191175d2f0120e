"""Control images of a ControlNet's training: one beside each training image, cut and flipped as that one is."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image

from sana_kit.data import outlines
from sana_kit.data.decode import IMAGE_SUFFIXES
from sana_kit.data.discover import find_images
from sana_kit.data.headers import read_headers
from sana_kit.data.image_set import LISTED_PROBLEMS, ImageSet, bad_image_problems
from sana_kit.data.memory import Memory
from sana_kit.data.sources import FileSource, JoinedSource
from sana_kit.data.tables import Table
from sana_kit.data.transform import TransformPlan, apply_transform
from sana_kit.distributed import Ranks
from sana_kit.errors import Problem, UserError, listed, setting
from sana_kit.files import expand

# Of the images alone.
_COLUMNS = ("caption_column", "mask_column")


@dataclass(frozen=True)
class ControlKind:
    """Where control images come from; one of the three.

    Attributes:
        column: of the data set.
        folder: of files that are called as the training images are, whatever their endings.
        edges: the outlines of the training images themselves, computed (`outlines.outlines`).
    """

    column: str | None = None
    folder: str | None = None
    edges: bool = False

    @property
    def field(self) -> str:
        """The setting, for problems."""
        return "control_column" if self.column is not None else "control_data_dir"

    @property
    def value(self) -> str | None:
        """Its value."""
        return self.column if self.column is not None else self.folder


class ControlImages(ImageSet):
    """Control images by sample; each is transformed as the sample of `follows` is.

    Attributes:
        follows: the training images.
    """

    def __init__(self, follows: ImageSet, source: Any, rows: np.ndarray, digests: np.ndarray, sizes: np.ndarray):
        captions, positions = follows.captions, follows.positions()
        super().__init__(source, rows, captions, positions, digests, sizes, {}, [])
        self.follows = follows

    def digest(self) -> str:
        """Hex SHA-256 of the control images and of the images that they follow."""
        return hashlib.sha256(f"{super().digest()} {self.follows.digest()}".encode()).hexdigest()


class Outlines(ControlImages):
    """The outlines of the training images, computed at the size that is trained at."""

    def __init__(self, follows: ImageSet):
        own, mark = follows.source_digests(), f"outlines {outlines.VERSION}:".encode()
        digests = [np.frombuffer(hashlib.sha256(mark + row.tobytes()).digest(), np.uint8) for row in own]
        rows = np.arange(len(follows))
        super().__init__(follows, None, rows, np.array(digests, np.uint8).reshape(-1, 32), follows.sizes())

    def name(self, i: int) -> str:
        """The image's name in messages."""
        return self.follows.name(i)

    def read(self, i: int) -> bytes:
        """The encoded bytes of the training image."""
        return self.follows.read(i)

    def pixels(self, i: int, plan: TransformPlan) -> np.ndarray:
        """uint8 (height, width, 3)."""
        whole = Image.fromarray(apply_transform(self.load(i), plan))
        return np.array(outlines.outlines(whole))

    def release(self) -> None:
        """Give source data held in memory back."""
        self.follows.release()


def find_controls(kind: ControlKind, images: Table, source: Mapping[str, Any]) -> Table | None:
    """The table of control images, row by row beside that of the images; None where they are computed.

    Args:
        images: what `find_images` found.
        source: its arguments.

    Raises:
        UserError: no such column or folder, images without a control image, by name.
    """
    if kind.edges:
        return None
    if kind.folder is not None:
        return _of_equal_names(kind.folder, images.source)
    try:
        table, _ = find_images(**{**dict(source), **dict.fromkeys(_COLUMNS), "image_column": kind.column})
    except UserError as error:
        renamed = {"image_column": "control_column"}
        problems = [Problem(renamed.get(p.field, p.field), p.value, p.reason, p.remedy) for p in error.problems]
        raise UserError(problems, "The control images cannot be used:") from None
    return table


def _of_equal_names(folder: str, images: Any) -> Table:
    """Files of a folder, in the order of the images whose names they have."""
    place, field = expand(folder), "control_data_dir"
    if not place.is_dir():
        raise UserError(Problem(field, folder, "is a file, not a folder" if place.exists() else "no such folder"))
    if not isinstance(images, FileSource):
        remedy = f"Use {setting('control_column')}, or images in files."
        raise UserError(Problem(field, folder, "the training images lie in a table and have no file names", remedy))
    known: dict[str, list[str]] = {}
    for here, _, files in os.walk(place):
        for file in sorted(files):
            if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith("."):
                name = os.path.relpath(os.path.join(here, file), place)
                known.setdefault(_stem(name), []).append(name)
    found = [known.get(_stem(name), []) for name in images.names]
    problems = []
    missing = [name for name, files in zip(images.names, found, strict=True) if not files]
    if missing:
        shown = listed(missing, LISTED_PROBLEMS)
        reason = f"{len(missing)} of {len(found)} images have no control image of their name: {shown}"
        problems.append(Problem(field, folder, reason, "Add them, or take these images out."))
    double = [" and ".join(files) for files in found if len(files) > 1]
    if double:
        reason = f"several files have the name of one image: {listed(double, LISTED_PROBLEMS)}"
        problems.append(Problem(field, folder, reason, "Keep one of each."))
    if problems:
        raise UserError(problems, "The control images cannot be used:")
    return Table(FileSource(place, [files[0] for files in found]), None, [], [], {})


def _stem(name: str) -> str:
    return str(PurePath(name).with_suffix(""))


@dataclass(frozen=True)
class Controls:
    """Control images that were looked at; `of(images)` are those of a set of training images.

    Attributes:
        source: of all data sets, one behind the other; None where they are computed.
    """

    source: Any
    digests: np.ndarray | None = None
    sizes: np.ndarray | None = None

    def of(self, images: ImageSet, rows: Sequence[int] | np.ndarray) -> ControlImages:
        """Those of `images`.

        Args:
            rows: of each sample in the tables that `find_images` found, one behind the other.
        """
        if self.source is None:
            return Outlines(images)
        return ControlImages(images, self.source, np.array(rows, np.int64), self.digests, self.sizes)


def find_all_controls(
    kinds: Sequence[ControlKind], images: Sequence[Table], sources: Sequence[Mapping[str, Any]]
) -> list[Table | None]:
    """`find_controls` of each data set.

    Raises:
        UserError: what is wrong with those of any set; an image name that two sets look up in one folder.
    """
    tables: list[Table | None] = []
    problems: list[Problem] = []
    seen: dict[tuple[str, str], int] = {}
    for number, (kind, table, source) in enumerate(zip(kinds, images, sources, strict=True)):
        try:
            tables.append(find_controls(kind, table, source))
        except UserError as error:
            problems += error.problems
            continue
        if kind.folder is not None:
            files: Any = table.source
            names = [(str(expand(kind.folder).resolve()), _stem(name)) for name in files.names]
            twice = [name for folder, name in names if seen.setdefault((folder, name), number) != number]
            if twice:
                reason = f"images of two data sets have one name there: {listed(twice, LISTED_PROBLEMS)}"
                problems.append(Problem(kind.field, kind.value, reason, "Give a folder for each data set."))
    if problems:
        raise UserError(dict.fromkeys(problems), "The control images cannot be used:")
    return tables


def load_controls(
    kinds: Sequence[ControlKind],
    sources: Sequence[Mapping[str, Any]],
    *images: ImageSet,
    remember_in: str | Path | None = None,
    ranks: Ranks | None = None,
) -> Controls:
    """Find, hash and check the control images; every rank calls it.

    Args:
        kinds: of each data set; sources: of each, the arguments of `find_images`.
        images: what the data sets, one behind the other, were made into: what to train on, and what is held out.

    Raises:
        UserError: control images that are missing, cannot be read or have another shape than their image, by name.
    """
    ranks = ranks or Ranks(0, 1, torch.device("cpu"))

    def find() -> list[Table | None]:
        return find_all_controls(kinds, [find_images(**source)[0] for source in sources], sources)

    tables = [table for table in ranks.run_on_all(find) if table is not None]
    if not tables:
        return Controls(None)
    memory = Memory(remember_in, writes=ranks.is_local_main)
    headers = [read_headers(table.source, memory, ranks) for table in tables]
    source = functools.reduce(JoinedSource, [table.source for table in tables])
    digests, sizes = (np.concatenate([getattr(part, name) for part in headers]) for name in ("digests", "sizes"))

    def check() -> None:
        problems = [
            Problem(kind.field, kind.value, bad_image_problems(list(part.bad.values())))
            for kind, part in zip(kinds, headers, strict=True)
            if part.bad
        ]
        if problems := problems or _shape_problems(kinds[0].field, source, images, sizes):
            raise UserError(problems, "The control images cannot be used:")

    ranks.run_on_all(check)
    return Controls(source, digests, sizes)


def _shape_problems(field: str, source: Any, images: Sequence[ImageSet], sizes: np.ndarray) -> list[Problem]:
    """Control images that are not of their image's shape; half or twice its size is no problem."""
    rows = np.concatenate([part.rows() for part in images])
    shapes = np.concatenate([part.sizes() for part in images]).astype(np.int64)
    (width, height), (own_width, own_height) = shapes.T, sizes[rows].astype(np.int64).T
    # by how much the shapes differ, in pixels of the image times its other side: one pixel is rounding
    off = np.abs(own_width * height - own_height * width) > np.maximum(np.maximum(width, own_width), own_height)
    first = {int(rows[i]): int(i) for i in np.flatnonzero(off)[::-1]}
    if not first:
        return []
    told = [
        f"{source.name(row)} is {own_width[i]}x{own_height[i]} px, its image {width[i]}x{height[i]}"
        for row, i in sorted(first.items())
    ]
    reason = f"{len(told)} control image(s) have another shape than their image: {listed(told, LISTED_PROBLEMS)}"
    return [Problem(field, None, reason, "Cut or scale them as their images are.")]
