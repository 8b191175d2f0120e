"""The hooks and the patch of diffusers' trainer under DeepSpeed on two processes.

python -m pytest tests/distributed/test_patch_sana_deepspeed.py                     # -m "not slow" leaves out the slow
SANA_DIFFUSERS_CHECKOUT=PATH/diffusers python -m pytest tests/distributed/test_patch_sana_deepspeed.py -k upstream
"""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from helpers import free_port, run, same
from helpers.tiny import write_image_folder
from helpers.upstream import FAKE_TRAINER, REFERENCE_COMMIT, TRAINER, upstream_source

import patch_sana

ADAPTER = patch_sana.ADAPTER_FILE
WORKERS = Path(__file__).with_name("workers")


def launch_deepspeed(folder, command, zero_stage=2):
    """`accelerate launch` with DeepSpeed on two processes; returns its output, fails with it."""
    import torch

    config = folder / f"zero{zero_stage}.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nmixed_precision: bf16\nnum_machines: 1\n"
        "num_processes: 2\nuse_cpu: false\ndeepspeed_config:\n  gradient_accumulation_steps: 1\n"
        f"  gradient_clipping: 1.0\n  zero_stage: {zero_stage}\n"
        + ("  zero3_init_flag: false\n  zero3_save_16bit_model: false\n" if zero_stage == 3 else "")
    )
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "PYTHONPATH"))
    }
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.environ.get("SANA_STACK_PATH", "")  # see tests/stacks/run.sh
    if not hasattr(torch.cpu, "set_device"):  # torch 2.1, where accelerate would call it
        environment["ACCELERATE_TORCH_DEVICE"] = "cpu"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    done = run([*launcher, "--main_process_port", free_port(), *command], cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def test_zero2_engine_and_adapter_file(tiny_model, tmp_path):
    pytest.importorskip("deepspeed")
    output = launch_deepspeed(tmp_path, [WORKERS / "adapter_hooks.py", tiny_model, tmp_path / "out"])
    print(output)
    assert sorted(re.findall(r"rank (\d) went through all parts", output)) == ["0", "1"]


def patched_fake(folder):
    folder.mkdir(exist_ok=True)
    trainer = folder / TRAINER
    shutil.copy(FAKE_TRAINER, trainer)
    assert patch_sana.main([str(trainer)]) == 0
    return trainer


@pytest.mark.parametrize("zero_stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_patched_fake_trainer_resumes_to_the_same_bits(tiny_model, tmp_path, zero_stage):
    pytest.importorskip("deepspeed")
    trainer = patched_fake(tmp_path / "dreambooth")
    out = tmp_path / "out"
    command = [trainer, "--pretrained_model_name_or_path", tiny_model, "--output_dir", out]
    output = launch_deepspeed(tmp_path, command + ["--checkpointing_steps", "3"], zero_stage)
    assert '"vae": "torch.bfloat16"' in output
    undisturbed = (out / "checkpoint-6" / ADAPTER).read_bytes()
    assert (out / "checkpoint-3" / ADAPTER).read_bytes() != undisturbed

    shutil.rmtree(out / "checkpoint-6")
    command += ["--resume_from_checkpoint", "latest", "--checkpoints_total_limit", "1"]
    output = launch_deepspeed(tmp_path, command + ["--checkpointing_steps", "3"], zero_stage)
    assert "resumed from step 3" in output
    assert (out / "checkpoint-6" / ADAPTER).read_bytes() == undisturbed
    assert not (out / "checkpoint-3").exists()


@pytest.mark.slow
@pytest.mark.parametrize("commit", [REFERENCE_COMMIT, "HEAD"], ids=["reference", "today"])
def test_patched_upstream_trainer_trains_saves_and_resumes_under_zero2(commit, tiny_model, tmp_path):
    pytest.importorskip("deepspeed")
    from diffusers import SanaPipeline

    upstream_trainer = tmp_path / "dreambooth" / TRAINER
    upstream_trainer.parent.mkdir()
    upstream_trainer.write_bytes(upstream_source(commit))
    images = write_image_folder(tmp_path / "images", count=4, captions=False)
    assert patch_sana.main([str(upstream_trainer)]) == 0

    out = tmp_path / "out"
    flags = {
        "pretrained_model_name_or_path": tiny_model,
        "instance_data_dir": images,
        "instance_prompt": "a square",
        "resolution": 64,
        "train_batch_size": 1,
        "learning_rate": 1e-2,
        "mixed_precision": "bf16",
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 2,
        "max_train_steps": 4,
        "seed": 0,
        "output_dir": out,
    }
    command = [WORKERS / "run_with_gloo.py", upstream_trainer] + [f"--{name}={value}" for name, value in flags.items()]
    launch_deepspeed(tmp_path, command)
    second, fourth = (patch_sana.read_adapter(out / f"checkpoint-{step}")[0] for step in (2, 4))
    assert len(second) == 24 and not same(second, fourth)
    assert patch_sana.read_adapter(out)[0].keys() == fourth.keys()

    command.remove("--max_train_steps=4")
    output = launch_deepspeed(tmp_path, command + ["--max_train_steps=6", "--resume_from_checkpoint=latest"])
    assert "Resuming from checkpoint checkpoint-4" in output
    sixth = patch_sana.read_adapter(out / "checkpoint-6")[0]
    assert not same(fourth, sixth)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    change = max((sixth[key].float() - fourth[key].float()).abs().max() for key in sixth)
    assert change < 0.05, "two AdamW steps at 1e-2 move a weight by 0.02 at most: it did not go on from checkpoint-4"
    SanaPipeline.from_pretrained(tiny_model).load_lora_weights(str(out / "checkpoint-6"))
