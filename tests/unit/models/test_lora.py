"""LoRA layers in training: peft's own results from classes of the kit, and blocks that are recomputed.

python -m pytest tests/unit/models/test_lora.py
"""

from contextlib import nullcontext

import pytest
import torch
from diffusers import SanaTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora

from sana_kit.models.lora import FusedLoraLinear, LoraConv2d, lora_config, recompute_blocks
from sana_kit.models.lora_layers import PRESETS, parse_layers, unmatched_layers
from sana_kit.models.weights import meta_transformer


def relative(found, expected):
    """Distance of two tensors in units of the second's size."""
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def one_layer(variant, ours, dtype):
    """(output, input's gradient, LoRA gradients) of one adapted layer of peft's class or of ours, in float32."""
    settings = {"use_dora": True} if variant == "dora" else {}
    alpha, dropout = 12 if variant == "alpha" else 4, 0.5 if variant == "dropout" else 0.0
    if ours:
        config = lora_config(rank=4, alpha=alpha, dropout=dropout, layers=["to_q"], init_lora_weights=True, **settings)
    else:
        config = LoraConfig(r=4, lora_alpha=alpha, lora_dropout=dropout, target_modules=["to_q"], **settings)
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator).bfloat16()

    base = torch.nn.Conv2d(32, 48, 1) if variant == "conv" else torch.nn.Linear(32, 48)
    model = inject_adapter_in_model(config, torch.nn.ModuleDict({"to_q": base}).to(dtype))
    expected = (LoraConv2d if variant == "conv" else FusedLoraLinear) if ours else lora.LoraLayer
    assert isinstance(model["to_q"], expected) and "forward" not in vars(model["to_q"])
    for name, parameter in model.named_parameters():
        masters = variant == "masters" and "lora_" in name
        parameter.data = draw(*parameter.shape).to(torch.float32 if masters else dtype) * 0.25
    hidden_states = (draw(2, 32, 5, 4) if variant == "conv" else draw(2, 20, 32)).to(dtype).requires_grad_()
    torch.manual_seed(2)  # dropout draws the same in both
    cast = variant == "masters" and not ours and dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16) if cast else nullcontext():
        out = model["to_q"](hidden_states)
    assert out.dtype == dtype
    out.backward(draw(*out.shape).to(dtype))
    adapter = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
    assert len(adapter) == 2 + (variant == "dora") and all(grad is not None for grad in adapter.values())
    return [out.detach().float(), hidden_states.grad.float(), *(grad.float() for grad in adapter.values())]


@pytest.mark.parametrize("variant", ["float32", "bf16", "masters", "dropout", "alpha", "dora", "conv"])
def test_layers_give_what_pefts_give(variant):
    """Same output and gradients as peft's layer, in bf16 no farther than peft's from what float32 gives."""
    in_bf16 = variant in ("bf16", "masters")
    dtype = torch.bfloat16 if in_bf16 else torch.float32
    results = (
        one_layer(variant, False, torch.float32),
        one_layer(variant, False, dtype),
        one_layer(variant, True, dtype),
    )
    for exact, theirs, ours in zip(*results, strict=True):
        assert relative(ours, exact) <= (1.2 * relative(theirs, exact) if in_bf16 else 1e-6)


def test_a_disabled_or_merged_adapter_is_pefts_to_handle():
    model = inject_adapter_in_model(
        lora_config(rank=2, alpha=4, layers=["to_q"]), torch.nn.ModuleDict({"to_q": torch.nn.Linear(8, 8)})
    )
    layer, x = model["to_q"], torch.randn(3, 8)
    torch.nn.init.ones_(layer.lora_B["default"].weight)
    with torch.no_grad():
        base, adapted = layer.base_layer(x), layer(x)
        assert not torch.allclose(base, adapted)
        layer.enable_adapters(False)
        assert torch.equal(layer(x), base)
        layer.enable_adapters(True)
        layer.merge()
        assert torch.allclose(layer(x), adapted, atol=1e-5)


def test_the_configuration_is_pefts_and_tells_nothing_of_our_classes():
    ours = lora_config(rank=4, alpha=8, layers=["to_q"])
    plain = LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=["to_q"])
    assert ours.to_dict() == plain.to_dict()


class Blocks(torch.nn.Module):
    """A tiny Sana transformer that counts how often each block runs."""

    def __init__(self, folder):
        super().__init__()
        self.model = SanaTransformer2DModel.from_pretrained(folder, subfolder="transformer")
        self.runs = [0] * len(self.model.transformer_blocks)
        for index, block in enumerate(self.model.transformer_blocks):
            block.register_forward_pre_hook(lambda *_, index=index: self.count(index))

    def count(self, index):
        self.runs[index] += 1

    def gradients(self):
        generator = torch.Generator().manual_seed(0)
        self.runs[:] = [0] * len(self.runs)
        self.model.zero_grad()
        out = self.model(
            torch.randn(1, 4, 8, 8, generator=generator),
            encoder_hidden_states=torch.randn(1, 5, 32, generator=generator),
            timestep=torch.tensor([300.0]),
        ).sample
        if torch.is_grad_enabled():
            out.square().mean().backward()
        return [out.detach()] + [p.grad.clone() for p in self.model.parameters() if p.grad is not None]


@pytest.mark.parametrize(("interval", "runs"), [(1, [2, 2]), (2, [2, 1]), (3, [2, 1])])
def test_every_nth_block_is_recomputed_and_no_bit_changes(tiny_model, interval, runs):
    blocks = Blocks(tiny_model)
    expected = blocks.gradients()
    assert blocks.runs == [1, 1]
    recompute_blocks(blocks.model, interval)
    assert not any("forward" in vars(module) for module in blocks.model.modules())
    found = blocks.gradients()
    assert blocks.runs == runs and all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    with torch.no_grad():
        blocks.gradients()
    assert blocks.runs == [1, 1]


def test_presets_reach_every_layer_that_a_lora_fits():
    names = {}
    for name, module in meta_transformer({}).named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            names[name] = module
    found = {}
    for preset in PRESETS:
        layers = parse_layers(preset)
        assert not unmatched_layers(layers, names)
        found[preset] = {n for n in names if any(n.endswith(f".{end}") or n == end for end in layers)}
    assert found["attention"] < found["attention+ffn"] < found["all"]
    assert {n for n in names if ".attn" in n} == found["attention"]
    assert {n for n, module in names.items() if getattr(module, "groups", 1) == 1} == found["all"]


def test_names_and_expressions_are_told_apart():
    assert parse_layers(None) == ["to_k", "to_q", "to_v"]
    assert parse_layers("attn1.to_q, to_out.0") == ["attn1.to_q", "to_out.0"]
    assert parse_layers(r".*\.attn1\..*") == r".*\.attn1\..*"
    names = ["transformer_blocks.0.attn1.to_q", "proj_out"]
    assert not unmatched_layers(r".*\.attn1\..*", names) and unmatched_layers("attn1.*", names)
    assert unmatched_layers(["to_q", "to_z"], names)[0][0] == "to_z"
    assert "no regular expression" in unmatched_layers("(", names)[0][1]
    depth = ["transformer_blocks.0.ff.conv_depth", "transformer_blocks.0.ff.conv_point"]
    for layers in (["conv_depth"], r".*\.ff\..*"):
        assert "takes in conv_depth" in unmatched_layers(layers, depth)[0][1]
    assert not unmatched_layers(r".*conv_point", depth)
