"""A found table of images becomes the image set: every header checked, every image hashed, every caption settled."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from sana_kit.data.decode import ImageFacts, inspect_image
from sana_kit.data.image_set import (
    LISTED_PROBLEMS,
    ImageSet,
    bad_image_problems,
    default_workers,
    prefetch,
    progress_bar,
)
from sana_kit.data.tables import Named, Table
from sana_kit.errors import ImageError, Problem, UserError


@dataclass
class _Headers:
    """What the headers of all rows say."""

    digests: np.ndarray  # (rows, 32) uint8
    sizes: np.ndarray  # (rows, 2) int32: width, height when upright
    bad: dict[int, str] = field(default_factory=dict)  # row -> why
    animated: int = 0
    open_ended: list[str] = field(default_factory=list)  # PNG files without their last chunk


@dataclass
class _Captions:
    """The samples: row, caption and position of each."""

    rows: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)  # rows without a caption of their own
    several: int = 0
    problems: list[Problem] = field(default_factory=list)


def refuse(problems: list[Problem]) -> None:
    """Raise all problems of a data set as one UserError."""
    raise UserError(problems, "The training images cannot be used:")


def _read_headers(source) -> _Headers:
    count, workers = len(source), default_workers()
    found = _Headers(np.zeros((count, 32), np.uint8), np.zeros((count, 2), np.int32))

    def look(row: int) -> ImageFacts | str:
        try:
            return inspect_image(source.read(row), source.name(row))
        except ImageError as error:
            return str(error)

    with progress_bar(count, "Reading images") as bar:
        for row, result in enumerate(prefetch(look, range(count), workers, 4 * workers)):
            bar.update()
            if isinstance(result, str):
                found.bad[row] = result
                continue
            found.digests[row] = np.frombuffer(result.sha256, np.uint8)
            found.sizes[row] = result.width, result.height
            found.animated += result.animated
            if result.open_ended:
                found.open_ended.append(source.name(row))
    if hasattr(source, "release"):
        source.release()
    return found


def _settle_captions(table: Table, named: Named, bad: dict[int, str], fallback: str, repeats: int) -> _Captions:
    """A caption for each repeat of each good row; the r-th repeat takes caption r modulo the row's number of them."""
    settled = _Captions()
    for row in range(len(table.source)):
        if row in bad:
            continue
        try:
            choices = caption_choices(None if table.captions is None else table.captions[row])
        except TypeError as error:
            settled.problems.append(named.problem(f"caption of {table.source.name(row)}: {error}"))
            if len(settled.problems) >= LISTED_PROBLEMS:
                break
            continue
        if not choices:
            if table.captions is not None:
                settled.empty.append(row)
            choices = [fallback]
        settled.several += len(choices) > 1
        for repeat in range(repeats):
            settled.rows.append(row)
            settled.texts.append(choices[repeat % len(choices)])
            settled.positions.append(row * repeats + repeat)
    return settled


def caption_choices(cell) -> list[str]:
    """The captions in a cell, those that are only spaces left out. Raises TypeError for anything but text."""
    if cell is None:
        return []
    if isinstance(cell, str):
        return [cell.strip()] if cell.strip() else []
    if isinstance(cell, (list, tuple)) or type(cell).__name__ in ("ndarray", "Column"):
        return [text for item in cell for text in caption_choices(item)]
    raise TypeError(f"it holds {type(cell).__name__} ({str(cell)[:60]!r}), not text; name a text column")


def _no_caption_problems(table: Table, named: Named, empty: list[int]) -> list[Problem]:
    """What is wrong where images have no caption and no instance prompt was given."""
    if table.captions is None:
        remedy = "Give one; or name a table's caption column, or put .txt files beside the images of a folder."
        return [Problem("instance_prompt", None, f"{named.value} has no captions, and there is none", remedy)]
    if not empty:
        return []
    shown = ", ".join(table.source.name(row) for row in empty[:LISTED_PROBLEMS])
    more = " ..." if len(empty) > LISTED_PROBLEMS else ""
    what = "have no caption (null, empty or only spaces) and there is no instance prompt to take instead"
    return [Problem("instance_prompt", None, f"{len(empty)} image(s) of {named.value} {what}: {shown}{more}")]


def _notes(table: Table, named: Named, headers: _Headers, captions: _Captions) -> list[str]:
    notes = list(table.notes)
    if headers.bad:
        notes.append("skip_bad_images: " + bad_image_problems(list(headers.bad.values())))
    if table.captions is None:
        notes.append(f"{named.value}: no captions in use; every image gets the instance prompt.")
    elif captions.empty:
        notes.append(f"{named.value}: {len(captions.empty)} image(s) without a caption get the instance prompt.")
    if headers.animated:
        notes.append(f"{named.value}: {headers.animated} animation(s); the first frame is taken.")
    if headers.open_ended:
        shown = ", ".join(headers.open_ended[:10])
        notes.append(
            f"{named.value}: {len(headers.open_ended)} PNG file(s) lack their last chunk but are whole: {shown}"
        )
    return notes


def assemble(table: Table, named: Named, instance_prompt: str | None, repeats: int, skip_bad: bool) -> ImageSet:
    """Check every header, settle every caption, and build the set.

    Args:
        instance_prompt: the caption of images without one; the empty text is a caption, None is none.

    Raises:
        UserError: all problems found.
    """
    source, count = table.source, len(table.source)
    headers = _read_headers(source)
    problems = []
    if headers.bad and not skip_bad:
        problems.append(named.problem(bad_image_problems(list(headers.bad.values()))))
    captions = _settle_captions(table, named, headers.bad, (instance_prompt or "").strip(), repeats)
    problems += captions.problems
    if instance_prompt is None:
        problems += _no_caption_problems(table, named, captions.empty)
    if not problems and not captions.rows:
        problems.append(
            named.problem(f"all {count} images are bad: " + bad_image_problems(list(headers.bad.values())))
        )
    if problems:
        refuse(problems)
    good = count - len(headers.bad)
    report = {
        "images": good,
        "samples": len(captions.rows),
        "bad images skipped": len(headers.bad),
        "captions from instance_prompt": len(captions.empty) if table.captions is not None else good,
        "animations, first frame taken": headers.animated,
        "images with several captions": captions.several,
        **table.counts,
    }
    return ImageSet(
        source,
        np.array(captions.rows, np.int64),
        captions.texts,
        np.array(captions.positions, np.int64),
        headers.digests,
        headers.sizes,
        report,
        _notes(table, named, headers, captions),
    )
