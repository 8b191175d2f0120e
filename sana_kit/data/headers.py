"""The headers of all images of a source: read by the ranks of a machine together, or remembered."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from sana_kit.data.decode import ImageFacts, inspect_image
from sana_kit.data.image_set import default_workers, prefetch, progress_bar
from sana_kit.data.memory import UNKNOWN, Headers, Memory
from sana_kit.distributed import Ranks
from sana_kit.errors import ImageError

if TYPE_CHECKING:
    from sana_kit.data.sources import ImageSource

Inspect = Callable[[bytes, str], ImageFacts]


def read_headers(
    source: ImageSource, memory: Memory, ranks: Ranks | None = None, inspect: Inspect | None = None
) -> Headers:
    """Digest, size and kind of every image of a source.

    Rows that `memory` knows are not read. Of the others each rank of a machine reads its share, and all of the machine
    get what the others found; every rank must call this, if `ranks` is given.

    Args:
        inspect: what tells the facts of one image, by default `inspect_image`.
    """
    inspect = inspect or inspect_image
    headers = memory.recall_headers(source)
    missing = np.flatnonzero(headers.kinds & UNKNOWN)
    if ranks is None or ranks.world_size == 1:
        if not len(missing):
            return headers
        found = [(missing, _look(source, missing, inspect))]
    else:
        views = ranks.gather((socket.gethostname(), len(source), _digest(missing)))
        peers = [rank for rank, view in enumerate(views) if view == views[ranks.rank]]
        own = missing[peers.index(ranks.rank) :: len(peers)]
        looked = ranks.run_on_all(lambda: _look(source, own, inspect))
        shares = ranks.gather((own, looked))
        found = [shares[rank] for rank in peers]
        if not len(missing):
            return headers
    headers = Headers(headers.digests.copy(), headers.sizes.copy(), headers.kinds.copy(), {})
    for rows, part in found:
        headers.digests[rows], headers.sizes[rows], headers.kinds[rows] = part.digests, part.sizes, part.kinds
        headers.bad |= {int(rows[k]): text for k, text in part.bad.items()}
    headers.bad = dict(sorted(headers.bad.items()))
    memory.keep_headers(source, headers)
    return headers


def _digest(rows: np.ndarray) -> tuple[int, int]:
    """Tells two sets of rows apart well enough: a rank that knew more than another reads its own."""
    return len(rows), int(rows.sum())


def _look(source: ImageSource, rows: np.ndarray, inspect: Inspect) -> Headers:
    """Of these rows, in their order."""
    workers = default_workers()

    def look(row: int) -> ImageFacts | str:
        try:
            return inspect(source.read(row), source.name(row))
        except ImageError as error:
            return str(error)

    def told() -> Iterator[ImageFacts | str]:
        with progress_bar(len(rows), "Reading images") as bar:
            for result in prefetch(look, rows.tolist(), workers, 4 * workers):
                bar.update()
                yield result

    headers = Headers.of(told(), len(rows))
    if hasattr(source, "release"):
        source.release()
    return headers
