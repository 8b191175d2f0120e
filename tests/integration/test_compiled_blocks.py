"""The fused block under torch.compile against diffusers' block: values, gradients, bytes by the compiler's count."""

import copy
import shutil

import pytest
import torch
from helpers.compiled import counting
from unit.models.test_fused import apart, inputs_of, make_model

from sana_kit.models.attention import set_attention
from sana_kit.models.compiled_ops import COMPILER_OPTIONS, GatedConvolution
from sana_kit.models.fused import CompiledSanaBlock, compile_blocks, fuse_blocks, unfuse_blocks

CPU = torch.device("cpu")
needs_a_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler"
)
CASES = {
    "lora": {},
    "ranks and strengths": {"rank_pattern": {"attn1.to_k": 5}, "alpha_pattern": {"attn1.to_v": 9}},
    "two layers, no q": {"target_modules": ["to_k", "to_v", "to_out.0"]},
    "qk-norm, guidance embedding": {"qk_norm": "rms_norm_across_heads", "guidance": True},
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_of(model, **settings):
    """A copy with the kit's attention and the fused block, compiled."""
    fused = copy.deepcopy(model)
    set_attention(fused, "auto", CPU)
    assert fuse_blocks(fused, compiled=True) == "fused block for torch.compile"
    assert {type(block) for block in fused.transformer_blocks} == {CompiledSanaBlock}
    for block in fused.transformer_blocks if settings else ():
        block.compile(**settings)
    return fused


def passed(model, tokens=5):
    """(prediction, gradients by name) of one step with that many caption tokens."""
    inputs = inputs_of(model)
    short = inputs["encoder_hidden_states"], inputs["encoder_attention_mask"]
    inputs["encoder_hidden_states"], inputs["encoder_attention_mask"] = (one[:, :tokens] for one in short)
    model.zero_grad()
    out = model(**inputs, return_dict=False)[0]
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype))
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found, expected):
    """In float32, within 1e-5 of the largest value."""
    assert apart(found[0], expected[0]) < 1e-5
    assert found[1].keys() == expected[1].keys() != set()
    largest = max(float(gradient.abs().max()) for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        assert float((found[1][name] - gradient).abs().max()) < 1e-5 * scale, name


@pytest.mark.parametrize("case", CASES)
def test_traced_without_a_break_it_is_diffusers_block(case):
    """One graph each way (the compiler's eager back end), captions of two lengths."""
    model = make_model(**CASES[case]).train()
    fused = compiled_of(model, backend="aot_eager", fullgraph=True)
    for tokens in (5, 4):
        assert_equal(passed(fused, tokens), passed(model, tokens))


@needs_a_compiler
def test_compiled_it_is_diffusers_block_and_draws():
    """As the trainer compiles it; a drawing takes one time step for all images."""
    model = make_model(layers=1).train()
    fused = compiled_of(model)
    compile_blocks(fused)
    assert_equal(passed(fused), passed(model))
    inputs = inputs_of(model)
    with torch.no_grad():
        expected = model(**inputs | {"timestep": torch.full((2,), 300.0)}, return_dict=False)[0]
        found = fused(**inputs | {"timestep": torch.full((1,), 300.0)}, return_dict=False)[0]
    assert apart(found, expected) < 1e-5


def test_joined_weights_follow_their_modules():
    """`.to()` gives weights other memory: the joined ones are looked up again; unfused blocks have none."""
    fused = compiled_of(make_model())
    fused.double()
    block = fused.transformer_blocks[0]
    weight, _ = block.joined["attn1.qkv"]
    assert weight.dtype == torch.float64 and weight.data_ptr() == block.attn1.to_q.base_layer.weight.data_ptr()
    unfuse_blocks(fused)
    assert "joined" not in vars(block)


@needs_a_compiler
def test_the_mix_ffn_takes_two_passes_each_way():
    """Bytes by the compiler's own count, in tensors of the input's size, which padding makes 1.27 here.

    Forward: x read, silu written and read, the halves of the convolution and the output written: 5.0. Backward: they
    and the gradient read, the convolution's written and read, x read, its gradient written: 6.0. Left to itself the
    compiler writes sums of some taps.
    """
    x = torch.randn(2, 16 * 16, 32, requires_grad=True)
    weight, bias = torch.randn(32, 1, 3, 3), torch.randn(32)

    def middle(x):
        return GatedConvolution.apply(x, weight, bias, (16, 16), True)

    with counting() as metrics:
        torch.compile(middle, options=COMPILER_OPTIONS)(x).sum().backward()
        moved = metrics.num_bytes_accessed / x.nbytes
    assert 8 < moved < 12
