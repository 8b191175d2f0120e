"""Images equal those of SanaPipeline; groups, schedulers, failures.

python -m pytest tests/unit/generation/test_denoise.py
"""

import weakref

import pytest
import torch
from helpers.drawing import CPU, draw, encode_few, levels, load_plain, plan, reference_image, write_lora

from sana_kit.generation.generate import generate
from sana_kit.generation.inputs import Inputs
from sana_kit.generation.jobs import Prompt
from sana_kit.generation.texts import encode_job_prompts, job_texts
from sana_kit.models.fused import fuse_blocks
from sana_kit.models.loading import load_pipeline


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    return load_plain(tiny_model)


@pytest.fixture(scope="module")
def embeds(pipeline):
    return encode_few(pipeline)


@pytest.mark.parametrize("guidance", [2.0, 1.0])
def test_images_are_those_of_sana_pipeline(pipeline, embeds, guidance):
    jobs = plan(["a red square", "a small green dog"], [8, 23], guidance=guidance, negative_prompt="blue")
    images = draw(pipeline, embeds, jobs)
    assert len(images) == 4
    for job, image in zip(jobs, images, strict=True):
        assert levels(image, reference_image(pipeline, job)) <= 1
    assert levels(images[0], images[1]) > 20  # another seed is another image


def test_batches_change_an_image_by_rounding_only(pipeline, embeds):
    jobs = plan(["a red square", "a small green dog"], [8, 23], negative_prompt="blue")
    alone, together = draw(pipeline, embeds, jobs, batch_size=1), draw(pipeline, embeds, jobs, batch_size=4)
    assert all(levels(a, b) <= 1 for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_stochastic_schedulers_draw_from_each_images_own_generator(pipeline, embeds, algorithm):
    from diffusers import DPMSolverMultistepScheduler

    class Parts:
        transformer, vae = pipeline.transformer, pipeline.vae
        scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, algorithm_type=algorithm)

    jobs = plan(["a red square"], [8, 23])
    together = draw(Parts, embeds, jobs, batch_size=2)
    second = draw(Parts, embeds, jobs[1:], batch_size=1)[0]
    assert levels(together[1], second) <= 1
    assert Parts.scheduler.model_outputs == [None, None]  # the caller's scheduler was not run


def test_live_transformer_and_random_state_are_left_as_they_were(pipeline, embeds):
    transformer = pipeline.transformer.train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = draw(pipeline, embeds, plan(["a red square"], [8]))[0]
    assert torch.equal(torch.rand(3), expected) and transformer.training
    transformer.eval()
    assert levels(first, draw(pipeline, embeds, plan(["a red square"], [8]))[0]) == 0


def test_a_failing_group_is_reported_and_the_others_are_made(pipeline, embeds):
    jobs = plan(["a red square", "never encoded", "a small green dog"], [8])
    failed = []
    images = draw(
        pipeline,
        embeds,
        jobs,
        on_error=lambda group, error: failed.append(([job.index for job in group], type(error))),
    )
    assert [image.size for image in images] == [(96, 64), (96, 64)] and failed == [([1], KeyError)]
    with pytest.raises(KeyError):
        draw(pipeline, embeds, jobs)


def test_an_image_of_nan_is_an_error_and_no_black_image(pipeline, embeds):
    broken = {"a red square": torch.full_like(embeds[0]["a red square"], float("nan"))}
    with pytest.raises(FloatingPointError, match="NaN"):
        draw(pipeline, (broken, embeds[1]), plan(["a red square"], [8]))


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
    assert levels(draw(kit, embeds, jobs)[0], draw(pipeline, embeds, jobs)[0]) <= 1
    assert set(seen) == {torch.bool}


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_euler_scheduler_draws_what_sana_pipeline_draws(pipeline, embeds, shift):
    """diffusers' conversion writes it with `--scheduler_type flow-euler`; it has no init_noise_sigma."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline

    euler = FlowMatchEulerDiscreteScheduler(shift=shift)
    assert not hasattr(euler, "init_noise_sigma")
    theirs = SanaPipeline(**{**pipeline.components, "scheduler": euler})
    theirs.set_progress_bar_config(disable=True)
    jobs = plan(["a red square"], [8, 23], negative_prompt="blue")
    for job, image in zip(jobs, draw(theirs, embeds, jobs), strict=True):
        assert levels(image, reference_image(theirs, job)) <= 1


def test_images_come_one_by_one(pipeline, embeds):
    """The first is there before the second is begun."""
    steps = []
    drawn = generate(
        [[job] for job in plan(["a red square"], [8, 23], steps=2)],
        transformer=pipeline.transformer.train(),
        vae=pipeline.vae,
        scheduler=pipeline.scheduler,
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        device=CPU,
        dtype=torch.float32,
        on_step=lambda: steps.append(1),
    )
    assert steps == []
    job, image, seconds = next(drawn)
    assert (job.seed, image.size, len(steps)) == (8, (96, 64), 2) and seconds > 0
    assert pipeline.transformer.training  # between two groups the model is as it was
    drawn.close()
    pipeline.transformer.eval()


@pytest.mark.parametrize("kind", ["plain", "LoRA merged", "LoRA beside", "perturbed"])
def test_fused_blocks_draw_the_same_images(tiny_model, tmp_path, embeds, kind):
    """Within one 8-bit step in float32, in every way to draw."""
    lora = str(write_lora(tiny_model, tmp_path)) if "LoRA" in kind else None
    inputs = Inputs(pag_scale=3.0) if kind == "perturbed" else Inputs()
    layers = [1] if kind == "perturbed" else []
    jobs = plan(["a red square"], [8, 23], inputs=lambda entry: inputs, negative_prompt="blue")
    settings = {"device": CPU, "dtype": torch.float32, "lora_weights": lora, "fuse_lora": kind != "LoRA beside"}
    own = load_pipeline(str(tiny_model), **settings)
    expected = draw(own, embeds, jobs, pag_layers=layers)
    assert fuse_blocks(own.transformer.requires_grad_(False)).startswith("fused")
    images = draw(own, embeds, jobs, pag_layers=layers)
    assert all(levels(a, b) <= 1 for a, b in zip(expected, images, strict=True))
