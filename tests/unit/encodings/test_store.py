"""The store: found again, never stale, safe against damage."""

import json
import os
import pickle
import shutil
import time
from pathlib import Path

import pytest
import tiny
import torch
from stores import all_of, equal, shards

from sana_kit.data.discover import load_images
from sana_kit.errors import StoreError
from sana_kit.models.folder import component_identity

INSTRUCTION = ["Given a prompt, describe it.", "User Prompt: "]


def test_second_run_loads_no_model_and_serves_the_same(run, image_folder, no_models):
    images = load_images(instance_data_dir=str(image_folder))
    first = run(images, complex_human_instruction=INSTRUCTION)
    with no_models():
        second = run(images, complex_human_instruction=INSTRUCTION)
    assert (second.facts.encoded_images, second.facts.reused_images) == (0, 6)
    assert (second.facts.encoded_prompts, second.facts.reused_prompts) == (0, 6)
    assert equal(first, second)


def test_changed_image_caption_flag_or_model_is_encoded_anew_and_the_old_stays(run, tmp_path, tiny_model):
    folder = tiny.write_image_folder(tmp_path / "set", count=3)

    def now(**changes):
        encoded = run(load_images(instance_data_dir=str(folder)), **changes)
        return encoded.facts.encoded_images, encoded.facts.encoded_prompts

    assert now() == (3, 3)
    assert now() == (0, 0)
    tiny.make_images(9)[8][0].save(folder / "image_01.png")
    assert now() == (1, 0)
    (folder / "image_02.txt").write_text("another caption")
    assert now() == (0, 1)
    assert now(resolution=48) == (3, 0)
    assert now(vae_dtype=torch.float32) == (3, 0)
    assert now(text_encoder_dtype=torch.float32) == (0, 3)
    assert now(max_sequence_length=200) == (0, 3)
    assert now(complex_human_instruction=INSTRUCTION) == (0, 3)
    assert now(complex_human_instruction=INSTRUCTION[::-1]) == (0, 3)
    assert sum(now(random_flip=True)) > 0  # those that are flipped
    assert now(center_crop=True)[0] == 2  # one image is square: nothing of it is cropped, so nothing changes
    assert now(seed=1)[0] > 0
    assert now() == (0, 0)  # the encodings of all these flags live beside each other
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    assert now(model=str(copy)) == (0, 0)  # a copy is the same model
    other = tiny.make_tiny_pipeline(tmp_path / "other", seed=1)
    for part, expected in (("vae", (3, 0)), ("text_encoder", (0, 3))):
        mixed = shutil.copytree(tiny_model, tmp_path / f"mixed-{part}")
        shutil.rmtree(mixed / part)
        shutil.copytree(other / part, mixed / part)
        assert now(model=str(mixed)) == expected
    tokenizer = json.loads((copy / "tokenizer" / "tokenizer_config.json").read_text())
    (copy / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "note": 1}))
    assert now(model=str(copy)) == (0, 3)


def test_identity_of_large_weight_files_sees_a_change_in_any_tensor(tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "model" / "vae"
    folder.mkdir(parents=True)
    (folder.parent / "model_index.json").write_text("{}")
    (folder / "config.json").write_text("{}")
    tensors = {f"layer{k}": torch.zeros(2**20) for k in range(20)}  # 80 MiB: over the size that is hashed whole
    seen = set()
    for k in (None, 0, 7, 19):
        changed = dict(tensors) if k is None else {**tensors, f"layer{k}": torch.ones(2**20)}
        save_file(changed, folder / "diffusion_pytorch_model.safetensors")
        seen.add(component_identity(str(tmp_path / "model"), "vae"))
    assert len(seen) == 4


def test_hub_models_count_by_commit(tmp_path, tiny_model, monkeypatch):
    import huggingface_hub

    def snapshot(commit):
        folder = tmp_path / "models--a--b" / "snapshots" / commit
        shutil.copytree(tiny_model, folder)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name, **_: str(folder / name))
        return component_identity("a/b", "vae")

    assert snapshot("1" * 40) != snapshot("2" * 40)


@pytest.mark.parametrize("size", [0, 5, 40, -1])
def test_cut_off_shard_is_named_set_aside_and_encoded_again(run, image_folder, tmp_path, size):
    images = load_images(instance_data_dir=str(image_folder))
    first = all_of(run(images))
    (path,) = shards(tmp_path / "store", "latents")
    data = path.read_bytes()
    path.write_bytes(data[:size])
    again = run(images)
    assert (again.facts.encoded_images, again.facts.encoded_prompts) == (6, 0)
    assert any(path.name in m and "damaged" in m for m in again.facts.messages)
    assert path.with_name(path.name + ".damaged").exists() and not path.exists()
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, all_of(again), strict=True))


def test_foreign_and_garbage_files_in_the_store(run, image_folder, tmp_path):
    from safetensors.torch import save_file

    images = load_images(instance_data_dir=str(image_folder))
    (tmp_path / "store" / "latents").mkdir(parents=True)
    save_file({"x": torch.zeros(3)}, tmp_path / "store" / "latents" / "foreign.safetensors")
    (tmp_path / "store" / "latents" / "garbage.safetensors").write_bytes(os.urandom(5000))
    (tmp_path / "store" / "latents" / "notes.txt").write_text("mine")
    encoded = run(images)
    assert encoded.facts.encoded_images == 6 and len(encoded.facts.messages) == 2
    assert (tmp_path / "store" / "latents" / "notes.txt").exists()


def test_bytes_that_change_while_in_use_are_noticed(run, image_folder, tmp_path):
    encoded = run(load_images(instance_data_dir=str(image_folder)))
    (path,) = shards(tmp_path / "store", "latents")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=f"{path.name}: its bytes changed"):
        all_of(encoded)
    path.unlink()
    again = pickle.loads(pickle.dumps(encoded))
    with pytest.raises(StoreError, match="cannot be read"):
        again.latents(0)


def test_leftovers_of_a_killed_run_are_removed_when_old(run, image_folder, tmp_path):
    folder = tmp_path / "store" / "latents"
    folder.mkdir(parents=True)
    old, young = folder / ".unfinished-old", folder / ".unfinished-young"
    for path in (old, young):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    run(load_images(instance_data_dir=str(image_folder)))
    assert not old.exists() and young.exists()
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == ["latents", "plans", "prompts", "runs"]


def test_full_disk_leaves_nothing_half_written(run, image_folder, tmp_path, monkeypatch):
    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sana_kit.encodings.store.save_file", full)
        with pytest.raises(StoreError, match="could not be written.*No space left"):
            run(load_images(instance_data_dir=str(image_folder)))
    assert [p for p in (tmp_path / "store").rglob("*") if p.is_file()] == []
    assert run(load_images(instance_data_dir=str(image_folder))).facts.encoded_images == 6


def test_reading_keeps_few_file_handles(run, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sana_kit.encodings.store.SHARD_ITEMS", 1)
    monkeypatch.setattr("sana_kit.encodings.store.OPEN_SHARDS", 2)
    encoded = run(load_images(instance_data_dir=str(image_folder)), vae_batch_size=1, text_batch_size=1)
    assert len(shards(tmp_path / "store", "latents")) == 6
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        all_of(encoded)
    assert len(os.listdir("/proc/self/fd")) <= before + 4
    del encoded
    assert len(os.listdir("/proc/self/fd")) <= before
