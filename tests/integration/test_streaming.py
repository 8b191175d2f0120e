"""Runs that read shards as they go (--streaming), through main(): resumed to the bit, within the disk's limit."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from helpers import adapter_weights, events, run_trainer, same
from helpers.runs import as_it_was_at
from helpers.shards import write_parquet, write_shards
from safetensors.torch import load_file

from sana_kit.encodings.store import ShardWriter
from sana_kit.encodings.streamed import StreamedDataset
from sana_kit.errors import UserError
from sana_kit.training.checkpoint_folders import read_state

# What an image of 64 px and a caption of 20 tokens can take at most, in the tiny model: RowBytes.row.
ROW = 4 * 8 * 8 * 2 + 20 * 32 * 2 + 2 * 1024


@pytest.fixture(scope="module")
def flags(tiny_model, tmp_path_factory):
    """Three tar shards of 5, 9 and 4 images in windows of 6; 8 updates of 2 images end in the third window."""
    folder = write_shards(tmp_path_factory.mktemp("stream") / "shards", [5, 9, 4])
    return [
        f"--pretrained_model_name_or_path={tiny_model}", "--streaming", f"--dataset_name={folder}",
        "--caption_column=txt", "--stream_window=6", "--resolution=64", "--train_batch_size=2", "--max_train_steps=8",
        "--checkpointing_steps=2", "--logging_steps=1", "--seed=4", "--report_to=none", "--mixed_precision=bf16",
        "--learning_rate=1e-2", "--complex_human_instruction=none", "--max_sequence_length=20", "--lora_dropout=0.2",
        "--random_flip", "--caption_dropout=0.2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "out"
    assert run_trainer(*flags, f"--output_dir={output}") == 0
    return output


def with_data(flags, *data):
    """The same run on other shards."""
    return [flag for flag in flags if not flag.startswith(("--dataset_name", "--caption_column"))] + list(data)


def problems(*flags):
    with pytest.raises(UserError) as error:
        run_trainer(*flags)
    return str(error.value)


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_resume_is_the_run_to_the_bit_from_within_a_window_and_from_its_end(flags, whole, step, tmp_path):
    """After 2 updates the first window has two images left, after 6 the next one begins; another disk's limit, too."""
    half = as_it_was_at(whole, step, tmp_path)
    shutil.rmtree(half / "encodings")
    more = ["--encodings_disk_gb=1", "--resume_from_checkpoint=latest"]
    assert run_trainer(*flags, f"--output_dir={half}", *more) == 0
    assert same(adapter_weights(whole), adapter_weights(half))
    file = "checkpoint-8/optimizer.safetensors"
    assert same(load_file(whole / file), load_file(half / file))
    assert read_state(whole / "checkpoint-8")["stream"] == read_state(half / "checkpoint-8")["stream"]
    assert not same(adapter_weights(whole / "checkpoint-2"), adapter_weights(whole))


def test_the_disk_never_holds_more_than_the_limit_and_windows_that_are_behind_are_gone(flags, tmp_path, monkeypatch):
    limit = 6 * (2 * ROW + 400_000)
    sizes, folders = [], []
    read, save, unlink = StreamedDataset._encode_next, ShardWriter.flush, Path.unlink

    def counted(way):
        """Count what is there before and after: shards are written, images that were read removed."""

        def call(it, *more, **words):
            sizes.append(sum(path.stat().st_size for path in (tmp_path / "o").rglob("stream/**/*") if path.is_file()))
            way(it, *more, **words)
            sizes.append(sum(path.stat().st_size for path in (tmp_path / "o").rglob("stream/**/*") if path.is_file()))

        return call

    def watch(self):
        read(self)
        folders.append(sorted(path.name.rpartition("-")[2] for path in self.root.iterdir() if path.is_dir()))

    monkeypatch.setattr(StreamedDataset, "_encode_next", watch)
    monkeypatch.setattr(ShardWriter, "flush", counted(save))
    monkeypatch.setattr(Path, "unlink", counted(unlink))
    more = [f"--encodings_disk_gb={limit / 1e9:.9f}", f"--output_dir={tmp_path / 'o'}"]
    assert run_trainer(*flags, *more) == 0
    assert 0 < max(sizes) <= limit
    assert folders == [["00000000", "prompts"], ["00000001", "prompts"], ["00000002", "prompts"]]


def test_too_small_a_disk_is_told_with_the_window_that_fits(flags, tmp_path):
    told = problems(*flags, f"--output_dir={tmp_path}", f"--encodings_disk_gb={4 * (2 * ROW + 400_000) / 1e9:.6f}")
    assert "encodings_disk_gb" in told and "--stream_window=4" in told


def test_parquet_shards_of_several_captions_train_to_the_bit_too(flags, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(2):
        rows = range(5 * number, 5 * number + 5)
        write_parquet(folder / f"train-{number}.parquet", rows, short=[f"{n}" for n in rows])
    more = with_data(flags, f"--dataset_name={folder}", "--caption_column=text:3,short:1", "--crop_seed=3")
    more += ["--max_train_steps=6", "--validation_prompt=drawing 1", "--num_validation_images=1"]
    more += ["--validation_inference_steps=2", "--validation_steps=3"]
    assert run_trainer(*more, f"--output_dir={tmp_path / 'o'}") == 0
    assert [event["step"] for event in events(tmp_path / "o", "validation")] == [0, 3, 6]
    assert any("memorisation: not looked for" in str(event) for event in events(tmp_path / "o", "warning"))
    half = as_it_was_at(tmp_path / "o", 4, tmp_path)
    assert run_trainer(*more, f"--output_dir={half}", "--resume_from_checkpoint=latest") == 0
    assert same(adapter_weights(tmp_path / "o"), adapter_weights(half))


def test_a_signal_while_a_window_is_encoded_leaves_a_checkpoint_that_goes_on_to_the_bit(
    flags, whole, tmp_path, monkeypatch
):
    read, calls = StreamedDataset._encode_next, []

    def interrupt(self):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        read(self)

    monkeypatch.setattr(StreamedDataset, "_encode_next", interrupt)
    more = [*flags, "--checkpointing_steps=100", f"--output_dir={tmp_path / 'o'}"]
    assert run_trainer(*more) == 143
    monkeypatch.undo()
    assert (tmp_path / "o" / "checkpoint-3").is_dir()
    assert run_trainer(*more, "--resume_from_checkpoint=latest") == 0
    assert same(adapter_weights(whole), adapter_weights(tmp_path / "o"))


def test_another_stream_is_no_place_to_go_on(flags, whole, tmp_path):
    half = as_it_was_at(whole, 4, tmp_path)
    go_on = [*flags, f"--output_dir={half}", "--resume_from_checkpoint=latest"]
    assert "Give --stream_window=6" in problems(*go_on, "--stream_window=7")
    assert "Give --seed=4" in problems(*go_on, "--seed=5")
    other = write_shards(tmp_path / "other", [5, 9])
    assert "the shards are other ones" in problems(
        *with_data(go_on, f"--dataset_name={other}", "--caption_column=txt")
    )
    state = json.loads((half / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["stream"]["window"] == 1 and len(state["stream"]["lanes"]) == 3


def test_what_does_not_go_with_a_stream_is_refused_by_name_all_at_once(flags, tmp_path):
    plain = [flag for flag in flags if not flag.startswith("--max_train_steps")]
    told = problems(
        *plain, f"--output_dir={tmp_path}", "--aspect_ratio_buckets", "--crops_per_image=2", "--validation_split=0.1",
        "--repeats=2", "--mask_column=m", "--dataloader_num_workers=1", "--validation_epochs=2",
        "--with_prior_preservation", "--class_data_dir=x", "--class_prompt=x", f"--instance_data_dir={tmp_path}",
        "--train_mode=controlnet", "--control_edges",
    )  # fmt: skip
    for name in (
        "aspect_ratio_buckets", "crops_per_image", "validation_split", "repeats", "mask_column", "train_mode",
        "dataloader_num_workers", "validation_epochs", "with_prior_preservation", "instance_data_dir",
        "max_train_steps",
    ):  # fmt: skip
        assert any(name in line and "streaming" in line for line in told.split("\n")), (name, told)
    alone = [flag for flag in flags if flag != "--streaming"]
    assert "stream_window=6: has no effect without --streaming" in problems(*alone, f"--output_dir={tmp_path}")
    told = problems(*flags, f"--output_dir={tmp_path}", "--train_batch_size=7")
    assert "an update takes 7 images, more than a window of 6" in told
