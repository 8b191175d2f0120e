"""In which order the images stand in the endless stream of samples: a pure function of seed and position.

One size: epoch after epoch a permutation of all images. Several sizes (buckets): a micro-step over all processes holds
images of one size only. Each bucket is a stream of its own, permutation after permutation, cut into micro-steps; what
is left of a bucket at the end of an epoch is filled up from its next permutation, and those images have their turn
already when the next epoch comes. So after every epoch each image was seen at least as often as there were epochs, and
never more often by more than its bucket's last micro-step needed.
"""

from __future__ import annotations

import bisect

import numpy as np

_BUCKET_SALT = 0xB0C7


def generator(seed: int, *key: int) -> np.random.Generator:
    """Numbers that depend on a run's seed (up to 64 bits) and `key` alone."""
    return np.random.default_rng([seed & 0xFFFFFFFF, seed >> 32, *key])


def make_order(
    shapes: np.ndarray, num_encoded: int, samples: int, seed: int, crops: int = 1
) -> PermutationOrder | BucketOrder:
    """The order of a run's instance images.

    Args:
        shapes: (N, 2) height and width of each encoded sample's latents, instance images first.
        num_encoded: how many of them are of instance images.
        samples: of a micro-step over all processes.
        crops: encoded samples of one image, which follow one another.
    """
    _, bucket_of = np.unique(shapes[:num_encoded:crops], axis=0, return_inverse=True)
    if bucket_of.max(initial=0) == 0:
        return PermutationOrder(num_encoded // crops, seed)
    return BucketOrder(bucket_of.reshape(-1), samples, seed)


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

    def first_position(self, samples_seen: int) -> int:
        """Where the order goes on after so many samples."""
        return samples_seen


class BucketOrder:
    """Micro-steps of one bucket each.

    Args:
        bucket_of: (N,) a number per image; images of one number have one size.
        samples: of a micro-step over all processes. With another number of them the order is another one.
    """

    def __init__(self, bucket_of: np.ndarray, samples: int, seed: int):
        self.samples, self.seed, self.size = samples, seed, len(bucket_of)
        self._members = [np.flatnonzero(bucket_of == bucket) for bucket in np.unique(bucket_of)]
        self._within = [PermutationOrder(len(m), seed, _BUCKET_SALT + 1 + k) for k, m in enumerate(self._members)]
        self._epoch, self._schedule = -1, np.zeros((0, 2), dtype=np.int64)

    def first_position(self, samples_seen: int) -> int:
        """Where the order goes on after so many samples: at a whole micro-step, also if they came in other ones."""
        return -(-samples_seen // self.samples) * self.samples

    def micro_steps(self, epochs: int) -> int:
        """Micro-steps of so many epochs: each bucket's are rounded up by themselves."""
        return sum(-(-epochs * len(members) // self.samples) for members in self._members)

    def __call__(self, position: int) -> int:
        """Index of the image at a position."""
        number, offset = divmod(position, self.samples)
        epoch = bisect.bisect_right(range(number + 2), number, key=self.micro_steps) - 1
        if epoch != self._epoch:
            self._epoch, self._schedule = epoch, self._of_epoch(epoch)
        bucket, turn = self._schedule[number - self.micro_steps(epoch)]
        return int(self._members[bucket][self._within[bucket](int(turn) * self.samples + offset)])

    def _of_epoch(self, epoch: int) -> np.ndarray:
        """(micro-steps, 2): bucket and its turn, shuffled."""
        rows = [
            (bucket, turn)
            for bucket, members in enumerate(self._members)
            for turn in range(-(-epoch * len(members) // self.samples), -(-(epoch + 1) * len(members) // self.samples))
        ]
        return np.array(rows, dtype=np.int64)[generator(self.seed, epoch, _BUCKET_SALT).permutation(len(rows))]
