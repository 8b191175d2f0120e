"""Find the training images that the flags name, settle every caption, and build the image set."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from sana_kit.data.decode import IMAGE_SUFFIXES, inspect_image
from sana_kit.data.image_set import (
    LISTED_PROBLEMS,
    ImageSet,
    bad_image_problems,
    default_workers,
    prefetch,
    progress_bar,
)
from sana_kit.data.sources import FileSource
from sana_kit.data.tables import SPLIT_WORDS, Table, from_files, from_hub, from_saved, refused_table
from sana_kit.errors import ImageError


def load_images(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    instance_data_dir: str | None = None,
    image_column: str | None = "image",
    caption_column: str | None = None,
    instance_prompt: str | None = None,
    cache_dir: str | None = None,
    repeats: int = 1,
    skip_bad_images: bool = False,
) -> ImageSet:
    """Find, check and hash the training images.

    Args:
        dataset_name: a local folder (parquet files at its top or under data/, metadata.jsonl or metadata.csv beside
            images, a folder written by `save_to_disk`, .jsonl or .csv tables that name files, or just images), one
            such file, or the name of a data set on the hub. Of several splits 'train' is taken, else the only one.
        dataset_config_name: the hub configuration, or a subfolder of the local folder.
        instance_data_dir: a folder of images, each with an optional caption in a .txt file of the same name.
        image_column: column of the images; None takes the first that holds images.
        caption_column: column of the captions; None gives every image of `dataset_name` the instance prompt. Where a
            cell lists several captions, the r-th repeat of the image takes caption r modulo their number, so without
            --repeats the first.
        instance_prompt: the caption of images that have none (null, empty or only spaces).
        cache_dir: where `datasets` keeps what it downloads.
        repeats: how many times each image appears, consecutively.
        skip_bad_images: leave unreadable images out and count them, instead of an error.

    Raises:
        ValueError: all problems found, each with flag, value and remedy; bad images are named.
    """
    problems = []
    if (dataset_name is None) == (instance_data_dir is None):
        found = "both" if dataset_name is not None else "neither"
        problems.append(f"--dataset_name and --instance_data_dir: {found} given; give exactly one of them.")
    if repeats < 1:
        problems.append(f"--repeats={repeats}: must be at least 1.")
    if instance_data_dir is not None and caption_column is not None:
        problems.append(
            f"--caption_column={caption_column}: only tables (--dataset_name) have columns; with --instance_data_dir"
            " put captions into .txt files beside the images."
        )
    if problems:
        _raise(problems)
    if instance_data_dir is not None:
        table = _find_in_image_folder(Path(instance_data_dir), "--instance_data_dir")
        flag = f"--instance_data_dir={instance_data_dir}"
    else:
        table = _find_dataset(dataset_name, dataset_config_name, image_column, caption_column, cache_dir)
        flag = f"--dataset_name={dataset_name}"
    if table.problems:
        _raise(table.problems)
    if len(table.source) == 0:
        _raise([f"{flag}: the data set has no images."])
    return _assemble(table, flag, instance_prompt, repeats, skip_bad_images)


def load_class_images(class_data_dir: str, class_prompt: str, num_class_images: int | None) -> ImageSet:
    """The first `num_class_images` images (by name) of a folder of class images; None or fewer there: all of them.

    Raises:
        ValueError: no such folder, no images, or unreadable ones, which are named.
    """
    table = _find_in_image_folder(Path(class_data_dir), "--class_data_dir", captions=False)
    if not table.problems and len(table.source) == 0:
        table.problems.append(f"--class_data_dir={class_data_dir}: no images in it.")
    if table.problems:
        _raise(table.problems)
    source = table.source
    if num_class_images is not None:
        source = FileSource(source.paths[:num_class_images], source.names[:num_class_images])
    table = Table(source, None, [], table.notes, table.counts)
    return _assemble(table, f"--class_data_dir={class_data_dir}", class_prompt, 1, False)


def _raise(problems: list[str]):
    raise ValueError("The training images cannot be used:" + "".join(f"\n- {p}" for p in problems))


def _assemble(table: Table, flag: str, instance_prompt: str | None, repeats: int, skip_bad: bool) -> ImageSet:
    """Check every header, settle every caption, and build the set."""
    source, count = table.source, len(table.source)
    digests, sizes = np.zeros((count, 32), np.uint8), np.zeros((count, 2), np.int32)
    bad: dict[int, str] = {}
    animated = 0

    def look(row):
        try:
            return inspect_image(source.read(row), source.name(row))
        except ImageError as error:
            return str(error)

    workers = default_workers()
    with progress_bar(count, "Reading images") as bar:
        for row, result in enumerate(prefetch(look, range(count), workers, 4 * workers)):
            bar.update()
            if isinstance(result, str):
                bad[row] = result
                continue
            digest, width, height, moving = result
            digests[row] = np.frombuffer(digest, np.uint8)
            sizes[row] = width, height
            animated += moving
    if hasattr(source, "release"):
        source.release()
    problems = []
    if bad and not skip_bad:
        problems.append(f"{flag}: " + bad_image_problems(list(bad.values())))

    rows, captions, positions = [], [], []
    empty, several, fallback = [], 0, (instance_prompt or "").strip()
    for row in range(count):
        if row in bad:
            continue
        try:
            choices = _caption_choices(None if table.captions is None else table.captions[row])
        except TypeError as error:
            problems.append(f"{flag}: caption of {source.name(row)}: {error}")
            if len(problems) >= LISTED_PROBLEMS:
                break
            continue
        if not choices:
            if table.captions is not None:
                empty.append(row)
            choices = [fallback]
        several += len(choices) > 1
        for repeat in range(repeats):
            rows.append(row)
            captions.append(choices[repeat % len(choices)])
            positions.append(row * repeats + repeat)
    if not fallback and table.captions is None:
        problems.append(
            f"{flag}: no captions: give --instance_prompt, or --caption_column for a table with captions, or .txt"
            " files beside the images of --instance_data_dir."
        )
    elif not fallback and empty:
        shown = ", ".join(source.name(row) for row in empty[:LISTED_PROBLEMS]) + (
            " ..." if len(empty) > LISTED_PROBLEMS else ""
        )
        problems.append(
            f"{flag}: {len(empty)} image(s) have no caption (null, empty or only spaces) and there is no"
            f" --instance_prompt to take instead: {shown}"
        )
    if not problems and not rows:
        problems.append(f"{flag}: all {count} images are bad: " + bad_image_problems(list(bad.values())))
    if problems:
        _raise(problems)
    report = {
        "images": count - len(bad),
        "samples": len(rows),
        "bad images skipped": len(bad),
        "captions from instance_prompt": len(empty) if table.captions is not None else count - len(bad),
        "animations, first frame taken": animated,
        "images with several captions": several,
        **table.counts,
    }
    notes = list(table.notes)
    if bad:
        notes.append("--skip_bad_images: " + bad_image_problems(list(bad.values())))
    if table.captions is None:
        notes.append(f"{flag}: no captions in use; every image gets the instance prompt.")
    elif empty:
        notes.append(f"{flag}: {len(empty)} image(s) without a caption get the instance prompt.")
    if animated:
        notes.append(f"{flag}: {animated} animation(s); the first frame is taken.")
    return ImageSet(
        source, np.array(rows, np.int64), captions, np.array(positions, np.int64), digests, sizes, report, notes
    )


def _caption_choices(cell) -> list[str]:
    """The captions in a cell, those that are only spaces left out. Raises TypeError for anything but text."""
    if cell is None:
        return []
    if isinstance(cell, str):
        return [cell.strip()] if cell.strip() else []
    if isinstance(cell, (list, tuple)) or type(cell).__name__ in ("ndarray", "Column"):
        return [text for item in cell for text in _caption_choices(item)]
    raise TypeError(f"it holds {type(cell).__name__} ({str(cell)[:60]!r}), not text; name a text column.")


def _find_in_image_folder(folder: Path, flag: str, captions: bool = True) -> Table:
    """The images directly in a folder, each with the caption of its .txt file."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        return refused_table(f"{flag}={folder}: {what}.")
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        return refused_table(f"{flag}={folder}: cannot be listed ({error.strerror}).")
    files = [e for e in entries if e.is_file() and not e.name.startswith(".")]
    images = [f for f in files if f.suffix.lower() in IMAGE_SUFFIXES]
    stems = {f.stem for f in images}
    texts = {f.stem: f for f in files if f.suffix.lower() == ".txt" and f.stem in stems} if captions else {}
    used = set(images) | set(texts.values())
    others = [f.name for f in files if f not in used]
    folders = [e.name for e in entries if e.is_dir()]
    problems, notes, cells = [], [], []
    if not images:
        hint = (
            f" (it has the subfolders {', '.join(folders[:5])}; images are looked for at the top)" if folders else ""
        )
        problems.append(f"{flag}={folder}: no images in it{hint}. Known endings: {', '.join(IMAGE_SUFFIXES)}.")
    for image in images:
        text = texts.get(image.stem)
        try:
            cells.append(None if text is None else text.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{flag}={folder}: caption {text.name} cannot be read as UTF-8 text ({error}).")
    shared = len([p for p in images if p.stem in texts]) - len(texts)
    if shared:
        notes.append(f"{flag}={folder}: {shared} caption file(s) serve several images of the same name.")
    if others:
        shown = ", ".join(others[:10]) + (" ..." if len(others) > 10 else "")
        notes.append(f"{flag}={folder}: {len(others)} other file(s) skipped by name: {shown}")
    if any(name.startswith("metadata.") for name in others):
        notes.append(f"{flag}={folder}: to use its metadata file give the folder as --dataset_name.")
    counts = {"other files skipped": len(others), "captions shared by images of one name": shared}
    return Table(FileSource(images, [p.name for p in images]), cells if texts else None, problems, notes, counts)


def _find_dataset(name, config, image_column, caption_column, cache_dir) -> Table:
    """A local folder or file in one of the known layouts, else a data set of the hub."""
    path = Path(name).expanduser()
    if not path.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
            return refused_table(
                f"--dataset_name={name}: no such folder or file. Check the path, or give the"
                " name of a data set on the hub."
            )
        return from_hub(name, config, image_column, caption_column, cache_dir)
    columns = (image_column, caption_column)
    if path.is_file():
        return from_files(name, {"train": [path]}, path.parent, *columns)
    if config is not None:
        if not (path / config).is_dir():
            present = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir())) or "none"
            return refused_table(f"--dataset_config_name={config}: no such subfolder in {name}; present: {present}.")
        path = path / config
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return from_saved(name, path, *columns)
    splits = _splits(path, (".parquet",))
    metadata = {**_splits(path, (".jsonl", ".csv", ".parquet"), stem="metadata")}
    if metadata:
        return from_files(name, metadata, path, *columns)
    for found in (splits, _splits(path, (".arrow",)), _splits(path, (".jsonl", ".csv"))):
        if found:
            return from_files(name, found, path, *columns)
    table = _find_in_image_folder(path, "--dataset_name")
    if table.problems:
        present = ", ".join(sorted(p.name for p in path.iterdir())[:20]) or "nothing"
        table.problems = [
            f"--dataset_name={name}: no data set recognised in this folder. Looked for *.parquet (at its top or under"
            " data/), metadata.jsonl or metadata.csv beside images, a save_to_disk folder, *.jsonl or *.csv tables,"
            f" and images. Present: {present}."
        ]
    elif caption_column is not None:
        table.problems.append(
            f"--caption_column={caption_column}: {name} is a folder of images without a metadata file, so it has no"
            " columns. Columns present: image."
        )
    return table


def _splits(folder: Path, suffixes: tuple[str, ...], stem: str | None = None) -> dict[str, list[Path]]:
    """Files by split: at the top, under data/, or in a folder named like a split; a file name may hold the split."""
    places = [folder, folder / "data"] + [p for p in sorted(folder.iterdir()) if p.is_dir() and p.name in SPLIT_WORDS]
    splits: dict[str, list[Path]] = {}
    for place in places:
        if not place.is_dir():
            continue
        for file in sorted(place.iterdir()):
            if file.suffix.lower() not in suffixes or not file.is_file() or file.name.startswith("."):
                continue
            if stem is not None and file.stem != stem:
                continue
            words = re.split(r"[^a-z]+", file.stem.lower())
            split = next((SPLIT_WORDS[w] for w in words if w in SPLIT_WORDS), None)
            split = split or SPLIT_WORDS.get(place.name, "train")
            splits.setdefault(split, []).append(file)
    return splits
