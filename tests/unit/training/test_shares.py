"""Files of a checkpoint: cut, shared out, written in step by several ranks, hashed on the way."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file

from sana_kit.training.engine import Entry
from sana_kit.training.shares import index_of, share_out, split_files, write_shares


def entries(tensors: dict, walked: list | None = None) -> list[Entry]:
    def fetch(key):
        def of(keep):
            if walked is not None:
                walked.append(key)
            return tensors[key] if keep else None

        return of

    return [Entry(key, tensor.dtype, tuple(tensor.shape), fetch(key)) for key, tensor in tensors.items()]


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    found = {f"weight {i}": torch.randn(5, i + 1, generator=generator) for i in range(7)}
    found["codes"] = torch.arange(7, dtype=torch.uint8)
    found["half"] = torch.randn(3, generator=generator).bfloat16()
    return found


def test_what_is_written_reads_back_and_carries_its_hash(tensors, tmp_path):
    files = split_files("optimizer", entries(tensors))
    written, problem = write_shares(tmp_path, share_out(files, [0]), 0)
    assert problem is None and list(written) == ["optimizer.safetensors"]
    data = (tmp_path / "optimizer.safetensors").read_bytes()
    assert written["optimizer.safetensors"] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    read = load_file(tmp_path / "optimizer.safetensors")
    assert read.keys() == tensors.keys()
    assert all(read[key].dtype == tensors[key].dtype and torch.equal(read[key], tensors[key]) for key in tensors)


def test_ranks_walk_all_tensors_in_one_order_and_write_their_own_files(tensors, tmp_path):
    walks, names = [], []
    for rank in range(3):
        walked = []
        files = split_files("part", entries(tensors, walked), limit=120)
        assert len(files) > 3
        written, problem = write_shares(tmp_path, share_out(files, [0, 2]), rank)
        assert problem is None
        walks.append(walked)
        names.append(list(written))
    assert walks[0] == walks[1] == walks[2] and sorted(walks[0]) == sorted(tensors)
    assert names[0] and names[2] and not names[1] and not set(names[0]) & set(names[2])
    read = {key: tensor for path in tmp_path.iterdir() for key, tensor in load_file(path).items()}
    assert all(torch.equal(read[key], tensors[key]) for key in tensors)


def test_the_largest_files_are_shared_first(tensors):
    files = split_files("part", entries(tensors), limit=120)
    loads = [sum(file.bytes for file in mine) for mine in share_out(files, [0, 1, 2]).values()]
    assert max(loads) - min(loads) <= max(file.bytes for file in files)


def test_an_error_of_the_disk_does_not_stop_the_walk(tensors, tmp_path):
    walked = []
    files = split_files("no/part", entries(tensors, walked))
    (tmp_path / "no").write_text("a file, where a folder should be")
    written, problem = write_shares(tmp_path, share_out(files, [0]), 0)
    assert "FileExistsError" in problem and not written and len(walked) == len(tensors)


def test_what_is_not_finite_is_not_saved(tensors, tmp_path):
    tensors["weight 3"][0, 0] = float("nan")
    _, problem = write_shares(tmp_path, share_out(split_files("optimizer", entries(tensors)), [0]), 0)
    assert "weight 3 holds values that are not finite" in problem


def test_a_model_in_several_files_has_an_index(tensors):
    files = split_files("transformer/model", entries(tensors), limit=120)
    index = index_of(files)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["weight_map"]["weight 0"].startswith("model-0") and "/" not in index["weight_map"]["weight 0"]
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
