"""The trainer's LoKr and LoHa layers: equal to peft's, forward and backward, and in the input's dtype."""

import copy

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, inject_adapter_in_model
from peft.tuners import loha, lokr

from sana_kit.models.lycoris_layers import _CLASSES, LoHaLinear, LoKrLinear

CONFIGS = {
    "LoKr": LoKrConfig(r=2, alpha=4, target_modules=["0", "1"], init_weights=False),
    "LoKr of whole factors": LoKrConfig(
        r=64, alpha=64, decompose_factor=4, target_modules=["0", "1"], init_weights=False
    ),
    "LoKr of products": LoKrConfig(r=1, alpha=1, decompose_both=True, target_modules=["0", "1"], init_weights=False),
    "LoHa": LoHaConfig(r=3, alpha=6, target_modules=["0", "1"], init_weights=False),
    "LoHa of a rank that is no less": LoHaConfig(r=5, alpha=5, target_modules=["0", "1"], init_weights=False),
}


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module("0", torch.nn.Linear(24, 20))
        self.add_module("1", torch.nn.Conv2d(24, 12, 1))

    def forward(self, tokens):
        image = tokens.transpose(1, 2).unflatten(-1, (3, 5))
        return getattr(self, "0")(tokens), getattr(self, "1")(image)


@pytest.fixture(params=CONFIGS)
def both(request):
    """(peft's own layers, the same with the kit's classes)."""
    torch.manual_seed(0)
    theirs = inject_adapter_in_model(CONFIGS[request.param], Layers())
    ours = copy.deepcopy(theirs)
    changed = [module for module in ours.modules() if type(module) in _CLASSES]
    assert len(changed) == 2
    for module in changed:
        module.__class__ = _CLASSES[type(module)]
    return theirs, ours


def results(model, tokens):
    tokens = tokens.clone().requires_grad_()
    outputs = model(tokens)
    sum((output.float() ** 2).sum() for output in outputs).backward()
    trained = {name: p.grad for name, p in model.named_parameters() if "lokr_" in name or "hada_" in name}
    return [*outputs, tokens.grad, *(trained[name] for name in sorted(trained))]


def test_forward_and_backward_are_pefts(both):
    tokens = torch.randn(2, 15, 24)
    for theirs, ours in zip(*(results(model, tokens) for model in both), strict=True):
        assert (theirs - ours).abs().max() < 1e-5 * theirs.abs().max()


def test_float32_factors_beside_bf16_weights_compute_in_bf16(both):
    _, ours = both
    exact = [result.detach().clone() for result in results(ours, torch.ones(1, 15, 24))]
    for name, parameter in ours.named_parameters():
        parameter.grad = None
        if "base_layer" in name:
            parameter.data = parameter.data.bfloat16()
    found = results(ours, torch.ones(1, 15, 24).bfloat16())
    assert [result.dtype for result in found[:3]] == [torch.bfloat16] * 3
    assert all(result.dtype == torch.float32 for result in found[3:])
    for one, other in zip(exact, found, strict=True):
        assert (one - other.float()).abs().max() < 0.15 * one.abs().max()


def test_no_whole_difference_is_made(both, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the whole difference was made")

    _, ours = both
    linear = getattr(ours, "0")
    assert isinstance(linear, (LoKrLinear, LoHaLinear))
    for kind in (lokr.Linear, loha.Linear):
        monkeypatch.setattr(kind, "get_delta_weight", refuse)
    if isinstance(linear, LoHaLinear) and linear.r["default"] ** 2 >= 20:  # it would be no smaller
        with pytest.raises(AssertionError, match="whole difference"):
            linear(torch.randn(2, 24))
    else:
        linear(torch.randn(2, 24))
