"""Captions that are dropped, the average of the weights, the held-out loss: in this process, resumed to the bit."""

import json
import shutil

import pytest
import tiny
import torch
from helpers import adapter_weights, events, run_trainer, same
from safetensors import safe_open

FLAGS = [
    "--instance_prompt=a drawing",
    "--resolution=64",
    "--train_batch_size=2",
    "--report_to=none",
    "--learning_rate=1e-2",
    "--complex_human_instruction=none",
    "--max_train_steps=6",
    "--checkpointing_steps=3",
    "--seed=4",
    "--logging_steps=1",
    "--ema_decay=0.9",
    "--caption_dropout=0.5",
    "--validation_split=2",
    "--validation_steps=2",
]


@pytest.fixture(scope="module")
def flags(tiny_model, image_folder):
    return [f"--pretrained_model_name_or_path={tiny_model}", f"--instance_data_dir={image_folder}", *FLAGS]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    output = tmp_path_factory.mktemp("average") / "out"
    assert run_trainer(*flags, f"--output_dir={output}") == 0
    return output


def held_out(output):
    return {line["step"]: {k: line[k] for k in ("raw", "ema")} for line in events(output, "held_out")}


def test_a_resumed_run_has_the_same_average_and_held_out_losses(flags, whole, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    for name in ("checkpoint-6", "best", "raw"):
        shutil.rmtree(output / name)
    (output / "summary.json").unlink()  # as if it had been killed before its end
    assert run_trainer(*flags, f"--output_dir={output}", "--resume_from_checkpoint=latest") == 0
    for part in ("", "raw", "best", "checkpoint-6"):
        assert same(adapter_weights(whole / part), adapter_weights(output / part)), part
    assert held_out(whole) == held_out(output)
    names = ("best_loss", "best_step", "since_best")
    states = [json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text()) for folder in (whole, output)]
    assert [states[0][name] for name in names] == [states[1][name] for name in names]


def test_the_result_is_the_average_of_the_trained_weights(flags, whole, tmp_path):
    """Held against the definition: the run without an average, its weights after every update, averaged here."""
    without = [flag for flag in flags if "ema" not in flag and "checkpointing_steps" not in flag]
    assert run_trainer(*without, "--checkpointing_steps=1", f"--output_dir={tmp_path}") == 0
    steps = [adapter_weights(tmp_path / f"checkpoint-{step}") for step in range(1, 7)]
    assert same(steps[-1], adapter_weights(whole / "raw"))
    with safe_open(whole / "checkpoint-6" / "ema.safetensors", "pt") as file:
        assert all(key.endswith("|ema") for key in file.keys())
    average = None
    for step, weights in enumerate(steps, start=1):
        kept = min(0.9, (1 + step) / (10 + step))
        if average is None:  # lora_B begins at zero, lora_A at its random start, which no checkpoint holds
            average = {k: (1 - kept) * v.float() for k, v in weights.items() if "lora_B" in k}
        else:
            average = {k: kept * v + (1 - kept) * weights[k].float() for k, v in average.items()}
    found = adapter_weights(whole)
    for key, value in average.items():
        torch.testing.assert_close(found[key].float(), value, rtol=1e-4, atol=1e-6)
    assert not same(found, steps[-1])


def test_held_out_images_are_not_trained_on_and_the_loss_is_told(whole):
    (start,) = events(whole, "start")
    assert start["config"]["validation_split"] == 2
    assert sorted(held_out(whole)) == [0, 2, 4, 6]
    line = events(whole, "held_out")[-1]
    assert len(line["raw"]["bands"]) == 4 and line["raw"]["half_width"] > 0
    assert events(whole, "step")[-1]["epoch"] == pytest.approx(12 / (6 - 2))


def test_early_stopping_ends_the_run_and_a_restart_finds_it_finished(flags, tmp_path, capsys):
    """With a learning rate of 0 no measurement is lower than the first."""
    more = [*flags, "--learning_rate=0", "--early_stopping=2", "--ema_only_final", "--checkpointing_steps=1"]
    assert run_trainer(*more, f"--output_dir={tmp_path}") == 0
    (end,) = events(tmp_path, "end")
    assert end["summary"]["global_step"] == 4 and not (tmp_path / "raw").exists()
    assert run_trainer(*more, f"--output_dir={tmp_path}", "--resume_from_checkpoint=latest") == 0
    assert "this run is finished" in capsys.readouterr().err


def test_dropped_captions_change_the_loss_of_some_samples_only(flags, tmp_path):
    base = [flag for flag in flags if flag.split("=")[0] not in ("--caption_dropout", "--ema_decay")]
    base += ["--train_batch_size=1", "--learning_rate=0", "--validation_split=0"]
    losses = {}
    for share in (0, 0.5, 1):
        output = tmp_path / str(share)
        assert run_trainer(*base, f"--caption_dropout={share}", f"--output_dir={output}") == 0
        losses[share] = [line["loss"] for line in events(output, "step")]
    mixed = [loss in (kept, dropped) for loss, kept, dropped in zip(losses[0.5], losses[0], losses[1], strict=True)]
    assert all(mixed) and losses[0.5] not in (losses[0], losses[1])


def test_a_prefix_is_part_of_every_caption(flags, tmp_path):
    folder = tiny.write_image_folder(tmp_path / "images", count=3)
    more = [flag for flag in flags if "validation" not in flag and "instance_data_dir" not in flag]
    more += [f"--instance_data_dir={folder}", "--caption_prefix=TOK, ", "--max_train_steps=1"]
    assert run_trainer(*more, f"--output_dir={tmp_path / 'o'}") == 0
    with safe_open(tmp_path / "o" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["sana_kit"])["trigger"] == "TOK"
