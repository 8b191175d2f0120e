"""Kinds of adapters: each trains, resumes to the bit, and draws as it was trained, with the kit and with diffusers."""

import shutil

import pytest
import torch
from diffusers import SanaPipeline, SanaTransformer2DModel
from helpers import SHORT_RUN, adapter_weights, run_trainer, same
from peft import LoHaConfig, LoKrConfig, inject_adapter_in_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file

import patch_sana
from sana_kit.errors import UserError
from sana_kit.models.adapter import apply_lora, read_lora
from sana_kit.models.folder import find_model
from sana_kit.models.loading import load_transformer
from sana_kit.training.engine import Engine

KINDS = {
    "alpha is the rank": ["--rank=3"],
    "rsLoRA on attention+ffn": ["--use_rslora", "--rank=4", "--lora_alpha=2", "--lora_layers=attention+ffn"],
    "DoRA on attention": ["--use_dora", "--lora_layers=attention", "--lora_plus_ratio=2"],
    "DoRA, fused blocks asked for": ["--use_dora", "--fused_blocks=auto", "--lora_dropout=0.1"],
    "orthogonal, by expression": [r"--lora_layers=.*\.1\.attn[12]\.to_(q|k)", "--init_lora_weights=orthogonal"],
    "LoKr on attention+ffn": ["--adapter_type=lokr", "--rank=2", "--lora_layers=attention+ffn"],
    "LoKr, whole factors": ["--adapter_type=lokr", "--rank=64", "--lokr_factor=4"],
    "LoHa": ["--adapter_type=LoHa", "--rank=3", "--lora_alpha=6", "--lora_layers=all"],
    "all layers": ["--lora_layers=all", "--init_lora_weights=kaiming"],
}


@pytest.fixture(scope="module")
def flags(tiny_model, image_folder, tmp_path_factory):
    return [
        f"--pretrained_model_name_or_path={tiny_model}",
        f"--instance_data_dir={image_folder}",
        f"--encodings_dir={tmp_path_factory.mktemp('encodings')}",
        *SHORT_RUN,
        "--mixed_precision=no",
    ]


INPUTS = {
    "hidden_states": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
    "encoder_hidden_states": torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2)),
    "timestep": torch.tensor([500.0]),
    "return_dict": False,
}


def base_transformer(tiny_model):
    found, problems = find_model(str(tiny_model))
    assert not problems
    return load_transformer(found, device=torch.device("cpu"), dtype=torch.float32)


def drawn_by_the_kit(tiny_model, folder):
    transformer = base_transformer(tiny_model)
    lora, problems = read_lora(str(folder), dict(transformer.config))
    assert not problems
    apply_lora(transformer, lora)
    with torch.no_grad():
        return transformer(**INPUTS)[0]


def drawn_by_peft(tiny_model, folder):
    """peft's own layers with the file's tensors, settings from the file's metadata."""
    tensors, settings, _ = patch_sana.read_adapter(folder)
    config = {"LOKR": LoKrConfig, "LOHA": LoHaConfig}[settings.pop("peft_type")](**settings)
    transformer = inject_adapter_in_model(config, base_transformer(tiny_model))
    own = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    result = set_peft_model_state_dict(transformer, own)
    assert not result.unexpected_keys
    return transformer.eval()(**INPUTS)[0]


@pytest.fixture
def live(monkeypatch):
    """What the trained transformer itself gives, at the end of each run."""
    found, close = [], Engine.close

    def closing(self):
        self.transformer.eval()
        with torch.no_grad():
            found.append(self.transformer(**INPUTS)[0])
        close(self)

    monkeypatch.setattr(Engine, "close", closing)
    return found


@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_resumes_to_the_bit_and_draws_as_it_was_trained(flags, tiny_model, tmp_path, live, name):
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert run_trainer(*flags, *KINDS[name], f"--output_dir={whole}") == 0
    shutil.copytree(whole / "checkpoint-2", half / "checkpoint-2")
    assert run_trainer(*flags, *KINDS[name], f"--output_dir={half}", "--resume_from_checkpoint=latest") == 0
    assert same(adapter_weights(whole), adapter_weights(half))
    file = "checkpoint-4/optimizer.safetensors"
    assert same(load_file(whole / file), load_file(half / file))
    with torch.no_grad():
        untrained = base_transformer(tiny_model)(**INPUTS)[0]
    moved = (live[0] - untrained).abs().max()
    assert moved > 1e-3
    assert (drawn_by_the_kit(tiny_model, whole) - live[0]).abs().max() < 1e-3 * moved
    assert run_trainer(f"--config={whole / 'run.yaml'}", "--dry_run", f"--output_dir={tmp_path / 'again'}") == 0
    if name[:4] in ("LoKr", "LoHa"):  # which diffusers does not load
        with torch.no_grad():
            assert (drawn_by_peft(tiny_model, whole) - live[0]).abs().max() < 1e-4 * moved
        return
    pipeline = SanaPipeline.from_pretrained(tiny_model)
    pipeline.load_lora_weights(str(whole))
    pipeline.transformer.eval()  # diffusers 0.42 leaves the new layers in training mode, with the adapter's dropout
    with torch.no_grad():
        assert (pipeline.transformer(**INPUTS)[0] - live[0]).abs().max() < 1e-3 * moved


@pytest.mark.parametrize("kind", [["--rank=3", "--lora_alpha=6"], ["--use_dora", "--lora_layers=attention"]])
def test_a_run_begins_with_an_adapter(flags, tiny_model, tmp_path, live, kind):
    """Its first image is that of the adapter; rank, alpha, layers and kind are the adapter's. A merged result."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert run_trainer(*flags, *kind, f"--output_dir={first}") == 0
    more = [f"--init_lora={first}", f"--output_dir={second}", "--learning_rate=0", "--save_merged"]
    assert run_trainer(*flags, *more) == 0
    before, after = adapter_weights(first), adapter_weights(second)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert torch.allclose(live[0], live[1], atol=1e-6)
    merged = SanaTransformer2DModel.from_pretrained(second / "transformer")
    with torch.no_grad():
        assert torch.allclose(merged(**INPUTS)[0], live[1], atol=1e-5)
    found, problems = find_model(str(second))  # what the drawing scripts take by --model_path
    assert not problems and found.transformer_folder == second / "transformer"


def test_an_adapter_to_begin_with_is_held_against_the_settings(flags, tmp_path):
    assert run_trainer(*flags, "--rank=3", "--max_train_steps=1", f"--output_dir={tmp_path / 'a'}") == 0
    more = [f"--init_lora={tmp_path / 'a'}", "--rank=5", "--lora_layers=to_q", "--use_dora"]
    with pytest.raises(UserError) as error:
        run_trainer(*flags, *more, f"--output_dir={tmp_path / 'b'}")
    told = str(error.value)
    assert "--rank=5: the adapter to begin with has rank 3" in told
    assert "--lora_layers=to_q: the adapter to begin with names its layers" in told
    assert "--use_dora: the adapter to begin with has no magnitudes" in told


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--init_lora_weights=pissa"], "--init_lora_weights=pissa: it moves a part of the base's weights"),
        (["--adapter_type=oft"], "--adapter_type=oft: it turns the weights instead of adding to them"),
        (["--adapter_type=lork"], "--adapter_type=lork: there is no such adapter"),
        (["--adapter_type=lokr", "--lora_alpha=9"], "--lora_alpha=9: LoKr's whole factors have no rank"),
        (["--adapter_type=loha", "--use_dora"], "--use_dora: LoHa has no magnitudes here"),
        (["--adapter_type=loha", "--lora_layers=attn9"], "--lora_layers=attn9: 'attn9' matches no"),
        (["--lokr_factor=8"], "--lokr_factor=8: has no effect without"),
        (["--lora_layers=attn(1"], "is no regular expression"),
        (["--lora_layers=attn3.*"], "matches no whole name"),
        (["--init_lora_weights=orthogonal", "--rank=3"], "--rank=3: must be even"),
        (["--init_lora=/nowhere"], "--init_lora=/nowhere: no such file"),
        (["--train_mode=full", "--use_dora", "--save_merged"], "--use_dora: has no effect without LoRA"),
    ],
)
def test_what_an_adapter_cannot_be_is_told_before_anything_is_loaded(flags, tmp_path, more, told):
    with pytest.raises(UserError) as error:
        run_trainer(*flags, *more, f"--output_dir={tmp_path}")
    assert told in str(error.value)
