"""The counter of bytes, kernels and kept activations against counts made by hand."""

import torch

from sana_kit.roofline import KeptBytes, StepCounter, kind_of, read_by


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
