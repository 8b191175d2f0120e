"""Run a module that ends with the process that started it: python -m sana_kit.tied PARENT MODULE [ARGUMENTS].

The launcher puts the run into a session of its own, so that Ctrl-C reaches it once; a launcher that is killed outright
(SIGKILL) could then leave ranks training for ever. The kernel is asked for a SIGTERM at the parent's death (Linux).
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def tie(parent: int) -> None:
    """Get a SIGTERM when `parent` dies; end at once if it is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(f"process {parent}, which started this run, is gone")


def main() -> None:
    tie(int(sys.argv[1]))
    module = sys.argv[2]
    sys.argv = sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
