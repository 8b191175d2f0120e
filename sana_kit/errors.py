"""The errors that users can mend, and how a script ends with one.

Libraries know settings, not flags: they raise a `UserError` with one `Problem` per setting, all of them at once. The
command line turns fields into flags (`as_flags`), so a message names what the user can type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence


def _as_flag(field: str) -> str:
    return f"--{field}"


@dataclasses.dataclass(frozen=True)
class Problem:
    """One setting that cannot be used.

    Attributes:
        field: the setting's name, e.g. "resolution"; several joined by " and "; empty where no setting is to blame.
        value: what it was set to, None where nothing was given.
        reason: what is wrong, a sentence without its full stop.
        remedy: what to do, a sentence; may be empty where the reason says it.
    """

    field: str
    value: object
    reason: str
    remedy: str = ""

    def text(self, name: Callable[[str], str] = str) -> str:
        """`field=value: reason. remedy`, the field written as `name(field)` writes it."""
        fields = " and ".join(name(field) for field in self.field.split(" and ")) if self.field else ""
        shown = fields if self.value is None else f"{fields}={self.value}"
        told = f"{self.reason.rstrip('.')}. {self.remedy}".strip()
        return f"{shown}: {told}" if fields else told

    def __str__(self) -> str:
        return self.text()


class UserError(ValueError):
    """What the user has to mend, all of it at once.

    Attributes:
        problems: the single problems, in the order in which they were found.
        heading: a line above them; empty for a single problem.
    """

    def __init__(self, problems: Problem | Iterable[Problem], heading: str = "", name: Callable[[str], str] = str):
        self.problems: Sequence[Problem] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        self.heading, self._name = heading, name
        lines = [problem.text(name) for problem in self.problems]
        super().__init__("\n  ".join([heading, *lines] if heading else lines))

    def as_flags(self, name: Callable[[str], str] = _as_flag) -> UserError:
        """The same error as the command line tells it."""
        return type(self)(self.problems, self.heading, name)


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
