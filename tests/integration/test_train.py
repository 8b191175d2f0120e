"""The trainer, run as `main()` in this process on a tiny model: data sources, resume, checkpoints, logs, errors.

Several processes and DeepSpeed are launched for real in tests/distributed/test_engines.py.
"""

import errno
import functools
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from helpers import run_trainer as run
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from sana_kit import devices
from sana_kit.distributed import check_world_size
from sana_kit.errors import CheckpointError
from sana_kit.flags import make_parser
from sana_kit.locks import lock_folder
from sana_kit.models.attention import LinearAttentionProcessor, set_attention
from sana_kit.models.folder import find_model
from sana_kit.models.lora_layers import DEFAULT_LORA_LAYERS
from sana_kit.training import checkpoint_folders, checkpoints
from sana_kit.training.config import TrainConfig, parse_args
from sana_kit.training.order import PermutationOrder
from sana_kit.training.recipes import FlowMatching, loss_per_sample
from sana_kit.training.recomputation import ActivationBytes, count_run_step, held_bytes
from sana_kit.training.state import pack_random_state
from sana_kit.training.stream import SampleStream, StreamBatchSampler, collate

# Name and default of every flag of diffusers' examples/dreambooth/train_dreambooth_lora_sana.py, August 2026.
UPSTREAM_FLAGS = {
    "pretrained_model_name_or_path": None,
    "revision": None,
    "variant": None,
    "dataset_name": None,
    "dataset_config_name": None,
    "instance_data_dir": None,
    "cache_dir": None,
    "image_column": "image",
    "caption_column": None,
    "repeats": 1,
    "class_data_dir": None,
    "instance_prompt": None,
    "class_prompt": None,
    "max_sequence_length": 300,
    "complex_human_instruction": None,
    "validation_prompt": None,
    "num_validation_images": 4,
    "validation_epochs": 50,
    "rank": 4,
    "lora_alpha": 4,
    "lora_dropout": 0.0,
    "with_prior_preservation": False,
    "prior_loss_weight": 1.0,
    "num_class_images": 100,
    "output_dir": "sana-dreambooth-lora",
    "seed": None,
    "resolution": 512,
    "center_crop": False,
    "random_flip": False,
    "train_batch_size": 4,
    "sample_batch_size": 4,
    "num_train_epochs": 1,
    "max_train_steps": None,
    "checkpointing_steps": 500,
    "checkpoints_total_limit": None,
    "resume_from_checkpoint": None,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "learning_rate": 0.0001,
    "scale_lr": False,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "lr_num_cycles": 1,
    "lr_power": 1.0,
    "dataloader_num_workers": 0,
    "weighting_scheme": "none",
    "logit_mean": 0.0,
    "logit_std": 1.0,
    "mode_scale": 1.29,
    "optimizer": "AdamW",
    "use_8bit_adam": False,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "prodigy_beta3": None,
    "prodigy_decouple": True,
    "adam_weight_decay": 0.0001,
    "adam_weight_decay_text_encoder": 0.001,
    "lora_layers": None,
    "adam_epsilon": 1e-08,
    "prodigy_use_bias_correction": True,
    "prodigy_safeguard_warmup": True,
    "max_grad_norm": 1.0,
    "push_to_hub": False,
    "hub_token": None,
    "hub_model_id": None,
    "logging_dir": "logs",
    "allow_tf32": False,
    "cache_latents": False,
    "report_to": "tensorboard",
    "mixed_precision": None,
    "upcast_before_saving": False,
    "offload": False,
    "local_rank": -1,
    "enable_vae_tiling": False,
    "enable_npu_flash_attention": False,
}
# README.md says why these differ.
OTHER_DEFAULTS = {"lora_alpha": None, "complex_human_instruction": "default"}


@pytest.fixture
def base_flags(tiny_model):
    """Flags of a short run; a data source and --output_dir are still needed."""
    return [
        f"--pretrained_model_name_or_path={tiny_model}",
        "--instance_prompt=a drawing",
        "--resolution=64",
        "--train_batch_size=2",
        "--logging_steps=2",
        "--seed=0",
        "--mixed_precision=bf16",
        "--report_to=none",
        "--learning_rate=1e-2",
        "--complex_human_instruction=none",
    ]


def events(output_dir, kind=None):
    lines = [json.loads(line) for line in (Path(output_dir) / "train_log.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["event"])]


def weights(folder):
    return load_file(Path(folder) / "pytorch_lora_weights.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def test_every_upstream_flag_is_there_with_its_default():
    ours = {action.dest: action.default for action in make_parser(TrainConfig, "")._actions}
    assert len(UPSTREAM_FLAGS) == 75
    for name, default in {**UPSTREAM_FLAGS, **OTHER_DEFAULTS}.items():
        assert name in ours, name
        assert ours[name] == default, (name, ours[name], default)


def test_help_groups_the_flags_and_a_misspelt_one_is_corrected(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = capsys.readouterr().out
    for heading in ("model:", "data:", "flow matching:", "optimizer:", "checkpoints and output:", "validation:"):
        assert f"\n{heading}\n" in text
    with pytest.raises(SystemExit) as stop:
        parse_args(["--pretrained_model_name_or_path=x", "--train_batchsize=3"])
    assert stop.value.code == 2
    assert "--train_batchsize=3 Did you mean --train_batch_size?" in capsys.readouterr().err


def test_false_is_false_for_prodigys_switches():
    args = parse_args(["--pretrained_model_name_or_path=x", "--prodigy_decouple=False"])
    assert args.prodigy_decouple is False and args.prodigy_safeguard_warmup is True


# ---------------------------------------------------------------------------------------------------------------------
# Data sources


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
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_an_imagefolder_with_metadata(base_flags, tmp_path):
    folder = tmp_path / "imagefolder"
    folder.mkdir()
    with open(folder / "metadata.jsonl", "w") as file:
        for index, (image, caption) in enumerate(tiny.make_images(3)):
            image.save(folder / f"{index}.png")
            file.write(json.dumps({"file_name": f"{index}.png", "description": caption}) + "\n")
    flags = [f"--dataset_name={folder}", "--caption_column=description", f"--output_dir={tmp_path / 'o'}"]
    assert run(*base_flags, *flags, "--max_train_steps=2") == 0
    assert weights(tmp_path / "o")


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


# ---------------------------------------------------------------------------------------------------------------------
# The stream of samples


class _Encoded:
    """Stands for EncodedDataset: sample i is a constant i."""

    def __getitem__(self, i):
        return {"latents": torch.full((4, 2, 2), float(i)), "prompt_embeds": torch.full((3 + i % 2, 8), float(i))}


def make_stream(images=7, classes=0, seed=1):
    order = PermutationOrder(images, seed)
    return SampleStream(_Encoded(), order, classes, seed=seed, recipe=FlowMatching(flow_shift=3.0))


@pytest.mark.parametrize("world_size, batch_size, accumulation", [(1, 1, 1), (2, 2, 1), (3, 1, 2), (2, 5, 3)])
def test_each_epoch_holds_each_image_once_on_any_number_of_ranks(world_size, batch_size, accumulation):
    stream, steps = make_stream(), 21
    positions = []
    for rank in range(world_size):
        batches = StreamBatchSampler(0, steps, batch_size, accumulation, rank, world_size)
        assert len(list(batches)) == len(batches) == steps * accumulation
        positions += [p for batch in batches for p in batch]
    assert sorted(positions) == list(range(steps * accumulation * batch_size * world_size))
    order = [stream.image_index(p) for p in range(14)]
    assert sorted(order[:7]) == sorted(order[7:]) == list(range(7)) and order[:7] != order[7:]


def test_a_resumed_stream_goes_on_where_it_was_on_another_number_of_ranks():
    whole = [p for b in StreamBatchSampler(0, 4, 2, 1, 0, 1) for p in b]
    first = [p for rank in range(2) for b in StreamBatchSampler(0, 1, 2, 1, rank, 2) for p in b]
    rest = [p for b in StreamBatchSampler(len(first), 2, 2, 1, 0, 1) for p in b]
    assert sorted(first) + rest == whole


def test_collate_keeps_each_caption_with_its_image_and_pads_with_a_mask():
    stream = make_stream(images=5, classes=2)
    batch = collate([stream[position] for position in range(4)])
    assert batch["latents"].shape == (8, 4, 2, 2) and batch["noise"].dtype == torch.float32
    for row in range(8):
        index = batch["latents"][row, 0, 0, 0]
        kept = batch["prompt_mask"][row].bool()
        assert kept.sum() == 3 + int(index) % 2
        assert (batch["prompt_embeds"][row][kept] == index).all() and not batch["prompt_embeds"][row][~kept].any()
    assert (batch["latents"][:4] < 5).all() and (batch["latents"][4:] >= 5).all()  # instance first, class after


def gradients(transformer):
    """Output and all gradients of one backward pass on fixed inputs, in float32."""
    generator = torch.Generator().manual_seed(3)
    dtype = transformer.dtype
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[0, 5:] = False
    out = transformer(
        torch.randn(2, 4, 8, 8, generator=generator).to(dtype),
        torch.randn(2, 16, 32, generator=generator).to(dtype),
        torch.tensor([300.0, 700.0]),
        encoder_attention_mask=mask,
        return_dict=False,
    )[0]
    (out.float() * torch.randn(out.shape, generator=generator)).sum().backward()
    found = {name: p.grad.float() for name, p in transformer.named_parameters() if p.grad is not None}
    return out.detach().float(), found


def relative(difference, reference):
    return ((difference - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("qk_norm", [None, "rms_norm_across_heads"])
def test_the_kits_attention_is_diffusers_own_forward_and_backward(tmp_path, qk_norm):
    """In float32 to rounding; in bf16 no farther from that than diffusers' own processors are."""
    from diffusers import SanaTransformer2DModel

    folder = tiny.make_tiny_pipeline(tmp_path / "model", qk_norm=qk_norm)

    def of(dtype, kit):
        transformer = SanaTransformer2DModel.from_pretrained(folder, subfolder="transformer").to(dtype)
        if kit:
            set_attention(transformer, "auto", torch.device("cpu"))
            processor = transformer.transformer_blocks[0].attn1.processor
            assert isinstance(processor, LinearAttentionProcessor)
        return gradients(transformer)

    exact, exact_gradients = of(torch.float32, kit=False)
    ours, our_gradients = of(torch.float32, kit=True)
    assert exact_gradients.keys() == our_gradients.keys()
    assert relative(ours, exact) < 1e-5
    for name, gradient in exact_gradients.items():
        assert (our_gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-5, name
    theirs_bf16, _ = of(torch.bfloat16, kit=False)
    ours_bf16, _ = of(torch.bfloat16, kit=True)
    assert relative(ours_bf16, exact) < 1.2 * relative(theirs_bf16, exact)


def test_the_loss_is_the_transformers_own_in_float32(tiny_model):
    """The whole loss of a micro-batch, written down once more from the definition, with diffusers' own attention."""
    from diffusers import SanaTransformer2DModel

    transformer = SanaTransformer2DModel.from_pretrained(tiny_model, subfolder="transformer")
    plain = SanaTransformer2DModel.from_pretrained(tiny_model, subfolder="transformer")
    set_attention(transformer, "auto", torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    batch = {
        "latents": torch.randn(2, 4, 8, 8, generator=generator),
        "noise": torch.randn(2, 4, 8, 8, generator=generator),
        "u": torch.tensor([0.3, 0.8]),
        "prompt_embeds": torch.randn(2, 16, 32, generator=generator),
        "prompt_mask": torch.ones(2, 16, dtype=torch.bool),
    }
    batch["prompt_mask"][0, 5:] = False
    loss = FlowMatching(flow_shift=3.0).loss(transformer, batch, torch.float32)
    expected = []
    for row in range(2):
        sigma0 = 1 - math.floor(batch["u"][row].item() * 1000) / 1000
        sigma = 3 * sigma0 / (1 + 2 * sigma0)
        noisy = (1 - sigma) * batch["latents"][row] + sigma * batch["noise"][row]
        valid = int(batch["prompt_mask"][row].sum())
        prediction = plain(
            noisy[None],
            batch["prompt_embeds"][row : row + 1, :valid],
            torch.tensor([sigma * 1000]),
            encoder_attention_mask=torch.ones(1, valid),
            return_dict=False,
        )[0][0]
        expected.append(((prediction - (batch["noise"][row] - batch["latents"][row])) ** 2).mean())
    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Resume and checkpoints


@pytest.fixture(scope="session")
def six_steps(tiny_model, parquet_dataset, tmp_path_factory):
    """A run of 6 steps with everything random switched on, and its flags; checkpoints at 3 and 6."""
    output = tmp_path_factory.mktemp("six") / "out"
    flags = [
        f"--pretrained_model_name_or_path={tiny_model}",
        f"--dataset_name={parquet_dataset}",
        "--caption_column=text",
        "--instance_prompt=x",
        "--resolution=64",
        "--train_batch_size=2",
        "--gradient_accumulation_steps=2",
        "--lora_dropout=0.2",
        "--random_flip",
        "--max_train_steps=6",
        "--checkpointing_steps=3",
        "--logging_steps=1",
        "--lr_scheduler=cosine",
        "--lr_warmup_steps=2",
        "--seed=5",
        "--mixed_precision=bf16",
        "--learning_rate=1e-2",
        "--complex_human_instruction=none",
        "--validation_prompt=a red square",
        "--validation_prompt=a blue square",
        "--num_validation_images=1",
        "--validation_inference_steps=2",
        "--validation_steps=3",
        "--hub_token=hf_secretsecretsecret",
    ]
    assert run(*flags, f"--output_dir={output}") == 0
    return output, flags


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
    assert same(weights(output), weights(copy))
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
    assert not same(weights(output), weights(copy))


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


# ---------------------------------------------------------------------------------------------------------------------
# What a run writes


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

    monkeypatch.setattr("sana_kit.encodings.encode_images.load_vae", refuse)
    monkeypatch.setattr("sana_kit.encodings.encode_prompts.load_text_encoder", refuse)
    warm = [flag for flag in flags if not flag.startswith("--validation")]
    assert run(*warm, f"--output_dir={tmp_path}", f"--encodings_dir={output / 'encodings'}") == 0
    assert same(weights(output), weights(tmp_path))  # and validation changed nothing about the training
    with pytest.raises(AssertionError, match="loaded again"):
        run(*warm, f"--output_dir={tmp_path / 'o'}", f"--encodings_dir={output / 'encodings'}", "--resolution=56")


def test_the_final_adapter_in_float32(six_steps, base_flags, image_folder, tmp_path):
    flags = [*base_flags, f"--instance_data_dir={image_folder}", "--max_train_steps=2", f"--output_dir={tmp_path}"]
    assert run(*flags, "--upcast_before_saving") == 0
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {torch.float32}


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
        results.append(weights(output))
    assert same(results[0], results[1]) and same(results[0], results[2])
    settings = yaml.safe_load((tmp_path / "1" / "run.yaml").read_text())
    assert settings["gradient_checkpointing"] and settings["gradient_checkpointing_interval"] == 1
    assert "memory_budget" not in settings


def test_lora_layers_choose_the_trained_layers(base_flags, image_folder, tmp_path):
    flags = [f"--instance_data_dir={image_folder}", f"--output_dir={tmp_path}", "--max_train_steps=1"]
    assert run(*base_flags, *flags, "--lora_layers=attn2.to_q,ff.conv_point") == 0
    layers = {key.split(".lora")[0].split(".", 3)[3] for key in weights(tmp_path)}
    assert layers == {"attn2.to_q", "ff.conv_point"}


# ---------------------------------------------------------------------------------------------------------------------
# Full-parameter fine-tuning


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


# ---------------------------------------------------------------------------------------------------------------------
# Losses that are not numbers


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
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path).values())


# ---------------------------------------------------------------------------------------------------------------------
# Errors before anything is loaded

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
        "encodings.encode_images.load_vae",
        "encodings.encode_prompts.load_text_encoder",
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
    plain, compiled = weights(tmp_path / "plain"), weights(tmp_path / "compiled")
    assert plain.keys() == compiled.keys()  # names as without compilation
    # bf16 rounds otherwise in a compiled block. Adam's first steps turn even a gradient of nearly nothing into a whole
    # step of the learning rate, so single weights may go the other way: direction and losses must agree.
    learnt = [torch.cat([w[key].flatten() for key in sorted(w) if "lora_B" in key]) for w in (plain, compiled)]
    assert torch.nn.functional.cosine_similarity(*learnt, dim=0) > 0.98
    losses = [events(tmp_path / name, "step")[-1]["loss"] for name in ("plain", "compiled")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
