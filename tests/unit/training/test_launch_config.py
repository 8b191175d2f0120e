"""What the accelerate config asks for, held against the run's settings before anything is built."""

import json
import types

import pytest

from sana_kit.training.launch_config import LaunchConfig, settle

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


def settings(**more):
    found = {"mixed_precision": None, "gradient_accumulation_steps": 1, "max_grad_norm": 1.0, "train_mode": "lora"}
    return types.SimpleNamespace(**{**found, **more})


def told(environment, given=(), device="cuda", **more) -> str:
    _, problems = settle(LaunchConfig.read(environment), settings(**more), set(given), device)
    return "\n".join(map(str, problems))


@pytest.mark.parametrize(
    "variable, name",
    [
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "MEGATRON_LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "TP"),
    ],
)
def test_engines_that_shard_in_ways_of_their_own_are_refused(variable, name):
    assert f"the accelerate config asks for {name}" in told({variable: "true"})


def test_fp16_of_the_accelerate_config_is_checked_as_the_flag_is():
    environment = {"ACCELERATE_MIXED_PRECISION": "fp16"}
    assert "fp16 needs an accelerator (it comes from the accelerate config)" in told(environment, device="cpu")
    assert told(environment, device="cuda") == ""
    assert told(environment, device="cpu", mixed_precision="bf16", given=["mixed_precision"]) == ""
    assert "fp8" in told({"ACCELERATE_MIXED_PRECISION": "fp8"})
    # what is wrong with the flag itself is told with its choices, once
    assert told({}, device="cpu", mixed_precision="fp32", given=["mixed_precision"]) == ""


def test_the_effective_precision_is_the_flags_else_the_configs():
    launch = LaunchConfig.read({"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert settle(launch, settings(), set(), "cpu")[0].mixed_precision == "bf16"
    assert settle(launch, settings(mixed_precision="no"), set(), "cpu")[0].mixed_precision == "no"
    assert settle(LaunchConfig.read({}), settings(), set(), "cpu")[0].mixed_precision == "no"


@pytest.mark.parametrize("stage, words", [("0", "zero_stage: 0"), ("3", "zero_stage: 3")])
def test_zero_stages_that_do_not_fit_are_refused(stage, words):
    assert words in told({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage})


def test_stage_3_is_for_full_fine_tuning():
    assert told({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, train_mode="full") == ""


def test_the_configs_values_hold_where_no_flag_was_given():
    environment = {
        **DEEPSPEED,
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_GRADIENT_CLIPPING": "0.5",
        "ACCELERATE_MIXED_PRECISION": "bf16",
    }
    settled, problems = settle(LaunchConfig.read(environment), settings(), set(), "cpu")
    assert not problems and (settled.gradient_accumulation_steps, settled.max_grad_norm) == (4, 0.5)
    words = told(environment, given=["max_grad_norm", "mixed_precision"], max_grad_norm=2.0, mixed_precision="no")
    assert "max_grad_norm=2.0: the accelerate config says gradient_clipping: 0.5" in words
    assert "mixed_precision=no: the accelerate config says mixed_precision: bf16" in words


def test_words_for_unset_values_are_no_values():
    for word in ("auto", "None", "none", ""):
        environment = {**DEEPSPEED, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": word}
        launch = LaunchConfig.read({**environment, "ACCELERATE_GRADIENT_CLIPPING": word})
        assert launch.gradient_accumulation_steps is None and launch.max_grad_norm is None


def of_file(tmp_path, config, **environment) -> LaunchConfig:
    path = tmp_path / "ds_config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return LaunchConfig.read({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path), **environment})


def test_a_deepspeed_config_file_decides_the_precision(tmp_path):
    config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}, "gradient_clipping": "auto"}
    launch = of_file(tmp_path, config)
    settled, problems = settle(launch, settings(), set(), "cpu")
    assert not problems and settled.mixed_precision == "bf16" and launch.zero_stage == 1
    _, (problem,) = settle(launch, settings(mixed_precision="no"), {"mixed_precision"}, "cpu")
    assert "the accelerate config says mixed_precision: bf16" in str(problem)
    _, (problem,) = settle(
        of_file(tmp_path, {**config, "bf16": {}, "fp16": {"enabled": True}}), settings(), set(), "cpu"
    )
    assert "fp16 needs an accelerator" in str(problem)


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_a_deepspeed_config_file_with_an_optimizer_of_its_own_is_refused(tmp_path, section):
    launch = of_file(tmp_path, {"zero_optimization": {"stage": 2}, section: {"type": "AdamW"}})
    _, (problem,) = settle(launch, settings(), set(), "cpu")
    assert f"Take the section '{section}' out of the file" in str(problem) and "ds_config.json" in str(problem)


def test_a_deepspeed_config_file_that_cannot_be_read_is_refused(tmp_path):
    _, (problem,) = settle(of_file(tmp_path, "{"), settings(), set(), "cpu")
    assert "cannot be read" in str(problem)
    launch = of_file(tmp_path, {"bf16": {"enabled": True}, "fp16": {"enabled": True}})
    words = "\n".join(map(str, settle(launch, settings(), set(), "cuda")[1]))
    assert "no section 'zero_optimization'" in words and "both bf16 and fp16" in words
    launch = of_file(tmp_path, {"bf16": {"enabled": True}, "zero_optimization": {}}, ACCELERATE_MIXED_PRECISION="fp16")
    assert "it enables bf16, while" in str(settle(launch, settings(), set(), "cuda")[1][0])
