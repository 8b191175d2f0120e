"""LoRA files: read, refused, applied.

python -m pytest tests/unit/models/test_adapter.py
"""

import json

import numpy as np
import pytest
import tiny
import torch
from helpers.drawing import CPU, diffusers_keeps_alpha, draw, encode_few, levels, load_plain, plan, write_lora

import patch_sana
from sana_kit.errors import UserError
from sana_kit.models.about import LoraAbout, about_metadata, read_about
from sana_kit.models.adapter import LORA_FILE, apply_lora, read_lora
from sana_kit.models.folder import find_model
from sana_kit.models.loading import load_pipeline, load_transformer


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    return load_plain(tiny_model)


@pytest.fixture(scope="module")
def embeds(pipeline):
    return encode_few(pipeline)


@pytest.fixture(scope="module")
def lora(tiny_model, tmp_path_factory):
    return write_lora(tiny_model, tmp_path_factory.mktemp("lora"))


def with_lora(model, path, embeds, dtype=torch.float32, **kwargs):
    loaded = load_pipeline(
        str(model),
        lora_weights=None if path is None else str(path),
        device=CPU,
        dtype=dtype,
        text_encoder=False,
        **kwargs,
    )
    return loaded, draw(loaded, embeds, plan(["a red square"], [8]), dtype=dtype)[0]


def test_lora_is_what_diffusers_makes_of_it_fused_and_apart(tiny_model, lora, embeds):
    from diffusers import SanaPipeline

    _, base = with_lora(tiny_model, None, embeds)
    fused, image = with_lora(tiny_model, lora, embeds)
    _, apart = with_lora(tiny_model, lora.parent, embeds, fuse_lora=False)
    theirs = SanaPipeline.from_pretrained(tiny_model)
    theirs.load_lora_weights(lora.parent, adapter_name="default")
    if not diffusers_keeps_alpha():
        theirs.set_adapters("default", 2.0)  # alpha 8 of rank 4
    expected = draw(theirs, embeds, plan(["a red square"], [8]))[0]
    assert levels(image, expected) <= 1 and levels(apart, expected) <= 1
    assert levels(image, base) > 20
    assert not any("lora" in name for name, _ in fused.transformer.named_parameters())


def test_lora_scale_goes_from_none_to_more(tiny_model, lora, embeds):
    _, base = with_lora(tiny_model, None, embeds)
    for fuse in (True, False):
        _, none = with_lora(tiny_model, lora, embeds, lora_scale=0.0, fuse_lora=fuse)
        assert levels(none, base) == 0
    _, half = with_lora(tiny_model, lora, embeds, lora_scale=0.5)
    _, half_apart = with_lora(tiny_model, lora, embeds, lora_scale=0.5, fuse_lora=False)
    assert levels(half, half_apart) <= 1 and levels(half, base) > 5


def test_fusing_in_bf16_rounds_no_worse_than_bf16_itself(tiny_model, lora, embeds):
    """The fused image is as near to the float32 one as the image with the adapter apart is."""
    _, exact = with_lora(tiny_model, lora, embeds)
    _, fused = with_lora(tiny_model, lora, embeds, dtype=torch.bfloat16)
    _, apart = with_lora(tiny_model, lora, embeds, dtype=torch.bfloat16, fuse_lora=False)

    def error(image):
        return float(np.abs(np.asarray(image).astype(float) - np.asarray(exact)).mean())

    assert error(fused) < 1.5 * error(apart) + 0.1


def lora_problems(path, model):
    config = json.loads((model / "transformer/config.json").read_text())
    found, problems = read_lora(str(path), config)
    assert (found is None) == bool(problems)
    return "\n".join(map(str, problems))


def test_lora_that_is_missing_or_not_safetensors(tiny_model, lora, tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pickle.bin")
    (tmp_path / "cut.safetensors").write_bytes(lora.read_bytes()[:-50])
    (tmp_path / "empty.safetensors").touch()
    assert "no such file" in lora_problems(tmp_path / "nowhere.safetensors", tiny_model)
    assert f"holds no {LORA_FILE}" in lora_problems(tmp_path, tiny_model)
    assert "not a safetensors file" in lora_problems(tmp_path / "pickle.bin", tiny_model)
    assert "cut off" in lora_problems(tmp_path / "cut.safetensors", tiny_model)
    assert "not a safetensors file" in lora_problems(tmp_path / "empty.safetensors", tiny_model)


def test_lora_of_another_model_is_refused(tiny_model, lora, tmp_path):
    from safetensors.torch import load_file, save_file

    wider = tiny.make_tiny_pipeline(tmp_path / "wider", heads=8)
    text = lora_problems(lora, wider)
    assert "other shapes" in text and "transformer_blocks.0.attn1.to_k (64, 64)" in text
    deeper = write_lora(tiny.make_tiny_pipeline(tmp_path / "deeper", layers=3), tmp_path)
    text = lora_problems(deeper, tiny_model)
    assert "belong to no layer" in text and "transformer_blocks.2" in text
    weights = load_file(lora)
    save_file({f"unet.{name}": tensor for name, tensor in weights.items()}, tmp_path / "prefix.safetensors")
    assert "belong to no layer" in lora_problems(tmp_path / "prefix.safetensors", tiny_model)
    first = next(iter(weights))
    save_file({name: tensor for name, tensor in weights.items() if name != first}, tmp_path / "half.safetensors")
    assert "only" in lora_problems(tmp_path / "half.safetensors", tiny_model)
    save_file({**weights, first: weights[first] * float("nan")}, tmp_path / "nan.safetensors")
    assert "NaN" in lora_problems(tmp_path / "nan.safetensors", tiny_model)


def test_lora_whose_metadata_contradicts_its_tensors_is_refused(tiny_model, tmp_path):
    wrong = write_lora(tiny_model, tmp_path / "rank", r=8)
    assert "says rank 8" in lora_problems(wrong, tiny_model)
    dora = write_lora(tiny_model, tmp_path / "dora", use_dora=True)
    assert "DoRA" in lora_problems(dora, tiny_model)


def test_lora_without_metadata_has_alpha_equal_to_rank(tiny_model, lora, tmp_path):
    from safetensors.torch import load_file, save_file

    config = json.loads((tiny_model / "transformer/config.json").read_text())
    weights = load_file(lora)
    save_file(weights, tmp_path / "plain.safetensors")
    assert set(read_lora(str(tmp_path / "plain.safetensors"), config)[0].scaling.values()) == {1.0}
    assert set(read_lora(str(lora), config)[0].scaling.values()) == {2.0}
    stems = {name.rsplit(".lora_", 1)[0] for name in weights}
    save_file({**weights, **{f"{stem}.alpha": torch.tensor(2.0) for stem in stems}}, tmp_path / "alpha.safetensors")
    assert set(read_lora(str(tmp_path / "alpha.safetensors"), config)[0].scaling.values()) == {0.5}


def dora_pair(tiny_model, folder, scale=0.3):
    """(LoRA file with magnitudes, the transformer with peft's own DoRA layers)."""
    from diffusers import SanaTransformer2DModel
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    transformer = SanaTransformer2DModel.from_pretrained(tiny_model / "transformer")
    layers = ["to_q", "to_k", "to_v", "conv_point"]
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=layers))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in transformer.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand(parameter.shape, generator=generator)
        elif "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    config = {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": layers}
    tensors = {f"transformer.{name}": tensor for name, tensor in get_peft_model_state_dict(transformer).items()}
    patch_sana.write_adapter(folder, tensors, config, {})
    return folder / LORA_FILE, transformer.eval()


def test_dora_is_what_peft_makes_of_it(tiny_model, tmp_path):
    """diffusers drops the magnitudes; here W' = m * V / |V| as peft's own layers compute it."""
    path, theirs = dora_pair(tiny_model, tmp_path)
    lora, problems = read_lora(str(path), dict(theirs.config))
    assert problems == [] and len(lora.magnitude) == len(lora.rank) == 14
    ours = load_transformer(find_model(str(tiny_model))[0], device=CPU, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 32, generator=generator),
        "encoder_attention_mask": torch.ones(1, 5),
        "timestep": torch.tensor([300.0]),
    }
    with torch.no_grad():
        base, expected = ours(**inputs).sample, theirs(**inputs).sample
        apply_lora(ours, lora, 0.0)
        assert torch.equal(ours(**inputs).sample, base)
        apply_lora(ours, lora, 1.0)
        made = ours(**inputs).sample
    assert torch.allclose(made, expected, atol=1e-5) and not torch.allclose(base, expected, atol=1e-2)


def test_dora_that_cannot_be_applied_is_refused_by_its_name(tiny_model, tmp_path):
    path, _ = dora_pair(tiny_model, tmp_path)
    with pytest.raises(UserError, match="no_fuse_lora: a DoRA adapter can only be merged"):
        load_pipeline(str(tiny_model), lora_weights=str(path), fuse_lora=False, device=CPU, text_encoder=False)
    adapter = patch_sana.open_adapter(path)
    plain = {name: tensor for name, tensor in adapter.tensors.items() if "magnitude" not in name}
    patch_sana.write_adapter(tmp_path / "without", plain, adapter.lora_config, {})
    assert "its metadata says DoRA, and it holds no magnitude" in lora_problems(tmp_path / "without", tiny_model)
    odd = {k: t[:3] if "magnitude" in k else t for k, t in adapter.tensors.items()}
    patch_sana.write_adapter(tmp_path / "odd", odd, adapter.lora_config, {})
    assert "DoRA magnitude of (3," in lora_problems(tmp_path / "odd", tiny_model)


def test_a_file_says_how_it_was_trained(tiny_model, lora, tmp_path):
    adapter = patch_sana.open_adapter(lora)
    about = LoraAbout(
        rank=4,
        alpha=8,
        base_model="owner/model",
        instruction=("Say it well:", "User Prompt: "),
        trigger="一只小猫",
        resolution=512,
        steps=300,
        images=12,
        kit_version="1",
    )
    patch_sana.write_adapter(tmp_path, adapter.tensors, adapter.lora_config, {}, about_metadata(about))
    config = json.loads((tiny_model / "transformer/config.json").read_text())
    found = read_lora(str(tmp_path), config)[0].about
    assert found["instruction"] == ["Say it well:", "User Prompt: "] and found["trigger"] == "一只小猫"
    assert (found["resolution"], found["steps"], found["images"], found["rank"]) == (512, 300, 12, 4)
    metadata = patch_sana.open_adapter(tmp_path / LORA_FILE).metadata
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"], metadata["ss_steps"]) == ("4", "8", "300")
    assert metadata["modelspec.trigger_phrase"] == "一只小猫" and metadata["modelspec.resolution"] == "512x512"
    assert read_lora(str(lora), config)[0].about == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("not json", {}),
        ("[1]", {}),
        ('{"resolution": "512", "instruction": [1]}', {}),
        ('{"resolution": 0, "instruction": null}', {"instruction": None}),
        ('{"resolution": true, "trigger": "cat", "other": 1}', {"trigger": "cat"}),
    ],
)
def test_only_sound_values_are_taken_from_a_file(text, found):
    assert read_about({"sana_kit": text}) == found
