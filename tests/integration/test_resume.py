"""Resume to the bit, and what a checkpoint holds, of a run of six steps with everything random switched on."""

import errno
import json
import os
import shutil

import pytest
import torch
from helpers import adapter_weights, events, same
from helpers import run_trainer as run
from safetensors.torch import load_file

from sana_kit import devices
from sana_kit.errors import CheckpointError
from sana_kit.locks import lock_folder
from sana_kit.models.lora_layers import DEFAULT_LORA_LAYERS
from sana_kit.training import checkpoint_folders, checkpoints
from sana_kit.training.state import pack_random_state


def copy_until(output, tmp_path, step=3):
    """A copy of a run as it was when checkpoint-`step` was its newest."""
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    for number, folder in checkpoints.list_checkpoints(copy):
        if number > step:
            shutil.rmtree(folder)
    (copy / "pytorch_lora_weights.safetensors").unlink()
    return copy


def test_three_steps_and_three_more_are_six_steps_to_the_bit(six_steps, tmp_path):
    output, flags = six_steps
    copy = copy_until(output, tmp_path)
    assert run(*flags, f"--output_dir={copy}", "--resume_from_checkpoint=latest", "--dataloader_num_workers=1") == 0
    assert same(adapter_weights(output), adapter_weights(copy))
    for name in ("optimizer.safetensors", "pytorch_lora_weights.safetensors"):
        assert same(load_file(output / "checkpoint-6" / name), load_file(copy / "checkpoint-6" / name))
    before = {e["step"]: e["loss"] for e in events(output, "step")}
    after = {e["step"]: e["loss"] for e in events(copy, "step")[-3:]}
    assert after == {step: before[step] for step in (4, 5, 6)}
    assert [e["event"] for e in events(copy) if e["event"] in ("start", "resume", "end")] == [
        "start",
        "end",
        "resume",
        "end",
    ]


def test_without_the_saved_random_state_a_resume_would_differ(six_steps, tmp_path, monkeypatch):
    """The test above can fail: dropout really draws from the restored state."""
    output, flags = six_steps
    copy = copy_until(output, tmp_path)
    monkeypatch.setattr(devices, "set_random_state", lambda state, device: devices.seed_everything(1))
    assert run(*flags, f"--output_dir={copy}", "--resume_from_checkpoint=checkpoint-3") == 0
    assert not same(adapter_weights(output), adapter_weights(copy))


def test_a_checkpoint_holds_what_it_should_and_nothing_of_the_base(six_steps):
    output, _ = six_steps
    folder = output / "checkpoint-3"
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "optimizer.safetensors",
        "pytorch_lora_weights.safetensors",
        "random_states.pt",
        "trainer_state.json",
    ]
    assert checkpoints.find_damage(folder) is None
    names = {key.split("|")[0] for key in load_file(folder / "optimizer.safetensors")}
    assert names and all("lora_" in name for name in names)
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == 3 and state["samples_seen"] == 12 and state["seed"] == 5


def test_a_checkpoint_of_the_1600m_model_at_rank_4_is_at_most_40_mb(tmp_path):
    """From the real model's tensor sizes: adapter in bf16, masters and two moments in float32, as ZeRO-2 writes
    them.
    """
    from diffusers import SanaTransformer2DModel
    from peft import LoraConfig
    from safetensors.torch import save_file

    with torch.device("meta"):
        model = SanaTransformer2DModel(sample_size=32, interpolation_scale=None)
    model.add_adapter(LoraConfig(r=4, target_modules=list(DEFAULT_LORA_LAYERS)))
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert sum(p.numel() for _, p in trainable) == 2_150_400 and len(trainable) == 240
    save_file({f"transformer.{n}": torch.zeros(p.shape, dtype=torch.bfloat16) for n, p in trainable}, tmp_path / "a")
    optimizer = {
        f"{n}|{part}": torch.zeros(p.shape) for n, p in trainable for part in ("master", "exp_avg", "exp_avg_sq")
    }
    save_file(optimizer, tmp_path / "b")
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 29e6 < size < 31e6  # and the random states of 8 ranks below, 15 KB each: well under 40 MB
    state = pack_random_state(devices.random_state(torch.device("cpu")))
    torch.save({"world_size": 8, "states": [state] * 8}, tmp_path / "c")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 40e6


def test_others_may_read_what_the_umask_lets_them(six_steps):
    """Colleagues and other machines draw with the adapter and resume from the checkpoints."""
    output, _ = six_steps
    mask = os.umask(0)
    os.umask(mask)
    files = [path for path in output.rglob("*") if path.is_file()]
    assert len(files) > 15 and {path.suffix for path in files} >= {".safetensors", ".json", ".pt", ".png", ".html"}
    assert [
        (str(path), oct(path.stat().st_mode)) for path in files if path.stat().st_mode & 0o777 != 0o666 & ~mask
    ] == []


def test_old_checkpoints_go_only_after_the_new_one_is_whole(base_flags, image_folder, tmp_path, monkeypatch):
    flags = [
        *base_flags,
        f"--instance_data_dir={image_folder}",
        f"--output_dir={tmp_path}",
        "--checkpointing_steps=1",
        "--checkpoints_total_limit=2",
        "--max_train_steps=4",
    ]
    assert run(*flags) == 0
    assert [step for step, _ in checkpoints.list_checkpoints(tmp_path)] == [3, 4]

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sana_kit.training.shares._header", full)
    with pytest.raises(CheckpointError, match="No space left.*checkpoint-3, checkpoint-4.*Free space"):
        run(*flags, "--max_train_steps=6", "--resume_from_checkpoint=latest")
    assert [step for step, _ in checkpoints.list_checkpoints(tmp_path)] == [3, 4]
    assert all(checkpoints.find_damage(folder) is None for _, folder in checkpoints.list_checkpoints(tmp_path))
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "no manifest"])
def test_latest_names_and_skips_a_damaged_checkpoint(six_steps, tmp_path, damage):
    output, flags = six_steps
    for step in (3, 6):
        shutil.copytree(output / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    target = tmp_path / "checkpoint-6" / "optimizer.safetensors"
    data = target.read_bytes()
    if damage == "cut":
        target.write_bytes(data[:-7])
    elif damage == "changed":
        target.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "missing":
        target.unlink()
    else:
        (tmp_path / "checkpoint-6" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="--resume_from_checkpoint=checkpoint-6.*not a whole checkpoint"):
        run(*flags, f"--output_dir={tmp_path}", "--resume_from_checkpoint=checkpoint-6")
    assert (tmp_path / "checkpoint-6").is_dir()  # an error changes nothing
    folder, notes = checkpoint_folders.find_checkpoint(tmp_path, "latest")
    assert folder.name == "checkpoint-3" and len(notes) == 1 and "checkpoint-6 is damaged" in notes[0]
    assert (tmp_path / "checkpoint-6.damaged").is_dir()


def test_an_adapter_that_is_not_of_its_masters_is_refused(six_steps, tmp_path):
    output, flags = six_steps
    copy = copy_until(output, tmp_path)
    shutil.copy(
        output / "checkpoint-6" / "pytorch_lora_weights.safetensors",
        copy / "checkpoint-3" / "pytorch_lora_weights.safetensors",
    )
    checkpoint_folders.write_manifest(copy / "checkpoint-3")
    with pytest.raises(ValueError, match="differ from the float32 masters"):
        run(*flags, f"--output_dir={copy}", "--resume_from_checkpoint=latest")


@pytest.mark.parametrize("flag, words", [("--rank=2", "rank"), ("--lora_layers=to_k", "lora_layers")])
def test_a_checkpoint_of_another_adapter_is_refused(six_steps, tmp_path, flag, words):
    output, flags = six_steps
    copy = copy_until(output, tmp_path)
    with pytest.raises(ValueError, match=words):
        run(*flags, f"--output_dir={copy}", "--resume_from_checkpoint=latest", flag)


def test_the_output_folder_belongs_to_one_live_run(base_flags, image_folder, tmp_path):
    with lock_folder(tmp_path), pytest.raises(ValueError, match="another live run is writing there"):
        run(*base_flags, f"--instance_data_dir={image_folder}", f"--output_dir={tmp_path}")
    assert run(*base_flags, f"--instance_data_dir={image_folder}", f"--output_dir={tmp_path}") == 0
