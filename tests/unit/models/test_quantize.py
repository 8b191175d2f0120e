"""Quantised weights: what is refused before loading, and which layers are meant.

python -m pytest tests/unit/models/test_quantize.py
The libraries themselves: tests/distributed/test_quantize.py.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers.drawing import CPU
from torch import nn

from sana_kit.models.quantize import (
    QUANTIZATIONS,
    PointwiseLinear,
    Quantization,
    quantize_problems,
    quantize_weights,
)
from sana_kit.models.weights import meta_transformer


@pytest.fixture
def config(tiny_model):
    return json.loads((tiny_model / "transformer/config.json").read_text())


@pytest.mark.parametrize("name", list(QUANTIZATIONS))
def test_what_cannot_be_is_refused_by_name_with_the_reason(name, monkeypatch):
    package = QUANTIZATIONS[name].package
    (problem,) = quantize_problems(name, SimpleNamespace(type="npu"))
    assert problem.value == name and "not on npu" in problem.reason and package in problem.reason
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (problem,) = quantize_problems(name, CPU)
    assert "not installed" in problem.reason and f"pip install '{package}>=" in problem.remedy
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.1")
    (problem,) = quantize_problems(name, CPU)
    assert "or newer" in problem.reason
    assert "Use one of int8, fp8, nf4" in quantize_problems("int3", CPU)[0].text()


def test_shapes_without_whole_blocks_are_refused(config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99")
    assert quantize_problems("int8", CPU, config) == []
    (problem,) = quantize_problems("nf4", CPU, config)
    assert problem.reason == "a layer of 80 x 32 has no whole blocks of 32"
    real = {"num_attention_heads": 70, "num_cross_attention_heads": 20, "cross_attention_head_dim": 112}
    small = {"num_attention_heads": 36, "num_cross_attention_heads": 16, "cross_attention_head_dim": 72}
    for heads, width in ((real, 2240), (small, 1152)):
        shape = {**config, **heads, "attention_head_dim": 32, "cross_attention_dim": width, "num_layers": 1}
        assert quantize_problems("nf4", CPU, shape) == []


def test_a_pointwise_convolution_is_the_same_as_a_linear_layer():
    torch.manual_seed(0)
    for bias in (True, False):
        convolution = nn.Conv2d(12, 20, 1, bias=bias).requires_grad_(False)
        images = torch.randn(2, 12, 5, 7)
        assert torch.allclose(PointwiseLinear(convolution)(images), convolution(images), atol=1e-6)


def test_every_product_of_a_block_is_meant_and_nothing_else(config, monkeypatch):
    """By a stand-in that halves weights: 8 projections of attention and 2 convolutions a block, no adapter."""
    seen = []

    def halve(linear, dtype):
        seen.append(tuple(linear.weight.shape))
        return linear

    monkeypatch.setitem(QUANTIZATIONS, "half", Quantization(halve, "torch", "1", {}, ""))
    blocks = meta_transformer(config).transformer_blocks
    assert quantize_weights(blocks, "half", torch.float32) == len(seen) == 20
    kinds = [type(blocks[0].ff.conv_inverted), type(blocks[0].ff.conv_depth), type(blocks[0].ff.conv_point)]
    assert kinds == [PointwiseLinear, nn.Conv2d, PointwiseLinear]
    from peft import LoraConfig

    transformer = meta_transformer(config)
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    seen.clear()
    assert quantize_weights(transformer.transformer_blocks, "half", torch.float32) == 20
    assert (2, 32) not in seen and (32, 2) not in seen
