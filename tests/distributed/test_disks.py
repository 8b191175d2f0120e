"""Disks that are full, or that cannot be written to."""

import shutil
import subprocess

import pytest
from helpers import TRAINER, adapter_weights, launch
from helpers.runs import train

from sana_kit.training import checkpoints


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint_whole_and_the_run_goes_on_once_there_is_room(
    flags, small_disk, tmp_path
):
    more = ["--train_batch_size=1", "--gradient_accumulation_steps=1", "--rank=8", "--max_train_steps=40"]
    more += ["--checkpointing_steps=2", f"--encodings_dir={tmp_path / 'encodings'}"]
    done = launch(TRAINER, *flags, f"--output_dir={small_disk}", *more, engine="python")
    assert done.returncode == 1 and "No space left" in done.stderr and "Traceback" not in done.stderr
    whole = checkpoints.list_checkpoints(small_disk)
    assert whole and all(checkpoints.find_damage(folder) is None for _, folder in whole)
    assert not [path for path in small_disk.iterdir() if "partial" in path.name]
    for _, folder in whole[:-1]:
        shutil.rmtree(folder)
    more += ["--resume_from_checkpoint=latest", "--checkpoints_total_limit=1"]
    train(small_disk, flags, *more, engine="python")
    assert adapter_weights(small_disk)


def test_a_read_only_output_folder_is_an_error_before_anything_is_loaded(flags, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = launch(TRAINER, *flags, f"--output_dir={small_disk}/out", engine="python")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert done.returncode == 1 and "cannot be written to (Read-only file system)" in done.stderr
    assert "Loading weights" not in done.stderr and not list(small_disk.iterdir())
