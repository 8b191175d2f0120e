"""Folders of images: captions beside them, a line each, and everything else in the folder counted and told."""

from __future__ import annotations

from pathlib import Path

from sana_kit.data.captions import lines_of
from sana_kit.data.decode import IMAGE_SUFFIXES
from sana_kit.data.masks import is_mask, masks_beside
from sana_kit.data.sources import FileSource
from sana_kit.data.tables import Named, Table, refused_table
from sana_kit.errors import Problem
from sana_kit.files import expand

CAPTION_SUFFIXES = (".txt", ".caption")


def image_files(folder: Path) -> list[Path]:
    """The image files directly in a folder, by name: the one rule of what counts as an image."""
    names = (path for path in folder.iterdir() if not path.name.startswith("."))
    images = (path for path in names if path.suffix.lower() in IMAGE_SUFFIXES and not is_mask(path.name))
    return sorted(path for path in images if path.is_file())


def free_class_names(folder: Path, count: int) -> list[str]:
    """`count` names class-00000.png, class-00001.png, ... that no file of the folder has; gaps are filled first."""
    taken, names, number = {path.name for path in folder.iterdir()}, [], 0
    while len(names) < count:
        name = f"class-{number:05d}.png"
        if name not in taken:
            names.append(name)
        number += 1
    return names


def _caption_files(named: Named, files: list[Path], stems: set[str]) -> tuple[dict[str, Path], list[Problem]]:
    """({stem: caption file}, problems); one image with two caption files is a problem."""
    texts: dict[str, Path] = {}
    problems = []
    for file in files:
        if file.suffix.lower() in CAPTION_SUFFIXES and file.stem in stems:
            if file.stem in texts:
                both = f"{texts[file.stem].name} and {file.name}"
                problems.append(named.problem(f"{both} are captions of the same image", "Keep one of them."))
            texts[file.stem] = file
    return texts, problems


def _listed(names: list[str], limit: int = 10) -> str:
    return ", ".join(names[:limit]) + (" ..." if len(names) > limit else "")


def find_in_folder(named: Named, captions: bool = True) -> Table:
    """The images directly in a folder, each with the caption of its .txt or .caption file."""
    folder = expand(named.value)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        return refused_table(named.problem(what))
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        return refused_table(named.problem(f"cannot be listed ({error.strerror})"))
    files = [e for e in entries if e.is_file() and not e.name.startswith(".")]
    images = image_files(folder)
    texts, problems = _caption_files(named, files, {f.stem for f in images}) if captions else ({}, [])
    masks = masks_beside(folder, [image.name for image in images]) if captions else None
    used = set(images) | set(texts.values()) | {folder / name for name in (masks.names if masks else ())}
    others = [f.name for f in files if f not in used]
    folders = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    broken = [e.name for e in entries if e.is_symlink() and not e.exists()]
    if not images:
        hint = f" (it has the subfolders {_listed(folders, 5)}; images are looked for at the top)" if folders else ""
        problems.append(named.problem(f"no images in it{hint}", f"Known endings: {', '.join(IMAGE_SUFFIXES)}."))
    cells = []
    for text in (texts.get(image.stem) for image in images):
        try:
            cells.append(None if text is None else lines_of(text.read_text(encoding="utf-8-sig")))
        except (OSError, UnicodeDecodeError) as error:
            problems.append(named.problem(f"caption {text.name} cannot be read as UTF-8 text ({error})"))
    shared = len([image for image in images if image.stem in texts]) - len(texts)
    notes = _notes(str(folder), shared, others, folders, broken)
    counts = {"other files skipped": len(others), "captions shared by images of one name": shared}
    source = FileSource(folder, [image.name for image in images])
    return Table(source, cells if texts else None, problems, notes, counts, masks=masks)


def _notes(where: str, shared: int, others: list[str], folders: list[str], broken: list[str]) -> list[str]:
    """One sentence for each kind of thing in the folder that is not used as it stands."""
    notes = []
    if shared:
        notes.append(f"{where}: {shared} caption file(s) serve several images of the same name.")
    if others:
        notes.append(f"{where}: {len(others)} other file(s) skipped by name: {_listed(others)}")
    if folders:
        notes.append(f"{where}: {len(folders)} subfolder(s) are not searched: {_listed(folders)}")
    if broken:
        notes.append(f"{where}: {len(broken)} broken link(s): {_listed(broken)}")
    if any(name.startswith("metadata.") for name in others):
        notes.append(f"{where}: its metadata file is not used; give the folder as a data set to use it.")
    return notes
