"""The errors that users can mend, and how a script ends with one.

Libraries know settings, not flags: they raise a `UserError` with one `Problem` per setting, all of them at once. The
command line turns fields into flags (`as_flags`), so a message names what the user can type. Every error whose
message is enough for the user is a `KitError`; of all others the traceback is shown.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence

from sana_kit.environment import missing_package
from sana_kit.launchers import local_rank, settle_launcher
from sana_kit.quiet import quiet_libraries


def _as_flag(field: str) -> str:
    return f"--{field}"


_MARK = "\x1e"  # stands around a setting that a reason or remedy names
_MARKED = re.compile(f"{_MARK}(.*?){_MARK}")


def setting(field: str) -> str:
    """A setting as a Problem's reason or remedy names it: the command line writes it as a flag."""
    return f"{_MARK}{field}{_MARK}"


def listed(names: Sequence[str], limit: int = 10) -> str:
    """The first `limit` names in a row, with dots where there are more."""
    return ", ".join(names[:limit]) + (" ..." if len(names) > limit else "")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the known word that is nearest, '' where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One setting that cannot be used.

    Attributes:
        field: the setting's name, e.g. "resolution"; several joined by " and "; empty where no setting is to blame.
        value: what it was set to, None where nothing was given.
        reason: what is wrong, a sentence without its full stop; other settings in it are named by `setting`.
        remedy: what to do, a sentence; may be empty where the reason says it.
    """

    field: str
    value: object
    reason: str
    remedy: str = ""

    def text(self, name: Callable[[str], str] = str) -> str:
        """`field=value: reason. remedy`, each setting written as `name(field)` writes it."""
        fields = " and ".join(name(field) for field in self.field.split(" and ")) if self.field else ""
        shown = fields if self.value is None else f"{fields}={self.value}"
        told = _MARKED.sub(lambda found: name(found[1]), f"{self.reason.rstrip('.')}. {self.remedy}".strip())
        return f"{shown}: {told}" if fields else told

    def __str__(self) -> str:
        return self.text()


class KitError(Exception):
    """An error whose message says all that the user needs: it is shown without a traceback.

    Attributes:
        shared: every rank raises this same error, so one rank of each machine tells it.
    """

    shared = False


class UserError(KitError, ValueError):
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
        told = type(self)(self.problems, self.heading, name)
        told.shared = self.shared
        return told


class CheckpointError(KitError, RuntimeError):
    """A checkpoint could not be written or read; the message names the file and what is left."""


class ImageError(KitError, ValueError):
    """One image that cannot be used; the message names it and the reason."""


class NoImageError(ImageError):
    """A cell of an image column that is null."""


class StoreError(KitError, RuntimeError):
    """The encodings cannot be written, or a shard changed while it was in use; the message names file and remedy."""


class EncodingStopped(KitError, RuntimeError):
    """The run was asked to stop; what was encoded is kept and the next start goes on from there."""


class InputError(KitError, ValueError):
    """Problems that the user can mend, one a line."""


class RankFailed(KitError, RuntimeError):
    """Another rank failed or is gone; the message says which, on which machine, and with what."""


EXIT_INTERRUPTED_BY_KEYBOARD = 130
# What gloo and NCCL say in the ranks that are left when one is gone; where in DeepSpeed they met it helps nobody.
_LOST = re.compile(r"Connection (?:closed|reset) by peer|Broken pipe|remote process exited")
_AT_FAILURE: list[Callable[[str], None]] = []


def at_failure(tell: Callable[[str], None]) -> Callable[[], None]:
    """Call `tell(message)` when this process ends with an error; returns a function that takes that back."""
    _AT_FAILURE.append(tell)

    def forget() -> None:
        if tell in _AT_FAILURE:
            _AT_FAILURE.remove(tell)

    return forget


def show_error(message: str) -> None:
    """Tell "error: message": at the end of the file that SANA_ERROR_FILE names, else on standard error.

    `sana_kit.launch` names that file and shows what is in it once all processes have ended, so that each error is told
    once and is the last thing on the screen.
    """
    path = os.environ.get("SANA_ERROR_FILE")
    if path:
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"error: {message}\n")
            return
        except OSError:
            pass  # told on the screen then
    sys.stderr.write(f"\nerror: {message}\n")
    sys.stderr.flush()


def _speaks(error: BaseException, told: bool) -> bool:
    """Whether this rank shows `error`: the first of each machine always does, another what only it can know.

    Before the ranks have met, all of a machine check the same settings, so the first speaks for them.
    """
    if local_rank() == 0 or not told:
        return True
    shared = getattr(error, "shared", False) or isinstance(error, RankFailed)
    return bool(_AT_FAILURE) and not shared


def run_as_script(
    main: Callable[[], int | None],
    *,
    expected: tuple[type[BaseException], ...] = (),
    name: Callable[[str], str] = _as_flag,
    interrupted: str = "interrupted",
) -> int:
    """Run a script's `main` and return its exit code, 0 or what it returned; use as `sys.exit(run_as_script(main))`.

    A KitError is shown by its message, fields written as flags: exit code 1; so is a package that is not installed,
    with what to do. Any other exception keeps its traceback:
    exit code 1. Ctrl-C is one line: exit code 130. Before all that, variables that a launcher left in the shell are
    taken out, and notices of libraries silenced. With several ranks the first of every machine shows the error, any
    other only what it alone met; the rest learn of it within seconds.

    Args:
        expected: further classes whose message is enough.
        name: writes a field as what the user can type.
        interrupted: the line for Ctrl-C.
    """
    settle_launcher()
    quiet_libraries()
    try:
        return main() or 0
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{interrupted}\n")
        return EXIT_INTERRUPTED_BY_KEYBOARD
    except Exception as error:
        failure = error.as_flags(name) if isinstance(error, UserError) else error
        if isinstance(error, ModuleNotFoundError) and (remedy := missing_package(error)):
            failure = KitError(remedy)
            failure.shared = True
        if isinstance(error, RuntimeError) and not isinstance(error, KitError) and (lost := _LOST.search(str(error))):
            failure = KitError(f"another rank ended while this one waited for it ({lost[0]})")
        told = isinstance(failure, (KitError, *expected))
        message = str(failure) if told else f"{type(failure).__name__}: {failure}"
        if not isinstance(failure, RankFailed):
            for tell in list(_AT_FAILURE):
                tell(message)
        if _speaks(failure, told):
            if not told:
                traceback.print_exception(error)
            show_error(message)
        return 1
