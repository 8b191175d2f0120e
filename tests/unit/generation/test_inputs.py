"""Image to image, inpainting, ControlNet and perturbed attention: equal to diffusers where it has them.

python -m pytest tests/unit/generation/test_inputs.py
"""

import copy
import dataclasses

import numpy as np
import pytest
import tiny
import torch
from helpers.drawing import CPU, draw, encode_few, input_image, levels, load_plain, plan, reference_image
from PIL import Image

from sana_kit.files import file_sha256
from sana_kit.generation.inputs import (
    NO_INPUTS,
    InputImage,
    Inputs,
    encode_image,
    first_step,
    fit_mask,
    latent_mask,
)
from sana_kit.models.attention import perturbed_attention, set_attention


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    return load_plain(tiny_model)


@pytest.fixture(scope="module")
def sprint(tiny_sprint):
    return load_plain(tiny_sprint)


@pytest.fixture(scope="module")
def embeds(pipeline):
    return encode_few(pipeline)


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    return input_image(tmp_path_factory.mktemp("init") / "init.png")


@pytest.fixture(scope="module")
def mask(tmp_path_factory):
    return input_image(tmp_path_factory.mktemp("mask") / "mask.png", mask=True)


def plan_with(inputs, seeds=(8,), steps=4, prompts=("a red square",), **kwargs):
    return plan(list(prompts), list(seeds), steps=steps, inputs=lambda entry: inputs, **kwargs)


def euler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0)


class Parts:
    """A pipeline's parts with another scheduler."""

    def __init__(self, pipeline, scheduler):
        self.transformer, self.vae, self.scheduler = pipeline.transformer, pipeline.vae, scheduler


# ---------------------------------------------------------------------------------------------------------------------
# Image to image


def late_scheduler(scheduler, first):
    """A scheduler whose pipeline runs its last steps only; it still knows them all, as in image-to-image pipelines."""

    class Late(type(scheduler)):
        def set_timesteps(self, *args, **kwargs):
            super().set_timesteps(*args, **kwargs)
            self.all, self.timesteps = self.timesteps, self.timesteps[first:]
            self.set_begin_index(first)

        def step(self, *args, **kwargs):
            shown, self.timesteps = self.timesteps, self.all
            try:
                return super().step(*args, **kwargs)
            finally:
                self.timesteps = shown

    late = copy.deepcopy(scheduler)
    late.__class__ = Late
    return late


@pytest.mark.parametrize("name", ["dpm", "euler"])
def test_image_to_image_is_sana_pipeline_from_noised_latents(pipeline, embeds, init, name):
    """diffusers has no such pipeline for SANA 1.x: its scheduler makes the noised latents, SanaPipeline the rest."""
    from diffusers import SanaPipeline

    scheduler = pipeline.scheduler if name == "dpm" else euler()
    (job,) = plan_with(Inputs(init_image=init, strength=0.5), steps=4, negative_prompt="blue")
    image = draw(Parts(pipeline, scheduler), embeds, [job])[0]

    own = copy.deepcopy(scheduler)
    own.set_timesteps(4)
    pixels = torch.from_numpy(np.asarray(init.read()).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        clean = pipeline.vae.encode(pixels).latent * pipeline.vae.config.scaling_factor
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(8))
    time = own.timesteps[2:3]
    noised = own.add_noise(clean, noise, time) if name == "dpm" else own.scale_noise(clean, time, noise)
    late = SanaPipeline(**{**pipeline.components, "scheduler": late_scheduler(scheduler, 2)})
    late.set_progress_bar_config(disable=True)
    assert levels(image, reference_image(late, job, latents=noised)) <= 1
    text_only = plan(["a red square"], [8], steps=4, negative_prompt="blue")
    assert levels(image, draw(Parts(pipeline, scheduler), embeds, text_only)[0]) > 20


@pytest.mark.parametrize(("steps", "strength"), [(2, 0.5), (4, 0.6), (4, 0.25)])
def test_image_to_image_of_sprint_is_diffusers(sprint, embeds, init, steps, strength):
    from diffusers import SanaSprintImg2ImgPipeline

    theirs = SanaSprintImg2ImgPipeline(**sprint.components)
    theirs.set_progress_bar_config(disable=True)
    (job,) = plan_with(Inputs(init_image=init, strength=strength), steps=steps, guidance=4.5, takes_negative=False)
    expected = theirs(
        job.prompt,
        image=init.read(),
        strength=strength,
        num_inference_steps=steps,
        **({} if steps == 2 else {"intermediate_timesteps": None}),
        height=64,
        width=96,
        guidance_scale=4.5,
        generator=torch.Generator().manual_seed(8),
        use_resolution_binning=False,
        complex_human_instruction=None,
    ).images[0]
    image = draw(sprint, embeds, [job])[0]
    assert levels(image, expected) <= 1
    other = draw(sprint, embeds, [dataclasses.replace(job, inputs=NO_INPUTS)])[0]
    assert levels(image, other) > 5


def test_groups_of_one_kind_share_a_call_and_an_image_does_not_depend_on_them(pipeline, embeds, init, tmp_path):
    other = input_image(tmp_path / "other.png", seed=1)
    first = plan_with(Inputs(init_image=init, strength=0.5), seeds=(8, 23))
    second = plan_with(Inputs(init_image=other, strength=0.5))
    jobs = [*first, *second, *plan_with(Inputs(init_image=other, strength=0.25))]
    calls = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    together = draw(pipeline, embeds, jobs, batch_size=4)
    hook.remove()
    assert calls == [6, 6, 2]  # two steps of three images with guidance, one of the last
    alone = draw(pipeline, embeds, jobs, batch_size=1)
    assert all(levels(a, b) <= 1 for a, b in zip(together, alone, strict=True))
    assert len({job.file_name for job in jobs}) == 4


def test_the_first_step_is_that_of_diffusers():
    assert [first_step(28, strength) for strength in (1.0, 0.99, 0.6, 0.5, 0.01)] == [0, 0, 11, 14, 27]
    assert [first_step(2, strength) for strength in (1.0, 0.6, 0.5, 0.1)] == [0, 0, 1, 1]


def test_a_file_that_changed_since_is_an_error_of_its_images(pipeline, embeds, tmp_path):
    source = input_image(tmp_path / "a.png")
    jobs = plan_with(Inputs(init_image=source, strength=0.5)) + plan(["a red square"], [8], steps=4)
    input_image(tmp_path / "a.png", seed=5)
    failed = []
    assert len(draw(pipeline, embeds, jobs, on_error=lambda group, error: failed.append(str(error)))) == 1
    assert len(failed) == 1 and "has changed since the run began" in failed[0]


def test_large_images_are_encoded_in_tiles(pipeline, init, monkeypatch):
    monkeypatch.setattr("sana_kit.generation.inputs.WHOLE_ENCODE_SIDE", 64)
    monkeypatch.setattr("sana_kit.generation.inputs.ENCODE_TILE", 64)
    monkeypatch.setattr("sana_kit.generation.inputs.ENCODE_STRIDE", 48)
    sizes = []
    hook = pipeline.vae.encoder.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[2:])))
    tiled = encode_image(pipeline.vae, init.read(), 96, 128)
    hook.remove()
    assert tiled.shape == (1, 4, 12, 16) and max(max(size) for size in sizes) == 64 and not pipeline.vae.use_tiling


# ---------------------------------------------------------------------------------------------------------------------
# Inpainting


def test_inpainting_keeps_what_is_black_and_draws_what_is_white(pipeline, embeds, init, mask):
    image, other = draw(pipeline, embeds, plan_with(Inputs(init_image=init, mask_image=mask), seeds=(8, 23)))
    source = np.asarray(init.read())
    assert np.array_equal(np.asarray(image)[:, :48], source[:, :48])  # to the bit: no VAE has seen it
    assert np.abs(np.asarray(image)[:, 48:].astype(int) - source[:, 48:]).max() > 50
    assert np.abs(np.asarray(image)[:, 48:].astype(int) - np.asarray(other)[:, 48:]).max() > 20


def test_kept_latents_follow_the_path_of_the_init_image(pipeline, embeds, init, mask, monkeypatch):
    """Seen by the transformer at each step: (1 - sigma) x0 + sigma noise, with the image's own noise."""
    seen = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    draw(Parts(pipeline, euler()), embeds, plan_with(Inputs(init_image=init, mask_image=mask, strength=0.5)))
    hook.remove()
    scheduler = euler()
    scheduler.set_timesteps(4)
    clean = encode_image(pipeline.vae, init.read(), 64, 96)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(8))
    for sigma, latents in zip(scheduler.sigmas[2:4], seen, strict=True):
        expected = (1 - sigma) * clean + sigma * noise
        assert torch.allclose(latents[0, :, :, :6], expected[0, :, :, :6], atol=1e-6)
    assert not torch.allclose(seen[1][0, :, :, 6:], expected[0, :, :, 6:], atol=1e-2)


def test_a_white_mask_at_full_strength_draws_the_image_of_the_prompt_alone(pipeline, embeds, init, tmp_path):
    Image.new("RGB", (96, 64), "white").save(tmp_path / "white.png")
    white = InputImage(str(tmp_path / "white.png"), file_sha256(tmp_path / "white.png"), 96, 64)
    anew = draw(pipeline, embeds, plan_with(Inputs(init_image=init, mask_image=white)))[0]
    assert levels(anew, draw(pipeline, embeds, plan(["a red square"], [8], steps=4))[0]) == 0


def test_a_latent_is_drawn_where_any_of_its_pixels_is_white(mask):
    pixels = fit_mask(mask.read(), 64, 96)
    assert pixels.sum() == 64 * 48 and not pixels[:, :48].any()
    pixels[:, :48][3, 3] = True
    latents = latent_mask(pixels, 8)
    assert latents.shape == (1, 8, 12) and latents[0, 0, 0] == 1 and latents[0, 1:, :6].sum() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Perturbed attention guidance


@pytest.mark.parametrize("guidance", [2.0, 1.0])
@pytest.mark.parametrize("kernel", ["diffusers", "kit"])
def test_images_are_those_of_sana_pag_pipeline(pipeline, tiny_model, embeds, guidance, kernel):
    from diffusers import SanaPAGPipeline

    theirs = SanaPAGPipeline(**pipeline.components, pag_applied_layers=["transformer_blocks.1"])
    theirs.set_progress_bar_config(disable=True)
    mine = load_plain(tiny_model)
    if kernel == "kit":
        set_attention(mine.transformer, "auto", CPU)
    jobs = plan_with(
        Inputs(pag_scale=3.0), seeds=(8, 23), guidance=guidance, negative_prompt="blue", prompts=["a red square"]
    )
    images = draw(mine, embeds, jobs, pag_layers=[1], batch_size=2)
    for job, image in zip(jobs, images, strict=True):
        assert levels(image, reference_image(theirs, job, pag_scale=3.0)) <= 1
    without = draw(mine, embeds, plan(["a red square"], [8], steps=4, guidance=guidance, negative_prompt="blue"))[0]
    assert levels(images[0], without) > 5
    names = {type(block.attn1.processor).__name__ for block in mine.transformer.transformer_blocks}
    assert names == ({"LinearAttentionProcessor"} if kernel == "kit" else {"SanaLinearAttnProcessor2_0"})


def test_perturbed_attention_keeps_the_norms_of_sana_1_5(sprint):
    """diffusers' own processors drop them."""
    transformer = sprint.transformer
    attention = transformer.transformer_blocks[1].attn1
    hidden = torch.randn((3, 6, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attention.norm_q.weight.copy_(torch.linspace(0.5, 2, 32))
        expected = attention(hidden)
        with perturbed_attention(transformer, [1], copies=3):
            made = attention(hidden)
        values = attention.to_out[0](attention.to_v(hidden[2:]))
    assert torch.allclose(made[:2], expected[:2], atol=1e-6) and torch.allclose(made[2:], values, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# ControlNet


@pytest.mark.parametrize(("guidance", "scale"), [(2.0, 1.0), (1.0, 0.5)])
def test_images_are_those_of_sana_controlnet_pipeline(pipeline, tiny_model, embeds, init, tmp_path, guidance, scale):
    from diffusers import SanaControlNetModel, SanaControlNetPipeline

    controlnet = SanaControlNetModel.from_pretrained(tiny.make_tiny_controlnet(tmp_path / "controlnet", tiny_model))
    theirs = SanaControlNetPipeline(**pipeline.components, controlnet=controlnet)
    theirs.set_progress_bar_config(disable=True)
    inputs = Inputs(control_image=init, control_scale=scale)
    jobs = plan_with(inputs, seeds=(8, 23), guidance=guidance, negative_prompt="blue")
    own = copy.deepcopy(controlnet)
    set_attention(own, "auto", CPU)
    images = draw(pipeline, embeds, jobs, controlnet=own, batch_size=2)
    for job, image in zip(jobs, images, strict=True):
        told = {"control_image": init.read(), "controlnet_conditioning_scale": scale}
        assert levels(image, reference_image(theirs, job, **told)) <= 1
    without = plan(["a red square"], [8], steps=4, guidance=guidance, negative_prompt="blue")
    assert levels(images[0], draw(pipeline, embeds, without)[0]) > 5


def test_every_way_at_once(pipeline, tiny_model, embeds, init, mask, tmp_path):
    """A control image, perturbed attention, an init image and a mask share one loop; batches change rounding only."""
    from diffusers import SanaControlNetModel

    controlnet = SanaControlNetModel.from_pretrained(tiny.make_tiny_controlnet(tmp_path / "controlnet", tiny_model))
    inputs = Inputs(init_image=init, strength=0.75, mask_image=mask, control_image=init, pag_scale=2.0)
    jobs = plan_with(inputs, seeds=(8, 23))
    settings = {"controlnet": controlnet, "pag_layers": [0, 1]}
    alone, together = (draw(pipeline, embeds, jobs, batch_size=size, **settings) for size in (1, 2))
    assert all(levels(a, b) <= 1 for a, b in zip(alone, together, strict=True))
    assert levels(alone[0], alone[1]) > 5


def test_identity_names_only_what_is_there(init, mask):
    assert NO_INPUTS.identity() == {} and Inputs(strength=1.0).identity() == {}
    assert Inputs(init_image=init, strength=0.5).identity() == {"init_image": init.sha256, "strength": 0.5}
    assert Inputs(init_image=init, mask_image=mask).told() == {"init_image": init.path, "mask_image": mask.path}
