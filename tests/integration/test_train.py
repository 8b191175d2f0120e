"""The trainer, run as `main()` in this process on a tiny model: data sources, log, results, full fine-tuning.

Several processes and DeepSpeed are launched for real in tests/distributed/test_engines.py.
"""

import functools
import json
import shutil

import pytest
import tiny
import torch
import yaml
from helpers import adapter_weights, events, same
from helpers import run_trainer as run
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from sana_kit.models.folder import find_model
from sana_kit.training.config import parse_args
from sana_kit.training.recomputation import ActivationBytes, count_run_step, held_bytes


def test_a_parquet_data_set_trains_an_adapter_that_the_pipeline_takes(
    base_flags, tiny_model, parquet_dataset, tmp_path, capsys
):
    code = run(
        *base_flags,
        f"--dataset_name={parquet_dataset}",
        "--caption_column=text",
        f"--output_dir={tmp_path}",
        "--max_train_steps=4",
        "--rank=3",
        "--lora_alpha=6",
    )
    assert code == 0
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", framework="pt") as handle:
        keys, metadata = list(handle.keys()), handle.metadata()
    assert keys and all(key.startswith("transformer.") for key in keys)
    settings = json.loads(metadata["lora_adapter_metadata"])
    assert settings["transformer.r"] == 3 and settings["transformer.lora_alpha"] == 6
    assert metadata["ss_sd_model_hash"] == json.loads(metadata["sana_base_model"])["sha256"]

    from diffusers import SanaPipeline

    pipeline = SanaPipeline.from_pretrained(tiny_model)
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 5, 32),
        "timestep": torch.tensor([500.0]),
        "return_dict": False,
    }
    before = pipeline.transformer(**inputs)[0]
    pipeline.load_lora_weights(str(tmp_path))
    after = pipeline.transformer(**inputs)[0]
    assert not torch.allclose(before, after)
    from diffusers.loaders import lora_base

    # diffusers before 0.34 reads no metadata and takes the rank; the trainer warns of it.
    reads_alpha = hasattr(lora_base, "LORA_ADAPTER_METADATA_KEY")
    assert pipeline.transformer.peft_config["default_0"].lora_alpha == (6 if reads_alpha else 3)
    assert reads_alpha or "ignores lora_alpha 6" in capsys.readouterr().err


def test_a_parquet_folder_without_infos_and_readme_gives_the_same_adapter(base_flags, parquet_dataset, tmp_path):
    bare = tmp_path / "bare"
    (bare / "data").mkdir(parents=True)
    shutil.copy(parquet_dataset / "data" / "train-001.parquet", bare / "data")
    for name, source in (("a", parquet_dataset), ("b", bare)):
        flags = [f"--dataset_name={source}", "--caption_column=text", f"--output_dir={tmp_path / name}"]
        assert run(*base_flags, *flags, "--max_train_steps=2") == 0
    assert same(adapter_weights(tmp_path / "a"), adapter_weights(tmp_path / "b"))


def test_an_imagefolder_with_metadata(base_flags, tmp_path):
    folder = tmp_path / "imagefolder"
    folder.mkdir()
    with open(folder / "metadata.jsonl", "w") as file:
        for index, (image, caption) in enumerate(tiny.make_images(3)):
            image.save(folder / f"{index}.png")
            file.write(json.dumps({"file_name": f"{index}.png", "description": caption}) + "\n")
    flags = [f"--dataset_name={folder}", "--caption_column=description", f"--output_dir={tmp_path / 'o'}"]
    assert run(*base_flags, *flags, "--max_train_steps=2") == 0
    assert adapter_weights(tmp_path / "o")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_instance_prompt_alone_works_at_every_batch_size(base_flags, tmp_path, batch_size):
    folder = tiny.write_image_folder(tmp_path / "images", captions=False)
    (folder / "notes.pdf").write_text("not an image")
    flags = [f"--instance_data_dir={folder}", f"--output_dir={tmp_path / 'o'}", f"--train_batch_size={batch_size}"]
    assert run(*base_flags, *flags, "--max_train_steps=2", "--random_flip", "--repeats=2") == 0
    assert events(tmp_path / "o", "end")[0]["summary"]["batch_size"] == batch_size


def test_prior_preservation_generates_class_images_and_adds_their_loss(base_flags, image_folder, tmp_path):
    flags = [
        *base_flags,
        f"--instance_data_dir={image_folder}",
        "--with_prior_preservation",
        f"--class_data_dir={tmp_path / 'class'}",
        "--class_prompt=a square",
        "--num_class_images=3",
        "--validation_inference_steps=2",
        "--max_train_steps=2",
        "--learning_rate=0",
    ]
    losses = {}
    for weight in (0.0, 1.0, 2.0):
        output = tmp_path / f"o{weight}"
        assert run(*flags, f"--prior_loss_weight={weight}", f"--output_dir={output}") == 0
        losses[weight] = events(output, "step")[-1]["loss"]
    made = sorted((tmp_path / "class").glob("*.png"))
    assert len(made) == 3 and all(Image.open(path).size == (64, 64) for path in made)
    prior = losses[1.0] - losses[0.0]
    assert prior > 0.1
    assert losses[2.0] - losses[0.0] == pytest.approx(2 * prior, rel=1e-3)


def test_log_summary_and_validation_images(six_steps):
    output, _ = six_steps
    steps = events(output, "step")
    assert [e["step"] for e in steps] == [1, 2, 3, 4, 5, 6]
    for entry in steps:
        assert entry["loss"] > 0 and entry["images_per_second"] > 0 and entry["peak_memory_bytes"] > 1e6
    assert steps[0]["learning_rate"] == pytest.approx(5e-3)  # two steps of warm-up: the rate of the step to come
    assert steps[1]["learning_rate"] == pytest.approx(1e-2)
    assert steps[-1]["learning_rate"] == pytest.approx(0.0, abs=1e-9)
    shown = events(output, "validation")
    assert [e["step"] for e in shown] == [0, 3, 6]
    for entry in shown:
        assert entry["prompts"] == ["a red square", "a blue square"]
        for file in entry["files"]:
            assert Image.open(output / file).size == (64, 64)
    first, last = ((output / entry["files"][0]).read_bytes() for entry in (shown[0], shown[-1]))
    assert first != last  # the live weights drew them
    summary = json.loads((output / "summary.json").read_text())
    assert summary["global_step"] == 6 and summary["final_loss"] == steps[-1]["loss"]
    assert summary["images_per_second"] > 0 and summary["duration_seconds"] > 0
    memorised = summary["memorisation"]  # of an untrained model's noise nothing is a copy
    assert (memorised["images"], memorised["copies"], memorised["training_crops"]) == (2, 0, 6)
    assert {row["file"] for row in memorised["rows"]} == set(shown[-1]["files"])
    assert all(Image.open(output / row["nearest"]).size == (80, 80) for row in memorised["rows"])
    assert "<h2>Nearest training images</h2>" in (output / "report.html").read_text()
    phases = ["imports", "checks", "processes", "images and encodings", "transformer", "engine, checkpoint"]
    assert list(summary["start_seconds"]) == [*phases, "first validation", "first step"]
    assert 0 < sum(summary["start_seconds"].values()) <= summary["duration_seconds"]
    assert (output / "report.html").stat().st_size > 10_000
    assert list((output / "logs").rglob("events.out.tfevents*"))


def test_a_spike_within_an_interval_is_in_the_log(six_steps, tmp_path):
    """Three losses a line: their mean, and the largest, which the mean would hide."""

    def steps(output):
        lines = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
        return [line for line in lines if line["event"] == "step"]

    output, flags = six_steps
    single = [line["loss"] for line in steps(output)]
    store = f"--encodings_dir={output / 'encodings'}"
    assert run(*flags, f"--output_dir={tmp_path / 'out'}", store, "--logging_steps=3") == 0
    for line, losses in zip(steps(tmp_path / "out"), (single[:3], single[3:]), strict=True):
        assert line["loss"] == pytest.approx(sum(losses) / 3) and line["loss_max"] == pytest.approx(max(losses))
        assert line["loss_max"] > line["loss"]


def test_no_secret_in_anything_written(six_steps):
    output, _ = six_steps
    for path in output.rglob("*"):
        if path.is_file():
            assert b"hf_secretsecretsecret" not in path.read_bytes(), path


def test_a_second_start_loads_neither_vae_nor_text_encoder(six_steps, tmp_path, monkeypatch):
    output, flags = six_steps

    def refuse(*args, **kwargs):
        raise AssertionError("loaded again")

    monkeypatch.setattr("sana_kit.encodings.encoders.load_vae", refuse)
    monkeypatch.setattr("sana_kit.encodings.encoders.load_text_encoder", refuse)
    warm = [flag for flag in flags if not flag.startswith("--validation")]
    assert run(*warm, f"--output_dir={tmp_path}", f"--encodings_dir={output / 'encodings'}") == 0
    assert same(
        adapter_weights(output), adapter_weights(tmp_path)
    )  # and validation changed nothing about the training
    with pytest.raises(AssertionError, match="loaded again"):
        run(*warm, f"--output_dir={tmp_path / 'o'}", f"--encodings_dir={output / 'encodings'}", "--resolution=56")


def test_the_final_adapter_in_float32(six_steps, base_flags, image_folder, tmp_path):
    flags = [*base_flags, f"--instance_data_dir={image_folder}", "--max_train_steps=2", f"--output_dir={tmp_path}"]
    assert run(*flags, "--upcast_before_saving") == 0
    assert {tensor.dtype for tensor in adapter_weights(tmp_path).values()} == {torch.float32}


def test_recomputed_blocks_change_no_bit(base_flags, image_folder, tiny_model, tmp_path):
    """All blocks, every second one, and what a budget chooses, which run.yaml then has in its place."""
    config = parse_args(base_flags)
    model, _ = find_model(str(tiny_model))
    blocks, every_second = model.transformer_config["num_layers"], ["--gradient_checkpointing_interval=2"]
    count = functools.partial(count_run_step, config, model, side=64 // model.vae_factor, tokens=300)
    all_recomputed = ActivationBytes.counted(lambda interval: count(interval=interval), blocks).peak(1)
    held = held_bytes(config, model, 1)
    if config.mixed_precision != "bf16":
        held["weights"] *= 2
    budget = sum(held.values()) + config.train_batch_size * all_recomputed + 2
    results = []
    for index, extra in enumerate(
        ([], [f"--memory_budget={budget / 1e9:.12f}"], ["--gradient_checkpointing", *every_second])
    ):
        output = tmp_path / str(index)
        flags = [f"--instance_data_dir={image_folder}", f"--output_dir={output}", "--max_train_steps=2"]
        assert run(*base_flags, *flags, *extra) == 0
        results.append(adapter_weights(output))
    assert same(results[0], results[1]) and same(results[0], results[2])
    settings = yaml.safe_load((tmp_path / "1" / "run.yaml").read_text())
    assert settings["gradient_checkpointing"] and settings["gradient_checkpointing_interval"] == 1
    assert "memory_budget" not in settings


def test_lora_layers_choose_the_trained_layers(base_flags, image_folder, tmp_path):
    flags = [f"--instance_data_dir={image_folder}", f"--output_dir={tmp_path}", "--max_train_steps=1"]
    assert run(*base_flags, *flags, "--lora_layers=attn2.to_q,ff.conv_point") == 0
    layers = {key.split(".lora")[0].split(".", 3)[3] for key in adapter_weights(tmp_path)}
    assert layers == {"attn2.to_q", "ff.conv_point"}


def test_full_fine_tuning_resumes_to_the_bit_and_its_folder_is_a_model(base_flags, image_folder, tmp_path):

    flags = [
        *base_flags,
        f"--instance_data_dir={image_folder}",
        "--train_mode=full",
        "--max_train_steps=4",
        "--checkpointing_steps=2",
        "--learning_rate=1e-3",
    ]
    assert run(*flags, f"--output_dir={tmp_path / 'a'}") == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoint-4")
    shutil.rmtree(tmp_path / "b" / "transformer")
    assert run(*flags, f"--output_dir={tmp_path / 'b'}", "--resume_from_checkpoint=latest") == 0
    trained, resumed = (
        load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors") for name in "ab"
    )
    assert same(trained, resumed) and {t.dtype for t in trained.values()} == {torch.bfloat16}
    model, problems = find_model(str(tmp_path / "a"))
    assert not problems and model.transformer_folder == tmp_path / "a" / "transformer"
