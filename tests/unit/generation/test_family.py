"""SANA 1.0 and 1.5 at every size: latents equal those of SanaPipeline in float32, on small models of their configs.

python -m pytest tests/unit/generation/test_family.py
Each has what its member has and others have not: sample size, interpolation of positions, flow shift, norms of query
and key across heads, number of blocks, 32 pixels a latent.
"""

import pytest
import tiny
import torch
from helpers.drawing import CPU, draw, encode_few, load_plain, plan

from sana_kit.models.folder import find_model
from sana_kit.models.loading import load_pipeline

NORMS = "rms_norm_across_heads"
MEMBERS = {
    "1.0, 512 px": {"sample_size": 16},
    "1.0, 1024 px": {"sample_size": 32},
    "1.0, 2048 px": {"sample_size": 64, "interpolation_scale": 1.0},
    "1.0, 4096 px": {"sample_size": 128, "interpolation_scale": 2.0, "flow_shift": 6.0},
    "1.5, 1.6B": {"sample_size": 32, "qk_norm": NORMS},
    "1.5, 4.8B": {"sample_size": 32, "qk_norm": NORMS, "layers": 60},
}
# (height, width) asked for, of a native side; not square, so that the nearest bin and its positions count
SHAPES = {512: (640, 448), 1024: (1248, 832), 2048: (1408, 2944), 4096: (5120, 3072)}


def make(folder, settings):
    """A model's folder; its norms are no longer all ones, and its blocks of usual size for their number."""
    from diffusers import SanaTransformer2DModel

    tiny.make_tiny_pipeline(folder, vae_blocks=6, **settings)
    transformer = SanaTransformer2DModel.from_pretrained(folder / "transformer")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if ".norm_q." in name or ".norm_k." in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    transformer.save_pretrained(folder / "transformer")
    return folder


@pytest.fixture
def latents(monkeypatch):
    """What reaches the decoder. Nothing is decoded: at 4096 px that takes a minute on a CPU, and has its own tests."""
    found = []
    monkeypatch.setattr("sana_kit.generation.generate.decode_latents", lambda vae, latent: found.append(latent))
    monkeypatch.setattr("sana_kit.generation.generate.resize_and_crop", lambda image, height, width: [image])
    monkeypatch.setattr("sana_kit.generation.generate.to_pil", lambda image: image)
    return found


@pytest.mark.parametrize("member", list(MEMBERS))
def test_latents_are_those_of_sana_pipeline(member, tmp_path, latents):
    """Measured: within 2e-6 of the largest."""
    settings = MEMBERS[member]
    folder = make(tmp_path / "model", settings)
    model, problems = find_model(str(folder))
    side = settings["sample_size"] * 32
    assert problems == [] and model.native_size == side and model.vae_factor == 32
    mine = load_pipeline(model, device=CPU, dtype=torch.float32, text_encoder=False)
    assert mine.scheduler.config.flow_shift == settings.get("flow_shift", 3.0)
    theirs = load_plain(folder)
    height, width = SHAPES[side]
    (job,) = plan(["a red square"], [8], height=height, width=width, steps=3, guidance=4.5, negative_prompt="blue")
    draw(mine, encode_few(theirs), [job], use_resolution_binning="auto")
    expected = theirs(
        job.prompt,
        negative_prompt=job.negative_prompt,
        height=height,
        width=width,
        num_inference_steps=3,
        guidance_scale=4.5,
        generator=torch.Generator().manual_seed(8),
        complex_human_instruction=None,
        output_type="latent",
    ).images
    assert latents[0].shape == expected.shape and latents[0].shape[-2:] != (side // 32, side // 32)
    assert distance(latents[0], expected) <= 2e-5


def distance(a, b):
    return float((a - b).abs().max() / b.abs().max())


def test_every_special_changes_the_latents(tmp_path, latents):
    """So that the equality above means something: without its special a member draws something else."""
    settings = {"sample_size": 16, "interpolation_scale": 2.0, "flow_shift": 6.0, "qk_norm": NORMS}
    loaded = load_plain(make(tmp_path / "model", settings))
    embeds = encode_few(loaded)
    (job,) = plan(["a red square"], [8], height=320, width=256, steps=3)
    draw(loaded, embeds, [job])
    for place, name, without in (
        (loaded.transformer.transformer_blocks[1].attn1, "norm_q", None),
        (loaded.transformer.transformer_blocks[1].attn2, "norm_k", None),
        (loaded.transformer.patch_embed, "interpolation_scale", 1.0),
        (loaded, "scheduler", tiny.make_scheduler(3.0)),
    ):
        kept = getattr(place, name)
        setattr(place, name, without)
        draw(loaded, embeds, [job])
        setattr(place, name, kept)
        assert distance(latents[-1], latents[0]) > 5e-4, name
    draw(loaded, embeds, [job])
    assert torch.equal(latents[-1], latents[0])
