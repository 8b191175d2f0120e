"""SANA-Sprint: images equal those of SanaSprintPipeline, for any number of steps.

python -m pytest tests/unit/generation/test_sprint.py
"""

import pytest
import torch
from helpers.drawing import CPU, draw, encode_few, levels, load_plain, plan

from sana_kit.errors import UserError
from sana_kit.generation.texts import job_texts
from sana_kit.models.folder import find_model
from sana_kit.models.fused import fuse_blocks
from sana_kit.models.loading import check_scheduler, load_pipeline, load_scheduler
from sana_kit.models.members import MEMBERS, NOT_TRAINED


@pytest.fixture(scope="module")
def pipeline(tiny_sprint):
    return load_plain(tiny_sprint)


@pytest.fixture(scope="module")
def embeds(pipeline):
    return encode_few(pipeline)


def plan_sprint(prompts, seeds, steps, guidance=4.5):
    return plan(prompts, seeds, steps=steps, guidance=guidance, takes_negative=False)


def theirs(pipeline, job, **kwargs):
    """What SanaSprintPipeline makes of a job; told to leave its second time out where there are not two steps."""
    if job.num_inference_steps != 2:
        kwargs["intermediate_timesteps"] = None
    return pipeline(
        job.prompt,
        height=job.height,
        width=job.width,
        num_inference_steps=job.num_inference_steps,
        guidance_scale=job.guidance_scale,
        generator=torch.Generator().manual_seed(job.seed),
        use_resolution_binning=False,
        complex_human_instruction=None,
        **kwargs,
    ).images[0]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_images_are_those_of_sana_sprint_pipeline(pipeline, embeds, steps):
    jobs = plan_sprint(["a red square", "a small green dog"], [8, 23], steps)
    images = draw(pipeline, embeds, jobs, batch_size=1)
    for job, image in zip(jobs, images, strict=True):
        assert levels(image, theirs(pipeline, job)) <= 1
    assert levels(images[0], images[1]) > 20  # another seed is another image


def test_fused_blocks_draw_the_same_images(pipeline, tiny_sprint, embeds):
    """They get one time step and one guidance scale for the whole batch."""
    fused = load_plain(tiny_sprint)
    assert fuse_blocks(fused.transformer.requires_grad_(False)).startswith("fused")
    jobs = plan_sprint(["a red square", "a small green dog"], [8, 23], 2)
    for one, other in zip(draw(pipeline, embeds, jobs), draw(fused, embeds, jobs), strict=True):
        assert levels(one, other) <= 1


def test_latents_are_those_of_sana_sprint_pipeline_in_float32(pipeline, embeds, monkeypatch):
    """8-bit images hide what is smaller than their steps."""
    latents = []
    decoder = pipeline.vae.decoder
    monkeypatch.setattr(decoder, "forward", lambda z, own=decoder.forward: latents.append(z.clone()) or own(z))
    for steps in (1, 2, 4):
        (job,) = plan_sprint(["a red square"], [8], steps)
        draw(pipeline, embeds, [job])
        theirs(pipeline, job)
        mine, other = latents[-2:]
        assert mine.shape == other.shape and (mine - other).abs().max() <= 1e-5 * other.abs().max()


def test_an_image_does_not_depend_on_its_group(pipeline, embeds):
    jobs = plan_sprint(["a red square", "a small green dog"], [8, 23], 4)
    alone, together = draw(pipeline, embeds, jobs, batch_size=1), draw(pipeline, embeds, jobs, batch_size=4)
    assert all(levels(a, b) <= 1 for a, b in zip(alone, together, strict=True))


def test_guidance_is_an_input_and_there_is_no_negative_prompt(pipeline, embeds):
    low, high = (plan_sprint(["a red square"], [8], 2, guidance)[0] for guidance in (1.0, 4.5))
    assert not high.guided and job_texts([high]) == [("a red square", False)]
    batches = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    images = [draw(pipeline, embeds, [job])[0] for job in (low, high)]
    hook.remove()
    assert batches == [1] * 4 and levels(*images) >= 1


def test_the_kits_attention_keeps_the_norms_of_sprint(tiny_sprint, pipeline, embeds):
    kit = load_pipeline(str(tiny_sprint), device=CPU, dtype=torch.float32, text_encoder=False)
    assert type(kit).__name__ == "SanaSprintPipeline"
    with torch.no_grad():
        for loaded in (kit, pipeline):
            for block in loaded.transformer.transformer_blocks:
                for attention in (block.attn1, block.attn2):
                    attention.norm_q.weight.copy_(torch.linspace(0.5, 2, len(attention.norm_q.weight)))
    jobs = plan_sprint(["a red square"], [8], 2)
    assert levels(draw(kit, embeds, jobs)[0], theirs(pipeline, jobs[0])) <= 1


def test_sprint_is_drawn_with_and_not_trained(tiny_sprint):
    model, problems = find_model(str(tiny_sprint), members=MEMBERS)
    assert problems == [] and model.member.sprint and model.native_size == 256
    model, (problem,) = find_model(str(tiny_sprint))
    assert model is None and problem.reason == NOT_TRAINED and "SANA-1.5" in problem.remedy


def test_flow_schedulers_are_refused_for_sprint(tiny_sprint):
    model, _ = find_model(str(tiny_sprint), members=MEMBERS)
    assert check_scheduler(model, "checkpoint") == []
    assert type(load_scheduler(model)).__name__ == "SCMScheduler"
    for name in ("flow-dpm", "flow-euler"):
        with pytest.raises(UserError, match="SCMScheduler"):
            load_scheduler(model, name)
    with pytest.raises(UserError, match="SCMScheduler"):
        load_pipeline(str(tiny_sprint), scheduler="flow-euler", device=CPU)
