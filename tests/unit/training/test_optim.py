"""Every optimizer of the registry: built, refused where it cannot run, its state saved and restored to the bit."""

import argparse
import importlib.util
import json

import pytest
import torch

from sana_kit.training.config import parse_args
from sana_kit.training.optim import (
    build_optimizer,
    build_schedule,
    optimizer_problems,
    parameter_groups,
    savable_problem,
)
from sana_kit.training.optim_state import (
    GroupNumbers,
    averaged,
    restored_number,
    restored_state,
    state_numbers,
    state_tensors,
)
from sana_kit.training.optimizers import OPTIMIZERS, OptimizerKind
from sana_kit.training.settings import LR_SCHEDULERS

CPU = torch.device("cpu")


def settings(name: str, rate: float = 1e-2, *more: str) -> argparse.Namespace:
    return parse_args(["--pretrained_model_name_or_path=x", f"--optimizer={name}", f"--learning_rate={rate}", *more])


def runnable(name: str) -> None:
    kind = OPTIMIZERS[name]
    if kind.devices and "cpu" not in kind.devices:
        pytest.skip(f"{name} needs {kind.devices}")
    if importlib.util.find_spec(kind.package) is None:
        pytest.skip(f"{kind.package} is not installed")


@pytest.fixture(autouse=True)
def nothing_is_compiled():
    """torchao's optimizer compiles its step, which takes half a minute; the step is the same without."""
    with torch.compiler.set_stance("force_eager"):
        yield


SHAPES = ((8, 4), (5,), (4, 4, 1, 1))
LARGE = ((64, 64), (5,), (16, 256, 1, 1))  # 8-bit moments begin at 4096 weights


def parameters(shapes=SHAPES):
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def built(name, trained, rate=1e-2):
    names = ("block.lora_A.default.weight", "norm.bias", "block.lora_B.default.weight")
    return build_optimizer(settings(name, rate), list(zip(names, trained, strict=False)), CPU)


def steps(optimizer, trained, first, last) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in trained:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_steps_and_three_more_are_six(name):
    runnable(name)
    whole, first, second = parameters(LARGE), parameters(LARGE), parameters(LARGE)
    rate = OPTIMIZERS[name].learning_rate or 1e-2
    steps(built(name, whole, rate), whole, 0, 6)
    optimizer = built(name, first, rate)
    numbers = GroupNumbers(optimizer)
    steps(optimizer, first, 0, 3)
    resumed = built(name, second, rate)
    GroupNumbers(resumed).restore(numbers.changed())
    with torch.no_grad():
        for old, new in zip(first, second, strict=True):
            new.copy_(old)
            saved = optimizer.state[old]
            numbers_of = json.loads(json.dumps(state_numbers(saved)))
            tensors = {key: value.clone() for key, value in state_tensors(saved).items()}
            assert all(type(value) is torch.Tensor for value in tensors.values())
            resumed.state[new] = restored_state(resumed, numbers_of, tensors, CPU)
            assert {k: type(v) for k, v in resumed.state[new].items()} == {k: type(v) for k, v in saved.items()}
    steps(resumed, second, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_prodigys_state_of_other_shapes_and_its_estimate_are_saved():
    runnable("prodigy")
    trained = parameters()
    optimizer = built("prodigy", trained, 1.0)
    numbers = GroupNumbers(optimizer)
    steps(optimizer, trained, 0, 3)
    tensors = state_tensors(optimizer.state[trained[0]])
    assert {"s", "p0", "exp_avg"} <= tensors.keys() and tensors["s"].shape == (32,)
    assert numbers.changed()[0]["k"] == 3 and "betas" not in numbers.changed()[0]


def test_a_changed_setting_is_not_undone_by_a_resume():
    trained = parameters()
    optimizer = built("adamw", trained)
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


class Broken(torch.optim.SGD):
    def step(self, closure=None):
        raise NotImplementedError("no kernel for this device")


def test_state_of_any_dtype_and_shape_is_savable_on_one_process_and_ddp_only():
    def build(named):
        return Whole([parameter for _, parameter in named], lr=1)

    assert savable_problem(build, CPU, under_deepspeed=False) is None
    assert "'table' in another shape" in savable_problem(build, CPU, under_deepspeed=True)


def test_state_that_no_checkpoint_holds_is_refused_at_start(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "odd", OptimizerKind(f"{__name__}.Odd", elementwise=True, arguments=lambda *_: {}))
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
    one, other = built(name, apart), built(name, flat)
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


def test_8_bit_adam_needs_its_device_and_adamw():
    args = parse_args(["--pretrained_model_name_or_path=x", "--use_8bit_adam"])
    assert any("needs CUDA or CPU" in str(problem) for problem in optimizer_problems(args, "npu", False))
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


@pytest.mark.parametrize("name", ["came8bit", "CAME-8bit", "came_8bit"])
def test_came_with_8_bits_is_refused_with_the_reason(name):
    (problem,) = optimizer_problems(settings(name), "cpu", False)
    assert "no maintained package" in str(problem) and "Use came" in str(problem)


def test_an_optimizer_that_fails_at_its_first_step_is_refused_at_start(monkeypatch):
    monkeypatch.setitem(
        OPTIMIZERS, "broken", OptimizerKind(f"{__name__}.Broken", elementwise=True, arguments=lambda *_: {})
    )
    (problem,) = optimizer_problems(settings("broken"), "cpu", False)
    assert "does not run here (NotImplementedError: no kernel for this device)" in str(problem)


# ---------------------------------------------------------------------------------------------------------------------
# Parameter groups


NAMES = ("blocks.0.to_q.lora_A.default.weight", "blocks.0.to_q.lora_B.default.weight", "norm.bias")


def groups_of(*flags):
    named = list(zip((*NAMES, "blocks.0.scale_shift_table"), parameters((*SHAPES, (6, 4))), strict=True))
    names = {id(parameter): name for name, parameter in named}
    found = parameter_groups(settings("adamw", 1e-2, "--adam_weight_decay=0.1", *flags), named)
    return [({names[id(p)] for p in group["params"]}, group["lr"], group["weight_decay"]) for group in found]


def test_all_weights_are_one_group_unless_something_asks_for_more():
    assert groups_of() == [({*NAMES, "blocks.0.scale_shift_table"}, 1e-2, 0.1)]


def test_lora_plus_gives_the_second_matrix_its_own_rate():
    first, second = groups_of("--lora_plus_ratio=16")
    assert second == ({NAMES[1]}, 0.16, 0.1) and first[1:] == (1e-2, 0.1)


def test_norms_and_tables_can_be_left_without_decay():
    decayed, spared = groups_of("--no_decay_norms")
    assert decayed[0] == {NAMES[0], NAMES[1]} or decayed[0] == {NAMES[0], "norm.bias"}
    assert spared[1:] == (1e-2, 0.0) and "blocks.0.scale_shift_table" in spared[0]


def test_a_schedule_moves_both_rates_alike():
    named = list(zip(NAMES, parameters(), strict=True))
    args = settings("adamw", 1e-2, "--lora_plus_ratio=4", "--lr_scheduler=linear", "--lr_warmup_steps=2")
    optimizer = build_optimizer(args, named, CPU)
    schedule, seen = build_schedule(args, optimizer, 6), []
    for _ in range(4):
        optimizer.step()
        schedule.step()
        seen.append([group["lr"] for group in optimizer.param_groups])
    assert [rate[0] for rate in seen] == pytest.approx([5e-3, 1e-2, 7.5e-3, 5e-3])
    assert all(second == pytest.approx(4 * first) for first, second in seen)


def test_prodigy_and_full_fine_tuning_have_no_second_rate():
    runnable("prodigy")
    (problem,) = optimizer_problems(settings("prodigy", 1.0, "--lora_plus_ratio=4"), "cpu", False)
    assert problem.field == "lora_plus_ratio" and "one rate for all" in problem.reason
    args = settings("adamw", 1e-3, "--lora_plus_ratio=4", "--train_mode=full")
    assert "no effect without LoRA" in str(optimizer_problems(args, "cpu", False)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Schedules, and the weights that schedule-free AdamW means to be used


def test_every_scheduler_of_diffusers_is_there_and_runs():
    from diffusers.optimization import SchedulerType

    assert set(LR_SCHEDULERS) == {kind.value for kind in SchedulerType}
    for name in LR_SCHEDULERS:
        rules = ["--lr_step_rules=1:2,0.1:4,0.01"] if name == "piecewise_constant" else []
        args = settings("adamw", 1.0, f"--lr_scheduler={name}", "--lr_warmup_steps=1", *rules)
        assert not optimizer_problems(args, "cpu", False)
        optimizer = built("adamw", parameters(), 1.0)
        schedule, rates = build_schedule(args, optimizer, 6), []
        for _ in range(6):
            optimizer.step()
            schedule.step()
            rates.append(optimizer.param_groups[0]["lr"])
        assert all(rate >= 0 for rate in rates) and max(rates) > 0, name
        if rules:
            assert rates == [1.0, 0.1, 0.1, 0.01, 0.01, 0.01]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--lr_scheduler=piecewise_constant"], "needed with piecewise_constant"),
        (["--lr_step_rules=1:5,0.1"], "has no effect with lr_scheduler constant"),
        (["--lr_scheduler=piecewise_constant", "--lr_step_rules=1:5,0.1:3,0"], "rising order"),
        (["--lr_scheduler=piecewise_constant", "--lr_step_rules=1-5,0.1"], "rising order"),
    ],
)
def test_rules_of_steps_are_checked(flags, told):
    (problem,) = optimizer_problems(settings("adamw", 1e-3, *flags), "cpu", False)
    assert problem.field == "lr_step_rules" and told in str(problem)


def test_the_average_of_schedule_free_adamw_is_the_packages_own():
    runnable("schedulefree")
    trained = parameters(LARGE)
    optimizer = built("schedulefree", trained)
    steps(optimizer, trained, 0, 5)
    ours = [averaged(optimizer, p.detach().clone(), optimizer.state[p]["z"]) for p in trained]
    assert not any(torch.equal(own, p) for own, p in zip(ours, trained, strict=True))
    optimizer.eval()
    assert all(torch.allclose(own, p, rtol=1e-5, atol=1e-7) for own, p in zip(ours, trained, strict=True))


def test_schedule_free_adamw_is_average_enough():
    runnable("schedulefree")
    (problem,) = optimizer_problems(settings("schedulefree", 1e-3, "--ema_decay=0.9"), "cpu", False)
    assert problem.field == "ema_decay"
