"""Encodings: right, found again, never stale, safe against damage, kills and other ranks.

Run with `python -m pytest tests/test_encodings.py`.
"""

import contextlib
import inspect
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import tiny
import torch

from sana_kit.data.discover import load_images
from sana_kit.data.image_set import concat
from sana_kit.data.transform import transform
from sana_kit.encodings.encode import encode
from sana_kit.encodings.missing import encode_pixels, group_size, images_that_fit
from sana_kit.encodings.prompts import collate_prompt_embeds, encode_prompts
from sana_kit.errors import EncodingStopped, StoreError
from sana_kit.models.folder import component_identity, vae_geometry

KIT = Path(__file__).resolve().parent.parent
# Matrix products of other shapes than in the pipeline's batch of 300 tokens may round otherwise; bf16 keeps 8 bits.
TEXT_TOLERANCE = 1e-2
INSTRUCTION = ["Given a prompt, describe it.", "User Prompt: "]
CAPTIONS = ["a red dog", "  A Photo of a CAT 😀 ", "", "שלום עולם", "a " * 2000, "drawing of a small square " * 20]


@pytest.fixture(scope="module")
def state():
    """A PartialState of one process on the CPU: all that `encode` needs of an accelerator."""
    from accelerate import PartialState

    return PartialState(cpu=True)


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    """The real SanaPipeline of the tiny model, in bf16."""
    from diffusers import SanaPipeline

    pipeline = SanaPipeline.from_pretrained(tiny_model)
    return pipeline.to(dtype=torch.bfloat16)


@pytest.fixture
def run(tmp_path, state, tiny_model):
    """A function that encodes into a store of the test's own."""

    def call(images, **changes):
        arguments = {
            "accelerator": state,
            "pretrained_model_name_or_path": str(tiny_model),
            "store_dir": str(tmp_path / "store"),
            "resolution": 64,
            "num_workers": 2,
        }
        return encode(images, **{**arguments, **changes})

    return call


@pytest.fixture
def no_models():
    """Makes loading a model an error inside `with no_models():`."""

    @contextlib.contextmanager
    def forbidden():
        def refuse(*_, **__):
            raise AssertionError("a model was loaded")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sana_kit.encodings.missing.open_vae", refuse)
            patch.setattr("sana_kit.encodings.missing.open_text_encoder", refuse)
            yield

    return forbidden


def shards(store, part):
    return sorted((Path(store) / part).glob("*.safetensors"))


def all_of(encoded):
    return [(s["latents"], s["prompt_embeds"]) for s in (encoded[i] for i in range(len(encoded)))]


def equal(first, second):
    pairs = zip(all_of(first), all_of(second), strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


# ---------------------------------------------------------------------------------------------------------------------
# Right


@pytest.mark.parametrize("instruction", [None, INSTRUCTION, "default", ["x"]], ids=["none", "own", "default", "short"])
@pytest.mark.parametrize("length", [300, 16, 2])
def test_prompts_are_encoded_as_by_the_pipeline(pipeline, instruction, length):
    if instruction == "default":
        instruction = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
    reference, mask, _, _ = pipeline.encode_prompt(
        CAPTIONS,
        do_classifier_free_guidance=False,
        max_sequence_length=length,
        complex_human_instruction=instruction,
    )
    for batch in (16, 1):
        ours = encode_prompts(pipeline.tokenizer, pipeline.text_encoder, CAPTIONS, instruction, length, batch=batch)
        for row, embeds in enumerate(ours):
            expected = reference[row][mask[row].bool()]
            assert embeds.shape == expected.shape and embeds.dtype == torch.bfloat16
            assert (embeds.float() - expected.float()).norm() <= TEXT_TOLERANCE * expected.float().norm()
        assert not batch == 16 or len({e.shape[0] for e in ours}) > 1 or length == 2


def test_negative_prompt_is_encoded_as_by_the_pipeline(pipeline):
    _, _, reference, mask = pipeline.encode_prompt(
        "x", True, negative_prompt="Ugly, blurry", complex_human_instruction=INSTRUCTION
    )
    (ours,) = encode_prompts(pipeline.tokenizer, pipeline.text_encoder, ["Ugly, blurry"], None)
    expected = reference[0][mask[0].bool()]
    assert (
        ours.shape == expected.shape
        and (ours.float() - expected.float()).norm() <= TEXT_TOLERANCE * expected.float().norm()
    )


def test_cut_captions_and_enlarged_images_are_told(run, tmp_path):
    folder = tiny.write_image_folder(tmp_path / "set", count=3)
    (folder / "image_01.txt").write_text("square circle " * 800, encoding="utf-8")
    tiny.make_images(1, size=40)[0][0].save(folder / "image_02.png")
    encoded = run(load_images(instance_data_dir=str(folder)), max_sequence_length=50)
    assert encoded.prompt_tokens()[1] == 50 > encoded.prompt_tokens()[0]
    assert [m[:40] for m in encoded.messages] == [
        "1 caption(s) reach --max_sequence_length",
        "1 image(s) are smaller than --resolution",
    ]


def test_images_too_large_for_one_pass_are_encoded_in_tiles(run, image_folder, tiny_model, tmp_path, monkeypatch):
    from diffusers import AutoencoderDC

    vae = AutoencoderDC.from_pretrained(tiny_model, subfolder="vae")
    images = load_images(instance_data_dir=str(image_folder))
    whole = run(images, resolution=192, vae_dtype=torch.float32, store_dir=str(tmp_path / "whole"))
    for name, value in (("WHOLE_ENCODE_SIDE", 128), ("ENCODE_TILE", 128), ("ENCODE_STRIDE", 96)):
        monkeypatch.setattr(f"sana_kit.encodings.missing.{name}", value)
    tiled = run(images, resolution=192, vae_dtype=torch.float32)
    for i in range(len(images)):
        a, b = whole.latents(i), tiled.latents(i)
        assert a.shape == b.shape == (4, 24, 24)
        assert not torch.equal(a, b)
        plan = {"resolution": 192, "center_crop": False, "random_flip": False, "seed": 0, "index": i}
        corner = transform(images.load(i), **plan)[:, :128, :128]
        with torch.no_grad():
            alone = vae.encode(corner[None]).latent[0] * vae.config.scaling_factor
        # The first tile up to the overlap is that tile encoded alone (the VAE's attention sees no more than the tile).
        torch.testing.assert_close(b[:, :12, :12], alone[:, :12, :12], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_latents_are_the_vaes_times_the_scaling_factor(run, image_folder, tiny_model, dtype):
    from diffusers import AutoencoderDC

    images = load_images(instance_data_dir=str(image_folder))
    encoded = run(images, vae_dtype=dtype, random_flip=True, seed=5)
    vae = AutoencoderDC.from_pretrained(tiny_model, subfolder="vae").to(dtype)
    for i in range(len(images)):
        decisions = {"resolution": 64, "center_crop": False, "random_flip": True, "seed": 5, "index": i}
        pixels = transform(images.load(i), **decisions)
        with torch.no_grad():
            expected = vae.encode(pixels[None].to(dtype)).latent[0] * vae.config.scaling_factor
        latents = encoded.latents(i)
        assert latents.dtype == dtype and latents.shape == (4, 8, 8)
        # One image here, a batch there: the convolutions may round otherwise.
        assert (latents.float() - expected.float()).norm() < 2e-2 * expected.float().norm()
    assert encoded.scaling_factor == vae.config.scaling_factor
    assert vae_geometry(str(tiny_model)) == {"factor": 8, "latent_channels": 4, "scaling_factor": 0.41407}


def test_each_image_keeps_its_caption_and_each_distinct_thing_is_encoded_once(
    run, image_folder, parquet_dataset, pipeline
):
    folder = load_images(instance_data_dir=str(image_folder), repeats=2)
    table = load_images(dataset_name=str(parquet_dataset), instance_prompt="a dog")
    images = concat(folder, table)
    encoded = run(
        images,
        center_crop=True,
        complex_human_instruction=INSTRUCTION,
        extra_prompts=[("A red Square", INSTRUCTION), ("", None), ("a dog", None)],
    )
    assert encoded.encoded_images == len({images.source_hash(i) for i in range(len(images))}) == 6
    assert encoded.encoded_prompts == 6 + 1 + 3 and encoded.reused_images == encoded.reused_prompts == 0
    expected = encode_prompts(pipeline.tokenizer, pipeline.text_encoder, images.captions, INSTRUCTION)
    for i in range(len(images)):
        embeds = encoded[i]["prompt_embeds"]
        assert embeds.shape == expected[i].shape
        assert (embeds.float() - expected[i].float()).norm() <= TEXT_TOLERANCE * expected[i].float().norm()
        assert torch.equal(embeds, encoded.prompt(images.captions[i], INSTRUCTION))
    assert encoded.prompt_tokens().tolist() == [e.shape[0] for e in expected]
    assert torch.equal(encoded.latents(0), encoded.latents(1)) and not torch.equal(
        encoded.latents(0), encoded.latents(2)
    )
    assert encoded.prompt("a red square", INSTRUCTION).shape[0] > encoded.prompt("").shape[0] == 1
    with pytest.raises(KeyError, match="a red square"):
        encoded.prompt("a red square", None)
    assert encoded.bytes["latents"] == 6 * 4 * 8 * 8 * 2
    assert encoded.bytes["prompts"] < 10 * 30 * 32 * 2  # valid tokens only, not 300


def test_collate_pads_to_the_longest_rounded_up():
    rows = [torch.randn(t, 3, dtype=torch.bfloat16) for t in (1, 17, 5)]
    embeds, mask = collate_prompt_embeds(rows)
    assert embeds.shape == (3, 32, 3) and embeds.dtype == torch.bfloat16 and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [1, 17, 5] and embeds[~mask].abs().sum() == 0
    assert all(torch.equal(embeds[k][mask[k]], row) for k, row in enumerate(rows))
    assert collate_prompt_embeds(rows, multiple=1)[0].shape == (3, 17, 3)


def test_result_does_not_depend_on_what_is_already_there(run, image_folder, tmp_path):
    images = load_images(instance_data_dir=str(image_folder))
    whole = run(images, store_dir=str(tmp_path / "whole"), vae_batch_size=4, text_batch_size=4)
    part = images.without([0, 2, 3])
    run(part, vae_batch_size=4, text_batch_size=4)
    for path in shards(tmp_path / "store", "prompts"):
        path.unlink()
    rest = run(images, vae_batch_size=4, text_batch_size=4)
    assert (rest.reused_images, rest.encoded_images, rest.encoded_prompts) == (3, 3, 6)
    latents = [torch.equal(rest.latents(i), whole.latents(i)) for i in (0, 2, 3)]
    assert all(latents) and all(torch.equal(rest.prompt_embeds(i), whole.prompt_embeds(i)) for i in range(6))


# ---------------------------------------------------------------------------------------------------------------------
# Found again, never stale


def test_second_run_loads_no_model_and_serves_the_same(run, image_folder, no_models):
    images = load_images(instance_data_dir=str(image_folder))
    first = run(images, complex_human_instruction=INSTRUCTION)
    with no_models():
        second = run(images, complex_human_instruction=INSTRUCTION)
    assert (second.encoded_images, second.reused_images) == (0, 6)
    assert (second.encoded_prompts, second.reused_prompts) == (0, 6)
    assert equal(first, second)


def test_changed_image_caption_flag_or_model_is_encoded_anew_and_the_old_stays(run, tmp_path, tiny_model):
    folder = tiny.write_image_folder(tmp_path / "set", count=3)

    def now(**changes):
        encoded = run(load_images(instance_data_dir=str(folder)), **changes)
        return encoded.encoded_images, encoded.encoded_prompts

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
    assert now(pretrained_model_name_or_path=str(copy)) == (0, 0)  # a copy is the same model
    other = tiny.make_tiny_pipeline(tmp_path / "other", seed=1)
    for part, expected in (("vae", (3, 0)), ("text_encoder", (0, 3))):
        mixed = shutil.copytree(tiny_model, tmp_path / f"mixed-{part}")
        shutil.rmtree(mixed / part)
        shutil.copytree(other / part, mixed / part)
        assert now(pretrained_model_name_or_path=str(mixed)) == expected
    tokenizer = json.loads((copy / "tokenizer" / "tokenizer_config.json").read_text())
    (copy / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "note": 1}))
    assert now(pretrained_model_name_or_path=str(copy)) == (0, 3)


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


# ---------------------------------------------------------------------------------------------------------------------
# Damage


@pytest.mark.parametrize("size", [0, 5, 40, -1])
def test_cut_off_shard_is_named_set_aside_and_encoded_again(run, image_folder, tmp_path, size):
    images = load_images(instance_data_dir=str(image_folder))
    first = all_of(run(images))
    (path,) = shards(tmp_path / "store", "latents")
    data = path.read_bytes()
    path.write_bytes(data[:size])
    again = run(images)
    assert (again.encoded_images, again.encoded_prompts) == (6, 0)
    assert any(path.name in m and "damaged" in m for m in again.messages)
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
    assert encoded.encoded_images == 6 and len(encoded.messages) == 2
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
    assert [p.name for p in (tmp_path / "store").iterdir()] in (["latents", "prompts"], ["prompts", "latents"])


# ---------------------------------------------------------------------------------------------------------------------
# Errors before weights load


def test_corrupt_image_is_an_error_before_any_weight_loads(run, tmp_path, no_models):
    folder = tiny.write_image_folder(tmp_path / "set", count=3)
    tiny.make_images(1, size=300)[0][0].save(folder / "cut.jpg")
    data = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(data[: len(data) * 3 // 4])
    images = load_images(instance_data_dir=str(folder), instance_prompt="x")
    with (
        no_models(),
        pytest.raises(ValueError, match=r"1 image\(s\) cannot be used.*--skip_bad_images.*\n.*cut.jpg: corrupt"),
    ):
        run(images)
    assert not shards(tmp_path / "store", "latents")
    encoded = run(images, skip_bad_images=True)
    assert len(encoded) == 3 and "cut.jpg" not in encoded.images.names
    assert encoded.images.report["bad images skipped"] == 1 and any("cut.jpg" in m for m in encoded.messages)


def test_wrong_flags_come_all_at_once(run, image_folder, no_models):
    images = load_images(instance_data_dir=str(image_folder))
    with no_models(), pytest.raises(ValueError) as caught:
        run(
            images,
            resolution=100,
            text_encoder_dtype=torch.float16,
            vae_batch_size=0,
            max_sequence_length=0,
            text_batch_size=0,
        )
    text = str(caught.value)
    for part in (
        "--resolution=100: must be a multiple of 8",
        "NaN in fp16",
        "--vae_batch_size=0",
        "--max_sequence_length=0",
    ):
        assert part in text
    assert "--text_batch_size=0" in text


def test_incomplete_model_folder(run, image_folder, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    shutil.rmtree(model / "text_encoder")
    shutil.rmtree(model / "tokenizer")
    with pytest.raises(
        ValueError, match="text_encoder/config.json is missing(.*\n)*.*tokenizer_config.json is missing"
    ):
        run(load_images(instance_data_dir=str(image_folder)), pretrained_model_name_or_path=str(model))


def test_store_that_cannot_be_made(run, image_folder, tmp_path, no_models):
    (tmp_path / "file").write_text("x")
    with no_models(), pytest.raises(StoreError, match="cannot be written"):
        run(load_images(instance_data_dir=str(image_folder)), store_dir=str(tmp_path / "file" / "store"))


def test_full_disk_leaves_nothing_half_written(run, image_folder, tmp_path, monkeypatch):
    import safetensors.torch

    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(StoreError, match="could not be written.*No space left"):
            run(load_images(instance_data_dir=str(image_folder)))
    assert [p for p in (tmp_path / "store").rglob("*") if p.is_file()] == []
    assert run(load_images(instance_data_dir=str(image_folder))).encoded_images == 6


def test_too_little_space_is_an_error_before_weights_load(run, image_folder, no_models, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with no_models(), pytest.raises(StoreError, match="6 latents need .* free"):
        run(load_images(instance_data_dir=str(image_folder)))


def test_nan_latents_name_the_image(run, image_folder, monkeypatch):
    real = encode_pixels

    def broken(vae, pixels):
        latents = real(vae, pixels)
        latents[1] = float("nan")
        return latents

    monkeypatch.setattr("sana_kit.encodings.missing.encode_pixels", broken)
    with pytest.raises(ValueError, match="NaN or infinite latents for image_01.png"):
        run(load_images(instance_data_dir=str(image_folder)), vae_batch_size=6)


def test_out_of_memory_halves_the_batch_and_ends_with_a_remedy(run, image_folder, monkeypatch, tmp_path):
    images = load_images(instance_data_dir=str(image_folder))
    real, sizes = encode_pixels, []

    def small_device(limit):
        def encode_pixels(vae, pixels):
            sizes.append(len(pixels))
            if len(pixels) > limit:
                raise RuntimeError("NPU out of memory. Tried to allocate 20.00 MiB")
            return real(vae, pixels)

        return encode_pixels

    monkeypatch.setattr("sana_kit.encodings.missing.encode_pixels", small_device(2))
    encoded = run(images, vae_batch_size=6)
    assert encoded.encoded_images == 6 and sizes == [6, 3, 1, 1, 1, 1, 1, 1]
    assert sum("out of memory" in m for m in encoded.messages) == 2
    monkeypatch.setattr("sana_kit.encodings.missing.encode_pixels", small_device(0))
    with pytest.raises(RuntimeError, match="cannot encode one image of 64 px.*--resolution"):
        run(images, vae_batch_size=2, store_dir=str(tmp_path / "other"))


def test_auto_batch_size_follows_the_free_memory(monkeypatch):
    # Without torch_npu there is no torch.device("npu"); only the kind of device counts here.
    cpu, npu = torch.device("cpu"), types.SimpleNamespace(type="npu")
    assert group_size("auto", 1024, npu) == 8
    assert group_size("auto", 512, npu) == 32
    assert group_size("auto", 4096, npu) == 1
    assert group_size(3, 1024, cpu) == 3
    for free, expected in ((2**40, 8), (8 * 2**30, 2), (1, 1), (None, 8)):
        monkeypatch.setattr("sana_kit.devices.free_memory_bytes", lambda _, free=free: free)
        assert images_that_fit(8, 1024, 128, torch.bfloat16, cpu) == expected


def test_stop_on_request_keeps_what_is_done(run, image_folder, tmp_path):
    images = load_images(instance_data_dir=str(image_folder))
    asked = []

    def stop_at_the_third_group():
        asked.append(1)
        return bool(shards(tmp_path / "store", "prompts")) and len(asked) > 6

    with pytest.raises(EncodingStopped):
        run(images, vae_batch_size=1, should_stop=stop_at_the_third_group)
    rest = run(images, vae_batch_size=1)
    assert rest.encoded_prompts == 0 and 0 < rest.encoded_images < 6


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def test_readable_from_forked_and_spawned_workers(run, image_folder):
    encoded = run(load_images(instance_data_dir=str(image_folder)))
    here = all_of(encoded)
    loader = torch.utils.data.DataLoader(encoded, batch_size=None, num_workers=2, multiprocessing_context="fork")
    for sample, (latents, embeds) in zip(loader, here, strict=True):
        assert torch.equal(sample["latents"], latents) and torch.equal(sample["prompt_embeds"], embeds)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        again = pool.map(encoded.__getitem__, range(6))
    assert all(torch.equal(a["latents"], b) for a, (b, _) in zip(again, here, strict=True))


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


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, tiny_model):
    """The results of all scenarios with several ranks; one process imports torch for all of them."""
    return run_ranks(tmp_path_factory.mktemp("ranks"), tiny_model, kills=6)


def run_ranks(work, tiny_model, kills):
    tiny.write_image_folder(work / "images", count=7)
    tiny.write_image_folder(work / "single", count=1)
    tiny.write_image_folder(work / "many", count=20 + 6 * kills)
    corrupt = tiny.write_image_folder(work / "corrupt", count=5)
    tiny.make_images(1, size=300)[0][0].save(corrupt / "cut.jpg")
    data = (corrupt / "cut.jpg").read_bytes()
    (corrupt / "cut.jpg").write_bytes(data[: len(data) * 3 // 4])
    script = KIT / "tests" / "distributed" / "workers" / "encode_groups.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = str(KIT)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, str(script), str(tiny_model), str(work), str(kills)],
        capture_output=True,
        text=True,
        timeout=900,
        env=environment,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(lines[-1][7:])


def test_shares_of_any_number_of_ranks_give_the_same_bits(ranks):
    assert all(len({r["digest"] for r in ranks[k]}) == 1 for k in ("one rank", "two ranks", "three ranks"))
    assert ranks["one rank"][0]["digest"] == ranks["two ranks"][0]["digest"] == ranks["three ranks"][0]["digest"]
    for name in ("one rank", "two ranks", "three ranks"):
        assert all((r["images"], r["prompts"]) == (7, 7) for r in ranks[name])
    assert all((r["images"], r["prompts"]) == (0, 0) for r in ranks["again on two"])
    assert ranks["again on two"][0]["digest"] == ranks["one rank"][0]["digest"]


def test_ranks_without_a_share_finish(ranks):
    assert [r["images"] for r in ranks["idle ranks"]] == [1, 1, 1]
    assert ranks["idle left"] == ["latents", "prompts"]


def test_corrupt_image_on_one_share_ends_all_ranks_with_its_name(ranks):
    for result in ranks["corrupt"]:
        assert result["error"].startswith("ValueError") and "cut.jpg" in result["error"]
    assert ranks["corrupt left"] == ["latents", "prompts"]
    assert all(r["samples"] == 5 and r["images"] == 5 for r in ranks["skipped"])


def test_machines_with_folders_of_their_own_each_encode_all(ranks):
    assert [r["samples"] for r in ranks["separate"]] == [7, 7]
    assert {r["digest"] for r in ranks["separate"]} == {ranks["one rank"][0]["digest"]}


def test_failure_of_one_rank_ends_all_with_its_text(ranks):
    for result in ranks["failure"]:
        assert "rank 1: the device caught fire" in result["error"]
    assert ranks["failure left"] == ["latents", "prompts"]
    for result in ranks["flag error on one rank"]:
        assert result["error"].startswith("ValueError: rank 0:") and "--resolution=63" in result["error"]


def test_killed_encoding_goes_on_and_ends_with_the_same_bits(ranks):
    assert sorted(ranks["kills"]) == ranks["kills"]  # nothing that was written is lost
    assert ranks["after kills"][0]["digest"] == ranks["undisturbed"][0]["digest"]
    assert 0 < ranks["kills"][0] < ranks["kills"][-1] < 56  # the kills fell into the encoding, and it went on
    assert ranks["after kills"][0]["images"] == 56 - ranks["kills"][-1]


def test_concurrent_runs_in_one_store(ranks):
    assert [r["digest"] for r in ranks["concurrent"]] == [ranks["undisturbed"][0]["digest"]] * 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_forty_kills_at_random_moments(tmp_path, tiny_model):
    results = run_ranks(tmp_path, tiny_model, kills=40)
    assert len(results["kills"]) == 40 and results["after kills"][0]["digest"] == results["undisturbed"][0]["digest"]
    print("encoded at each kill:", results["kills"])
