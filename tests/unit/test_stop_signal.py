"""A signal asks for a stop, wherever standard error goes."""

import errno
import os
import signal
import time

import pytest
import torch

from sana_kit import distributed
from sana_kit.distributed import Ranks, StopSignal


@pytest.fixture
def stop():
    """A stop signal of one process; the handlers of before come back."""
    numbers = distributed.EXIT_INTERRUPTED
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}  # a shell's & ignores some
    yield StopSignal(Ranks(0, 1, torch.device("cpu")))
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("code", [errno.EIO, errno.EBADF, errno.EPIPE])
def test_a_standard_error_that_is_gone_does_not_end_the_run(stop, monkeypatch, code):
    """A terminal that was closed is the reason for the signal: the note about it can reach nobody."""

    def gone(descriptor, data):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(distributed.os, "write", gone)
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.requested and stop.agreed() and stop.exit_code == 129


def test_the_second_of_two_signals_at_once_is_the_same_stop(stop, capfd):
    os.kill(os.getpid(), signal.SIGINT)
    while not stop.requested:  # another thread may have received it
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)  # within a second: a launcher and a terminal may both send one
    assert stop.exit_code == 130 and capfd.readouterr().err.count("finishing this step") == 1
