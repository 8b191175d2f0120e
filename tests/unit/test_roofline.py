"""The counter of bytes, kernels and kept activations against counts made by hand."""

import json

import torch

from sana_kit import flops
from sana_kit.roofline import KeptBytes, StepCounter, kind_of, read_by
from sana_kit.step_table import BLOCKS, STEPS, count_step


def bytes_of(run):
    """Bytes that the counter found, by operator's name."""
    with StepCounter() as counter:
        run()
    return {name: row.bytes for name, row in counter.rows.items()}


def test_memory_that_is_only_written_is_not_read():
    """out= and copy_ write, in-place operators read what they change: 4 bytes an element."""
    a, b = torch.ones(10, device="meta"), torch.ones(10, device="meta")
    assert bytes_of(lambda: torch.mul(a, a, out=b)) == {"aten.mul.out": 4 * (10 + 10 + 10)}
    assert bytes_of(lambda: b.copy_(a)) == {"aten.copy_.default": 4 * (10 + 10)}
    assert bytes_of(lambda: b.mul_(a)) == {"aten.mul_.Tensor": 4 * (10 + 10 + 10)}
    assert read_by("aten.addmm.default", (1, 2), {"beta": 0}) == ((1, 2), {"beta": 0})


def test_broadcast_counts_once_and_views_cost_nothing():
    a, row = torch.ones(8, 4, device="meta"), torch.ones(1, 4, device="meta").expand(8, 4)
    assert bytes_of(lambda: a + row) == {"aten.add.Tensor": 4 * (32 + 4 + 32)}
    assert bytes_of(lambda: a.view(4, 8).transpose(0, 1)) == {}


def test_kinds():
    names = ("aten.baddbmm_.default", "aten.copy_.default", "aten.native_layer_norm.default", "aten.silu_backward.x")
    assert [kind_of(name) for name in names] == ["product", "copy", "norm", "pointwise"]


def test_kept_bytes_count_a_storage_once_and_no_weights():
    weight = torch.ones(4, 4, requires_grad=True)
    x = torch.ones(2, 4, requires_grad=True)
    kept = KeptBytes([weight])
    with kept.hooks():
        y = x @ weight
        (y * y).sum()
    assert kept.total == x.nbytes + y.nbytes


def test_peak_counts_what_is_alive_at_once():
    """Two of three tensors are alive at most; views and what was there before do not count."""
    a = torch.ones(10, device="meta")
    with StepCounter() as counter:
        b = a + a
        c = b.view(2, 5) * 2
        del b
        c = c + 1
    assert counter.peak == 2 * a.nbytes


def test_the_table_of_a_step_is_printed(tmp_path, capsys):
    """`python -m sana_kit.flops --step` on a small config: every step and block, kinds, and what the blocks bring."""
    config = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32, "caption_channels": 16}
    config |= {"num_cross_attention_heads": 2, "cross_attention_head_dim": 32, "cross_attention_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps({**config, "in_channels": 8, "out_channels": 8}))
    arguments = ["--step", f"--config={tmp_path}", "--resolution=256", "--batch_size=2", "--caption_tokens=8"]
    assert flops.main(arguments) == 0
    said = capsys.readouterr().out
    for step in STEPS:
        assert all(f"{step}, {block} block" in said for block in BLOCKS)
    assert "lora16, fused block instead of diffusers block" in said
    counted = {
        block: count_step(config, "lora4", block, latent_hw=(8, 8), images=2, tokens=8) for block in ("kit", "fused")
    }
    assert counted["fused"].total.bytes < 0.8 * counted["kit"].total.bytes
    assert counted["fused"].kept < 0.7 * counted["kit"].kept < counted["kit"].peak
