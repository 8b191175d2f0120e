"""In which order the images stand in the endless stream of samples: a pure function of seed and position.

One size: epoch after epoch a permutation of all images. Several sizes (buckets): a micro-step over all processes holds
images of one size only. Each bucket is a stream of its own, permutation after permutation, cut into micro-steps; what
is left of a bucket at the end of an epoch is filled up from its next permutation, and those images have their turn
already when the next epoch comes. So after every epoch each image was seen at least as often as there were epochs, and
never more often by more than its bucket's last micro-step needed.

Several data sets: where all weights are 1, one permutation of all images. Else each set is a stream of its own, and an
epoch takes `weight` samples for each of its images, shuffled among those of the other sets; fractions add up over the
epochs, so that a weight of 0.25 shows each image once in four.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np

from sana_kit.data.draws import generator

_BUCKET_SALT, _SET_SALT = 0xB0C7, 0x5E700


@dataclasses.dataclass(frozen=True)
class WeightedSets:
    """Which data set each encoded sample of an instance image belongs to, and how often a set's images come.

    Attributes:
        set_of: (N,) a set's number per encoded sample.
        weights: samples of an epoch for each image, by set.
    """

    set_of: np.ndarray
    weights: Sequence[Fraction]


def epoch_of(place: int, count: Callable[[int], int]) -> int:
    """The epoch that holds a place of a stream, where the first e epochs have count(e) places."""
    high = 1
    while count(high) <= place:
        high *= 2
    return bisect.bisect_right(range(high + 1), place, key=count) - 1


def make_order(
    shapes: np.ndarray,
    num_encoded: int,
    samples: int,
    seed: int,
    crops: int = 1,
    sets: WeightedSets | None = None,
) -> PermutationOrder | MixedOrder | BucketOrder:
    """The order of a run's instance images.

    Args:
        shapes: (N, 2) height and width of each encoded sample's latents, instance images first.
        num_encoded: how many of them are of instance images.
        samples: of a micro-step over all processes.
        crops: encoded samples of one image, which follow one another.
        sets: of several data sets with weights; None: every image comes once an epoch.
    """
    if sets is not None:
        sets = WeightedSets(np.asarray(sets.set_of)[:num_encoded:crops], sets.weights)
    _, bucket_of = np.unique(shapes[:num_encoded:crops], axis=0, return_inverse=True)
    if bucket_of.max(initial=0) > 0:
        return BucketOrder(bucket_of.reshape(-1), samples, seed, sets)
    return PermutationOrder(num_encoded // crops, seed) if sets is None else MixedOrder(sets, seed)


class PermutationOrder:
    """Epoch after epoch a permutation of `size` images; `salt` tells orders of one seed apart."""

    def __init__(self, size: int, seed: int, salt: int = 0):
        self.size, self.seed, self.salt = size, seed, salt
        self._orders: dict[int, np.ndarray] = {}

    def __call__(self, position: int) -> int:
        """Index of the image at a position."""
        epoch, offset = divmod(position, self.size)
        if epoch not in self._orders:
            if len(self._orders) > 4:
                self._orders.clear()
            self._orders[epoch] = generator(self.seed, epoch, self.salt).permutation(self.size)
        return int(self._orders[epoch][offset])

    def count(self, epochs: int) -> int:
        """Samples of so many epochs."""
        return epochs * self.size

    def first_position(self, samples_seen: int) -> int:
        """Where the order goes on after so many samples."""
        return samples_seen


class MixedOrder:
    """Epochs of several data sets: `weight` samples for each of a set's images, shuffled.

    Attributes:
        size: images of all sets.
    """

    def __init__(self, sets: WeightedSets, seed: int, salt: int = 0):
        self.seed, self.salt, self.size = seed, salt, len(sets.set_of)
        numbers = np.unique(sets.set_of).tolist()
        self._members = [np.flatnonzero(sets.set_of == number) for number in numbers]
        self._rates = [sets.weights[k] * len(m) for k, m in zip(numbers, self._members, strict=True)]
        salts = [_SET_SALT + (salt << 24) + k for k in numbers]
        self._within = [PermutationOrder(len(m), seed, s) for m, s in zip(self._members, salts, strict=True)]
        self._epoch, self._schedule = -1, np.zeros((0, 2), dtype=np.int64)

    def count(self, epochs: int) -> int:
        """Samples of so many epochs."""
        return sum(int(epochs * rate) for rate in self._rates)

    def __call__(self, position: int) -> int:
        """Index of the image at a position."""
        epoch = self._epoch
        if epoch < 0 or not self.count(epoch) <= position < self.count(epoch + 1):
            epoch = epoch_of(position, self.count)
            self._epoch, self._schedule = epoch, self._of_epoch(epoch)
        number, turn = self._schedule[position - self.count(epoch)]
        return int(self._members[number][self._within[number](int(turn))])

    def _of_epoch(self, epoch: int) -> np.ndarray:
        """(samples, 2): set and its turn, shuffled."""
        parts = []
        for number, rate in enumerate(self._rates):
            turns = np.arange(int(epoch * rate), int((epoch + 1) * rate))
            parts.append(np.stack([np.full_like(turns, number), turns], axis=1))
        rows = np.concatenate(parts)
        return rows[generator(self.seed, epoch, self.salt, _SET_SALT).permutation(len(rows))]

    def first_position(self, samples_seen: int) -> int:
        """Where the order goes on after so many samples."""
        return samples_seen


class BucketOrder:
    """Micro-steps of one bucket each.

    Args:
        bucket_of: (N,) a number per image; images of one number have one size.
        samples: of a micro-step over all processes. With another number of them the order is another one.
        sets: of several data sets with weights, per image.
    """

    def __init__(self, bucket_of: np.ndarray, samples: int, seed: int, sets: WeightedSets | None = None):
        self.samples, self.seed, self.size = samples, seed, len(bucket_of)
        self._members = [np.flatnonzero(bucket_of == bucket) for bucket in np.unique(bucket_of)]
        self._within: list[PermutationOrder | MixedOrder] = []
        for k, members in enumerate(self._members):
            salt = _BUCKET_SALT + 1 + k
            if sets is None:
                self._within.append(PermutationOrder(len(members), seed, salt))
            else:
                self._within.append(MixedOrder(WeightedSets(sets.set_of[members], sets.weights), seed, salt))
        self._epoch, self._schedule = -1, np.zeros((0, 2), dtype=np.int64)

    def first_position(self, samples_seen: int) -> int:
        """Where the order goes on after so many samples: at a whole micro-step, also if they came in other ones."""
        return -(-samples_seen // self.samples) * self.samples

    def micro_steps(self, epochs: int) -> int:
        """Micro-steps of so many epochs: each bucket's are rounded up by themselves."""
        return sum(-(-within.count(epochs) // self.samples) for within in self._within)

    def count(self, epochs: int) -> int:
        """Samples of so many epochs."""
        return self.micro_steps(epochs) * self.samples

    def __call__(self, position: int) -> int:
        """Index of the image at a position."""
        number, offset = divmod(position, self.samples)
        epoch = epoch_of(number, self.micro_steps)
        if epoch != self._epoch:
            self._epoch, self._schedule = epoch, self._of_epoch(epoch)
        bucket, turn = self._schedule[number - self.micro_steps(epoch)]
        return int(self._members[bucket][self._within[bucket](int(turn) * self.samples + offset)])

    def _of_epoch(self, epoch: int) -> np.ndarray:
        """(micro-steps, 2): bucket and its turn, shuffled."""
        rows = [
            (bucket, turn)
            for bucket, within in enumerate(self._within)
            for turn in range(-(-within.count(epoch) // self.samples), -(-within.count(epoch + 1) // self.samples))
        ]
        return np.array(rows, dtype=np.int64)[generator(self.seed, epoch, _BUCKET_SALT).permutation(len(rows))]
