"""A loss that is no number, and errors told at once before weights load."""

import pytest
import tiny
import torch
from helpers import adapter_weights, events
from helpers import run_trainer as run

from sana_kit.distributed import check_world_size
from sana_kit.training.recipes import loss_per_sample


@pytest.fixture
def nan_at(monkeypatch):
    """Make the loss of one call NaN."""

    def install(call):
        calls, original = [], loss_per_sample

        def poisoned(*args, **kwargs):
            calls.append(1)
            loss = original(*args, **kwargs)
            return loss * float("nan") if len(calls) == call else loss

        monkeypatch.setattr("sana_kit.training.recipes.loss_per_sample", poisoned)

    return install


def test_a_nan_loss_stops_and_names_step_images_and_checkpoint(base_flags, image_folder, tmp_path, nan_at):
    nan_at(4)
    flags = [f"--instance_data_dir={image_folder}", f"--output_dir={tmp_path}", "--max_train_steps=9"]
    with pytest.raises(FloatingPointError, match=r"loss nan at step 4, images \[\d, \d\].*checkpoint-3"):
        run(*base_flags, *flags, "--checkpointing_steps=3")
    assert "loss nan at step 4" in events(tmp_path, "warning")[-1]["message"]
    assert not (tmp_path / "pytorch_lora_weights.safetensors").exists()


def test_a_nan_loss_is_skipped_and_counted_when_asked_for(base_flags, image_folder, tmp_path, nan_at):
    nan_at(2)
    flags = [f"--instance_data_dir={image_folder}", f"--output_dir={tmp_path}", "--max_train_steps=4"]
    assert run(*base_flags, *flags, "--on_nan=skip") == 0
    assert events(tmp_path, "end")[0]["summary"]["skipped_updates"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in adapter_weights(tmp_path).values())


ERRORS = {
    "no model": (["--pretrained_model_name_or_path=/no/such/model"], "no such folder"),
    "resolution": (["--resolution=65"], "--resolution=65: must be a multiple of 8, the VAE's factor: 64 or 72"),
    "data missing": (["--dataset_name=/no/such/set", "@no-instance"], "/no/such/set"),
    "two sources": (["--instance_data_dir=@empty", "--instance_data_dir=./absent"], "no images.*absent: no such"),
    "no source": (["@no-instance"], "neither is given"),
    "optimizer": (["--optimizer=adamx"], "--optimizer=adamx: there is no such optimizer. Use one of adamw"),
    "scheduler": (["--lr_scheduler=slow"], "--lr_scheduler=slow: unknown. Use one of linear"),
    "lora layer": (["--lora_layers=to_z"], "'to_z' matches no linear.*attn1.to_q"),
    "flash attention": (["--enable_npu_flash_attention"], "needs an Ascend NPU"),
    "fp16": (["--mixed_precision=fp16"], "fp16"),
    "resume": (["--resume_from_checkpoint=checkpoint-7"], "no such folder.*Checkpoints there: none"),
    "instruction": (["--complex_human_instruction=nofile.txt"], "no such file"),
    "prior": (["--with_prior_preservation"], "--class_data_dir: needed"),
    "all held out": (["--validation_split=6"], "--validation_split=6.0: it would hold out 6 of 6 images"),
    "none held out": (["--validation_split=0.01"], "it would hold out 0 of 6 images"),
    "8 bit": (["--optimizer=came8bit"], "no maintained package has CAME with 8-bit moments"),
    "tracker": (["--report_to=mlflow"], "unknown. Use one of tensorboard"),
    "token": (["--report_to=wandb", "--hub_token=t"], "must not be given with --report_to=wandb"),
    "column": (["--caption_column=text"], "columns belong to --dataset_name"),
    "empty": (["--instance_data_dir=@empty"], "no images"),
    "corrupt": (["--instance_data_dir=@corrupt"], "bad.png"),
    "output": (["--output_dir=@file"], "is a file"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_one_clear_error_before_weights_load_and_nothing_written(
    case, base_flags, image_folder, tmp_path, monkeypatch
):

    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    for name in (
        "training.transformer.load_transformer",
        "encodings.encoders.load_vae",
        "encodings.encoders.load_text_encoder",
    ):
        monkeypatch.setattr(f"sana_kit.{name}", refuse)
    extra, message = ERRORS[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    corrupt = tiny.write_image_folder(tmp_path / "corrupt", count=2)
    (corrupt / "bad.png").write_bytes((corrupt / "image_00.png").read_bytes()[:300])
    flags = [*base_flags, f"--output_dir={tmp_path / 'out'}"]
    if "@no-instance" not in extra and not any("instance_data_dir" in flag for flag in extra):
        flags.append(f"--instance_data_dir={image_folder}")
    for flag in extra:
        for name in ("empty", "corrupt", "file"):
            flag = flag.replace(f"@{name}", str(tmp_path / name))
        flags += [flag] if flag != "@no-instance" else []
    with pytest.raises(ValueError, match=f"(?s){message}"):
        run(*flags)
    assert not (tmp_path / "out" / "train_log.jsonl").exists() or not events(tmp_path / "out", "start")
    assert not list(tmp_path.rglob("*.safetensors")) and (tmp_path / "file").read_text() == "x"


def test_all_problems_are_told_at_once(base_flags, tmp_path):
    with pytest.raises(ValueError, match="5 problem") as problem:
        run(
            *base_flags,
            "--rank=0",
            "--resolution=33",
            "--optimizer=sgd",
            "--lr_scheduler=x",
            f"--output_dir={tmp_path}",
        )
    for flag in ("--rank=0", "--resolution=33", "--optimizer=sgd", "--lr_scheduler=x", "--dataset_name"):
        assert flag in str(problem.value)


def test_a_corrupt_image_can_be_skipped(base_flags, tmp_path):
    folder = tiny.write_image_folder(tmp_path / "images", count=3)
    (folder / "image_01.png").write_bytes((folder / "image_01.png").read_bytes()[:400])
    flags = [f"--instance_data_dir={folder}", f"--output_dir={tmp_path / 'o'}", "--max_train_steps=2"]
    assert run(*base_flags, *flags, "--skip_bad_images") == 0
    assert any("image_01.png" in entry["message"] for entry in events(tmp_path / "o", "warning"))


def test_two_ranks_never_believe_that_they_are_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="launcher started 2 processes.*sees a group of 1"):
        check_world_size(1)


@pytest.mark.slow
def test_compiled_blocks_train_the_same_adapter(base_flags, image_folder, tmp_path):
    flags = [*base_flags, f"--instance_data_dir={image_folder}", "--max_train_steps=2"]
    assert run(*flags, f"--output_dir={tmp_path / 'plain'}") == 0
    assert run(*flags, f"--output_dir={tmp_path / 'compiled'}", "--compile") == 0
    plain, compiled = adapter_weights(tmp_path / "plain"), adapter_weights(tmp_path / "compiled")
    assert plain.keys() == compiled.keys()  # names as without compilation
    # bf16 rounds otherwise in a compiled block. Adam's first steps turn even a gradient of nearly nothing into a whole
    # step of the learning rate, so single weights may go the other way: direction and losses must agree.
    learnt = [torch.cat([w[key].flatten() for key in sorted(w) if "lora_B" in key]) for w in (plain, compiled)]
    assert torch.nn.functional.cosine_similarity(*learnt, dim=0) > 0.98
    losses = [events(tmp_path / name, "step")[-1]["loss"] for name in ("plain", "compiled")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
