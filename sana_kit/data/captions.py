"""Several captions of an image: the columns they come from, their weights, and which one a draw takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sana_kit.data.texts import Texts


def caption_columns(named: str, present: Sequence[str]) -> list[tuple[str, float]]:
    """(column, weight) of each column that `named` names: "text", "short,long", "short:3,long:1".

    A text that is a column's own name is that column, whatever is in it. A weight that is left out is 1.

    Raises:
        ValueError: a weight that is no number above 0, an empty name, one column twice.
    """
    if named in present:
        return [(named, 1.0)]
    pairs = []
    for part in named.split(","):
        name, colon, text = part.strip().rpartition(":")
        if not colon or part.strip() in present:
            name, text = part.strip(), "1"
        try:
            weight = float(text)
        except ValueError:
            raise ValueError(f"the weight of '{name}' is '{text}', which is no number") from None
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"the weight of '{name}' is {text}; it must be above 0")
        if not name.strip():
            raise ValueError("a column's name is empty")
        pairs.append((name.strip(), weight))
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError("one column is named twice")
    return pairs


def lines_of(text: str) -> str | list[str]:
    """What a caption file holds: its text where one line has words, else the lines that have."""
    lines = [line for line in text.split("\n") if line.strip()]
    return text if len(lines) < 2 else lines


class Choices:
    """The captions of each sample where some samples have several.

    Args:
        texts: all captions, sample after sample.
        starts: (N + 1,) int64; sample i has the texts from starts[i] to starts[i + 1], at least one.
        weights: (number of texts,) float64, how often each is drawn, relative to the others of its sample.
    """

    def __init__(self, texts: Texts, starts: np.ndarray, weights: np.ndarray):
        self.texts, self.starts, self.weights = texts, np.asarray(starts, np.int64), np.asarray(weights, np.float64)

    @classmethod
    def single(cls, captions: Texts) -> Choices:
        """Of samples with one caption each."""
        return cls(captions, np.arange(len(captions) + 1), np.ones(len(captions)))

    @classmethod
    def of_columns(cls, columns: dict[str, pa.Array]) -> Choices:
        """What `columns` gave."""
        cells, weights = columns["choices"], columns["weights"]
        starts = np.frombuffer(cells.offsets.buffers()[1], np.int64)[cells.offset : cells.offset + len(cells) + 1]
        flat = weights.flatten()
        numbers = np.frombuffer(flat.buffers()[1], np.float64)[flat.offset : flat.offset + len(flat)]
        return cls(Texts(cells.flatten()), starts - starts[0], numbers)

    def columns(self) -> dict[str, pa.Array]:
        """The same as two Arrow columns of lists, a row per sample."""
        starts = pa.array(self.starts)
        return {
            "choices": pa.LargeListArray.from_arrays(starts, self.texts.array),
            "weights": pa.LargeListArray.from_arrays(starts, pa.array(self.weights)),
        }

    def __len__(self) -> int:
        return len(self.starts) - 1

    def draw(self, i: int, u: float) -> int:
        """Which of all texts sample i takes for a number u in [0, 1)."""
        first, last = int(self.starts[i]), int(self.starts[i + 1])
        bounds = np.cumsum(self.weights[first:last])
        return first + min(int(np.searchsorted(bounds, u * bounds[-1], side="right")), last - first - 1)

    def take(self, rows: np.ndarray) -> Choices:
        """Those of other samples, in this order."""
        lengths = np.diff(self.starts)[rows]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        index = np.repeat(self.starts[:-1][rows] - starts[:-1], lengths) + np.arange(starts[-1])
        return Choices(Texts(self.texts.array.take(pa.array(index))), starts, self.weights[index])

    def where(self, keep: np.ndarray) -> Choices:
        """Those where `keep`, bool (N,), is True."""
        return self.take(np.flatnonzero(keep))

    def __add__(self, other: Choices) -> Choices:
        starts = np.concatenate([self.starts, other.starts[1:] + self.starts[-1]])
        return Choices(self.texts + other.texts, starts, np.concatenate([self.weights, other.weights]))

    def affixed(self, prefix: str, suffix: str) -> Choices:
        """The same with something before and behind each caption."""
        return Choices(affixed(self.texts, prefix, suffix), self.starts, self.weights)


def affixed(texts: Texts, prefix: str, suffix: str) -> Texts:
    """Texts with something before and behind each."""
    kind = pa.large_string()
    before, behind, nothing = (pa.scalar(text, kind) for text in (prefix, suffix, ""))
    return Texts(pc.binary_join_element_wise(before, texts.array, behind, nothing))
