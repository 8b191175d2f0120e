"""Every optimizer of the registry: built, refused where it cannot run, its state saved and restored to the bit."""

import argparse
import importlib.util

import pytest
import torch

from sana_kit.training.config import parse_args
from sana_kit.training.optim import (
    OPTIMIZERS,
    GroupNumbers,
    build_optimizer,
    optimizer_problems,
    restored_number,
    savable_problem,
    state_numbers,
    state_tensors,
)

CPU = torch.device("cpu")


def settings(name: str, rate: float = 1e-2) -> argparse.Namespace:
    return parse_args(["--pretrained_model_name_or_path=x", f"--optimizer={name}", f"--learning_rate={rate}"])


def runnable(name: str) -> None:
    kind = OPTIMIZERS[name]
    if kind.devices:
        pytest.skip(f"{name} needs {kind.devices}")
    if kind.package and importlib.util.find_spec(kind.package) is None:
        pytest.skip(f"{kind.package} is not installed")


def parameters():
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((8, 4), (5,), (4, 4, 1, 1))]


def steps(optimizer, trained, first, last) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in trained:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_steps_and_three_more_are_six(name):
    runnable(name)
    whole, first, second = parameters(), parameters(), parameters()
    steps(build_optimizer(settings(name), whole, CPU), whole, 0, 6)
    optimizer = build_optimizer(settings(name), first, CPU)
    numbers = GroupNumbers(optimizer)
    steps(optimizer, first, 0, 3)
    resumed = build_optimizer(settings(name), second, CPU)
    GroupNumbers(resumed).restore(numbers.changed())
    with torch.no_grad():
        for old, new in zip(first, second, strict=True):
            new.copy_(old)
            saved = optimizer.state[old]
            state = {key: restored_number(resumed, key, value, CPU) for key, value in state_numbers(saved).items()}
            state.update({key: value.clone() for key, value in state_tensors(saved).items()})
            resumed.state[new] = state
    steps(resumed, second, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_prodigys_state_of_other_shapes_and_its_estimate_are_saved():
    runnable("prodigy")
    trained = parameters()
    optimizer = build_optimizer(settings("prodigy", 1.0), trained, CPU)
    numbers = GroupNumbers(optimizer)
    steps(optimizer, trained, 0, 3)
    tensors = state_tensors(optimizer.state[trained[0]])
    assert {"s", "p0", "exp_avg"} <= tensors.keys() and tensors["s"].shape == (32,)
    assert numbers.changed()[0]["k"] == 3 and "betas" not in numbers.changed()[0]


def test_a_changed_setting_is_not_undone_by_a_resume():
    trained = parameters()
    optimizer = build_optimizer(settings("adamw"), trained, CPU)
    saved = GroupNumbers(optimizer).changed()
    other = torch.optim.AdamW(parameters(), lr=1.0, weight_decay=0.7)
    GroupNumbers(other).restore(saved)
    assert other.param_groups[0]["weight_decay"] == 0.7 and other.param_groups[0]["lr"] == 1.0


class Whole(torch.optim.SGD):
    """Keeps state as 8-bit optimizers do: whole numbers, a table of another shape, a count."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["codes"] = torch.ones(parameter.shape, dtype=torch.uint8)
            state["table"] = torch.ones(256)
            state["count"] = state.get("count", 0) + 1


class Odd(torch.optim.SGD):
    """Keeps what no checkpoint can hold."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["history"] = [parameter.detach().clone()]


def test_state_of_any_dtype_and_shape_is_savable_on_one_process_and_ddp_only():
    assert savable_problem(lambda p: Whole(p, lr=1), CPU, under_deepspeed=False) is None
    assert "'table' in another shape" in savable_problem(lambda p: Whole(p, lr=1), CPU, under_deepspeed=True)


def test_state_that_no_checkpoint_holds_is_refused_at_start(monkeypatch):
    from sana_kit.training.optim import OptimizerKind

    monkeypatch.setitem(OPTIMIZERS, "odd", OptimizerKind(lambda p, s, d: Odd(p, lr=1), elementwise=True))
    (problem,) = optimizer_problems(settings("odd"), "cpu", under_deepspeed=False)
    assert "keeps 'history' as list" in str(problem) and problem.field == "optimizer"


@pytest.mark.parametrize("name", [name for name, kind in OPTIMIZERS.items() if not kind.elementwise])
def test_deepspeed_refuses_optimizers_that_look_at_whole_parameters(name):
    problems = optimizer_problems(settings(name), "cpu", under_deepspeed=True)
    assert any("DeepSpeed cuts the parameters into parts" in str(problem) for problem in problems)


@pytest.mark.parametrize("name", [name for name, kind in OPTIMIZERS.items() if kind.elementwise])
def test_what_is_said_to_be_elementwise_is(name):
    """On a flat row of all weights, as ZeRO steps it, the same weights come out."""
    runnable(name)
    apart = parameters()
    flat = [torch.nn.Parameter(torch.cat([p.detach().flatten() for p in apart]))]
    one, other = build_optimizer(settings(name), apart, CPU), build_optimizer(settings(name), flat, CPU)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for parameter in apart:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        flat[0].grad = torch.cat([p.grad.flatten() for p in apart])
        one.step()
        other.step()
    assert torch.allclose(torch.cat([p.detach().flatten() for p in apart]), flat[0], rtol=1e-6, atol=1e-7)


def test_an_unknown_optimizer_names_the_nearest():
    (problem,) = optimizer_problems(settings("prodigi"), "cpu", False)
    assert "Did you mean prodigy?" in str(problem)


def test_8_bit_adam_needs_cuda_and_adamw():
    args = parse_args(["--pretrained_model_name_or_path=x", "--use_8bit_adam"])
    assert any("needs CUDA" in str(problem) for problem in optimizer_problems(args, "cpu", False))
    args = parse_args(["--pretrained_model_name_or_path=x", "--use_8bit_adam", "--optimizer=lion"])
    assert any("It goes with AdamW only" in str(problem) for problem in optimizer_problems(args, "cpu", False))


def test_adams_step_count_takes_the_form_of_the_optimizer_that_goes_on():
    fused = torch.optim.AdamW(parameters(), fused=True)
    plain = torch.optim.AdamW(parameters())
    for optimizer in (fused, plain):
        for saved in (6.0, {"value": 6.0, "dtype": "float32", "on": "cpu"}):
            step = restored_number(optimizer, "step", saved, CPU)
            assert torch.is_tensor(step) and step.dtype == torch.float32 and step == 6

    class DeepSpeedCPUAdam(torch.optim.SGD):
        pass

    step = restored_number(DeepSpeedCPUAdam(parameters(), lr=1), "step", {"value": 6.0, "dtype": "float32"}, CPU)
    assert step == 6 and isinstance(step, int)
