"""Updates whose gradient is not finite leave nothing behind, and their number is known."""

import pytest
import torch

from sana_kit.training.updates import UpdateGuard, decides_on_device, gradient_norm, step_if_finite


def make(fused: bool):
    parameter = torch.nn.Parameter(torch.ones(6))
    return parameter, torch.optim.AdamW([parameter], lr=0.1, fused=fused)


def update(parameter, optimizer, gradient, guard, clip=1.0):
    parameter.grad = gradient.clone()
    norm = gradient_norm([parameter], clip)
    guard.add(step_if_finite(optimizer, optimizer, norm), norm)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("fused", [True, False], ids=["on the device", "on the host"])
def test_a_skipped_update_changes_no_weight_no_moment_and_no_count(fused, value):
    parameter, optimizer = make(fused)
    assert decides_on_device(optimizer) == fused
    guard, good = UpdateGuard(), torch.linspace(-1, 1, 6)
    update(parameter, optimizer, good, guard)
    weights = parameter.detach().clone()
    state = {key: tensor.clone() for key, tensor in optimizer.state[parameter].items()}
    bad = good.clone()
    bad[3] = value
    update(parameter, optimizer, bad, guard)
    assert torch.equal(parameter, weights)
    assert all(torch.equal(optimizer.state[parameter][key], tensor) for key, tensor in state.items())
    assert not hasattr(optimizer, "found_inf")

    other, again = make(fused)
    for gradient in (good, good * 0.5):
        update(other, again, gradient, UpdateGuard())
    update(parameter, optimizer, good * 0.5, guard)
    assert torch.equal(parameter, other)  # as if the bad one had never been
    assert guard.read() == [False, True, False] and (guard.total, guard.in_a_row) == (1, 0)


def test_the_first_update_can_be_the_bad_one():
    for fused in (True, False):
        parameter, optimizer = make(fused)
        guard = UpdateGuard()
        update(parameter, optimizer, torch.full((6,), float("nan")), guard)
        update(parameter, optimizer, torch.ones(6), guard)
        other, again = make(fused)
        update(other, again, torch.ones(6), UpdateGuard())
        assert torch.equal(parameter, other) and guard.read() == [True, False]


def test_the_norm_is_that_before_clipping_and_zero_does_not_clip():
    parameter, _ = make(False)
    gradient = torch.full((6,), 3.0)
    parameter.grad = gradient.clone()
    assert gradient_norm([parameter], 0.0) == pytest.approx(3 * 6**0.5)
    assert torch.equal(parameter.grad, gradient)
    assert gradient_norm([parameter], 1.0) == pytest.approx(3 * 6**0.5)
    assert parameter.grad.norm() == pytest.approx(1)


def test_skipped_updates_in_a_row_are_counted_across_reads():
    guard = UpdateGuard()
    for left_out in (False, torch.tensor(True), True):
        guard.add(left_out, 1.0)
    assert guard.read() == [False, True, True] and guard.in_a_row == 2
    guard.add(torch.tensor(True), 1.0)
    assert guard.read() == [True] and guard.in_a_row == 3 and guard.total == 3
    guard.add(False, 1.0)
    assert guard.read() == [False] and guard.in_a_row == 0 and guard.read() == []
