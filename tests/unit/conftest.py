"""Unit tests start no process: one that does ends with an error that says where it belongs."""

import contextlib
import multiprocessing.util
import os
import subprocess

import pytest

# Every way in which Python starts one: a fork, a new program, multiprocessing's spawn and fork server.
STARTS = [(os, name) for name in ("fork", "forkpty", "posix_spawn", "posix_spawnp", "system")]
STARTS += [(subprocess.Popen, "__init__"), (multiprocessing.util, "spawnv_passfds")]


def refuse(*words, **_):
    told = next((str(word) for word in words if isinstance(word, (str, list, tuple))), "a fork of this one")
    pytest.fail(
        f"a test of tests/unit starts a process ({told[:200]}). Tests that do belong to tests/integration,"
        " those of several ranks to tests/distributed."
    )


@contextlib.contextmanager
def alone():
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in STARTS:
            patch.setattr(owner, name, refuse)
        yield


# Of these three pytest asks a folder's own conftest only; the set-up makes the fixtures of the session too.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item):
    with alone():
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item):
    with alone():
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item):
    with alone():
        return (yield)
