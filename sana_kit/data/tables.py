"""Tables of images and captions: parquet, Arrow, jsonl, csv, save_to_disk folders, data sets of the hub."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

from sana_kit.data.image_set import LISTED_PROBLEMS
from sana_kit.data.sources import DatasetSource, FileSource, ParquetSource, inside

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


@dataclass
class Table:
    """A found data set: its images and, per row, the raw caption cell (`captions` None: no caption column)."""

    source: object
    captions: list | None
    problems: list[str]
    notes: list[str]
    counts: dict[str, int]


def refused_table(problem: str) -> Table:
    """No data set, for this reason."""
    return Table(None, None, [problem], [], {})


def _choose_split(names, flag_value: str) -> str:
    """'train', else the only one. Raises ValueError naming them all."""
    names = list(names)
    if "train" in names:
        return "train"
    if len(names) == 1:
        return names[0]
    raise ValueError(f"--dataset_name={flag_value}: several splits and none is 'train': {', '.join(names)}.")


def _missing_column(flag: str, value: str, name: str, columns) -> str:
    return f"{flag}={value}: no such column in {name}; columns present: {', '.join(columns)}."


def from_files(name, splits: dict[str, list[Path]], root: Path, image_column, caption_column) -> Table:
    """Parquet, Arrow, jsonl or csv files of the chosen split."""
    try:
        split = _choose_split(splits, name)
    except ValueError as error:
        return refused_table(str(error))
    files = splits[split]
    for file in files:
        with open(file, "rb") as handle:
            if handle.read(23) == b"version https://git-lfs":
                return refused_table(
                    f"--dataset_name={name}: {file.name} is a Git LFS pointer; run `git lfs pull` there."
                )
    kinds = {f.suffix.lower() for f in files}
    if len(kinds) > 1:
        return refused_table(f"--dataset_name={name}: files of several kinds: {', '.join(f.name for f in files)}.")
    kind = kinds.pop()
    if kind == ".parquet":
        return _from_parquet(name, files, split, root, image_column, caption_column)
    if kind == ".arrow":
        return _from_arrow(name, files, split, root, image_column, caption_column)
    if kind in (".jsonl", ".json", ".csv"):
        return _from_text_tables(name, files, image_column, caption_column)
    return refused_table(f"--dataset_name={name}: unknown kind of file; use .parquet, .arrow, .jsonl or .csv.")


def _holds_images(kind) -> bool:
    """Whether an Arrow type can be a column of encoded images: binary, or a struct with a field 'bytes'."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(kind.field(k).name == "bytes" for k in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _check_columns(name, schema, image_column, caption_column) -> tuple[str | None, list[str]]:
    """(image column, problems) for an Arrow schema."""
    import pyarrow as pa

    columns, problems = list(schema.names), []
    if image_column is None:
        image_column = next((c for c in columns if _holds_images(schema.field(c).type)), None)
        if image_column is None:
            problems.append(
                f"--image_column: no column of {name} holds images; columns present: {', '.join(columns)}."
            )
    elif image_column not in columns:
        problems.append(_missing_column("--image_column", image_column, name, columns))
    elif not _holds_images(schema.field(image_column).type) and not pa.types.is_string(
        schema.field(image_column).type
    ):
        problems.append(
            f"--image_column={image_column}: it holds {schema.field(image_column).type}, not images; columns"
            f" present: {', '.join(columns)}."
        )
    if caption_column is not None and caption_column not in columns:
        problems.append(_missing_column("--caption_column", caption_column, name, columns))
    elif caption_column is not None and not _holds_text(schema.field(caption_column).type):
        problems.append(
            f"--caption_column={caption_column}: it holds {schema.field(caption_column).type}, not text; columns"
            f" present: {', '.join(columns)}."
        )
    return image_column, problems


def _holds_text(kind) -> bool:
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _from_parquet(name, files, split, root, image_column, caption_column) -> Table:
    import pyarrow.parquet as pq

    schema = None
    problems, captions = [], []
    for file in files:
        try:
            this = pq.read_schema(file)
        except Exception as error:
            problems.append(f"--dataset_name={name}: {file.name} is not a readable parquet file ({error}).")
            continue
        if "file_name" in this.names and image_column not in this.names:
            return _from_text_tables(name, files, image_column, caption_column)
        column, found = _check_columns(f"{name} ({file.name})", this, image_column, caption_column)
        problems += found
        schema = schema or this
        if not found and caption_column is not None:
            try:
                captions += pq.read_table(file, columns=[caption_column]).column(0).to_pylist()
            except Exception as error:
                problems.append(f"--dataset_name={name}: {file.name} cannot be read ({error}).")
    if problems:
        return Table(None, None, problems, [], {})
    source = ParquetSource(files, column, split, root)
    return Table(source, captions if caption_column is not None else None, [], [], {})


def _from_dataset(name, dataset, split, root, image_column, caption_column) -> Table:
    """A `datasets.Dataset`: its image column is cast so that images stay encoded."""
    import datasets

    schema = dataset.features.arrow_schema
    column, problems = _check_columns(name, schema, image_column, caption_column)
    if problems:
        return Table(None, None, problems, [], {})
    captions = list(dataset[caption_column]) if caption_column is not None else None
    dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return Table(DatasetSource(dataset, column, split, root), captions, [], [], {})


def _pick_loaded_split(name, loaded):
    """(split name, Dataset) of what `datasets` returned. Raises ValueError naming the splits."""
    if hasattr(loaded, "keys"):
        split = _choose_split(loaded.keys(), name)
        return split, loaded[split]
    return str(loaded.split or "train"), loaded


def from_saved(name, path, image_column, caption_column) -> Table:
    """A folder written by `save_to_disk`."""
    import datasets

    try:
        split, dataset = _pick_loaded_split(name, datasets.load_from_disk(str(path)))
    except Exception as error:
        return refused_table(f"--dataset_name={name}: cannot be read as a save_to_disk folder ({error}).")
    return _from_dataset(name, dataset, split, path, image_column, caption_column)


def _from_arrow(name, files, split, root, image_column, caption_column) -> Table:
    import datasets

    try:
        dataset = datasets.concatenate_datasets([datasets.Dataset.from_file(str(f)) for f in files])
    except Exception as error:
        return refused_table(f"--dataset_name={name}: the Arrow files cannot be read ({error}).")
    return _from_dataset(name, dataset, split, root, image_column, caption_column)


def from_hub(name, config, image_column, caption_column, cache_dir) -> Table:
    """A data set of the hub, from the cache when offline. Its scripts are never executed."""
    import inspect

    try:
        import datasets
    except ImportError:
        return refused_table("--dataset_name: needs the package `datasets`: pip install datasets.")
    # Old versions of datasets would run a data set's own script; new ones know neither scripts nor this flag.
    known = inspect.signature(datasets.load_dataset).parameters
    guard = {"trust_remote_code": False} if "trust_remote_code" in known else {}
    try:
        loaded = datasets.load_dataset(name, config, cache_dir=cache_dir, **guard)
        split, dataset = _pick_loaded_split(name, loaded)
    except Exception as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else ""
        return refused_table(
            f"--dataset_name={name}: neither a folder here ({Path(name).absolute()}) nor to be had from the hub"
            f" ({type(error).__name__}: {text})."
        )
    return _from_dataset(name, dataset, split, None, image_column, caption_column)


def _read_text_table(file: Path) -> tuple[list[str], list[dict]]:
    """(columns, rows) of a .jsonl, .csv or small .parquet table. Raises ValueError naming the line."""
    if file.suffix.lower() == ".parquet":
        import pyarrow.parquet as pq

        table = pq.read_table(file)
        return table.column_names, table.to_pylist()
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.name} cannot be read as UTF-8 text ({error})") from None
    if file.suffix.lower() == ".csv":
        csv.field_size_limit(2**24)
        reader = csv.DictReader(io.StringIO(text, newline=""))
        try:
            rows = list(reader)
        except csv.Error as error:
            raise ValueError(f"{file.name}, line {reader.line_num}: {error}") from None
        return list(reader.fieldnames or []), rows
    columns: dict[str, None] = {}
    rows = []
    # Not str.splitlines: JSON strings may hold line separators that it would split at.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file.name}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{file.name}, line {number}: a JSON object is expected, not {type(row).__name__}")
        columns.update(dict.fromkeys(row))
        rows.append(row)
    return list(columns), rows


def _from_text_tables(name, files, image_column, caption_column) -> Table:
    """Tables that name image files in the column file_name, or in --image_column, relative to the table's folder."""
    problems, paths, names, captions = [], [], [], []
    root = files[0].parent
    for file in files:
        try:
            columns, rows = _read_text_table(file)
        except ValueError as error:
            problems.append(f"--dataset_name={name}: {error}.")
            continue
        column = image_column if image_column in columns else "file_name"
        # The images are addressed as in `datasets`: the column file_name becomes the column image.
        shown = ["image (from file_name)" if c == "file_name" else c for c in columns]
        if column not in columns or (image_column not in (None, "image", "file_name") and image_column not in columns):
            problems.append(_missing_column("--image_column", image_column, f"{name} ({file.name})", shown))
        if caption_column is not None and caption_column not in columns:
            problems.append(_missing_column("--caption_column", caption_column, f"{name} ({file.name})", shown))
        if problems:
            continue
        for number, row in enumerate(rows, start=1):
            value = row.get(column)
            if not isinstance(value, str) or not value.strip():
                problems.append(
                    f"--dataset_name={name}: {file.name}, row {number}: no file name in '{column}' ({value!r})."
                )
            else:
                image = inside(file.parent, value)
                if image is None:
                    problems.append(
                        f"--dataset_name={name}: {file.name}, row {number}: {value} leads out of the folder."
                    )
                else:
                    paths.append(image)
                    names.append(os.path.relpath(image, root))
                    captions.append(row.get(caption_column) if caption_column is not None else None)
            if len(problems) >= LISTED_PROBLEMS:
                break
    return Table(FileSource(paths, names), captions if caption_column is not None else None, problems, [], {})
