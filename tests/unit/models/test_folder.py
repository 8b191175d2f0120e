"""Model folders: what is there, what fits, what stands for it.

python -m pytest tests/unit/models/test_folder.py
"""

import json
import shutil

import pytest
import torch
from helpers.drawing import CPU, plan

from sana_kit import devices
from sana_kit.generation.jobs import Job
from sana_kit.models.folder import (
    BASE_FILE,
    ModelFields,
    component_folder,
    component_identity,
    find_model,
    vae_geometry,
)
from sana_kit.models.loading import (
    SCHEDULERS,
    dtype_argument,
    load_pipeline,
    load_scheduler,
    load_text_encoder,
    load_transformer,
    load_vae,
    open_text_encoder,
    open_vae,
)


def copy_model(source, target, **configs):
    """A copy of a model folder whose JSON files (a/b.json as a__b) are changed."""
    shutil.copytree(source, target)
    for name, change in configs.items():
        file = target / (name.replace("__", "/") + ".json")
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    return target


def problems_of(model, **kwargs):
    found, problems = find_model(str(model), **kwargs)
    assert (found is None or problems == []) or problems
    return "\n".join(problem.text("--{}".format) for problem in problems)


def test_model_that_is_not_there_or_no_model(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    assert "no such folder" in problems_of(tmp_path / "nowhere")
    assert "is a file" in problems_of(tmp_path / "file")
    assert "model_index.json" in problems_of(tmp_path / "empty")


def test_model_of_another_pipeline_or_mixed_parts(tiny_model, tmp_path):
    other = copy_model(tiny_model, tmp_path / "a", model_index={"_class_name": "FluxPipeline"})
    assert "FluxPipeline" in problems_of(other)
    mixed = copy_model(tiny_model, tmp_path / "b", transformer__config={"in_channels": 32, "caption_channels": 2304})
    assert "32 latent channels" in problems_of(mixed) and "width 2304" in problems_of(mixed)
    sprint = copy_model(tiny_model, tmp_path / "c", transformer__config={"guidance_embeds": True})
    assert "Sprint" in problems_of(sprint)


def test_weights_that_are_missing_cut_off_or_of_other_shapes(tiny_model, tmp_path):
    missing = copy_model(tiny_model, tmp_path / "a")
    (missing / "vae/diffusion_pytorch_model.safetensors").unlink()
    cut = tmp_path / "a/text_encoder/model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    text = problems_of(missing)
    assert "diffusion_pytorch_model.safetensors" in text and "cut off" in text  # both at once
    other = copy_model(tiny_model, tmp_path / "b", transformer__config={"num_layers": 3})
    assert "transformer_blocks.2" in problems_of(other) and "missing" in problems_of(other)
    shards = copy_model(tiny_model, tmp_path / "c")
    (shards / "vae/diffusion_pytorch_model.safetensors").unlink()
    index = shards / "vae/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    assert "lacks one.safetensors, two.safetensors" in problems_of(shards)


def test_fp16_is_refused_for_a_transformer_stored_in_bf16(tiny_model, tmp_path):
    from diffusers import SanaTransformer2DModel

    stored = copy_model(tiny_model, tmp_path / "bf16")
    SanaTransformer2DModel.from_pretrained(stored / "transformer").to(torch.bfloat16).save_pretrained(
        stored / "transformer"
    )
    assert "--dtype=fp16" in problems_of(stored, dtype=torch.float16)
    assert not problems_of(stored, dtype=torch.bfloat16) and not problems_of(tiny_model, dtype=torch.float16)


def test_fingerprint_follows_the_weights_and_not_the_place(tiny_model, tmp_path):
    first = find_model(str(tiny_model))[0].fingerprint
    copied = copy_model(tiny_model, tmp_path / "copy")
    assert find_model(str(copied))[0].fingerprint == first
    weights = copied / "transformer/diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-10] ^= 1
    weights.write_bytes(data)
    assert find_model(str(copied))[0].fingerprint != first


def test_fully_fine_tuned_transformer_takes_the_rest_from_its_base(tiny_model, tmp_path):
    from diffusers import SanaTransformer2DModel

    tuned = SanaTransformer2DModel.from_pretrained(tiny_model / "transformer")
    with torch.no_grad():
        tuned.proj_out.weight.add_(0.1)
    tuned.save_pretrained(tmp_path / "out/transformer", max_shard_size="100KB")
    assert len(list((tmp_path / "out/transformer").glob("*.safetensors"))) > 1
    assert "Name it by base_model" in problems_of(tmp_path / "out")
    by_flag = load_pipeline(
        str(tmp_path / "out"), base_model=str(tiny_model), device=CPU, dtype=torch.float32, text_encoder=False
    )
    (tmp_path / "out/sana_kit_base.json").write_text(json.dumps({"base_model": str(tiny_model)}))
    for path in (tmp_path / "out", tmp_path / "out/transformer"):
        loaded = load_pipeline(str(path), device=CPU, dtype=torch.float32, text_encoder=False)
        assert torch.equal(loaded.transformer.proj_out.weight, tuned.proj_out.weight)
        assert torch.equal(loaded.vae.decoder.conv_out.weight, by_flag.vae.decoder.conv_out.weight)
    assert "needs no base" in problems_of(tiny_model, base_model=str(tiny_model))
    assert problems_of(tmp_path / "out", base_model=str(tmp_path))


def test_all_problems_of_a_load_come_at_once(tiny_model, tmp_path):
    with pytest.raises(ValueError) as error:
        load_pipeline(str(tiny_model), lora_weights=str(tmp_path / "none"), device=CPU, attention="npu_fusion")
    assert "lora_weights" in str(error.value) and "npu_fusion" in str(error.value)


def test_native_size_is_the_configs(tiny_model):
    model = find_model(str(tiny_model))[0]
    assert (model.native_size, model.vae_factor, model.pixel_multiple) == (128, 8, 8)
    assert isinstance(plan(["x"], [1])[0], Job) and devices.accelerator_type() in ("cpu", "cuda", "npu")


def full_finetune(base, folder, **note):
    """The output of a full fine-tuning of `base`, as the trainer writes it."""
    shutil.copytree(base / "transformer", folder / "transformer")
    (folder / BASE_FILE).write_text(json.dumps({"base_model": str(base), **note}))
    return folder


def test_parts_of_a_fine_tuned_model_are_those_of_its_base(tiny_model, tmp_path):
    """What encoding asks for: every part, its identity and the VAE's geometry."""
    tuned = full_finetune(tiny_model, tmp_path / "tuned")
    for part in ("vae", "text_encoder", "tokenizer"):
        assert component_folder(str(tuned), part) == tiny_model / part
        assert component_identity(str(tuned), part) == component_identity(str(tiny_model), part)
    assert component_folder(str(tuned), "transformer") == tuned / "transformer"
    assert vae_geometry(str(tuned)) == vae_geometry(str(tiny_model))
    where = {"pretrained_model_name_or_path": str(tuned), "revision": None, "variant": None, "cache_dir": None}
    assert open_vae(where, torch.float32, CPU).config.latent_channels == 4
    tokenizer, encoder = open_text_encoder(where, torch.float32, CPU)
    assert encoder.config.hidden_size == 32 and len(tokenizer("a dog").input_ids) > 1


def test_a_fine_tuning_of_a_fine_tuning_leads_to_the_first_base(tiny_model, tmp_path, monkeypatch):
    first = full_finetune(tiny_model, tmp_path / "first")
    second = full_finetune(first, tmp_path / "second")
    model, problems = find_model(str(second))
    assert problems == [] and model.base == str(tiny_model)
    assert model.transformer_folder == second / "transformer"
    (second / BASE_FILE).write_text(json.dumps({"base_model": "second"}))  # itself
    monkeypatch.chdir(tmp_path)
    assert "no model_index.json" in problems_of(second) or "base" in problems_of(second)
    (second / BASE_FILE).write_text("not json")
    assert "cannot be read" in problems_of(second)


def test_home_folders_are_expanded(tiny_model, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_model.parent))
    name = f"~/{tiny_model.name}"
    assert find_model(name)[0].base == str(tiny_model)
    assert component_folder(name, "vae") == tiny_model / "vae"
    assert "no such folder" in problems_of("~/nowhere")


def test_a_variant_that_only_some_parts_have_falls_back_part_by_part(tiny_model, tmp_path):
    """Only the transformer has fp16 files: the others are found, checked and loaded by their plain ones."""
    from diffusers import SanaTransformer2DModel

    mixed = copy_model(tiny_model, tmp_path / "mixed")
    half = SanaTransformer2DModel.from_pretrained(mixed / "transformer").to(torch.float16)
    half.save_pretrained(mixed / "transformer", variant="fp16")
    (mixed / "transformer/diffusion_pytorch_model.safetensors").unlink()
    assert "no diffusion_pytorch_model" in problems_of(mixed) and "but of variant fp16, which has" in problems_of(
        mixed
    )
    model, problems = find_model(str(mixed), variant="fp16")
    assert problems == []
    where = {"pretrained_model_name_or_path": str(mixed), "revision": None, "variant": "fp16", "cache_dir": None}
    assert open_vae(where, torch.bfloat16, CPU).dtype == torch.bfloat16
    assert open_text_encoder(where, torch.bfloat16, CPU)[1].dtype == torch.bfloat16
    loaded = load_transformer(model, device=CPU, dtype=torch.float32)
    assert torch.equal(loaded.proj_out.weight, half.proj_out.weight.float())


def test_weights_stored_in_fp16_are_told(tiny_model, tmp_path):
    from diffusers import AutoencoderDC, SanaTransformer2DModel

    stored = copy_model(tiny_model, tmp_path / "fp16")
    for part, part_class in (("transformer", SanaTransformer2DModel), ("vae", AutoencoderDC)):
        part_class.from_pretrained(stored / part).to(torch.float16).save_pretrained(stored / part)
    model, problems = find_model(str(stored))
    assert problems == [] and len(model.notes) == 2
    assert "transformer" in model.notes[0] and "stored in fp16 and runs in bf16" in model.notes[0]
    assert "VAE" in model.notes[1] and "overflows; it runs in bf16" in model.notes[1]
    assert len(find_model(str(stored), dtype=torch.float16)[0].notes) == 1  # the transformer as it is stored
    assert find_model(str(tiny_model))[0].notes == []


def test_problems_name_the_settings_of_the_caller(tiny_model, tmp_path):
    """Once they were rewritten by replacing words, in paths too."""
    from diffusers import SanaTransformer2DModel

    stored = copy_model(tiny_model, tmp_path / "fp32-copy")
    weights = SanaTransformer2DModel.from_pretrained(stored / "transformer").to(torch.bfloat16)
    weights.save_pretrained(stored / "transformer")
    fields = ModelFields(model="pretrained_model_name_or_path", base=None, dtype="mixed_precision", full="no")
    text = problems_of(stored, dtype=torch.float16, fields=fields)
    assert "--mixed_precision=fp16: " in text and "Use bf16 or no." in text and "fp32-copy" in text
    assert "--pretrained_model_name_or_path=" in problems_of(tmp_path / "none", fields=fields)
    assert "base_model" not in problems_of(stored / "transformer", fields=fields).replace(BASE_FILE, "")


def test_the_dtype_argument_follows_the_version(monkeypatch):
    installed = {}
    monkeypatch.setattr("importlib.metadata.version", installed.get)
    for library, version, name in (
        ("diffusers", "0.33.1", "torch_dtype"),
        ("diffusers", "0.42.0.dev0", "dtype"),
        ("diffusers", "0.42.1", "dtype"),
        ("transformers", "4.47.1", "torch_dtype"),
        ("transformers", "5.24.0", "dtype"),
    ):
        installed[library] = version
        assert dtype_argument(library, torch.float32) == {name: torch.float32}


@pytest.mark.filterwarnings("error")
def test_loading_warns_of_nothing(tiny_model):
    model = find_model(str(tiny_model))[0]
    for load in (load_transformer, load_vae, load_text_encoder):
        load(model, device=CPU, dtype=torch.float32)


def test_schedulers_by_name_take_the_checkpoints_shift(tiny_model):
    model = find_model(str(tiny_model))[0]
    own, dpm, euler = (load_scheduler(model, name) for name in SCHEDULERS)
    assert type(own) is type(dpm) and own.config.flow_shift == dpm.config.flow_shift == 3.0
    own.set_timesteps(5), dpm.set_timesteps(5)
    assert torch.equal(own.timesteps, dpm.timesteps) and torch.equal(own.sigmas, dpm.sigmas)
    assert type(euler).__name__ == "FlowMatchEulerDiscreteScheduler" and euler.config.shift == 3.0
