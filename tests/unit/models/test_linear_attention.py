"""Linear attention under autocast: float32 inside, whatever dtype the run computes in."""

import pytest
import torch
from diffusers.models.attention_processor import Attention

from sana_kit.models.attention import LinearAttentionProcessor


def linear_attention(dim=16):
    torch.manual_seed(0)
    return Attention(dim, heads=2, dim_head=8, bias=False, processor=LinearAttentionProcessor())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_sums_in_float32(dtype):
    """Fails where the sums over 16,384 tokens are taken in fp16 (overflow), or in bf16 (8 bits of a sum)."""
    layer = linear_attention()
    hidden = 20 * torch.rand(1, 16384, 16)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        found = layer(hidden).float()
    with torch.no_grad():
        for module in (layer.to_q, layer.to_k, layer.to_v, layer.to_out[0]):
            module.weight.copy_(module.weight.to(dtype).float())
        exact = layer(hidden.to(dtype).float())
    assert torch.isfinite(found).all()
    # what is left is the rounding of Q, K, V and of the output: a few last bits
    assert (found - exact).abs().max() < 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_a_query_of_zeros_is_no_division_by_zero():
    layer = linear_attention()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        layer.to_q.weight.copy_(-layer.to_q.weight.abs())
        assert torch.isfinite(layer(torch.rand(1, 64, 16))).all()
