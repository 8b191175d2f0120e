"""Folders of images: captions beside them, a line each, and everything else in the folder counted and told."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from sana_kit.data.captions import lines_of
from sana_kit.data.decode import IMAGE_SUFFIXES
from sana_kit.data.masks import is_mask, masks_of
from sana_kit.data.memory import all_settled, stat_files
from sana_kit.data.sources import FileSource
from sana_kit.data.tables import Named, Table, refused_table
from sana_kit.data.texts import text_array
from sana_kit.errors import Problem, listed
from sana_kit.files import expand

CAPTION_SUFFIXES = (".txt", ".caption")
_BLOCK = 4096  # names that are Python objects at once


def image_files(folder: Path) -> list[Path]:
    """The image files directly in a folder, by name: the one rule of what counts as an image."""
    return [folder / name for name in _listed_in(folder).images.to_pylist()]


def free_class_names(folder: Path, count: int) -> list[str]:
    """`count` names class-00000.png, class-00001.png, ... that no file of the folder has; gaps are filled first."""
    taken, names, number = {path.name for path in folder.iterdir()}, [], 0
    while len(names) < count:
        name = f"class-{number:05d}.png"
        if name not in taken:
            names.append(name)
        number += 1
    return names


@dataclass
class _Listing:
    """Names of what lies directly in a folder, sorted; hidden entries are none of them.

    Attributes:
        images, captions: large_string arrays, as a set may have millions.
        masks: loss masks, which are no training images.
        others, folders, broken: the rest by kind; `broken` are links that lead nowhere.
        nameless: images, captions and masks whose names are no UTF-8 text, as they can be shown.
    """

    images: pa.Array
    captions: pa.Array
    masks: list[str]
    others: list[str]
    folders: list[str]
    broken: list[str]
    nameless: list[str]


class _Names:
    """Gathers names as Arrow does, some thousands of Python's strings at a time."""

    def __init__(self) -> None:
        self._blocks: list[pa.Array] = []
        self._names: list[str] = []

    def add(self, name: str) -> None:
        self._names.append(name)
        if len(self._names) == _BLOCK:
            self._close_block()

    def _close_block(self) -> None:
        self._blocks.append(text_array(self._names))
        self._names.clear()

    def sorted(self) -> pa.Array:
        self._close_block()
        names = pa.concat_arrays(self._blocks)
        return names.take(pc.sort_indices(names))


def _listed_in(folder: Path) -> _Listing:
    """One look at a folder, without a stat for each entry."""
    images, captions = _Names(), _Names()
    masks, others, folders, broken, nameless = [], [], [], [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name[0] == ".":
                continue
            if entry.is_file():
                suffix = name[name.rfind(".") :].lower() if "." in name else ""
                if not name.isascii() and (shown := _shown(name)) != name:
                    (nameless if suffix in (*IMAGE_SUFFIXES, *CAPTION_SUFFIXES) else others).append(shown)
                elif is_mask(name):
                    masks.append(name)
                elif suffix in IMAGE_SUFFIXES:
                    images.add(name)
                elif suffix in CAPTION_SUFFIXES:
                    captions.add(name)
                else:
                    others.append(name)
            elif entry.is_dir():
                folders.append(_shown(name))
            elif entry.is_symlink():
                broken.append(_shown(name))
    rest = (sorted(names) for names in (masks, others, folders, broken, nameless))
    return _Listing(images.sorted(), captions.sorted(), *rest)


def _shown(name: str) -> str:
    r"""A name as text: bytes that are not UTF-8 as \xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _stems(names: pa.Array) -> pa.Array:
    return pc.replace_substring_regex(names, r"\.[^.]*$", "")


class CaptionFiles:
    """The caption files of a folder's images, read when a run asks for them and no earlier one has settled them.

    Args:
        named: the folder.
        root: its path.
        names: large_string, a file's name per image, null where it has none; several images may share one.
    """

    def __init__(self, named: Named, root: Path, names: pa.Array):
        self._named = named
        self._files = FileSource(root, names)

    def identity(self) -> str | None:
        """What changes when a caption does: names, sizes and times. None for files that changed a moment ago."""
        files = FileSource(self._files.root, self._files.names.array.drop_null())
        sizes, changed = stat_files(files)
        if not all_settled(changed):
            return None
        whole = hashlib.sha256(self._files.root.encode("utf-8", "surrogateescape"))
        for block in self._files.names.blocks():
            whole.update("/".join("" if name is None else name for name in block).encode("utf-8", "surrogateescape"))
        whole.update(sizes.tobytes())
        whole.update(changed.tobytes())
        return f"folder {whole.hexdigest()}"

    def read(self) -> tuple[list[str | list[str] | None], list[Problem]]:
        """(each image's caption, captions or None; a problem per file that is no text)."""
        cells: list[str | list[str] | None] = []
        problems = []
        for name in self._files.names:
            if name is None:
                cells.append(None)
                continue
            try:
                with open(os.path.join(self._files.root, name), encoding="utf-8-sig") as file:
                    cells.append(lines_of(file.read()))
            except (OSError, UnicodeDecodeError) as error:
                problems.append(self._named.problem(f"caption {name} cannot be read as UTF-8 text ({error})"))
                cells.append(name)  # stands for what it should hold, so that it is not told as missing, too
        return cells, problems


def _captions_of(named: Named, listing: _Listing) -> tuple[pa.Array, list[str], list[Problem]]:
    """(caption file per image or null, caption files of no image, problems): one image with two files is a problem."""
    images, captions = _stems(listing.images), _stems(listing.captions)
    serves = pc.is_in(captions, value_set=images)
    unused = listing.captions.filter(pc.invert(serves)).to_pylist()
    names, stems = listing.captions.filter(serves), captions.filter(serves)
    problems = []
    if len(pc.unique(stems)) < len(stems):
        files: dict[str, list[str]] = {}
        for stem, name in zip(stems.to_pylist(), names.to_pylist(), strict=True):
            files.setdefault(stem, []).append(name)
        for both in (" and ".join(found) for found in files.values() if len(found) > 1):
            problems.append(named.problem(f"{both} are captions of the same image", "Keep one of them."))
    return names.take(pc.index_in(images, value_set=stems)), unused, problems


def find_in_folder(named: Named, captions: bool = True) -> Table:
    """The images directly in a folder, each with the caption of its .txt or .caption file."""
    folder = expand(named.value)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        return refused_table(named.problem(what))
    try:
        listing = _listed_in(folder)
    except OSError as error:
        return refused_table(named.problem(f"cannot be listed ({error.strerror})"))
    images, folders = listing.images, listing.folders
    if captions:
        files, unused, problems = _captions_of(named, listing)
    else:
        files, unused, problems = pa.nulls(len(images), pa.large_string()), listing.captions.to_pylist(), []
    masks = masks_of(folder, images.to_pylist(), listing.masks) if captions and listing.masks else None
    taken = set(masks.names) if masks else set()
    others = sorted([*listing.others, *unused, *(name for name in listing.masks if name not in taken)])
    if listing.nameless:
        what = f"the names of {len(listing.nameless)} file(s) in it are not UTF-8: {listed(listing.nameless)}"
        problems.append(named.problem(what, "Rename them."))
    if not len(images):
        hint = f" (it has the subfolders {listed(folders, 5)}; images are looked for at the top)" if folders else ""
        problems.append(named.problem(f"no images in it{hint}", f"Known endings: {', '.join(IMAGE_SUFFIXES)}."))
    used = len(files) - files.null_count
    shared = used - len(pc.unique(files.drop_null()))
    notes = _notes(str(folder), shared, others, folders, listing.broken)
    counts = {"other files skipped": len(others), "captions shared by images of one name": shared}
    cells = CaptionFiles(named, folder, files) if used else None
    pa.default_memory_pool().release_unused()  # the joins of a large folder need ten times what they give
    return Table(FileSource(folder, images), cells, problems, notes, counts, masks=masks)


def _notes(where: str, shared: int, others: list[str], folders: list[str], broken: list[str]) -> list[str]:
    """One sentence for each kind of thing in the folder that is not used as it stands."""
    notes = []
    if shared:
        notes.append(f"{where}: {shared} caption file(s) serve several images of the same name.")
    if others:
        notes.append(f"{where}: {len(others)} other file(s) skipped by name: {listed(others)}")
    if folders:
        notes.append(f"{where}: {len(folders)} subfolder(s) are not searched: {listed(folders)}")
    if broken:
        notes.append(f"{where}: {len(broken)} broken link(s): {listed(broken)}")
    if any(name.startswith("metadata.") for name in others):
        notes.append(f"{where}: its metadata file is not used; give the folder as a data set to use it.")
    return notes
