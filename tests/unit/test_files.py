"""Atomic writes, removal, folder checks, headers and locks, also on file systems that lack what they need."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sana_kit import files, locks
from sana_kit.errors import UserError
from sana_kit.files import check_output_folder, expand, read_header, read_layout, remove_tree, write_atomic
from sana_kit.locks import lock_folder


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_atomic(tmp_path / "a", lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        write_atomic(tmp_path / "a", fail)
    assert (tmp_path / "a").read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_a_write_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    order = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("sync"), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    write_atomic(tmp_path / "a", lambda file: file.write(b"x"))
    assert order == ["sync", "rename", "sync"]
    order.clear()
    write_atomic(tmp_path / "a", lambda file: file.write(b"y"), durable=False)
    assert order == ["rename"]


def test_temporary_names_of_processes_with_equal_ids_differ(monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)
    assert files.unique_name("x") != files.unique_name("x")


def test_a_home_folder_is_meant_by_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("~/out") == tmp_path / "out"
    assert check_output_folder("~/out", "output_dir") == [] and os.listdir(tmp_path) == []


def test_output_folders_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    texts = [str(p) for name in ("file", "file/below") for p in check_output_folder(tmp_path / name, "output_dir")]
    assert texts == [
        f"output_dir={tmp_path}/file: is a file. Name a folder.",
        f"output_dir={tmp_path}/file/below: {tmp_path}/file is a file. Name a folder.",
    ]

    def refuse(self, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)
    (problem,) = check_output_folder(tmp_path / "a" / "b", "output_path")
    assert problem.field == "output_path" and "Read-only file system" in problem.reason


def test_what_cannot_be_removed_is_set_aside_and_does_not_raise(tmp_path, monkeypatch, caplog):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / ".nfs0001").touch()
    real = shutil.rmtree

    def busy(path, ignore_errors=False, **kwargs):
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(shutil, "rmtree", busy)
    assert remove_tree(folder) is False
    assert not folder.exists() and "could not be removed whole" in caplog.text
    files.remove_leftovers(tmp_path)
    assert [name.startswith(".removed-") for name in os.listdir(tmp_path)] == [True]
    monkeypatch.setattr(shutil, "rmtree", real)
    files.remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == []


def test_removal_of_files_folders_links_and_nothing(tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "kept").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    assert all(remove_tree(tmp_path / name) for name in ("folder", "file", "link", "missing"))
    assert os.listdir(tmp_path) == ["kept"]


def test_headers_are_those_of_safetensors(tmp_path):
    tensors = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "x", metadata={"k": "v"})
    assert read_header(tmp_path / "x") == ({"a": ("F32", (2, 3)), "b": ("BF16", (2,))}, {"k": "v"})
    layout, _, start = read_layout(tmp_path / "x")
    begin, end = layout["a"][2]
    raw = (tmp_path / "x").read_bytes()
    assert raw[start + begin : start + end] == tensors["a"].numpy().tobytes()
    (tmp_path / "cut").write_bytes(raw[:-1])
    (tmp_path / "none").write_bytes(b"hello, this is text")
    with pytest.raises(ValueError, match="cut off"):
        read_header(tmp_path / "cut")
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_header(tmp_path / "none")


# Locks


@pytest.fixture(params=[None, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def flock(request, monkeypatch):
    """A file system with flock, or with none of three kinds; the errno or None."""
    if request.param is not None:

        def missing(*_):
            raise OSError(request.param, os.strerror(request.param))

        monkeypatch.setattr("fcntl.flock", missing)
    return request.param


def test_a_folder_belongs_to_one_run(flock, tmp_path, caplog):
    with lock_folder(tmp_path / "out"):
        with pytest.raises(UserError) as refused, lock_folder(tmp_path / "out", field="output_path"):
            pass
        assert str(refused.value.as_flags()).startswith(f"--output_path={tmp_path}/out: another live run")
        assert f"process {os.getpid()} on {os.uname().nodename}" in str(refused.value)
        with lock_folder(tmp_path / "out", enabled=False):
            pass
    with lock_folder(tmp_path / "out"):
        pass
    assert ("has no flock" in caplog.text) == (flock is not None)


@pytest.fixture
def no_flock(monkeypatch):
    def missing(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", missing)


def hold(folder, seconds_ago=0.0, **changes):
    """A lock file of another run; returns it."""
    path = folder / ".lock-holder"
    me = {"host": "h", "pid": os.getpid(), "machine": locks._machine(), "started": locks._started(os.getpid())}
    path.write_text(json.dumps({**me, "token": "t", **changes}))
    when = path.stat().st_mtime - seconds_ago
    os.utime(path, (when, when))
    return path


@pytest.mark.parametrize(
    ("seconds_ago", "changes", "free"),
    [
        (9999, {}, False),  # of this machine and alive, whatever the file's time
        (0, {"started": 5.0}, True),  # that process id is another process's by now
        (0, {"pid": 2**22 + 1}, True),
        (5, {"machine": "other"}, False),
        (500, {"machine": "other"}, True),
    ],
)
def test_a_dead_holders_lock_file_is_taken_over(no_flock, tmp_path, seconds_ago, changes, free):
    path = hold(tmp_path, seconds_ago, **changes)
    if free:
        with lock_folder(tmp_path):
            assert json.loads(path.read_text())["token"] != "t"
        assert not path.exists()
    else:
        with pytest.raises(UserError, match="another live run"), lock_folder(tmp_path):
            pass
        assert json.loads(path.read_text())["token"] == "t"


def test_a_lock_file_is_renewed_while_the_run_lives(no_flock, tmp_path, monkeypatch):
    import time

    monkeypatch.setattr(locks, "RENEW_SECONDS", 0.02)
    with lock_folder(tmp_path):
        os.utime(tmp_path / ".lock-holder", (5, 5))
        time.sleep(0.2)
        assert (tmp_path / ".lock-holder").stat().st_mtime > 5


def test_a_quicker_runs_lock_file_goes_back_to_its_place(tmp_path):
    path = hold(tmp_path, token="quicker")
    assert not locks._take_over(path, {"token": "dead"})
    assert json.loads(path.read_text())["token"] == "quicker" and os.listdir(tmp_path) == [".lock-holder"]
