"""Workers of a data loader, real processes: what goes wrong in one ends the loop with an error."""

import errno
import multiprocessing
import multiprocessing.queues
import os
import socket
import sys
import tempfile

import pytest
import torch
from helpers import KIT, run
from helpers.stores import all_of, encode_alone
from torch.utils.data import DataLoader, Dataset

from sana_kit import workers
from sana_kit.data.discover import load_images
from sana_kit.workers import LONGEST_SOCKET_FOLDER, prepare_worker, socket_folder


class Numbers(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.full((1000,), float(index))


class Unsendable(Numbers):
    def __getitem__(self, index):
        return lambda: index  # no pickle of it


def first_of(batch):
    return batch[0]


def numbers(dataset):
    loader = DataLoader(dataset, batch_size=1, num_workers=1, worker_init_fn=prepare_worker, collate_fn=first_of)
    return list(loader)


@pytest.fixture
def long_tmpdir(tmp_path, monkeypatch):
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_long_tmpdir_does_not_keep_batches_back(long_tmpdir):
    assert [int(batch[0]) for batch in numbers(Numbers())] == [0, 1, 2, 3]
    assert tempfile.gettempdir() == str(long_tmpdir)  # the trainer's own stays


def test_a_batch_that_cannot_be_sent_is_an_error_in_the_trainer(capfd):
    before = multiprocessing.queues.Queue._on_queue_feeder_error
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        numbers(Unsendable())
    assert "a worker of the data loader cannot send its batch" in capfd.readouterr().err
    assert multiprocessing.queues.Queue._on_queue_feeder_error is before


def test_without_a_short_folder_the_error_reaches_the_trainer(long_tmpdir, monkeypatch):
    monkeypatch.setattr(workers, "SHORT_FOLDERS", ("/nowhere",))
    with pytest.raises(OSError, match="too long for the sockets of the loader's workers"):
        numbers(Numbers())


def test_a_socket_fits_into_the_longest_folder_that_counts_as_short(tmp_path, monkeypatch):
    fits = "/tmp/" + "y" * (LONGEST_SOCKET_FOLDER - 5)
    monkeypatch.setattr(tempfile, "tempdir", fits)
    assert socket_folder() == fits
    name = f"{fits}/pymp-12345678/listener-12345678"
    with socket.socket(socket.AF_UNIX) as listener, pytest.raises(OSError, match="No such file") as missing:
        listener.bind(name)
    assert missing.value.errno == errno.ENOENT and len(os.fsencode(name)) <= 107


def test_a_busy_worker_does_not_hold_up_the_end_of_a_trainer_that_failed():
    script = KIT / "tests" / "distributed" / "workers" / "stuck_loader.py"
    done = run([sys.executable, script])
    assert done.returncode == 1 and "the update failed" in done.stderr


def test_encodings_are_readable_from_forked_and_spawned_workers(tiny_model, image_folder, tmp_path):
    encoded = encode_alone(load_images(instance_data_dir=str(image_folder)), tiny_model, tmp_path / "store")
    here = all_of(encoded)
    loader = torch.utils.data.DataLoader(encoded, batch_size=None, num_workers=2, multiprocessing_context="fork")
    for sample, (latents, embeds) in zip(loader, here, strict=True):
        assert torch.equal(sample["latents"], latents) and torch.equal(sample["prompt_embeds"], embeds)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        again = pool.map(encoded.__getitem__, range(6))
    assert all(torch.equal(a["latents"], b) for a, (b, _) in zip(again, here, strict=True))
