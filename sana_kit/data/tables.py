"""Tables of images and captions: parquet, Arrow, text tables, save_to_disk folders, tar shards, hub data sets."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sana_kit.data import arrow_types
from sana_kit.data.captions import caption_columns
from sana_kit.data.decode import IMAGE_SUFFIXES
from sana_kit.data.image_set import LISTED_PROBLEMS
from sana_kit.data.masks import MaskColumn, MaskFiles, is_mask, masks_beside
from sana_kit.data.sources import DatasetSource, FileSource, ParquetSource, inside
from sana_kit.data.text_tables import TABLE_SUFFIXES, read_text_table
from sana_kit.errors import Problem, UserError

if TYPE_CHECKING:
    import datasets

    from sana_kit.data.sources import ImageSource

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}


@dataclass(frozen=True)
class Named:
    """The setting that names a data set, for problems and notes."""

    field: str
    value: str

    def problem(self, reason: str, remedy: str = "") -> Problem:
        """A Problem of this setting."""
        return Problem(self.field, self.value, reason, remedy)


@dataclass(frozen=True)
class Wanted:
    """What of a data set is asked for; None for what is to be found out."""

    name: str
    config: str | None
    image_column: str | None
    caption_column: str | None
    split: str | None
    cache_dir: str | None
    mask_column: str | None = None

    def problem(self, reason: str, remedy: str = "") -> Problem:
        """A Problem of the data set as a whole."""
        return Problem("dataset_name", self.name, reason, remedy)


@dataclass
class Table:
    """A found data set: its images and, per row, the raw caption cell.

    Attributes:
        captions: the cells, Arrow's or Python's, or what reads them (a `CaptionFiles` of folders.py tells problems,
            too); None: no caption column. Of several columns each is a list of a row's cells.
        weights: of several caption columns; None for one.
        masks: the loss masks by row; None where there are none.
    """

    source: ImageSource | None
    captions: Any
    problems: list[Problem]
    notes: list[str]
    counts: dict[str, int]
    weights: tuple[float, ...] | None = None
    masks: ImageSource | None = None


def refused_table(*problems: Problem) -> Table:
    """No data set, for these reasons."""
    return Table(None, None, list(problems), [], {})


def choose_split(names: Iterable[str], wanted: Wanted) -> str:
    """The split asked for, else 'train', else the only one. Raises UserError naming them all."""
    names = list(names)
    present = ", ".join(names)
    if wanted.split is not None:
        if wanted.split not in names:
            reason = f"no such split in {wanted.name}; present: {present}"
            raise UserError(Problem("dataset_split", wanted.split, reason))
        return wanted.split
    if "train" in names:
        return "train"
    if len(names) == 1:
        return names[0]
    reason = f"several splits and none is 'train': {present}"
    raise UserError(Problem("dataset_name and dataset_split", wanted.name, reason, "Choose a split."))


def _missing_column(field: str, value: str | None, where: str, columns: Iterable[str]) -> Problem:
    return Problem(field, value, f"no such column in {where}; columns present: {', '.join(columns)}")


def pick_columns(
    wanted: Wanted, where: str, present: Sequence[str], shown: Sequence[str] | None = None
) -> tuple[list[tuple[str, float]], list[Problem]]:
    """((caption column, weight) of each, problems) for a table with these columns, told as `shown`."""
    if wanted.caption_column is None:
        return [], []
    try:
        pairs = caption_columns(wanted.caption_column, present)
    except ValueError as error:
        remedy = "Name columns as a,b or with weights as a:3,b:1."
        return [], [Problem("caption_column", wanted.caption_column, str(error), remedy)]
    absent = [name for name, _ in pairs if name not in present]
    return pairs, [_missing_column("caption_column", name, where, shown or present) for name in absent]


def _weights(pairs: list[tuple[str, float]]) -> tuple[float, ...] | None:
    return tuple(weight for _, weight in pairs) if len(pairs) > 1 else None


def _one_cell_a_row(columns: list) -> list:
    """Python cells of a column, or each row's of several."""
    columns = [column.to_pylist() if hasattr(column, "to_pylist") else list(column) for column in columns]
    return columns[0] if len(columns) == 1 else [list(cells) for cells in zip(*columns, strict=True)]


def datasets_library() -> Any:
    """The package `datasets`, whose import takes seconds, told to count no loads.

    It counts them by a request over the network, for each shard of a folder too (`increase_load_count`, 2.19 and 5.2):
    seconds each where there is no network.
    """
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    return datasets


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file only says where Git LFS keeps it."""
    with open(file, "rb") as handle:
        return handle.read(23) == b"version https://git-lfs"


def from_files(wanted: Wanted, splits: dict[str, list[Path]], root: Path) -> Table:
    """Parquet, Arrow, tar, jsonl or csv files of the chosen split."""
    try:
        split = choose_split(splits, wanted)
    except UserError as error:
        return refused_table(*error.problems)
    files = splits[split]
    for file in files:
        if is_lfs_pointer(file):
            remedy = "Run `git lfs pull` there."
            return refused_table(wanted.problem(f"{file.name} is a Git LFS pointer", remedy))
    kinds = {f.suffix.lower() for f in files}
    if len(kinds) > 1:
        return refused_table(wanted.problem(f"files of several kinds: {', '.join(f.name for f in files)}"))
    kind = kinds.pop()
    if kind == ".parquet":
        return _from_parquet(wanted, files, split, root)
    if kind == ".arrow":
        return _from_arrow(wanted, files, split, root)
    if kind == ".tar":
        return _from_tar(wanted, files, split)
    if kind in TABLE_SUFFIXES:
        return _from_text_tables(wanted, files)
    known = ", ".join((".parquet", ".arrow", ".tar", *TABLE_SUFFIXES))
    return refused_table(wanted.problem("unknown kind of file", f"Use one of {known}."))


def check_columns(where: str, schema: pa.Schema, wanted: Wanted) -> tuple[str | None, list[Problem]]:
    """(image column, problems) for an Arrow schema."""
    columns, problems = list(schema.names), []
    image_column = wanted.image_column
    present = f"columns present: {', '.join(columns)}"
    if image_column is None:
        image_column = next((c for c in columns if arrow_types.holds_images(schema.field(c).type)), None)
        if image_column is None:
            problems.append(Problem("image_column", None, f"no column of {where} holds images; {present}"))
    elif image_column not in columns:
        problems.append(_missing_column("image_column", image_column, where, columns))
    else:
        kind = schema.field(image_column).type
        if not arrow_types.holds_images(kind) and not arrow_types.is_text(kind):
            told = arrow_types.told(kind)
            problems.append(Problem("image_column", image_column, f"it holds {told}, not images; {present}"))
    mask_column = wanted.mask_column
    if mask_column is not None and mask_column not in columns:
        problems.append(_missing_column("mask_column", mask_column, where, columns))
    elif mask_column is not None and not arrow_types.holds_images(schema.field(mask_column).type):
        told = arrow_types.told(schema.field(mask_column).type)
        problems.append(Problem("mask_column", mask_column, f"it holds {told}, not images; {present}"))
    pairs, found = pick_columns(wanted, where, columns)
    problems += found
    for name in (name for name, _ in pairs if name in columns):
        kind = schema.field(name).type
        if not arrow_types.holds_captions(kind):
            told = arrow_types.told(kind)
            problems.append(Problem("caption_column", name, f"it holds {told}, not text; {present}"))
    return image_column, problems


def _from_parquet(wanted: Wanted, files: list[Path], split: str, root: Path) -> Table:
    problems, column = [], None
    for file in files:
        try:
            schema = pq.read_schema(file)
        except Exception as error:
            problems.append(wanted.problem(f"{file.name} is not a readable parquet file ({error})"))
            continue
        if "file_name" in schema.names and wanted.image_column not in schema.names:
            return _from_text_tables(wanted, files)
        column, found = check_columns(f"{wanted.name} ({file.name})", schema, wanted)
        problems += found
    if problems:
        return refused_table(*problems)
    source = ParquetSource(files, column, split, root)
    pairs, _ = pick_columns(wanted, wanted.name, schema.names)
    captions = None if not pairs else lambda: _parquet_cells(wanted, files, pairs)
    asked = wanted.mask_column
    masks = MaskColumn(ParquetSource(files, asked, split, root)) if asked else None
    return Table(source, captions, [], [], {}, _weights(pairs), masks)


def _parquet_cells(wanted: Wanted, files: list[Path], pairs: list[tuple[str, float]]) -> pa.ChunkedArray | list:
    """The caption cells of all files, of one column or several."""
    columns = [_parquet_column(wanted, files, name) for name, _ in pairs]
    return columns[0] if len(columns) == 1 else _one_cell_a_row(columns)


def _parquet_column(wanted: Wanted, files: list[Path], name: str) -> pa.ChunkedArray:
    """A caption column of all files. Raises UserError for those that cannot be read."""
    chunks, problems = [], []
    for file in files:
        try:
            column = pq.read_table(file, columns=[name]).column(0)
            plain = pa.large_string() if arrow_types.is_text(column.type) else column.type
            chunks += column.cast(plain).chunks
        except Exception as error:
            problems.append(wanted.problem(f"{file.name} cannot be read ({error})"))
    if problems:
        raise UserError(problems, "The training images cannot be used:")
    kinds = {chunk.type for chunk in chunks}
    if len(kinds) > 1:  # a list column that files spell in different ways
        return pa.chunked_array([pa.array([cell for chunk in chunks for cell in chunk.to_pylist()])])
    return pa.chunked_array(chunks)


def _from_dataset(wanted: Wanted, dataset: datasets.Dataset, split: str, root: Path | None) -> Table:
    """A `datasets.Dataset`: its image column is cast so that images stay encoded; class labels become their names."""
    import datasets

    shown, labels = dataset, {}
    pairs, _ = pick_columns(wanted, wanted.name, dataset.column_names)
    for name, _ in pairs:
        if isinstance(dataset.features.get(name), datasets.ClassLabel):
            labels[name] = dataset.features[name]
            shown = shown.cast_column(name, datasets.Value("string"))  # only for the check of the columns
    column, problems = check_columns(wanted.name, shown.features.arrow_schema, wanted)
    if problems:
        return refused_table(*problems)

    def cells(name: str) -> list:
        found, label = list(dataset[name]), labels.get(name)
        if label is None:
            return found
        return [None if number is None or number < 0 else label.int2str(number) for number in found]

    captions = _one_cell_a_row([cells(name) for name, _ in pairs]) if pairs else None
    sources = []
    for name in (column, wanted.mask_column):
        if name is not None:
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
            sources.append(DatasetSource(dataset, name, split, root))
    masks = MaskColumn(sources[1]) if len(sources) > 1 else None
    return Table(sources[0], captions, [], [], {}, _weights(pairs), masks)


def _pick_loaded_split(
    wanted: Wanted, loaded: datasets.Dataset | datasets.DatasetDict
) -> tuple[str, datasets.Dataset]:
    """(split name, Dataset) of what `datasets` returned. Raises UserError naming the splits."""
    if hasattr(loaded, "keys"):
        split = choose_split(loaded.keys(), wanted)
        return split, loaded[split]
    return str(loaded.split or "train"), loaded


def from_saved(wanted: Wanted, path: Path) -> Table:
    """A folder written by `save_to_disk`."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        return refused_table(wanted.problem(f"cannot be read as a save_to_disk folder ({error})"))
    try:
        split, dataset = _pick_loaded_split(wanted, loaded)
    except UserError as error:
        return refused_table(*error.problems)
    return _from_dataset(wanted, dataset, split, path)


def _from_arrow(wanted: Wanted, files: list[Path], split: str, root: Path) -> Table:
    import datasets

    try:
        dataset = datasets.concatenate_datasets([datasets.Dataset.from_file(str(f)) for f in files])
    except Exception as error:
        return refused_table(wanted.problem(f"the Arrow files cannot be read ({error})"))
    return _from_dataset(wanted, dataset, split, root)


def _from_tar(wanted: Wanted, files: list[Path], split: str) -> Table:
    """WebDataset shards, through `datasets`: a column per file ending (jpg, png, txt, ...)."""
    paths = {split: [str(file) for file in files]}
    try:
        loader = datasets_library().load_dataset
        dataset = loader("webdataset", data_files=paths, split=split, cache_dir=wanted.cache_dir)
    except Exception as error:
        told = str(error).strip().split("\n")[0]
        return refused_table(wanted.problem(f"the tar shards cannot be read ({told})"))
    return _from_dataset(tar_image_column(wanted, dataset.column_names), dataset, split, None)


def tar_image_column(wanted: Wanted, columns: Sequence[str]) -> Wanted:
    """The same with the one column that is called by the ending of an image file, where the one asked for is absent.

    Tar shards name their columns by file endings.
    """
    if wanted.image_column in columns:
        return wanted
    endings = {suffix.lstrip(".") for suffix in IMAGE_SUFFIXES}
    found = [column for column in columns if column.lower() in endings]
    return replace(wanted, image_column=found[0]) if len(found) == 1 else wanted


def from_hub(wanted: Wanted) -> Table:
    """A data set of the hub, from the cache when offline. Its scripts are never executed."""
    try:
        datasets = datasets_library()
    except ImportError:
        return refused_table(wanted.problem("needs the package `datasets`", "pip install datasets"))
    # Old versions of datasets would run a data set's own script; new ones know neither scripts nor this flag.
    known = inspect.signature(datasets.load_dataset).parameters
    guard = {"trust_remote_code": False} if "trust_remote_code" in known else {}
    name = wanted.name
    try:
        loaded = datasets.load_dataset(name, wanted.config, cache_dir=wanted.cache_dir, **guard)
    except Exception as error:
        # A missing configuration's message lists those that are there below its first line.
        text = " ".join(str(error).split())[:600]
        if "onfig name is missing" in text or "BuilderConfig" in text:
            reason = f"{name} has several configurations: {text}"
            return refused_table(Problem("dataset_config_name", wanted.config, reason))
        where = f"neither a folder here ({Path(name).absolute()}) nor to be had from the hub"
        return refused_table(wanted.problem(f"{where} ({type(error).__name__}: {text})"))
    try:
        split, dataset = _pick_loaded_split(wanted, loaded)
    except UserError as error:
        return refused_table(*error.problems)
    return _from_dataset(wanted, dataset, split, None)


def _from_text_tables(wanted: Wanted, files: list[Path]) -> Table:
    """Tables that name image files in the column file_name, or in the image column, relative to the table's folder."""
    problems, names, captions, notes, pairs, masks = [], [], [], [], [], []
    root = files[0].parent
    for file in files:
        try:
            columns, rows = read_text_table(file)
        except ValueError as error:
            problems.append(wanted.problem(str(error)))
            continue
        column, pairs, found = _file_columns(wanted, file, columns)
        problems += found
        if problems:
            continue
        for number, row in enumerate(rows, start=1):
            where = f"{file.name}, row {number}"
            value = row.get(column)
            image = inside(file.parent, value) if isinstance(value, str) and value.strip() else None
            if image is not None:
                names.append(os.path.relpath(image, os.path.abspath(root)))
                captions.append([row.get(name) for name, _ in pairs])
                masks.append(_file_of(row.get(wanted.mask_column), file.parent, root))
                if masks[-1] is None:
                    told = f"{where}: {row[wanted.mask_column]!r} is no file in the folder"
                    problems.append(Problem("mask_column", wanted.mask_column, told))
            elif isinstance(value, str) and value.strip():
                problems.append(wanted.problem(f"{where}: {value} leads out of the folder"))
            else:
                problems.append(wanted.problem(f"{where}: no file name in '{column}' ({value!r})"))
            if len(problems) >= LISTED_PROBLEMS:
                break
    if not problems:
        notes += _unnamed_images(wanted.name, {file.parent for file in files}, root, [*names, *filter(None, masks)])
    if len(pairs) < 2:
        captions = [cells[0] for cells in captions] if pairs else None
    if problems:
        return refused_table(*problems)
    beside = masks_beside(root, names) if wanted.mask_column is None else MaskFiles(root, masks)
    return Table(FileSource(root, names), captions, problems, notes, {}, _weights(pairs), beside)


def _file_of(cell: object, folder: Path, root: Path) -> str | None:
    """The file that a cell names, relative to `root`; "" for an empty cell, None for one that leads out."""
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return ""
    found = inside(folder, cell) if isinstance(cell, str) else None
    return None if found is None or not found.is_file() else os.path.relpath(found, os.path.abspath(root))


def _file_columns(
    wanted: Wanted, file: Path, columns: list[str]
) -> tuple[str, list[tuple[str, float]], list[Problem]]:
    """(column of the file names, caption columns with weights, problems) of a text table."""
    where, image_column = f"{wanted.name} ({file.name})", wanted.image_column
    column = image_column if image_column in columns else "file_name"
    # The images are addressed as in `datasets`: the column file_name becomes the column image.
    shown = ["image (from file_name)" if c == "file_name" else c for c in columns]
    problems = []
    if column not in columns or (image_column not in (None, "image", "file_name") and image_column not in columns):
        problems.append(_missing_column("image_column", image_column, where, shown))
    if wanted.mask_column is not None and wanted.mask_column not in columns:
        problems.append(_missing_column("mask_column", wanted.mask_column, where, shown))
    pairs, found = pick_columns(wanted, where, columns, shown)
    return column, pairs, problems + found


def _unnamed_images(name: str, folders: set[Path], root: Path, named: list[str]) -> list[str]:
    """A note on images beside the tables that no row names."""
    known = {os.path.abspath(root / name) for name in named}
    left = []
    for folder in folders:
        for here, _, files in os.walk(folder):
            paths = (os.path.abspath(os.path.join(here, file)) for file in files if not file.startswith("."))
            paths = (path for path in paths if path not in known and not is_mask(path))
            left += [path for path in paths if path.lower().endswith(IMAGE_SUFFIXES)]
    if not left:
        return []
    shown = ", ".join(sorted(os.path.basename(path) for path in left)[:10]) + (" ..." if len(left) > 10 else "")
    return [f"{name}: {len(left)} image(s) that no row of the table names are left out: {shown}"]
