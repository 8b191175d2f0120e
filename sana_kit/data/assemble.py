"""A found table of images becomes the image set: every header checked, every image hashed, every caption settled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sana_kit.data.captions import Choices
from sana_kit.data.image_set import LISTED_PROBLEMS, ImageSet, Masks, bad_image_problems
from sana_kit.data.memory import ANIMATED, OPEN_ENDED, Headers, Memory, as_numbers
from sana_kit.data.tables import Named, Table
from sana_kit.data.texts import Texts
from sana_kit.errors import Problem, UserError

# What str.strip() takes off.
WHITESPACE = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)


@dataclass(frozen=True)
class Asked:
    """What of a data set is asked for, beside its place.

    Attributes:
        instance_prompt: the caption of images without one; the empty text is a caption, None is none.
        repeats: how many times each image appears.
        skip_bad: leave bad images out instead of an error.
        caption_column: where captions come from.
    """

    instance_prompt: str | None
    repeats: int = 1
    skip_bad: bool = False
    caption_column: str | None = None


@dataclass
class _Captions:
    """The captions by sample: every good row, each repeated.

    Attributes:
        empty: rows without a caption of their own, the first few, and how many.
        several: how many rows have more than one.
        choices: all captions by sample; None where each has one.
    """

    texts: Texts = field(default_factory=Texts)
    empty: tuple[Sequence[int], int] = ((), 0)
    several: int = 0
    choices: Choices | None = None
    problems: list[Problem] = field(default_factory=list)


def refuse(problems: list[Problem]) -> None:
    """Raise all problems of a data set as one UserError."""
    raise UserError(problems, "The training images cannot be used:")


def _settle_captions(table: Table, named: Named, good: np.ndarray, asked: Asked) -> _Captions:
    """The captions of each repeat of each good row."""
    if hasattr(table.captions, "read"):
        cells, problems = table.captions.read()
    else:
        cells, problems = table.captions() if callable(table.captions) else table.captions, []
    settled = _settle_column(cells, table, named, good, asked)
    settled.problems[:0] = problems
    return settled


def _settle_column(
    cells: list | pa.ChunkedArray | None, table: Table, named: Named, good: np.ndarray, asked: Asked
) -> _Captions:
    fallback, repeats = (asked.instance_prompt or "").strip(), asked.repeats
    if cells is None:
        return _Captions(Texts(pa.repeat(pa.scalar(fallback, pa.large_string()), len(good) * repeats)))
    column = _as_texts(cells) if isinstance(cells, list) else cells
    if column is None or column.type != pa.large_string():
        listed = cells if isinstance(cells, list) else cells.to_pylist()
        return _settle_cells(listed, table, named, good, asked)
    texts = pc.utf8_trim(column, characters=WHITESPACE).take(pa.array(good))
    empty = pc.fill_null(pc.equal(pc.binary_length(texts), 0), True)
    texts = pc.if_else(empty, pa.scalar(fallback, pa.large_string()), texts)
    rows = good[_booleans(empty)]
    if repeats > 1:
        texts = texts.take(pa.array(np.repeat(np.arange(len(good)), repeats)))
    return _Captions(Texts(texts), (rows[: LISTED_PROBLEMS + 1].tolist(), len(rows)))


def _as_texts(cells: list) -> pa.ChunkedArray | None:
    """Cells that are texts or null; None for lists and numbers, which are settled cell by cell."""
    try:
        return pa.chunked_array([pa.array(cells, pa.large_string())])
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError):
        return None


def _booleans(column: pa.ChunkedArray) -> np.ndarray:
    """(N,) bool."""
    parts = [as_numbers(chunk.cast(pa.uint8()), np.uint8) for chunk in column.chunks]
    return np.concatenate(parts).astype(bool) if parts else np.zeros(0, bool)


def _settle_cells(cells: list, table: Table, named: Named, good: np.ndarray, asked: Asked) -> _Captions:
    """`_settle_captions` for cells that hold anything else than one text."""
    texts, counts, weights, empty, settled = [], [], [], [], _Captions()
    for row in good.tolist():
        try:
            choices, shares = _weighted(cells[row], table.weights)
        except TypeError as error:
            settled.problems.append(named.problem(f"caption of {table.source.name(row)}: {error}"))
            if len(settled.problems) >= LISTED_PROBLEMS:
                break
            continue
        if not choices:
            empty.append(row)
            choices, shares = [(asked.instance_prompt or "").strip()], [1.0]
        settled.several += len(choices) > 1
        texts += choices
        weights += shares
        counts.append(len(choices))
    if settled.problems:
        return settled
    starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
    repeated = np.repeat(np.arange(len(counts)), asked.repeats)
    whole = Texts(texts)
    settled.texts = Texts(whole.array.take(pa.array(starts[:-1][repeated])))
    settled.empty = (empty[: LISTED_PROBLEMS + 1], len(empty))
    if settled.several:
        settled.choices = Choices(whole, starts, np.array(weights)).take(repeated)
    return settled


def _weighted(cell: Any, columns: tuple[float, ...] | None) -> tuple[list[str], list[float]]:
    """(captions, their weights) of a cell, or of a row's cells in columns of these weights.

    A column's weight is shared by the captions of its cell; an empty cell leaves its share to the others.
    """
    texts, weights = [], []
    for part, weight in [(cell, 1.0)] if columns is None else zip(cell, columns, strict=True):
        found = caption_choices(part)
        texts += found
        weights += [weight / len(found) for _ in found]
    return texts, weights


def _remembered_captions(table: Table, named: Named, good: np.ndarray, asked: Asked, memory: Memory) -> _Captions:
    """`_settle_captions`, or what it gave for the same table before."""
    keeper = next((part for part in (table.captions, table.source) if hasattr(part, "identity")), None)
    identity = None if keeper is None else keeper.identity()
    parts = ("drawn", asked.caption_column, asked.instance_prompt, asked.repeats)
    count = len(good) * asked.repeats
    found = memory.recall_captions(identity, *parts)
    if found is not None and len(found[0]) == count and found[2]["rows"] == len(good):
        texts, choices, notes = found
        return _Captions(texts, tuple(notes["empty"]), notes["several"], choices)
    settled = _settle_captions(table, named, good, asked)
    if not settled.problems and len(good) == len(table.source):  # with bad rows the next start may see others
        notes = {"empty": settled.empty, "several": settled.several, "rows": len(good)}
        memory.keep_captions(identity, *parts, captions=settled.texts, choices=settled.choices, notes=notes)
    return settled


def caption_choices(cell: Any) -> list[str]:
    """The captions in a cell, those that are only spaces left out. Raises TypeError for anything but text."""
    if cell is None:
        return []
    if isinstance(cell, str):
        if not cell.isascii() and any("\ud800" <= letter <= "\udfff" for letter in cell):
            raise TypeError(f"it holds half a character ({cell[:60]!r})")
        return [cell.strip()] if cell.strip() else []
    if isinstance(cell, (list, tuple)) or type(cell).__name__ in ("ndarray", "Column"):
        return [text for item in cell for text in caption_choices(item)]
    raise TypeError(f"it holds {type(cell).__name__} ({str(cell)[:60]!r}), not text; name a text column")


def _no_caption_problems(table: Table, named: Named, captions: _Captions) -> list[Problem]:
    """What is wrong where images have no caption and no instance prompt was given."""
    if table.captions is None:
        remedy = "Give one; or name a table's caption column, or put .txt files beside the images of a folder."
        return [Problem("instance_prompt", None, f"{named.value} has no captions, and there is none", remedy)]
    rows, count = captions.empty
    if not count:
        return []
    shown = ", ".join(table.source.name(row) for row in rows[:LISTED_PROBLEMS])
    more = " ..." if count > LISTED_PROBLEMS else ""
    what = "have no caption (null, empty or only spaces) and there is no instance prompt to take instead"
    return [Problem("instance_prompt", None, f"{count} image(s) of {named.value} {what}: {shown}{more}")]


def _notes(table: Table, named: Named, headers: Headers, captions: _Captions) -> list[str]:
    notes, animated = list(table.notes), _count(headers, ANIMATED)
    if headers.bad:
        notes.append("skip_bad_images: " + bad_image_problems(list(headers.bad.values())))
    if table.captions is None:
        notes.append(f"{named.value}: no captions in use; every image gets the instance prompt.")
    elif captions.empty[1]:
        notes.append(f"{named.value}: {captions.empty[1]} image(s) without a caption get the instance prompt.")
    if captions.several:
        what = "lines of a caption file, texts of a cell or columns"
        drawn = f"{captions.several} image(s) have several captions ({what}); each time that one comes, one is drawn"
        notes.append(f"{named.value}: {drawn}.")
    if animated:
        notes.append(f"{named.value}: {animated} animation(s); the first frame is taken.")
    if _count(headers, OPEN_ENDED):
        rows = np.flatnonzero(headers.kinds & OPEN_ENDED)[:10].tolist()
        shown, count = ", ".join(table.source.name(row) for row in rows), _count(headers, OPEN_ENDED)
        notes.append(f"{named.value}: {count} PNG file(s) lack their last chunk but are whole: {shown}")
    return notes


def _count(headers: Headers, kind: int) -> int:
    """How many good rows are of this kind."""
    kinds = headers.kinds
    if headers.bad:
        kinds = np.delete(kinds, list(headers.bad))
    return int(np.count_nonzero(kinds & kind))


def _mask_problems(table: Table, named: Named, headers: Headers, masks: Headers) -> list[Problem]:
    """Masks that cannot be read, hold nothing, or have another size than their image."""
    wrong = list(masks.bad.values())
    other = (masks.sizes != headers.sizes).any(axis=1) & (masks.sizes[:, 0] > 0)
    for row in (row for row in np.flatnonzero(other).tolist() if row not in headers.bad):
        (width, height), (wide, high) = masks.sizes[row].tolist(), headers.sizes[row].tolist()
        wrong.append(f"{table.masks.name(row)}: it is {width} x {height}, its image {wide} x {high}.")
    if not wrong:
        return []
    shown = "".join(f"\n    {text}" for text in wrong[:LISTED_PROBLEMS])
    more = f"\n    ... and {len(wrong) - LISTED_PROBLEMS} more" if len(wrong) > LISTED_PROBLEMS else ""
    return [named.problem(f"{len(wrong)} mask(s) cannot be used; mend them or take them away:{shown}{more}")]


def assemble(
    table: Table, named: Named, headers: Headers, asked: Asked, memory: Memory, masks: Headers | None = None
) -> ImageSet:
    """Settle every caption, and build the set.

    Args:
        masks: of `table.masks`.

    Raises:
        UserError: all problems found, those of the headers too.
    """
    count = len(table.source)
    problems = []
    if headers.bad and not asked.skip_bad:
        problems.append(named.problem(bad_image_problems(list(headers.bad.values()))))
    good = np.arange(count, dtype=np.int32)
    if headers.bad:
        good = np.delete(good, list(headers.bad))
    if masks is not None:
        problems += _mask_problems(table, named, headers, masks)
    captions = _remembered_captions(table, named, good, asked, memory)
    problems += captions.problems
    if asked.instance_prompt is None:
        problems += _no_caption_problems(table, named, captions)
    if not problems and not len(good):
        problems.append(
            named.problem(f"all {count} images are bad: " + bad_image_problems(list(headers.bad.values())))
        )
    if problems:
        refuse(problems)
    repeats = asked.repeats
    rows = positions = good
    if repeats > 1:
        rows = np.repeat(good, repeats)
        positions = rows.astype(np.int64) * repeats + np.tile(np.arange(repeats), len(good))
    report = {
        "images": len(good),
        "samples": len(rows),
        "bad images skipped": len(headers.bad),
        "captions from instance_prompt": captions.empty[1] if table.captions is not None else len(good),
        "animations, first frame taken": _count(headers, ANIMATED),
        "images with several captions": captions.several,
        **table.counts,
    }
    notes = _notes(table, named, headers, captions)
    found = None if masks is None else Masks(table.masks, masks.digests, masks.sizes[:, 0] > 0)
    if found is not None:
        report["images with a mask"] = int(found.present[good].sum())
        lacking = len(good) - report["images with a mask"]
        rest = f"; without one, so that all of it counts: {lacking}" if lacking else ""
        notes.append(f"{named.value}: {report['images with a mask']} image(s) have a loss mask{rest}.")
    facts = (positions, headers.digests, headers.sizes, report, notes)
    return ImageSet(table.source, rows, captions.texts, *facts, captions.choices, found)
