"""A LoRA on weights in few bits: trains, resumes to the bit, fits the whole base; by the libraries themselves.

The tests of a library run where it is installed: pip install torchao bitsandbytes
"""

import json
import shutil

import pytest
import tiny
import torch
from helpers import SHORT_RUN, adapter_weights, run_trainer, same
from safetensors import safe_open
from safetensors.torch import load_file

from sana_kit.errors import UserError
from sana_kit.models.quantize import QUANTIZATIONS, quantize_problems, saved_bytes
from sana_kit.training.engine import Engine

FULL = {"num_attention_heads": 70, "num_cross_attention_heads": 20, "cross_attention_head_dim": 112}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model whose layers have whole blocks of 32."""
    return tiny.make_tiny_pipeline(tmp_path_factory.mktemp("model") / "wide", heads=8)


@pytest.fixture(scope="module")
def flags(model, image_folder, tmp_path_factory):
    return [
        f"--pretrained_model_name_or_path={model}",
        f"--instance_data_dir={image_folder}",
        f"--encodings_dir={tmp_path_factory.mktemp('encodings')}",
        *SHORT_RUN,
        "--lora_layers=attention+ffn",
    ]


@pytest.fixture(scope="module")
def whole_base(flags, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "out"
    assert run_trainer(*flags, f"--output_dir={output}") == 0
    return output


def metadata(folder):
    with safe_open(folder / "pytorch_lora_weights.safetensors", framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_lora_on_few_bits_resumes_to_the_bit_and_fits_the_whole_base(flags, whole_base, tmp_path, name, monkeypatch):
    if quantize_problems(name, torch.device("cpu")):
        pytest.skip(f"{QUANTIZATIONS[name].package} is not installed")
    kinds, prepare = [], Engine.prepare

    def seen(self, transformer, *more):
        kinds.extend(type(parameter).__name__ for parameter in transformer.parameters())
        return prepare(self, transformer, *more)

    monkeypatch.setattr(Engine, "prepare", seen)
    few = [*flags, f"--base_quantization={name}", "--fused_blocks=auto"]
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert run_trainer(*few, f"--output_dir={whole}") == 0
    assert len([kind for kind in kinds if kind not in ("Parameter", "Tensor")]) == 20  # of two blocks
    shutil.copytree(whole / "checkpoint-2", half / "checkpoint-2")
    assert run_trainer(*few, f"--output_dir={half}", "--resume_from_checkpoint=latest") == 0
    assert same(adapter_weights(whole), adapter_weights(half))
    file = "checkpoint-4/optimizer.safetensors"
    assert same(load_file(whole / file), load_file(half / file))
    # the file names the whole base, and the same layers
    assert metadata(whole)["sana_base_model"] == metadata(whole_base)["sana_base_model"]
    ours, theirs = adapter_weights(whole), adapter_weights(whole_base)
    assert ours.keys() == theirs.keys()
    ups = [key for key in ours if "lora_B" in key]  # these began at zero
    one, other = (torch.cat([w[key].float().flatten() for key in ups]) for w in (ours, theirs))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.5


def test_what_few_bits_cannot_be_is_told_by_name(flags, tmp_path, monkeypatch):
    monkeypatch.setattr("sana_kit.training.adapter_checks.quantize_problems", lambda *more: [])
    for more, told in (
        (["--use_dora"], "DoRA needs the norms of whole weights"),
        (["--train_mode=full"], "such weights cannot be trained"),
    ):
        with pytest.raises(UserError, match=told):
            run_trainer(*flags, "--base_quantization=int8", *more, f"--output_dir={tmp_path}")
    with pytest.raises(UserError, match="--base_quantization=int5: unknown"):
        run_trainer(*flags, "--base_quantization=int5", f"--output_dir={tmp_path}")


def test_bytes_of_few_bits_are_those_that_the_libraries_keep(model):
    config = json.loads((model / "transformer" / "config.json").read_text())
    blocks = 2 * 2 * (8 * 64 * 64 + 64 * 320 + 160 * 64)  # bytes of two blocks' products in bf16
    assert saved_bytes("int8", config) == blocks // 2 - 2 * 2 * (8 * 64 + 320 + 64)
    assert saved_bytes("fp8", config) == blocks // 2 - 4 * 2 * (8 * 64 + 320 + 64)
    narrow = 2 * 160 * 64  # weights with blocks of 32 in both, the others have 64
    assert saved_bytes("nf4", config) == blocks - (blocks // 2 * (1 / 2 + 4 / 64) + narrow * 4 / 64)
