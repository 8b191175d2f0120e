"""What libraries say that a user can do nothing about: kept off the screen, in this one place.

`quiet_libraries()` comes first in every script (`errors.run_as_script` and `sana_kit.launch` call it). It silences a
whole category only where nothing in it is the user's to mend (FutureWarning: the next release of a library), and
single notices by their text. Warnings of the kit itself, and all others, are shown. SANA_NOISE=1 shows everything.

Standard library only.
"""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Sequence

SIGNAL_NAMES: dict[int, str] = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}

# logger -> beginnings or parts of its notices, as read in the versions of constraints.txt
NOTICES = {
    # importing DeepSpeed on a host without accelerator
    "DeepSpeed": ("Setting accelerator to CPU", "Setting ds_accelerator to"),
    # a list of layers to be kept in float32 that is empty
    "diffusers.models.modeling_utils": ("should be kept in float32: []",),
    # defaults that the kit chooses on purpose
    "accelerate.commands.launch": ("The following values were not passed to `accelerate launch`",),
    "accelerate.utils.other": ("Detected kernel version",),
    # said once per process of each run, whatever is set
    "torch.distributed.run": ("Setting OMP_NUM_THREADS environment variable",),
    "torch.distributed.elastic.multiprocessing.redirects": ("Redirects are currently not supported",),
}
# module of a warning -> its beginning
WARNINGS = {
    r"torch\.": "barrier\\(\\): using the device under current context",
}


class _Notices(logging.Filter):
    """Drops records whose message holds one of these texts."""

    def __init__(self, texts: tuple[str, ...]):
        super().__init__()
        self.texts = texts

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(text in message for text in self.texts)


def quiet_libraries() -> None:
    """Keep the notices above off the screen, in this process; may be called again."""
    if os.environ.get("SANA_NOISE") == "1":
        return
    warnings.simplefilter("ignore", FutureWarning)
    for module, text in WARNINGS.items():
        warnings.filterwarnings("ignore", message=text, module=module)
    for name, texts in NOTICES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Notices) for known in logger.filters):
            logger.addFilter(_Notices(texts))


def leave(number: int, told: str) -> None:
    """End this process at once: "stopped by Ctrl-C" and `told` on standard error, the exit code of signal `number`."""
    os.write(2, f"\nstopped by {SIGNAL_NAMES.get(number, f'signal {number}')}{told}\n".encode())
    os._exit(128 + number)


def leave_on_signals(told: str, numbers: Sequence[int] = (signal.SIGINT, signal.SIGTERM)) -> None:
    """Until somebody else handles these signals, they end this process by `leave`.

    For the seconds of imports and checks, which leave nothing behind: an exception that is raised inside a library's
    callback is swallowed there, so that a KeyboardInterrupt may be lost, and otherwise shows a traceback of its own.
    """
    for number in numbers:
        signal.signal(number, lambda number, frame: leave(number, told))
