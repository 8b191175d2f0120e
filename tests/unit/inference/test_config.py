"""The flags of the inference scripts.

python -m pytest tests/unit/inference/test_config.py
"""

import pytest

from sana_kit.flags import settings_of
from sana_kit.inference.command import main
from sana_kit.inference.config import InferConfig, parse_config


@pytest.mark.parametrize(
    ("flag", "hint"), [("--promt", "--prompt"), ("--lora_weight=x", "--lora_weights"), ("--seed", "--seeds")]
)
def test_misspelt_flags_are_errors_that_name_the_nearest(flag, hint, capsys):
    with pytest.raises(SystemExit) as stop:
        main("test", [flag])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and flag.split("=")[0] in said
    assert f"Did you mean {hint}?" in said


def test_a_script_may_have_an_adapter_of_its_own():
    assert settings_of(parse_config("test", []))["lora_weights"] == ()
    assert parse_config("test", [], "./a.safetensors").lora.lora_weights == ("./a.safetensors",)
    assert parse_config("test", ["--lora_weights=b"], "./a.safetensors").lora.lora_weights == ("b",)
    assert isinstance(parse_config("test", []), InferConfig)
