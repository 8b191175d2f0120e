"""Many strings in little memory: a sequence over an Arrow array, which may lie in a mapped file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
import pyarrow as pa

_BLOCK = 1024  # strings that are Python objects at once while all are looked at


class Texts(Sequence):
    """A sequence of strings: their bytes and 8 more each; equal to any sequence of the same strings."""

    def __init__(self, texts: Iterable[str] | pa.Array | pa.ChunkedArray = ()):
        if isinstance(texts, Texts):
            texts = texts.array
        if not isinstance(texts, (pa.Array, pa.ChunkedArray)):
            texts = text_array(texts if isinstance(texts, (list, tuple)) else list(texts))
        self.array: pa.Array = _whole(texts)

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, i: int) -> str: ...

    @overload
    def __getitem__(self, i: slice) -> Texts: ...

    def __getitem__(self, i: int | slice) -> str | Texts:
        if isinstance(i, slice):
            return Texts(self.array.take(pa.array(np.arange(len(self))[i])))
        i = int(i)
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        return self.array[i % len(self)].as_py()

    def blocks(self) -> Iterator[list[str]]:
        """The strings in order, some thousands at a time."""
        for start in range(0, len(self), _BLOCK):
            yield self.array.slice(start, _BLOCK).to_pylist()

    def __iter__(self) -> Iterator[str]:
        for block in self.blocks():
            yield from block

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (Texts, list, tuple)):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None

    def __add__(self, other: Sequence[str]) -> Texts:
        return Texts(pa.chunked_array([self.array, Texts(other).array]))

    def __repr__(self) -> str:
        return f"Texts({self.array.slice(0, 10).to_pylist()}{' ...' if len(self) > 10 else ''})"

    def where(self, keep: np.ndarray) -> Texts:
        """Those where `keep`, bool (N,), is True."""
        return Texts(self.array.filter(pa.array(keep)))


def text_array(texts: Sequence[str]) -> pa.Array:
    """large_string of Python's strings. `pa.array` would import pandas, which takes a second and 30 MB."""
    encoded = [text.encode() for text in texts]
    ends = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)), out=ends[1:])
    return pa.LargeStringArray.from_buffers(len(encoded), pa.py_buffer(ends), pa.py_buffer(b"".join(encoded)))


def _whole(texts: pa.Array | pa.ChunkedArray) -> pa.Array:
    """One array of large_string."""
    if texts.type != pa.large_string():
        texts = texts.cast(pa.large_string())
    if not isinstance(texts, pa.ChunkedArray):
        return texts
    return texts.chunk(0) if texts.num_chunks == 1 else texts.combine_chunks()
