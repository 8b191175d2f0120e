"""A ControlNet that is trained: how it begins, and one step of it against a plain loop over diffusers' models."""

import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaControlNetModel, SanaTransformer2DModel
from helpers.tiny import NARROW_TRANSFORMER

from sana_kit.arithmetic import default_controlnet_layers
from sana_kit.models.attention import set_attention
from sana_kit.models.controlnet import ControlledTransformer, begin_controlnet
from sana_kit.models.lora import recompute_blocks
from sana_kit.training.recipes import FlowMatching

# A bias of all keys shifts every score of a query alike: its gradient is rounding alone.
WITHOUT_EFFECT = "attn2.to_k.bias"
SHAPES = {**NARROW_TRANSFORMER, "num_layers": 4, "sample_size": 8}


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    return SanaTransformer2DModel(**SHAPES).requires_grad_(False)


def a_batch():
    torch.manual_seed(1)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False
    return {
        "latents": torch.randn(3, 4, 8, 6),
        "control": torch.randn(3, 4, 8, 6),
        "noise": torch.randn(3, 4, 8, 6),
        "u": torch.rand(3),
        "prompt_embeds": torch.randn(3, 7, 24),
        "prompt_mask": mask,
    }


def controlled(transformer, layers=3):
    model = ControlledTransformer(transformer, begin_controlnet(transformer, layers))
    for part in model.trained_parts():
        part.requires_grad_(True)
    return model


def not_zero(controlnet):
    """Weights as after some training: with those of the start all gradients but a few are zero."""
    generator = torch.Generator().manual_seed(2)
    for layer in (controlnet.input_block, *controlnet.controlnet_blocks):
        layer.weight.data.normal_(std=0.3, generator=generator)
        layer.bias.data.normal_(std=0.1, generator=generator)


def diffusers_loss(transformer, controlnet, batch, shift):
    """One step as a loop over diffusers' own models does it: its scheduler's sigmas, its forwards, float32."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    index = (batch["u"] * 1000).long()
    sigma, timestep = scheduler.sigmas[index], scheduler.timesteps[index]
    noisy = (1 - sigma[:, None, None, None]) * batch["latents"] + sigma[:, None, None, None] * batch["noise"]
    mask = batch["prompt_mask"].to(torch.int64)
    prompt = {"encoder_hidden_states": batch["prompt_embeds"], "encoder_attention_mask": mask, "timestep": timestep}
    added = controlnet(noisy, controlnet_cond=batch["control"], **prompt, return_dict=False)[0]
    velocity = transformer(noisy, **prompt, controlnet_block_samples=tuple(added), return_dict=False)[0]
    return ((velocity - (batch["noise"] - batch["latents"])) ** 2).mean()


@pytest.mark.parametrize("recomputed", [False, True])
def test_loss_and_every_gradient_are_those_of_a_plain_loop_over_diffusers_models(transformer, recomputed):
    batch, plain = a_batch(), copy.deepcopy(transformer)
    model = controlled(transformer)
    not_zero(model.controlnet)
    theirs = SanaControlNetModel(**{**SHAPES, "num_layers": 3})
    theirs.load_state_dict(model.controlnet.state_dict())
    expected = diffusers_loss(plain, theirs, batch, shift=3.0)
    expected.backward()
    for part in (model.transformer, model.controlnet):  # as a run has them
        set_attention(part, "sdpa", torch.device("cpu"))
        if recomputed:
            recompute_blocks(part, 1)
    loss = FlowMatching(flow_shift=3.0).loss(model.train(), batch, torch.float32)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    known, trained = dict(theirs.named_parameters()), 0
    for name, parameter in model.controlnet.named_parameters():
        embedding = name.split(".")[0] in ("patch_embed", "time_embed", "caption_projection", "caption_norm")
        assert (parameter.grad is None) == embedding, name
        if not embedding and not name.endswith(WITHOUT_EFFECT):
            scale = known[name].grad.abs().max()
            assert scale > 0, name
            torch.testing.assert_close(parameter.grad, known[name].grad, rtol=1e-4, atol=1e-5 * scale, msg=name)
            trained += 1
    assert trained > 60
    assert all(parameter.grad is None for parameter in model.transformer.parameters())


def test_it_begins_as_copies_of_the_first_blocks_and_changes_nothing(transformer):
    batch = a_batch()
    model = controlled(transformer)
    own = model.controlnet.state_dict()
    for name, value in transformer.state_dict().items():
        if name in own:
            assert torch.equal(own[name], value), name
    assert {name.split(".")[0] for name in own if name not in transformer.state_dict()} == {
        "input_block",
        "controlnet_blocks",
    }
    prompt = {"encoder_hidden_states": batch["prompt_embeds"], "encoder_attention_mask": batch["prompt_mask"].long()}
    inputs = {"hidden_states": batch["noise"], "timestep": torch.full((3,), 500.0), **prompt}
    with torch.no_grad():
        alone = transformer(**inputs, return_dict=False)[0]
        assert torch.equal(model(**inputs, control=batch["control"])[0], alone)
        not_zero(model.controlnet)
        assert not torch.allclose(model(**inputs, control=batch["control"])[0], alone, atol=1e-2)


def test_masters_in_float32_compute_in_bf16_beside_a_base_in_bf16(transformer):
    batch = a_batch()
    whole = controlled(transformer)
    not_zero(whole.controlnet)
    base = copy.deepcopy(transformer).bfloat16()
    mixed = ControlledTransformer(base, copy.deepcopy(whole.controlnet), torch.bfloat16)
    losses = [
        FlowMatching(3.0).loss(whole, batch, torch.float32),
        FlowMatching(3.0).loss(mixed, batch, torch.bfloat16),
    ]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.02)
    for (name, parameter), other in zip(
        whole.controlnet.named_parameters(), mixed.controlnet.parameters(), strict=True
    ):
        if parameter.grad is not None and not name.endswith(WITHOUT_EFFECT):
            assert other.grad.dtype == torch.float32
            apart = (parameter.grad - other.grad).norm() / parameter.grad.norm()
            assert apart < 0.1, (name, apart)  # up to 0.04 was measured


def test_every_block_of_it_has_a_block_to_add_to():
    assert [default_controlnet_layers({"num_layers": blocks}) for blocks in (28, 20, 8, 7, 2)] == [7, 7, 7, 6, 1]
