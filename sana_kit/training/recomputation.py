"""How many blocks must be recomputed so that a step fits a device: bytes counted, then the least recomputation.

`--gradient_checkpointing_interval n` recomputes every n-th block in the backward pass. A recomputed block keeps its
input only, and costs one more forward pass of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sana_kit.errors import Problem, UserError
from sana_kit.roofline import StepCount


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes of one image's step beside weights and optimizer, by whether blocks are recomputed.

    Attributes:
        blocks: of the transformer.
        kept: kept for the backward pass, if no block is recomputed.
        block: of it, what one recomputed block does not keep.
        passing: alive beyond what is kept at the peak, if no block is recomputed.
        passing_recomputed: the same if one is; the block at work is whole in memory then.
    """

    blocks: int
    kept: int
    block: int
    passing: int
    passing_recomputed: int

    @classmethod
    def counted(cls, count: Callable[[int | None], StepCount], blocks: int) -> ActivationBytes:
        """From `count(interval)`, a step counted on meta tensors with every so many blocks recomputed (None: none)."""
        none, all_blocks = count(None), count(1)
        return cls(
            blocks=blocks,
            kept=none.kept // none.images,
            block=(none.kept - all_blocks.kept) // blocks // none.images,
            passing=(none.peak - none.kept) // none.images,
            passing_recomputed=(all_blocks.peak - all_blocks.kept) // all_blocks.images,
        )

    def peak(self, interval: int | None) -> int:
        """Bytes of one image at the peak of a step that recomputes every `interval`-th block (None: none)."""
        if interval is None:
            return self.kept + self.passing
        return self.kept - math.ceil(self.blocks / interval) * self.block + self.passing_recomputed


@dataclass(frozen=True)
class Recomputation:
    """A choice: every `interval`-th block (None: none), so many blocks in all, bytes of the batch at the peak."""

    interval: int | None
    blocks: int
    peak: int


def recomputations(activations: ActivationBytes, images: int) -> Iterator[Recomputation]:
    """All choices for a batch of `images`, the fastest first; intervals that recompute as many blocks come once."""
    yield Recomputation(None, 0, images * activations.peak(None))
    former = 0
    for interval in range(activations.blocks, 0, -1):
        blocks = math.ceil(activations.blocks / interval)
        if blocks != former:
            yield Recomputation(interval, blocks, images * activations.peak(interval))
        former = blocks


def choose_recomputation(budget_bytes: int, *, images: int, activations: ActivationBytes) -> Recomputation:
    """The least recomputation with which a step of `images` fits into `budget_bytes` beside weights and optimizer.

    Raises:
        UserError: it does not fit even where every block is recomputed.
    """
    for choice in recomputations(activations, images):
        if choice.peak <= budget_bytes:
            return choice
    most = budget_bytes // activations.peak(1)
    remedy = f"Use a batch of {most} or less." if most else "Use a smaller resolution or a larger device."
    reason = f"a step of {images} images needs {choice.peak / 1e9:.1f} GB with every block recomputed"
    raise UserError(Problem("memory_budget", f"{budget_bytes / 1e9:.1f} GB", reason, remedy))
