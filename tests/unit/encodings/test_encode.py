"""Encoding on one process: right values, each distinct thing once, errors before weights load."""

import shutil
import types

import pytest
import tiny
import torch
from stores import shards

from sana_kit.data.discover import load_images
from sana_kit.data.image_set import concat
from sana_kit.data.transform import transform
from sana_kit.encodings.encode_images import encode_pixels, group_size, images_that_fit
from sana_kit.encodings.prompts import encode_prompts
from sana_kit.errors import EncodingStopped, StoreError, UserError
from sana_kit.models.folder import find_model, vae_geometry

INSTRUCTION = ["Given a prompt, describe it.", "User Prompt: "]
TEXT_TOLERANCE = 1e-2  # of products of other shapes in bf16


def test_cut_captions_and_enlarged_images_are_told(run, tmp_path):
    folder = tiny.write_image_folder(tmp_path / "set", count=3)
    (folder / "image_01.txt").write_text("square circle " * 800, encoding="utf-8")
    tiny.make_images(1, size=40)[0][0].save(folder / "image_02.png")
    encoded = run(load_images(instance_data_dir=str(folder)), max_sequence_length=50)
    assert encoded.prompt_tokens()[1] == 50 > encoded.prompt_tokens()[0]
    assert [m[:42] for m in encoded.facts.messages] == [
        "1 caption(s) reach max_sequence_length=50 ",
        "1 image(s) are smaller than resolution=64 ",
    ]


def test_images_too_large_for_one_pass_are_encoded_in_tiles(run, image_folder, tiny_model, tmp_path, monkeypatch):
    from diffusers import AutoencoderDC

    vae = AutoencoderDC.from_pretrained(tiny_model, subfolder="vae")
    images = load_images(instance_data_dir=str(image_folder))
    whole = run(images, resolution=192, vae_dtype=torch.float32, seed=0, encodings_dir=str(tmp_path / "whole"))
    for name, value in (("WHOLE_ENCODE_SIDE", 128), ("ENCODE_TILE", 128), ("ENCODE_STRIDE", 96)):
        monkeypatch.setattr(f"sana_kit.encodings.encode_images.{name}", value)
    tiled = run(images, resolution=192, vae_dtype=torch.float32, seed=0)
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
    assert encoded.facts.scaling_factor == vae.config.scaling_factor
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
    assert encoded.facts.encoded_images == len({images.source_hash(i) for i in range(len(images))}) == 6
    assert encoded.facts.encoded_prompts == 6 + 1 + 3
    assert encoded.facts.reused_images == encoded.facts.reused_prompts == 0
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
    assert encoded.facts.bytes["latents"] == 6 * 4 * 8 * 8 * 2
    assert encoded.facts.bytes["prompts"] < 10 * 30 * 32 * 2  # valid tokens only, not 300


def test_result_does_not_depend_on_what_is_already_there(run, image_folder, tmp_path):
    images = load_images(instance_data_dir=str(image_folder))
    whole = run(images, encodings_dir=str(tmp_path / "whole"), vae_batch_size=4, text_batch_size=4)
    part = images.without([0, 2, 3])
    run(part, vae_batch_size=4, text_batch_size=4)
    for path in shards(tmp_path / "store", "prompts"):
        path.unlink()
    rest = run(images, vae_batch_size=4, text_batch_size=4)
    assert (rest.facts.reused_images, rest.facts.encoded_images, rest.facts.encoded_prompts) == (3, 3, 6)
    latents = [torch.equal(rest.latents(i), whole.latents(i)) for i in (0, 2, 3)]
    assert all(latents) and all(torch.equal(rest.prompt_embeds(i), whole.prompt_embeds(i)) for i in range(6))


def test_corrupt_image_is_an_error_before_any_weight_loads(run, tmp_path, no_models):
    folder = tiny.write_image_folder(tmp_path / "set", count=3)
    tiny.make_images(1, size=300)[0][0].save(folder / "cut.jpg")
    data = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(data[: len(data) * 3 // 4])
    images = load_images(instance_data_dir=str(folder), instance_prompt="x")
    with (
        no_models(),
        pytest.raises(ValueError, match=r"1 image\(s\) cannot be used.*skip_bad_images.*\n.*cut.jpg: corrupt"),
    ):
        run(images)
    assert not shards(tmp_path / "store", "latents")
    encoded = run(images, skip_bad_images=True)
    assert len(encoded) == 3 and "cut.jpg" not in encoded.images.names
    assert encoded.images.report["bad images skipped"] == 1 and any("cut.jpg" in m for m in encoded.facts.messages)


def test_wrong_flags_come_all_at_once(run, image_folder, no_models):
    images = load_images(instance_data_dir=str(image_folder))
    with no_models(), pytest.raises(UserError) as caught:
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
        "resolution=100: must be a multiple of 8, the VAE's factor. The nearest is 96.",
        "text_encoder_dtype=fp16: Gemma-2 gives NaN in fp16.",
        "vae_batch_size=0",
        "max_sequence_length=0",
        "text_batch_size=0",
    ):
        assert part in text
    assert "--" not in text  # a library names settings, the command line names flags


def test_incomplete_model_folder(run, image_folder, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    model, _ = find_model(str(folder))
    shutil.rmtree(folder / "text_encoder")
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(
        UserError, match="text_encoder/config.json is missing(.*\n)*.*tokenizer_config.json is missing"
    ):
        run(load_images(instance_data_dir=str(image_folder)), model=model)


def test_store_that_cannot_be_made(run, image_folder, tmp_path, no_models):
    (tmp_path / "file").write_text("x")
    with no_models(), pytest.raises(StoreError, match="cannot be written"):
        run(load_images(instance_data_dir=str(image_folder)), encodings_dir=str(tmp_path / "file" / "store"))


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

    monkeypatch.setattr("sana_kit.encodings.encode_images.encode_pixels", broken)
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

    monkeypatch.setattr("sana_kit.encodings.encode_images.encode_pixels", small_device(2))
    encoded = run(images, vae_batch_size=6)
    assert encoded.facts.encoded_images == 6 and sizes == [6, 3, 1, 1, 1, 1, 1, 1]
    assert sum("out of memory" in m for m in encoded.facts.messages) == 2
    monkeypatch.setattr("sana_kit.encodings.encode_images.encode_pixels", small_device(0))
    with pytest.raises(UserError, match="resolution=64: the VAE cannot encode one image.*Lower it"):
        run(images, vae_batch_size=2, encodings_dir=str(tmp_path / "other"))


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

    class StopInTheImages:
        asked = 0

        @property
        def requested(self):
            self.asked += 1
            return bool(shards(tmp_path / "store", "prompts")) and self.asked > 6

    with pytest.raises(EncodingStopped):
        run(images, vae_batch_size=1, stop=StopInTheImages())
    rest = run(images, vae_batch_size=1)
    assert rest.facts.encoded_prompts == 0 and 0 < rest.facts.encoded_images < 6
