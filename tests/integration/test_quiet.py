"""A signal during the seconds of imports: one line, no traceback, even where a library swallows exceptions."""

import subprocess
import sys

import pytest

PROGRAM = """
import os, signal
from sana_kit.quiet import leave_on_signals
leave_on_signals(" before the run began")
try:
    os.kill(os.getpid(), {number})
except BaseException:
    print("swallowed")
print("went on")
"""


@pytest.mark.parametrize(("number", "name"), [(2, "Ctrl-C"), (15, "SIGTERM")])
def test_a_signal_before_the_run_is_one_line(number, name):
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(number=number)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (128 + number, "")
    assert done.stderr == f"\nstopped by {name} before the run began\n"
