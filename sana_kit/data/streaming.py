"""Shards of images and captions that are read row by row and never listed: tar (WebDataset), parquet, or the hub's.

`find_shards` looks at the shards' names, sizes and first or last bytes alone, so a start costs the same for any number
of rows. The rows come through `datasets` (streaming=True), one shard at a time. Which rows a run takes in which order
says data/windows.py.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sana_kit.data.discover import split_files
from sana_kit.data.sources import cell_bytes
from sana_kit.data.tables import (
    Wanted,
    check_columns,
    choose_split,
    datasets_library,
    is_lfs_pointer,
    pick_columns,
    tar_image_column,
)
from sana_kit.errors import ImageError, Problem, UserError, listed
from sana_kit.files import expand

KINDS = {".tar": "webdataset", ".parquet": "parquet"}
_TAR_BLOCK = 512
_BRACES, _NUMBERED = re.compile(r"\{(\d+)\.\.(\d+)\}"), re.compile(r"^(.*?)(\d+)-of-(\d+)(\.[a-z]+)$")
_HELP = "Name a folder of .tar or .parquet shards, one such file, a pattern such as 'data/*.tar', or a hub name."


@dataclass
class Row:
    """A row of a shard.

    Attributes:
        image: the encoded bytes; None where there are none, `problem` then says why.
        caption: the caption cell, of several columns the list of their cells; None without a caption column.
        name: the shard's name and the row's number in it, for messages.
    """

    image: bytes | None
    caption: Any
    name: str
    problem: str = ""


class Shards:
    """The shards of a data set.

    Attributes:
        names: one per shard; of the hub's their numbers.
        bytes: size of each file; zeros where it is not known.
        rows: how many rows there are; estimated from the first shard's for tar files, None where nothing is known.
        weights: of several caption columns; None for one.
    """

    def __init__(self, wanted: Wanted, names: Sequence[str], sizes: Sequence[int], rows: int | None):
        self.wanted, self.names, self.bytes, self.rows = wanted, list(names), list(sizes), rows
        pairs = pick_columns(wanted, wanted.name, ())[0]
        self.weights = tuple(weight for _, weight in pairs) if len(pairs) > 1 else None

    def __len__(self) -> int:
        return len(self.names)

    def digest(self) -> str:
        """Hex SHA-256 of names and sizes: what a resumed run must share."""
        return hashlib.sha256(json.dumps([self.names, self.bytes]).encode()).hexdigest()

    def _open(self, number: int) -> Any:
        """An IterableDataset of one shard."""
        raise NotImplementedError

    def _image_column(self, columns: Sequence[str]) -> Wanted:
        return self.wanted

    def read(self, number: int, first: int = 0) -> Iterator[Row]:
        """The rows of a shard from row `first` on.

        Raises:
            UserError: the shard is gone, broken, or lacks a column; it is named.
        """
        datasets = datasets_library()
        wanted, name = self.wanted, self.names[number]
        try:
            shard, labels = self._open(number), {}
            if shard.features is not None:
                wanted = self._image_column(list(shard.features))
                self._check(wanted, name, shard.features)
                column = shard.features[wanted.image_column]
                kinds = datasets.ClassLabel
                labels = {key: kind for key, kind in shard.features.items() if isinstance(kind, kinds)}
                if isinstance(column, datasets.Image):
                    shard = shard.cast_column(wanted.image_column, datasets.Image(decode=False))
            for place, cells in enumerate(shard.skip(first) if first else shard, start=first):
                yield self._row(wanted, cells, f"{name}[{place}]", labels)
        except (UserError, GeneratorExit):
            raise
        except Exception as error:
            told = " ".join(str(error).split())[:300]
            reason = f"shard {name} cannot be read ({type(error).__name__}: {told})"
            remedy = "Mend it or fetch it again, or take it out of the data set and begin a new run."
            raise UserError(wanted.problem(reason, remedy)) from None

    @staticmethod
    def _check(wanted: Wanted, name: str, features: Any) -> None:
        datasets = datasets_library()
        shown = datasets.Features(
            {
                key: datasets.Value("string") if isinstance(kind, datasets.ClassLabel) else kind
                for key, kind in features.items()
            }
        )
        _, problems = check_columns(f"shard {name}", shown.arrow_schema, wanted)
        if problems:
            raise UserError(problems)

    def _row(self, wanted: Wanted, cells: dict[str, Any], name: str, labels: dict[str, Any]) -> Row:
        pairs, _ = pick_columns(wanted, name, list(cells))
        captions = [cells.get(column) for column, _ in pairs]
        for k, (column, _) in enumerate(pairs):
            if column in labels and captions[k] is not None:
                captions[k] = labels[column].int2str(captions[k]) if captions[k] >= 0 else None
        caption = None if not pairs else captions if len(pairs) > 1 else captions[0]
        try:
            return Row(cell_bytes(cells.get(wanted.image_column), name, self._root()), caption, name)
        except ImageError as error:
            return Row(None, caption, name, str(error))

    def _root(self) -> str | None:
        return None


class LocalShards(Shards):
    """Tar or parquet files of this machine, or of a file system that all machines share."""

    def __init__(self, wanted: Wanted, files: list[Path], rows: int | None):
        names = [file.name for file in files]
        if len(set(names)) < len(names):
            names = [str(file) for file in files]
        super().__init__(wanted, names, [file.stat().st_size for file in files], rows)
        self.files, self.kind = files, KINDS[files[0].suffix.lower()]

    def _open(self, number: int) -> Any:
        file = self.files[number]
        if not file.is_file():
            raise FileNotFoundError(f"{file} is gone")
        files = {"train": [str(file)]}
        return datasets_library().load_dataset(self.kind, data_files=files, split="train", streaming=True)

    def _image_column(self, columns: Sequence[str]) -> Wanted:
        return tar_image_column(self.wanted, columns) if self.kind == "webdataset" else self.wanted

    def _root(self) -> str | None:
        return str(self.files[0].parent)


class HubShards(Shards):
    """The shards of a data set on the hub, read over the network, or from a cache; its scripts are never executed."""

    def __init__(self, wanted: Wanted):
        datasets = datasets_library()
        split = wanted.split or "train"
        try:
            self._whole = datasets.load_dataset(
                wanted.name, wanted.config, split=split, cache_dir=wanted.cache_dir, streaming=True
            )
            count = self._whole.num_shards
        except Exception as error:
            text = " ".join(str(error).split())[:600]
            where = f"neither a folder here ({Path(wanted.name).absolute()}) nor to be had from the hub"
            raise UserError(wanted.problem(f"{where} ({type(error).__name__}: {text})", _HELP)) from None
        splits = self._whole.info.splits or {}
        rows = splits[split].num_examples if split in splits else None
        names = [f"{split} shard {number + 1} of {count}" for number in range(count)]
        super().__init__(wanted, names, [0] * count, rows or None)

    def _open(self, number: int) -> Any:
        return self._whole.shard(num_shards=len(self), index=number)


def find_shards(wanted: Wanted) -> Shards:
    """The shards that `wanted.name` names: a folder, a file, a pattern, or a data set of the hub.

    Raises:
        UserError: there are none; some are missing, empty or broken: all of them, by name.
    """
    name = wanted.name
    path = expand(name)
    if not path.exists() and not any(letter in name for letter in "*?[{"):
        if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or Path(name).suffix in KINDS:
            raise UserError(wanted.problem("no such folder or file", _HELP))
        return HubShards(wanted)
    files, problems = _local_files(wanted, path)
    kinds = {file.suffix.lower() for file in files}
    if not problems and (len(kinds) != 1 or not kinds <= set(KINDS)):
        found = f"files of several kinds: {listed(sorted(kinds))}" if files else "no .tar or .parquet shards there"
        raise UserError(wanted.problem(found, _HELP))
    rows, counts = 0, {}
    for file in files:
        try:
            counts[file] = _rows(file)
            rows += counts[file]
        except (OSError, ValueError) as error:
            problems.append(wanted.problem(f"shard {file.name}: {error}", "Mend it, fetch it again, or take it out."))
    if problems:
        raise UserError(problems)
    if files[0].suffix.lower() == ".tar":
        rows, problems = _look_into_tar(wanted, files)
    else:
        _, problems = check_columns(f"shard {files[0].name}", pq.read_schema(files[0]), wanted)
    if problems:
        raise UserError(problems)
    return LocalShards(wanted, files, rows)


def _local_files(wanted: Wanted, path: Path) -> tuple[list[Path], list[Problem]]:
    """(the shards in the order of their names, problems)."""
    if path.is_file():
        return [path], []
    if path.is_dir():
        place = path / wanted.config if wanted.config else path
        if not place.is_dir():
            return [], [Problem("dataset_config_name", wanted.config, f"no such subfolder in {wanted.name}")]
        splits = split_files(place, (".tar",)) or split_files(place, (".parquet",))
        if not splits:
            return [], []
        files = sorted(splits[choose_split(splits, wanted)])
        return files, [_missing(wanted, name) for name in _gaps([file.name for file in files])]
    found: list[Path] = []
    problems = []
    for pattern in _spelt_out(str(path)):
        if any(letter in pattern for letter in "*?["):
            found += [Path(file) for file in sorted(glob(pattern)) if Path(file).suffix.lower() in KINDS]
        elif Path(pattern).is_file():
            found.append(Path(pattern))
        else:
            problems.append(_missing(wanted, pattern))
    return list(dict.fromkeys(found)), problems


def _missing(wanted: Wanted, name: str) -> Problem:
    return wanted.problem(f"shard {name} is missing", "Fetch it, or give the shards other names.")


def _spelt_out(pattern: str) -> list[str]:
    """The names that one range in braces, as webdataset writes them, stands for: "x-{00..11}.tar"."""
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    low, high = found.groups()
    numbers = range(int(low), int(high) + 1)
    return [f"{pattern[: found.start()]}{number:0{len(low)}d}{pattern[found.end() :]}" for number in numbers]


def _gaps(names: list[str]) -> list[str]:
    """Names that are not there of files that say how many they are: "train-00001-of-00004.parquet"."""
    there, wanted = set(names), []
    for name in names:
        if found := _NUMBERED.match(name):
            stem, number, count, suffix = found.groups()
            wanted += [f"{stem}{k:0{len(number)}d}-of-{count}{suffix}" for k in range(min(int(count), 100_000))]
            break
    return [name for name in wanted if name not in there]


def _rows(file: Path) -> int:
    """How many rows a parquet shard has, 0 for a tar. Raises ValueError for one that is empty or broken."""
    if is_lfs_pointer(file):
        raise ValueError("it is a Git LFS pointer; run `git lfs pull` there")
    if not file.stat().st_size:
        raise ValueError("the file is empty")
    if file.suffix.lower() == ".parquet":
        try:
            rows = pq.read_metadata(file).num_rows
        except Exception as error:
            raise ValueError(f"it is not a readable parquet file ({error})") from None
        if not rows:
            raise ValueError("it has no rows")
        return rows
    with open(file, "rb") as handle:
        head = handle.read(_TAR_BLOCK)
    if not head.strip(b"\0"):
        raise ValueError("the archive is empty")
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        raise ValueError("it is not a tar archive") from None
    if file.stat().st_size % _TAR_BLOCK:
        raise ValueError("it is cut off in the middle of a block")
    return 0


def _look_into_tar(wanted: Wanted, files: list[Path]) -> tuple[int, list[Problem]]:
    """(rows of tar shards, columns that the first row lacks), by the first shard's headers.

    Rows are as many as there are in the first shard, for as many bytes as all have.
    """
    try:
        with tarfile.open(files[0]) as archive:
            members = [member.name for member in archive if member.isfile()]
    except tarfile.TarError:  # reading it will tell
        return 0, []
    keys = list(dict.fromkeys(name.partition(".")[0] for name in members))
    if not keys:
        return 0, [wanted.problem(f"shard {files[0].name}: it holds no files", "Fetch it again, or take it out.")]
    columns = [name.partition(".")[2].lower() for name in members if name.partition(".")[0] == keys[0]]
    columns += ["__key__", "__url__"]
    where, told = f"shard {files[0].name}", ", ".join(columns)
    _, problems = pick_columns(wanted, where, columns)
    if tar_image_column(wanted, columns).image_column not in columns:
        reason = f"no such column in {where}; columns present: {told}"
        problems.append(Problem("image_column", wanted.image_column, reason))
    return round(len(keys) * sum(file.stat().st_size for file in files) / files[0].stat().st_size), problems
