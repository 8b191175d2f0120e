"""Which rows of a stream of shards a run takes, in which order, and who reads them: one window after the other.

Epoch after epoch all shards stand in an order drawn from the run's seed; one behind the other the epochs are an
endless sequence of shards. A few of them are open at once, the lanes. Every window takes the same number of rows of
each lane; a lane that ends its shard goes on with the next one of the sequence. So each shard is read once an epoch,
and which rows a window holds depends on seed and shards alone, never on the number of processes or on their speed.

Process r of R reads the lanes r, r + R, ...; with fewer lanes than processes some read none. What was read lies in a
file of each process until it is encoded, which any process may do.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sana_kit.data.assemble import Asked, assemble
from sana_kit.data.decode import ImageFacts, inspect_image
from sana_kit.data.draws import generator
from sana_kit.data.image_set import ImageSet, default_workers, prefetch
from sana_kit.data.memory import Headers, Memory
from sana_kit.data.streaming import Row, Shards
from sana_kit.data.tables import Named, Table
from sana_kit.distributed import Ranks
from sana_kit.errors import EncodingStopped, ImageError, Problem, StoreError, UserError, listed, setting

# Shards that are open at once: enough for a mixed window and for as many reading processes, few enough for their
# buffers (a row group of a parquet file each).
LANES = 16

SPOOL = "images-"  # how the files of read images begin

_SHARDS_SALT, _WINDOW_SALT = 0x54A2D, 0x817D0

# ((file's rank, offset, length), what its header says or what is wrong, caption cell, name)
_Fact = tuple[tuple[int, int, int], ImageFacts | str, Any, str]


class SpooledSource:
    """The images of a window, in a file of each process that read some.

    Attributes:
        spans: (N, 3) int64, the rank of the file, first byte and length.
        names: of the rows.
    """

    def __init__(self, folder: Path, spans: np.ndarray, names: list[str]):
        self.folder, self.spans, self.names_ = str(folder), spans, names

    def __len__(self) -> int:
        return len(self.spans)

    def identity(self) -> None:
        """Nothing is remembered of a window."""

    def name(self, row: int) -> str:
        """For messages: shard[row]."""
        return self.names_[row]

    def read(self, row: int) -> bytes:
        """The encoded image. Raises ImageError where the file is gone."""
        rank, offset, length = self.spans[row].tolist()
        try:
            with open(spool_file(self.folder, rank), "rb") as file:
                file.seek(offset)
                return file.read(length)
        except OSError as error:
            raise ImageError(f"{self.name(row)}: what was read of it is gone ({error.strerror}).") from None


def spool_file(folder: str | os.PathLike, rank: int) -> Path:
    """Where a process keeps the images of a window that it has read."""
    return Path(folder) / f"{SPOOL}{rank}"


class WindowReader:
    """Reads windows one behind the other.

    Attributes:
        size: rows of every window.
        lanes: how many shards are open at once.
        window: the number of the next window.
    """

    def __init__(self, shards: Shards, asked: Asked, *, size: int, seed: int, ranks: Ranks):
        """Args:
        asked: the caption of images without one, and what happens to bad images.
        size: rows of a window; the nearest multiple of the number of lanes below is taken.
        seed: of the run.
        """
        self.shards, self.asked, self._seed, self._ranks = shards, asked, seed, ranks
        self.lanes = min(len(shards), LANES, size)
        self.size = size // self.lanes * self.lanes
        self._orders: dict[int, np.ndarray] = {}
        self._open: dict[int, tuple[int, int, Iterator[Row]]] = {}  # lane: number in the sequence, row, the rows
        self.go_to(None)

    def go_to(self, place: dict | None) -> None:
        """Go on where `place()` was taken; None: at the beginning."""
        self._open.clear()
        if place is None:
            place = {"window": 0, "next": self.lanes, "lanes": [[lane, 0] for lane in range(self.lanes)]}
        self.window: int = place["window"]
        self._next: int = place["next"]
        self._lanes: list[tuple[int, int]] = [(number, row) for number, row in place["lanes"]]

    def place(self) -> dict:
        """Where the next window begins, as JSON holds it.

        Its number, of each lane the shard's place in the sequence and the row, and the next shard's place.
        """
        return {"window": self.window, "next": self._next, "lanes": [list(lane) for lane in self._lanes]}

    def shard(self, place: int) -> int:
        """Which shard stands at a place of the endless sequence."""
        epoch, turn = divmod(place, len(self.shards))
        if epoch not in self._orders:
            if len(self._orders) > 4:
                self._orders.clear()
            self._orders[epoch] = generator(self._seed, epoch, _SHARDS_SALT).permutation(len(self.shards))
        return int(self._orders[epoch][turn])

    def split(self) -> list[str]:
        """Which process reads what now, a line each: what a user is told at the start."""
        lines, world_size = [], self._ranks.world_size
        for rank in range(min(world_size, self.lanes)):
            own = [self.shards.names[self.shard(self._lanes[k][0])] for k in range(rank, self.lanes, world_size)]
            lines.append(f"process {rank} of {world_size} begins with {listed(own, 4)}")
        if world_size > self.lanes:
            lines.append(
                f"processes {self.lanes} to {world_size - 1} read none, since only {self.lanes} shards are open at"
                " once; they encode and train their share all the same"
            )
        return lines

    def read(self, folder: Path, room: int, stop: Callable[[], bool]) -> ImageSet:
        """The images and captions of the next window, the same on every rank; a collective call.

        Args:
            folder: shared by all ranks; what was read is put there.
            room: most bytes that all ranks may put there.
            stop: whether this rank was asked to end.

        Raises:
            UserError: a shard or its images cannot be used, or there is no room; on every rank.
            EncodingStopped: `stop` said so on a rank; the reader stands where it stood.
        """
        place = self.place()
        try:
            return self._read(folder, room, stop)
        except BaseException:
            self.go_to(place)
            raise

    def _read(self, folder: Path, room: int, stop: Callable[[], bool]) -> ImageSet:
        ranks, share = self._ranks, self.size // self.lanes
        need, facts = dict.fromkeys(range(self.lanes), share), [[] for _ in range(self.lanes)]
        own = range(ranks.rank, self.lanes, ranks.world_size)
        room = room * len(own) // self.lanes
        ranks.run_on_all(lambda: _begin(folder, ranks) if len(own) else None)
        barren = 0  # shards in a row that gave nothing
        while any(need.values()):
            mine = ranks.run_on_all(
                lambda: {lane: self._advance(lane, need[lane], folder, room, stop) for lane in own if need[lane]}
            )
            for lane, (rows, ended) in sorted(item for part in ranks.gather(mine) for item in part.items()):
                facts[lane] += rows
                need[lane] -= len(rows)
                number, row = self._lanes[lane]
                self._lanes[lane] = (number, row + len(rows))
                barren = 0 if rows else barren + 1
                if ended:
                    self._lanes[lane], self._next = (self._next, 0), self._next + 1
            if barren > len(self.shards) + self.lanes:
                raise UserError(self.shards.wanted.problem("no shard has a row"))
        images = ranks.run_on_all(lambda: self._assembled(list(itertools.chain(*facts)), folder))
        images.shift_positions(self.window * self.size)
        self.window += 1
        return images

    def _rows(self, lane: int) -> Iterator[Row]:
        """The open rows of a lane, from where it stands."""
        number, row = self._lanes[lane]
        if self._open.get(lane, ())[:2] != (number, row):
            self._open[lane] = (number, row, self.shards.read(self.shard(number), row))
        return self._open[lane][2]

    def _advance(
        self, lane: int, count: int, folder: Path, room: int, stop: Callable[[], bool]
    ) -> tuple[list[_Fact], bool]:
        """(facts of up to `count` rows of a lane's shard, whether it has ended)."""
        number, first = self._lanes[lane]
        rows, workers, facts = self._rows(lane), default_workers(), []
        try:
            with open(spool_file(folder, self._ranks.rank), "ab") as spool:
                for row, found in prefetch(_look, itertools.islice(rows, count), workers, 4 * workers):
                    if stop():
                        raise EncodingStopped("Reading was stopped on request; start again to go on where it was.")
                    facts.append(self._fact(row, found, spool, room))
        except OSError as error:  # a shard's own are UserErrors
            raise StoreError(f"Encodings: {folder} cannot be written ({error.strerror}).") from None
        self._open[lane] = (number, first + len(facts), rows)
        return facts, len(facts) < count

    def _fact(self, row: Row, found: ImageFacts | str, spool: BinaryIO, room: int) -> _Fact:
        if isinstance(found, str):
            return (0, 0, 0), found, row.caption, row.name
        offset = spool.tell()
        if offset + len(row.image) > room:
            raise self._no_room(room)
        spool.write(row.image)
        return (self._ranks.rank, offset, len(row.image)), found, row.caption, row.name

    def _no_room(self, room: int) -> UserError:
        reason = f"{self.size} images of {self.shards.wanted.name} need more than the {room / 1e9:.3g} GB"
        reason += " that are left for a process beside the encodings"
        return UserError(Problem("encodings_disk_gb", None, reason, f"Raise it, or lower {setting('stream_window')}."))

    def _assembled(self, facts: list[_Fact], folder: Path) -> ImageSet:
        """The image set of a window's rows."""
        spans, found, cells, names = map(list, zip(*facts, strict=True))
        headers = Headers.of(found, len(found))
        source = SpooledSource(folder, np.array(spans, np.int64), names)
        wanted = self.shards.wanted
        captions = None if wanted.caption_column is None else cells
        table = Table(source, captions, [], [], {}, self.shards.weights)
        return assemble(table, Named("dataset_name", wanted.name), headers, self.asked, Memory())


def _begin(folder: Path, ranks: Ranks) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        spool_file(folder, ranks.rank).write_bytes(b"")
    except OSError as error:
        raise StoreError(f"Encodings: {folder} cannot be written ({error.strerror}).") from None


def _look(row: Row) -> tuple[Row, ImageFacts | str]:
    """A row and what its image's header says, or what is wrong with it."""
    if row.image is None:
        return row, row.problem
    try:
        return row, inspect_image(row.image, row.name)
    except ImageError as error:
        return row, str(error)


def window_order(seed: int, window: int, count: int) -> np.ndarray:
    """(count,) the order in which a window's images come."""
    return generator(seed, window, _WINDOW_SALT).permutation(count)
