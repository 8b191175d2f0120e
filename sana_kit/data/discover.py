"""Find the training images that the settings name."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from sana_kit.data.assemble import Asked, assemble, refuse
from sana_kit.data.folders import find_in_folder
from sana_kit.data.headers import read_headers
from sana_kit.data.image_set import ImageSet
from sana_kit.data.masks import inspect_mask
from sana_kit.data.memory import Memory
from sana_kit.data.sources import FileSource
from sana_kit.data.tables import SPLIT_WORDS, Named, Table, Wanted, from_files, from_hub, from_saved, refused_table
from sana_kit.data.text_tables import TABLE_SUFFIXES
from sana_kit.distributed import Ranks
from sana_kit.errors import Problem
from sana_kit.files import expand

# What hub downloads hold beside their tables.
_INFO_FILES = {"dataset_infos.json", "dataset_dict.json", "state.json", "dataset_info.json"}


def load_images(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    dataset_split: str | None = None,
    instance_data_dir: str | None = None,
    image_column: str | None = "image",
    caption_column: str | None = None,
    instance_prompt: str | None = None,
    cache_dir: str | None = None,
    mask_column: str | None = None,
    repeats: int = 1,
    skip_bad_images: bool = False,
    remember_in: str | Path | None = None,
    ranks: Ranks | None = None,
) -> ImageSet:
    """Find, check and hash the training images.

    Args:
        dataset_name: a local folder (parquet files at its top or under data/, metadata.jsonl or metadata.csv beside
            images, a folder written by `save_to_disk`, .jsonl or .csv tables that name files, or just images), one
            such file, or the name of a data set on the hub. Of several splits 'train' is taken, else the only one.
        dataset_config_name: the hub configuration, or a subfolder of the local folder.
        dataset_split: the split to take.
        instance_data_dir: a folder of images, each with an optional caption in a .txt or .caption file of its name.
        image_column: column of the images; None takes the first that holds images.
        caption_column: column of the captions, or several ("a,b", "a:3,b:1": see `captions.caption_columns`); None
            gives every image of `dataset_name` the instance prompt. A cell may list several captions.
        instance_prompt: the caption of images that have none (null, empty or only spaces); the empty text is one.
        cache_dir: where `datasets` keeps what it downloads.
        mask_column: column of loss masks, images or names of files; without it, files NAME.mask.png beside the images.
        repeats: how many times each image appears, consecutively.
        skip_bad_images: leave unreadable images out and count them, instead of an error.
        remember_in: a folder that keeps digests and sizes for the next start; None: nothing is kept.
        ranks: every rank calls this; those of one machine share the reading of images, and all raise the same errors.

    Raises:
        UserError: all problems found, bad images by name.
    """
    ranks = ranks or Ranks(0, 1, torch.device("cpu"))
    table, named = ranks.run_on_all(
        lambda: find_images(
            dataset_name=dataset_name,
            dataset_config_name=dataset_config_name,
            dataset_split=dataset_split,
            instance_data_dir=instance_data_dir,
            image_column=image_column,
            caption_column=caption_column,
            cache_dir=cache_dir,
            mask_column=mask_column,
            repeats=repeats,
        )
    )
    memory = Memory(remember_in, writes=ranks.is_local_main)
    headers = read_headers(table.source, memory, ranks)
    masks = None if table.masks is None else read_headers(table.masks, memory, ranks, inspect_mask)
    asked = Asked(instance_prompt, repeats, skip_bad_images, caption_column)
    return ranks.run_on_all(lambda: assemble(table, named, headers, asked, memory, masks))


def find_images(
    *,
    dataset_name: str | None,
    dataset_config_name: str | None,
    dataset_split: str | None,
    instance_data_dir: str | None,
    image_column: str | None,
    caption_column: str | None,
    cache_dir: str | None,
    mask_column: str | None = None,
    repeats: int = 1,
) -> tuple[Table, Named]:
    """(the table of `load_images`, the setting that names it): found and checked, no image opened.

    Raises:
        UserError: all problems found.
    """
    problems = []
    if (dataset_name is None) == (instance_data_dir is None):
        found = "both" if dataset_name is not None else "neither"
        reason = f"{found} given"
        problems.append(Problem("dataset_name and instance_data_dir", None, reason, "Give exactly one of them."))
    if repeats < 1:
        problems.append(Problem("repeats", repeats, "must be at least 1"))
    if instance_data_dir is not None and caption_column is not None:
        remedy = "Put captions into .txt files beside the images."
        problems.append(
            Problem("caption_column", caption_column, "only tables have columns, a folder has none", remedy)
        )
    if instance_data_dir is not None and mask_column is not None:
        remedy = "Put masks beside the images as NAME.mask.png."
        problems.append(Problem("mask_column", mask_column, "only tables have columns, a folder has none", remedy))
    if problems:
        refuse(problems)
    if instance_data_dir is not None:
        named = Named("instance_data_dir", instance_data_dir)
        table = find_in_folder(named)
    else:
        table = _find_dataset(
            Wanted(
                dataset_name, dataset_config_name, image_column, caption_column, dataset_split, cache_dir, mask_column
            )
        )
        named = Named("dataset_name", dataset_name)
    if table.problems:
        refuse(table.problems)
    if len(table.source) == 0:
        refuse([named.problem("the data set has no images")])
    return table, named


def load_class_images(class_data_dir: str, class_prompt: str, num_class_images: int | None) -> ImageSet:
    """The first `num_class_images` images (by name) of a folder of class images; None or fewer there: all of them.

    Raises:
        UserError: no such folder, no images, or unreadable ones, which are named.
    """
    named = Named("class_data_dir", class_data_dir)
    table = find_in_folder(named, captions=False)
    if not table.problems and len(table.source) == 0:
        table.problems.append(named.problem("no images in it"))
    if table.problems:
        refuse(table.problems)
    source = table.source
    if num_class_images is not None and isinstance(source, FileSource):
        source = FileSource(source.root, source.names[:num_class_images])
    table = Table(source, None, [], table.notes, table.counts)
    return assemble(table, named, read_headers(source, Memory()), Asked(class_prompt), Memory())


def _find_dataset(wanted: Wanted) -> Table:
    """A local folder or file in one of the known layouts, else a data set of the hub."""
    name, config = wanted.name, wanted.config
    path = expand(name)
    if not path.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
            remedy = "Check the path, or give the name of a data set on the hub."
            return refused_table(wanted.problem("no such folder or file", remedy))
        return from_hub(wanted)
    if path.is_file():
        return from_files(wanted, {wanted.split or "train": [path]}, path.parent)
    if config is not None:
        if not (path / config).is_dir():
            present = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir())) or "none"
            reason = f"no such subfolder in {name}; present: {present}"
            return refused_table(Problem("dataset_config_name", config, reason))
        path = path / config
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return from_saved(wanted, path)
    metadata = split_files(path, (*TABLE_SUFFIXES, ".parquet"), stem="metadata")
    kinds = ((".parquet",), (".arrow",), (".tar",), TABLE_SUFFIXES)
    for found in (metadata, *(split_files(path, kind) for kind in kinds)):
        if found:
            return from_files(wanted, found, path)
    table = find_in_folder(Named("dataset_name", str(path)))
    if table.problems:
        present = ", ".join(sorted(p.name for p in path.iterdir())[:20]) or "nothing"
        layouts = "*.parquet (at its top or under data/), metadata.jsonl or metadata.csv beside images"
        layouts += ", a save_to_disk folder, *.jsonl or *.csv tables, *.tar shards, and images"
        looked = f"Looked for {layouts}. Present: {present}."
        table.problems = [wanted.problem("no data set recognised in this folder", looked)]
    elif wanted.caption_column is not None:
        what = "is a folder of images without a metadata file, so it has no columns. Columns present: image"
        table.problems.append(Problem("caption_column", wanted.caption_column, f"{name} {what}"))
    elif wanted.mask_column is not None:
        what = "is a folder of images without a metadata file, so it has no columns. Columns present: image"
        table.problems.append(Problem("mask_column", wanted.mask_column, f"{name} {what}"))
    return table


def split_files(folder: Path, suffixes: tuple[str, ...], stem: str | None = None) -> dict[str, list[Path]]:
    """Files by split: at the top, under data/, or in a folder named like a split; a file name may hold the split."""
    places = [folder, folder / "data"] + [p for p in sorted(folder.iterdir()) if p.is_dir() and p.name in SPLIT_WORDS]
    splits: dict[str, list[Path]] = {}
    for place in places:
        if not place.is_dir():
            continue
        for file in sorted(place.iterdir()):
            if file.suffix.lower() not in suffixes or not file.is_file() or file.name.startswith("."):
                continue
            if file.stem != stem if stem is not None else file.name in _INFO_FILES:
                continue
            words = re.split(r"[^a-z]+", file.stem.lower())
            split = next((SPLIT_WORDS[w] for w in words if w in SPLIT_WORDS), None)
            split = split or SPLIT_WORDS.get(place.name, "train")
            splits.setdefault(split, []).append(file)
    return splits
