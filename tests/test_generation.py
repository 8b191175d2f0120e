"""Jobs, sizes, denoising, tiled decoding, adapters and model checks, in-process on tiny real models.

python -m pytest tests/test_generation.py
"""

import itertools
import json
import re
import shutil
import weakref
from collections import Counter
from inspect import signature

import numpy as np
import pytest
import tiny
import torch
from helpers import KIT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from sana_kit import devices
from sana_kit.data.discover import load_images
from sana_kit.encodings.prompts import parse_instruction
from sana_kit.generation.decode import MAX_TILE_PIXELS, check_decodable, decode_latents, decode_tiles, plan_tiles
from sana_kit.generation.generate import generate_from_embeddings
from sana_kit.generation.jobs import Job, Prompt, group_jobs, plan_jobs, resolve_batch_size
from sana_kit.generation.sizes import generation_size, nearest_bin, resize_and_crop
from sana_kit.generation.texts import encode_job_prompts, encode_texts, job_texts, split_texts
from sana_kit.models.adapter import LORA_FILE, read_lora
from sana_kit.models.folder import find_model
from sana_kit.models.loading import load_pipeline

CPU = torch.device("cpu")
SAFE_NAME = re.compile(r"[a-z0-9-]+\.png")


def plan(prompts, seeds, height=64, width=96, steps=3, guidance=2.0, **kwargs):
    return plan_jobs(
        prompts, seeds, height=height, width=width, num_inference_steps=steps, guidance_scale=guidance, **kwargs
    )


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    """The tiny model as diffusers loads it, float32."""
    from diffusers import SanaPipeline

    loaded = SanaPipeline.from_pretrained(tiny_model)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def embeds(pipeline):
    """(prompt -> (T, D), negative prompt -> (T, D)) of a few prompts, without instruction."""
    texts = [("a red square", False), ("a small green dog", False), ("", True), ("blue", True)]
    encoded = encode_texts(pipeline.tokenizer, pipeline.text_encoder, texts, None, device=CPU)
    return split_texts(encoded)


def generate(pipeline, embeds, jobs, **kwargs):
    settings = {"device": CPU, "dtype": torch.float32, "use_resolution_binning": False, **kwargs}
    return generate_from_embeddings(
        transformer=pipeline.transformer,
        vae=pipeline.vae,
        scheduler=pipeline.scheduler,
        jobs=jobs,
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        **settings,
    )


def levels(a, b):
    """Largest difference of two images in 8-bit steps."""
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


# ---------------------------------------------------------------------------------------------------------------------
# Jobs


HOSTILE = [
    "../../etc/passwd",
    "/absolute/path",
    "a\x00b\nc",
    "🦊" * 50,
    "红狐狸",
    "…",
    "CON",
    "x" * 10_000,
    "é" * 300,
    ".",
]


@pytest.mark.parametrize("prompt", HOSTILE)
def test_file_names_are_short_safe_and_stay_in_the_folder(prompt, tmp_path):
    name = plan([prompt], [8])[0].file_name
    assert SAFE_NAME.fullmatch(name) and len(name) < 100
    assert (tmp_path / name).resolve().parent == tmp_path.resolve()


def test_file_names_are_distinct_and_stable():
    jobs = plan(HOSTILE, [8, -8, 1334]) + plan(HOSTILE[:1], [8], fingerprint="another model")
    jobs += plan(HOSTILE[:1], [8], steps=4) + plan(HOSTILE[:1], [8], negative_prompt="x") + plan(HOSTILE[:1], [8], 32)
    assert len({job.file_name for job in jobs}) == len(jobs)
    assert jobs[0].file_name == plan(["../../etc/passwd"], [8])[0].file_name
    assert plan(["A red Fox, at dawn!"], [8])[0].file_name.startswith("a-red-fox-at-dawn-")


def test_plan_is_prompts_times_seeds_with_each_image_once():
    listed = [Prompt("one", negative_prompt="own"), "two", Prompt("three", seeds=(1,), height=32, width=64), "two"]
    jobs = plan(listed, [8, 23])
    assert [(j.prompt, j.seed) for j in jobs] == [("one", 8), ("one", 23), ("two", 8), ("two", 23), ("three", 1)]
    assert [j.index for j in jobs] == list(range(5))
    assert [j.negative_prompt for j in jobs[::2]] == ["own", "", ""]
    assert (jobs[4].height, jobs[4].width, jobs[0].height) == (32, 64, 64)
    assert {j.negative_prompt for j in plan(listed, [8], negative_prompt="for all")} == {"for all"}


def test_groups_hold_neighbours_of_one_size():
    jobs = plan(["one", Prompt("two", height=32), "three"], [1, 2, 3])
    groups = group_jobs(jobs, 2, device=CPU, pixels_per_token=64)
    assert [[job.index for job in group] for group in groups] == [[0, 1], [2], [3, 4], [5], [6, 7], [8]]


def test_auto_batch_depends_on_size_and_device_kind_only():
    def auto(size, kind):
        return resolve_batch_size("auto", size, size, device=torch.device(kind), pixels_per_token=32**2)

    assert [auto(size, "cuda") for size in (512, 1024, 2048, 4096)] == [8, 8, 2, 1]
    assert auto(512, "cpu") == auto(4096, "cpu") == 1
    assert resolve_batch_size("5", 64, 64, device=CPU, pixels_per_token=64) == 5


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize(
    ("size", "sample_size", "made"),
    [
        ((1024, 1024), 32, (1024, 1024)),
        ((1000, 1000), 32, (1024, 1024)),
        ((768, 768), 32, (1024, 1024)),
        ((1400, 1400), 32, (1024, 1024)),
        ((720, 1280), 32, (768, 1344)),
        ((512, 512), 32, (512, 512)),  # a quarter of the bin's pixels: off
        ((1024, 1024), 128, (1024, 1024)),  # the 4K checkpoint: off
        ((4000, 4000), 128, (4096, 4096)),
        ((500, 500), 16, (512, 512)),
        ((96, 64), 16, (96, 64)),
        ((96, 64), 8, (96, 64)),  # no table
    ],
)
def test_resolution_binning_is_used_within_a_factor_of_two_in_pixels(size, sample_size, made):
    assert generation_size(*size, sample_size) == made
    assert generation_size(*size, sample_size, False) == size


def test_nearest_bin_is_that_of_diffusers():
    from diffusers.image_processor import PixArtImageProcessor
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_1024_BIN

    for height, width in [(1024, 1024), (640, 1536), (2000, 500), (777, 1010)]:
        expected = PixArtImageProcessor.classify_height_width_bin(height, width, ratios=ASPECT_RATIO_1024_BIN)
        assert nearest_bin(height, width, 32) == expected


def test_resized_images_have_exactly_the_size_asked_for():
    from diffusers.image_processor import PixArtImageProcessor

    rng = np.random.default_rng(0)
    shorter = 0
    for _ in range(200):
        made, asked = rng.integers(4, 40, 2) * 8, rng.integers(30, 320, 2)
        image = torch.zeros(1, 1, *made.tolist())
        assert resize_and_crop(image, *asked.tolist()).shape[-2:] == tuple(asked.tolist())
        theirs = PixArtImageProcessor.resize_and_crop_tensor(image, int(asked[1]), int(asked[0]))
        shorter += theirs.shape[-2:] != tuple(asked.tolist())
    assert shorter > 0, "diffusers' own function no longer falls a pixel short: the kit's can go"


def test_binned_images_are_resized_to_the_size_asked_for(pipeline, embeds):
    """500 x 375 is no multiple of 8: the tiny model works at its 512 px bin and the image is cut to size."""
    jobs = plan(["a red square"], [8], height=375, width=500, steps=1)
    assert generation_size(375, 500, 16) == (416, 576)
    (image,) = generate(pipeline, embeds, jobs, use_resolution_binning="auto")
    assert image.size == (500, 375)
    reference = reference_image(pipeline, jobs[0], use_resolution_binning=True)
    assert reference.size == (500, 375) and levels(image, reference) <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Denoising


def reference_image(pipeline, job, use_resolution_binning=False):
    """What SanaPipeline itself makes of a job, alone and without instruction."""
    return pipeline(
        job.prompt,
        negative_prompt=job.negative_prompt,
        height=job.height,
        width=job.width,
        num_inference_steps=job.num_inference_steps,
        guidance_scale=job.guidance_scale,
        generator=torch.Generator().manual_seed(job.seed),
        use_resolution_binning=use_resolution_binning,
        complex_human_instruction=None,
    ).images[0]


@pytest.mark.parametrize("guidance", [2.0, 1.0])
def test_images_are_those_of_sana_pipeline(pipeline, embeds, guidance):
    jobs = plan(["a red square", "a small green dog"], [8, 23], guidance=guidance, negative_prompt="blue")
    images = generate(pipeline, embeds, jobs)
    assert len(images) == 4
    for job, image in zip(jobs, images, strict=True):
        assert levels(image, reference_image(pipeline, job)) <= 1
    assert levels(images[0], images[1]) > 20  # another seed is another image


def test_batches_change_a_image_by_rounding_only(pipeline, embeds):
    jobs = plan(["a red square", "a small green dog"], [8, 23], negative_prompt="blue")
    alone, together = generate(pipeline, embeds, jobs, batch_size=1), generate(pipeline, embeds, jobs, batch_size=4)
    assert all(levels(a, b) <= 1 for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_stochastic_schedulers_draw_from_each_images_own_generator(pipeline, embeds, algorithm):
    from diffusers import DPMSolverMultistepScheduler

    class Parts:
        transformer, vae = pipeline.transformer, pipeline.vae
        scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, algorithm_type=algorithm)

    jobs = plan(["a red square"], [8, 23])
    together = generate(Parts, embeds, jobs, batch_size=2)
    second = generate(Parts, embeds, jobs[1:], batch_size=1)[0]
    assert levels(together[1], second) <= 1
    assert Parts.scheduler.model_outputs == [None, None]  # the caller's scheduler was not run


def test_live_transformer_and_random_state_are_left_as_they_were(pipeline, embeds):
    transformer = pipeline.transformer.train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = generate(pipeline, embeds, plan(["a red square"], [8]))[0]
    assert torch.equal(torch.rand(3), expected) and transformer.training
    transformer.eval()
    assert levels(first, generate(pipeline, embeds, plan(["a red square"], [8]))[0]) == 0


def test_a_failing_group_is_reported_and_the_others_are_made(pipeline, embeds):
    jobs = plan(["a red square", "never encoded", "a small green dog"], [8])
    made, failed = [], []
    generate(
        pipeline,
        embeds,
        jobs,
        on_image=lambda job, image, seconds: made.append((job.index, image.size, seconds > 0)),
        on_error=lambda group, error: failed.append(([job.index for job in group], type(error))),
    )
    assert made == [(0, (96, 64), True), (2, (96, 64), True)] and failed == [([1], KeyError)]
    with pytest.raises(KeyError):
        generate(pipeline, embeds, jobs)


def test_a_image_of_nan_is_an_error_and_no_black_image(pipeline, embeds):
    broken = {"a red square": torch.full_like(embeds[0]["a red square"], float("nan"))}
    with pytest.raises(FloatingPointError, match="NaN"):
        generate(pipeline, (broken, embeds[1]), plan(["a red square"], [8]))


def test_each_distinct_text_is_encoded_once_and_the_encoder_freed(tiny_model):
    pipeline = load_pipeline(str(tiny_model), device=CPU, dtype=torch.float32)
    calls = []
    encoder = weakref.ref(pipeline.text_encoder)
    pipeline.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    jobs = plan(
        [Prompt("a red square"), Prompt("blue"), Prompt("a red square", height=32)], [1, 2], negative_prompt="blue"
    )
    prompts, negatives = encode_job_prompts(pipeline, jobs, ["Say it well:", "User Prompt: "], device=CPU)
    assert len(calls) == 3 and set(prompts) == {"a red square", "blue"} and set(negatives) == {"blue"}
    assert not torch.equal(prompts["blue"], negatives["blue"])  # the instruction goes before prompts only
    assert pipeline.text_encoder is None and encoder() is None
    assert job_texts(plan(["x"], [1], guidance=1.0)) == [("x", False)]


def test_boolean_mask_gives_the_images_of_diffusers_own_processor(tiny_model, pipeline, embeds):
    kit = load_pipeline(str(tiny_model), device=CPU, dtype=torch.float32, text_encoder=False)
    seen = []
    kit.transformer.transformer_blocks[0].attn2.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"].dtype), with_kwargs=True
    )
    jobs = plan(["a red square"], [8])
    assert levels(generate(kit, embeds, jobs)[0], generate(pipeline, embeds, jobs)[0]) <= 1
    assert set(seen) == {torch.bool}


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def test_blend_is_bit_equal_to_diffusers_with_the_same_tiles(pipeline):
    """Same tile and stride, corners and clipped last tiles included, in float32 and bf16."""
    from diffusers import AutoencoderDC

    latents = torch.randn(1, 4, 21, 27, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        vae = AutoencoderDC.from_config(pipeline.vae.config)
        vae.load_state_dict(pipeline.vae.state_dict())
        vae.to(dtype).enable_tiling(96, 88, 64, 56)
        rows = [(start, min(start + 12, 21)) for start in range(0, 21, 8)]
        columns = [(start, min(start + 11, 27)) for start in range(0, 27, 7)]
        with torch.no_grad():
            theirs = vae.tiled_decode(latents.to(dtype)).sample
            ours = decode_tiles(vae.decoder, latents.to(dtype), rows, columns, 8)
        assert torch.equal(ours, theirs) and ours.dtype == dtype


@pytest.mark.parametrize(
    ("height", "width"), [(4096, 4096), (2304, 2304), (8192, 2048), (2048, 8192), (4352, 3840), (16384, 16384)]
)
@pytest.mark.parametrize("limit", sorted(MAX_TILE_PIXELS.values()))
def test_tiles_cover_the_image_with_the_overlap_and_little_waste(height, width, limit):
    rows, columns = plan_tiles(height, width, 32, limit)
    for tiles, size in ((rows, height // 32), (columns, width // 32)):
        assert tiles[0][0] == 0 and tiles[-1][1] == size
        assert len({stop - start for start, stop in tiles}) == 1  # one shape
        for before, after in zip(tiles, tiles[1:], strict=False):
            assert 8 <= before[1] - after[0] <= 16  # 256 px shared, at most twice that
    pixels = (rows[0][1] * columns[0][1]) * 32**2
    assert pixels <= limit
    assert pixels * len(rows) * len(columns) <= 1.4 * height * width


@pytest.mark.parametrize("size", [(1024, 1024), (2048, 2048), (1536, 2560)])
def test_images_that_fit_are_decoded_whole(size):
    assert [len(axis) for axis in plan_tiles(*size, 32, MAX_TILE_PIXELS[2])] == [1, 1]


def test_sizes_that_no_grid_covers_are_refused():
    with pytest.raises(ValueError, match="too large"):
        check_decodable(131072, 131072, factor=32)


class PeakMemory(TorchDispatchMode):
    """Bytes of all storages alive at once, and the largest tensor's elements, on meta tensors too."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.seen = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                storage = tensor.untyped_storage()
                if storage not in self.seen:
                    size = self.seen[storage] = storage.nbytes()
                    self.live += size
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._free, size)
        return result

    def _free(self, size):
        self.live -= size


@pytest.fixture(scope="module")
def dc_ae():
    """The VAE of the SANA checkpoints (DC-AE f32c32) on the meta device: shapes and FLOPs, no memory."""
    from diffusers import AutoencoderDC

    with torch.device("meta"):
        return AutoencoderDC(
            latent_channels=32,
            attention_head_dim=32,
            encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
            decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
            encoder_block_out_channels=(128, 256, 512, 512, 1024, 1024),
            decoder_block_out_channels=(128, 256, 512, 512, 1024, 1024),
            encoder_layers_per_block=(2, 2, 2, 3, 3, 3),
            decoder_layers_per_block=(3, 3, 3, 3, 3, 3),
            encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
            decoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ).eval()


def flops(function):
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def storages_are_objects():
    """Whether a tensor's storage stays one Python object, by which its memory can be followed; not in torch 2.1."""
    tensor = torch.empty(1)
    return tensor.untyped_storage() is tensor.untyped_storage()


@pytest.mark.skipif(not storages_are_objects(), reason="this torch gives no lasting storage object to count by")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [(4096, 4096), (2048, 8192), (2048, 2048)])
def test_decoding_4096_px_takes_under_10_gb_and_little_more_than_the_whole(dc_ae, dtype, size):
    vae = dc_ae.to(dtype)
    latents = torch.empty(1, 32, size[0] // 32, size[1] // 32, device="meta")
    with torch.no_grad(), PeakMemory() as memory:
        image = decode_latents(vae, latents)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in vae.parameters())
    assert image.shape == (1, 3, *size)
    assert memory.largest < 2**31
    assert memory.peak + weights < 10e9
    whole = flops(lambda: vae.decoder(latents.to(dtype)))
    assert whole <= flops(lambda: decode_latents(vae, latents)) <= 1.2 * whole


def test_the_reference_tiling_costs_nearly_four_times_as_much(dc_ae):
    """What the kit's tiles are measured against: tile 1024 with diffusers' stride of 448 at 4096 px."""
    vae = dc_ae.to(torch.bfloat16)
    latents = torch.empty(1, 32, 128, 128, device="meta", dtype=torch.bfloat16)
    lengths = Counter(min(start + 32, 128) - start for start in range(0, 128, 14))
    reference = sum(
        count_h * count_w * flops(lambda h=h, w=w: vae.decoder(latents[:, :, :h, :w]))
        for (h, count_h), (w, count_w) in itertools.product(lengths.items(), repeat=2)
    )
    assert reference > 3.9 * flops(lambda: decode_latents(vae, latents))


QUICKSTART = KIT / "sana_kit" / "quickstart_assets"


@pytest.mark.skipif(not (QUICKSTART / "model/vae").is_dir(), reason="the quick start's trained model is not here")
def test_seams_are_invisible_and_bf16_is_as_good_on_a_trained_vae(monkeypatch):
    """512 px of drawings through the quick start's DC-AE: tiles and bf16 against a whole float32 decode."""
    from diffusers import AutoencoderDC
    from PIL import Image

    drawings = load_images(dataset_name=str(QUICKSTART / "style_dataset"), caption_column="text")
    mosaic = Image.new("RGB", (512, 512))
    for place in range(64):
        mosaic.paste(drawings.load(place % len(drawings)).resize((64, 64)), (place % 8 * 64, place // 8 * 64))
    pixels = torch.from_numpy(np.asarray(mosaic).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    vae = AutoencoderDC.from_pretrained(QUICKSTART / "model/vae", torch_dtype=torch.float32).eval()
    half = AutoencoderDC.from_pretrained(QUICKSTART / "model/vae", torch_dtype=torch.bfloat16).eval()

    def steps(image):  # 8-bit steps, unrounded
        return (image.clamp(-1, 1) + 1) * 127.5

    with torch.no_grad():
        latents = vae.encode(pixels).latent * vae.config.scaling_factor
        whole = steps(decode_latents(vae, latents))
        rounded = steps(decode_latents(half, latents))
        monkeypatch.setattr("sana_kit.generation.decode.MAX_TILE_PIXELS", {2: 320 * 320, 4: 320 * 320})
        monkeypatch.setattr("sana_kit.generation.decode.TILE_OVERLAP", 8 * 8)  # in latents as at 4096 px
        rows, columns = plan_tiles(512, 512, 8, 320 * 320)
        tiled = steps(decode_latents(vae, latents))
    assert len(rows) == len(columns) == 2
    assert (rounded - whole).abs().mean() < 1.0
    assert (tiled - whole).abs().mean() < 0.5
    slope, wanted = tiled.diff(dim=-1), whole.diff(dim=-1)
    for edge in (columns[1][0] * 8, columns[0][1] * 8):  # where a tile begins and ends
        assert (slope - wanted)[..., edge - 1].abs().mean() < 0.15 * wanted.abs().mean()


# ---------------------------------------------------------------------------------------------------------------------
# Instruction


def test_instruction_default_is_that_of_sana_pipeline(tmp_path):
    default = parse_instruction("default")
    assert default[-1] == "User Prompt: " and len(default) > 5
    assert parse_instruction("none") is None and parse_instruction(None) is None
    assert parse_instruction('["one", "two: "]') == ["one", "two: "]
    (tmp_path / "lines.txt").write_text("one\ntwo: \n", encoding="utf-8")
    (tmp_path / "list.json").write_text('["one",\n "two: "]', encoding="utf-8")
    for name in ("lines.txt", "list.json"):
        assert parse_instruction(str(tmp_path / name)) == ["one", "two: "]


@pytest.mark.parametrize("value", ["no/such/file", '["one", 2]', '["one"'])
def test_instruction_that_is_neither_file_nor_list_is_an_error(value):
    with pytest.raises(ValueError, match="--complex_human_instruction"):
        parse_instruction(value)


# ---------------------------------------------------------------------------------------------------------------------
# Models


def copy_model(source, target, **configs):
    """A copy of a model folder whose JSON files (a/b.json as a__b) are changed."""
    shutil.copytree(source, target)
    for name, change in configs.items():
        file = target / (name.replace("__", "/") + ".json")
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    return target


def problems_of(model, **kwargs):
    found, problems = find_model(str(model), **kwargs)
    assert (found is None or problems == []) or problems
    return "\n".join(problems)


def test_model_that_is_not_there_or_no_model(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    assert "no such folder" in problems_of(tmp_path / "nowhere")
    assert "is a file" in problems_of(tmp_path / "file")
    assert "model_index.json" in problems_of(tmp_path / "empty")


def test_model_of_another_pipeline_or_mixed_parts(tiny_model, tmp_path):
    other = copy_model(tiny_model, tmp_path / "a", model_index={"_class_name": "FluxPipeline"})
    assert "FluxPipeline" in problems_of(other)
    mixed = copy_model(tiny_model, tmp_path / "b", transformer__config={"in_channels": 32, "caption_channels": 2304})
    assert "32 latent channels" in problems_of(mixed) and "width 2304" in problems_of(mixed)
    sprint = copy_model(tiny_model, tmp_path / "c", transformer__config={"guidance_embeds": True})
    assert "Sprint" in problems_of(sprint)


def test_weights_that_are_missing_cut_off_or_of_other_shapes(tiny_model, tmp_path):
    missing = copy_model(tiny_model, tmp_path / "a")
    (missing / "vae/diffusion_pytorch_model.safetensors").unlink()
    cut = tmp_path / "a/text_encoder/model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    text = problems_of(missing)
    assert "diffusion_pytorch_model.safetensors" in text and "cut off" in text  # both at once
    other = copy_model(tiny_model, tmp_path / "b", transformer__config={"num_layers": 3})
    assert "transformer_blocks.2" in problems_of(other) and "missing" in problems_of(other)
    shards = copy_model(tiny_model, tmp_path / "c")
    (shards / "vae/diffusion_pytorch_model.safetensors").unlink()
    index = shards / "vae/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    assert "lacks one.safetensors, two.safetensors" in problems_of(shards)


def test_fp16_is_refused_for_a_transformer_stored_in_bf16(tiny_model, tmp_path):
    from diffusers import SanaTransformer2DModel

    stored = copy_model(tiny_model, tmp_path / "bf16")
    SanaTransformer2DModel.from_pretrained(stored / "transformer").to(torch.bfloat16).save_pretrained(
        stored / "transformer"
    )
    assert "--dtype=fp16" in problems_of(stored, dtype=torch.float16)
    assert not problems_of(stored, dtype=torch.bfloat16) and not problems_of(tiny_model, dtype=torch.float16)


def test_fingerprint_follows_the_weights_and_not_the_place(tiny_model, tmp_path):
    first = find_model(str(tiny_model))[0].fingerprint
    copied = copy_model(tiny_model, tmp_path / "copy")
    assert find_model(str(copied))[0].fingerprint == first
    weights = copied / "transformer/diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-10] ^= 1
    weights.write_bytes(data)
    assert find_model(str(copied))[0].fingerprint != first


def test_fully_fine_tuned_transformer_takes_the_rest_from_its_base(tiny_model, tmp_path):
    from diffusers import SanaTransformer2DModel

    tuned = SanaTransformer2DModel.from_pretrained(tiny_model / "transformer")
    with torch.no_grad():
        tuned.proj_out.weight.add_(0.1)
    tuned.save_pretrained(tmp_path / "out/transformer", max_shard_size="100KB")
    assert len(list((tmp_path / "out/transformer").glob("*.safetensors"))) > 1
    assert "--base_model" in problems_of(tmp_path / "out")
    by_flag = load_pipeline(
        str(tmp_path / "out"), base_model=str(tiny_model), device=CPU, dtype=torch.float32, text_encoder=False
    )
    (tmp_path / "out/sana_kit_base.json").write_text(json.dumps({"base_model": str(tiny_model)}))
    for path in (tmp_path / "out", tmp_path / "out/transformer"):
        loaded = load_pipeline(str(path), device=CPU, dtype=torch.float32, text_encoder=False)
        assert torch.equal(loaded.transformer.proj_out.weight, tuned.proj_out.weight)
        assert torch.equal(loaded.vae.decoder.conv_out.weight, by_flag.vae.decoder.conv_out.weight)
    assert "needs no base" in problems_of(tiny_model, base_model=str(tiny_model))
    assert problems_of(tmp_path / "out", base_model=str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# Adapters


def diffusers_keeps_alpha():
    """Whether diffusers writes and reads a LoRA's metadata; before 0.34 it took the rank for alpha."""
    from diffusers import SanaPipeline

    return "transformer_lora_adapter_metadata" in signature(SanaPipeline.save_lora_weights).parameters


def write_lora(model, folder, rank=4, alpha=8, seed=0, strength=0.3, **changes):
    """A LoRA file with metadata, as diffusers 0.34 and newer write it, with random weights; returns its path."""
    from diffusers import SanaPipeline, SanaTransformer2DModel
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    transformer = SanaTransformer2DModel.from_pretrained(model / "transformer")
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=["to_q", "to_k", "to_v"], init_lora_weights="gaussian"
    )
    transformer.add_adapter(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * strength
    settings = {**config.to_dict(), "target_modules": sorted(config.target_modules), **changes}
    keep = {key: value for key, value in settings.items() if isinstance(value, (int, float, str, list, dict, bool))}
    weights, path = get_peft_model_state_dict(transformer), folder / LORA_FILE
    if diffusers_keeps_alpha():
        SanaPipeline.save_lora_weights(folder, weights, transformer_lora_adapter_metadata=keep)
    else:
        SanaPipeline.save_lora_weights(folder, weights)
        metadata = json.dumps({f"transformer.{key}": value for key, value in keep.items()})
        save_file(load_file(path), path, metadata={"format": "pt", "lora_adapter_metadata": metadata})
    return path


@pytest.fixture(scope="module")
def lora(tiny_model, tmp_path_factory):
    return write_lora(tiny_model, tmp_path_factory.mktemp("lora"))


def with_lora(model, path, embeds, dtype=torch.float32, **kwargs):
    loaded = load_pipeline(
        str(model),
        lora_weights=None if path is None else str(path),
        device=CPU,
        dtype=dtype,
        text_encoder=False,
        **kwargs,
    )
    return loaded, generate(loaded, embeds, plan(["a red square"], [8]), dtype=dtype)[0]


def test_lora_is_what_diffusers_makes_of_it_fused_and_apart(tiny_model, lora, embeds):
    from diffusers import SanaPipeline

    _, base = with_lora(tiny_model, None, embeds)
    fused, image = with_lora(tiny_model, lora, embeds)
    _, apart = with_lora(tiny_model, lora.parent, embeds, fuse_lora=False)
    theirs = SanaPipeline.from_pretrained(tiny_model)
    theirs.load_lora_weights(lora.parent, adapter_name="default")
    if not diffusers_keeps_alpha():
        theirs.set_adapters("default", 2.0)  # alpha 8 of rank 4
    expected = generate(theirs, embeds, plan(["a red square"], [8]))[0]
    assert levels(image, expected) <= 1 and levels(apart, expected) <= 1
    assert levels(image, base) > 20
    assert not any("lora" in name for name, _ in fused.transformer.named_parameters())


def test_lora_scale_goes_from_none_to_more(tiny_model, lora, embeds):
    _, base = with_lora(tiny_model, None, embeds)
    for fuse in (True, False):
        _, none = with_lora(tiny_model, lora, embeds, lora_scale=0.0, fuse_lora=fuse)
        assert levels(none, base) == 0
    _, half = with_lora(tiny_model, lora, embeds, lora_scale=0.5)
    _, half_apart = with_lora(tiny_model, lora, embeds, lora_scale=0.5, fuse_lora=False)
    assert levels(half, half_apart) <= 1 and levels(half, base) > 5


def test_fusing_in_bf16_rounds_no_worse_than_bf16_itself(tiny_model, lora, embeds):
    """The fused image is as near to the float32 one as the image with the adapter apart is."""
    _, exact = with_lora(tiny_model, lora, embeds)
    _, fused = with_lora(tiny_model, lora, embeds, dtype=torch.bfloat16)
    _, apart = with_lora(tiny_model, lora, embeds, dtype=torch.bfloat16, fuse_lora=False)

    def error(image):
        return float(np.abs(np.asarray(image).astype(float) - np.asarray(exact)).mean())

    assert error(fused) < 1.5 * error(apart) + 0.1


def lora_problems(path, model):
    config = json.loads((model / "transformer/config.json").read_text())
    found, problems = read_lora(str(path), config)
    assert (found is None) == bool(problems)
    return "\n".join(problems)


def test_lora_that_is_missing_or_not_safetensors(tiny_model, lora, tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pickle.bin")
    (tmp_path / "cut.safetensors").write_bytes(lora.read_bytes()[:-50])
    (tmp_path / "empty.safetensors").touch()
    assert "no such file" in lora_problems(tmp_path / "nowhere.safetensors", tiny_model)
    assert f"holds no {LORA_FILE}" in lora_problems(tmp_path, tiny_model)
    assert "not a safetensors file" in lora_problems(tmp_path / "pickle.bin", tiny_model)
    assert "cut off" in lora_problems(tmp_path / "cut.safetensors", tiny_model)
    assert "not a safetensors file" in lora_problems(tmp_path / "empty.safetensors", tiny_model)


def test_lora_of_another_model_is_refused(tiny_model, lora, tmp_path):
    from safetensors.torch import load_file, save_file

    wider = tiny.make_tiny_pipeline(tmp_path / "wider", heads=8)
    text = lora_problems(lora, wider)
    assert "other shapes" in text and "transformer_blocks.0.attn1.to_k (64, 64)" in text
    deeper = write_lora(tiny.make_tiny_pipeline(tmp_path / "deeper", layers=3), tmp_path)
    text = lora_problems(deeper, tiny_model)
    assert "belong to no layer" in text and "transformer_blocks.2" in text
    weights = load_file(lora)
    save_file({f"unet.{name}": tensor for name, tensor in weights.items()}, tmp_path / "prefix.safetensors")
    assert "belong to no layer" in lora_problems(tmp_path / "prefix.safetensors", tiny_model)
    first = next(iter(weights))
    save_file({name: tensor for name, tensor in weights.items() if name != first}, tmp_path / "half.safetensors")
    assert "only" in lora_problems(tmp_path / "half.safetensors", tiny_model)
    save_file({**weights, first: weights[first] * float("nan")}, tmp_path / "nan.safetensors")
    assert "NaN" in lora_problems(tmp_path / "nan.safetensors", tiny_model)


def test_lora_whose_metadata_contradicts_its_tensors_is_refused(tiny_model, tmp_path):
    wrong = write_lora(tiny_model, tmp_path / "rank", r=8)
    assert "says rank 8" in lora_problems(wrong, tiny_model)
    dora = write_lora(tiny_model, tmp_path / "dora", use_dora=True)
    assert "DoRA" in lora_problems(dora, tiny_model)


def test_lora_without_metadata_has_alpha_equal_to_rank(tiny_model, lora, tmp_path):
    from safetensors.torch import load_file, save_file

    config = json.loads((tiny_model / "transformer/config.json").read_text())
    weights = load_file(lora)
    save_file(weights, tmp_path / "plain.safetensors")
    assert set(read_lora(str(tmp_path / "plain.safetensors"), config)[0].scaling.values()) == {1.0}
    assert set(read_lora(str(lora), config)[0].scaling.values()) == {2.0}
    stems = {name.rsplit(".lora_", 1)[0] for name in weights}
    save_file({**weights, **{f"{stem}.alpha": torch.tensor(2.0) for stem in stems}}, tmp_path / "alpha.safetensors")
    assert set(read_lora(str(tmp_path / "alpha.safetensors"), config)[0].scaling.values()) == {0.5}


def test_all_problems_of_a_load_come_at_once(tiny_model, tmp_path):
    with pytest.raises(ValueError) as error:
        load_pipeline(str(tiny_model), lora_weights=str(tmp_path / "none"), device=CPU, attention="npu_fusion")
    assert "--lora_weights" in str(error.value) and "npu_fusion" in str(error.value)


def test_native_size_is_the_configs(tiny_model):
    model = find_model(str(tiny_model))[0]
    assert (model.native_size, model.vae_factor, model.pixel_multiple) == (128, 8, 8)
    assert isinstance(plan(["x"], [1])[0], Job) and devices.accelerator_type() in ("cpu", "cuda", "npu")
