"""The errors that users can mend. Their messages say what is wrong and what to do."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message names the file and what is left."""


class ImageError(ValueError):
    """One image that cannot be used; the message names it and the reason."""


class StoreError(RuntimeError):
    """The encodings cannot be written, or a shard changed while it was in use; the message names file and remedy."""


class EncodingStopped(RuntimeError):
    """`should_stop` asked for an end; what was encoded is kept and the next start goes on from there."""


class InputError(ValueError):
    """Problems that the user can mend, one a line."""


class RankFailed(RuntimeError):
    """Another rank failed; that rank shows the whole error."""
