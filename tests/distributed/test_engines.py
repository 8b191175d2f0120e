"""The trainer under its engines: DeepSpeed ZeRO-1, 2 and 3, DDP, one process; resumed on another of them.

Real processes, real engines, a tiny model. `-m "not slow"` leaves out ZeRO-3 and offloading.
"""

import importlib
import json
import shutil
import sys

import pytest
import torch
from helpers import KIT, TRAINER, adapter_weights, events, launch, run, same
from helpers.runs import as_it_was_at, config_with, farthest, train
from safetensors.torch import load_file

from sana_kit.training import zero


def test_zero2_resumes_to_the_bit(zero2, flags, tmp_path):
    copy = as_it_was_at(zero2, 3, tmp_path)
    more = ["--lora_dropout=0.2", "--fused_blocks=auto", "--train_batch_size=1", "--resume_from_checkpoint=latest"]
    train(copy, flags, *more, processes=2, engine="zero")
    for part in ("", "raw", "best"):
        assert same(adapter_weights(zero2 / part), adapter_weights(copy / part)), part
    averages = [load_file(folder / "checkpoint-6" / "ema.safetensors") for folder in (zero2, copy)]
    assert same(*averages) and {value.dtype for value in averages[0].values()} == {torch.float32}
    before, after = ([(e["step"], e["raw"], e["ema"]) for e in events(f, "held_out")] for f in (zero2, copy))
    assert [step for step, _, _ in before] == [0, 3, 6] and after[-1] == before[-1] and len(after) == 4
    before, after = (load_file(folder / "checkpoint-6" / "optimizer.safetensors") for folder in (zero2, copy))
    assert same(before, after)
    assert {key.split("|")[1] for key in before} == {"master", "exp_avg", "exp_avg_sq"}


def test_zero2_keeps_float32_masters_of_its_bf16_adapter(zero2):
    adapter = adapter_weights(zero2 / "checkpoint-6")
    masters = load_file(zero2 / "checkpoint-6" / "optimizer.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.bfloat16}
    finer = 0
    for key, tensor in adapter.items():
        master = masters[key.removeprefix("transformer.").replace(".weight", ".default.weight") + "|master"]
        assert master.dtype == torch.float32 and torch.equal(master.bfloat16(), tensor)
        finer += int((master != tensor.float()).sum())
    assert finer > 100


@pytest.mark.parametrize("processes, engine, batch", [(1, "zero", 2), (1, "single", 2), (2, "ddp", 1)])
def test_a_zero2_checkpoint_resumes_on_other_processes_and_engines(
    zero2_no_dropout, flags, tmp_path, processes, engine, batch
):
    """The global batch stays 4, so the curve must go on as it would have: bf16 and float32 LoRA weights differ by the
    rounding of a bf16 number (2^-8), sums over ranks by their order."""
    copy = as_it_was_at(zero2_no_dropout, 3, tmp_path)
    more = [f"--train_batch_size={batch}", "--resume_from_checkpoint=latest"]
    done = train(copy, flags, *more, processes=processes, engine=engine)
    assert farthest(adapter_weights(zero2_no_dropout), adapter_weights(copy)) < 2**-7
    old, new = (
        [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
        for folder in (zero2_no_dropout, copy)
    )
    expected = {e["step"]: e["loss"] for e in old if e["event"] == "step"}
    for entry in [e for e in new if e["event"] == "step"][-3:]:
        assert entry["loss"] == pytest.approx(expected[entry["step"]], rel=2e-2)
    moments, again = (
        load_file(folder / "checkpoint-6" / "optimizer.safetensors") for folder in (zero2_no_dropout, copy)
    )
    pick = [key for key in moments if key.endswith("exp_avg_sq")]
    assert farthest({k: moments[k] for k in pick}, {k: again[k] for k in pick}) < 0.05
    if processes != 2:
        assert f"world_size was 2 when the checkpoint was written and is {processes} now" in done.stderr


def test_a_checkpoint_of_two_goes_on_with_three_and_back_to_zero2_from_one(zero2_no_dropout, flags, tmp_path):
    copy = as_it_was_at(zero2_no_dropout, 3, tmp_path)
    more = [
        "--train_batch_size=1",
        "--resume_from_checkpoint=latest",
        "--max_train_steps=5",
        "--checkpointing_steps=1",
    ]
    train(copy, flags, *more, processes=3, engine="zero")
    state = json.loads((copy / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["samples_seen"] == 3 * 4 + 2 * 6  # 3 steps of 2 x 2, then 2 of 3 x 2: none twice, none skipped
    assert state["optimizer"]["numbers"]["step"]["value"] == 5


def test_zero1_and_ddp_train_the_same_adapter_as_zero2(zero2_no_dropout, flags, tmp_path):
    config = config_with(tmp_path / "zero1.yaml", zero_stage=1)
    train(tmp_path / "one", flags, "--train_batch_size=1", processes=2, engine="zero", config=config)
    assert farthest(adapter_weights(zero2_no_dropout), adapter_weights(tmp_path / "one")) < 2**-7
    train(tmp_path / "ddp", flags, "--train_batch_size=1", processes=2, engine="ddp")
    assert farthest(adapter_weights(zero2_no_dropout), adapter_weights(tmp_path / "ddp")) < 2**-6


def test_full_fine_tuning_under_zero2_saves_a_model_folder(flags, tmp_path):
    more = ["--train_mode=full", "--train_batch_size=1", "--max_train_steps=2", "--learning_rate=1e-3"]
    train(tmp_path / "full", flags, *more, processes=2, engine="zero")
    tensors = load_file(tmp_path / "full" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "full" / "sana_kit_base.json").read_text())["base_model"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, offload, mode", [(2, "cpu", "lora"), (2, "cpu", "full"), (3, "none", "full"), (3, "cpu", "full")]
)
def test_zero3_and_cpu_offload_by_the_config_resume_to_the_bit(flags, tmp_path, stage, offload, mode):
    """The moments come from the checkpoint: without them the second half would differ."""
    if offload == "cpu" and not (shutil.which("g++") or shutil.which("c++")):
        pytest.skip("DeepSpeed compiles its CPU optimizer, and there is no C++ compiler here")
    config = config_with(tmp_path / "config.yaml", zero_stage=stage, offload_optimizer_device=offload)
    if stage == 3:  # which refuses an average
        flags = [flag for flag in flags if "ema" not in flag]
    more = ["--train_batch_size=1", f"--train_mode={mode}", "--learning_rate=1e-3"]
    how = {"processes": 2, "engine": "zero", "config": config}
    train(tmp_path / "whole", flags, *more, **how)
    copy = as_it_was_at(tmp_path / "whole", 3, tmp_path)
    shutil.rmtree(copy / "transformer", ignore_errors=True)
    (copy / "pytorch_lora_weights.safetensors").unlink(missing_ok=True)
    train(copy, flags, *more, "--resume_from_checkpoint=latest", **how)

    def trained(output):
        if mode == "lora":
            return adapter_weights(output)
        return load_file(output / "transformer" / "diffusion_pytorch_model.safetensors")

    assert same(trained(tmp_path / "whole"), trained(copy))
    before, after = (load_file(o / "checkpoint-6" / "optimizer.safetensors") for o in (tmp_path / "whole", copy))
    assert same(before, after) and {key.split("|")[1] for key in before} == {"master", "exp_avg", "exp_avg_sq"}


def test_an_error_ends_all_ranks_with_one_message(flags, tmp_path):
    done = launch(TRAINER, *flags, f"--output_dir={tmp_path}", "--resolution=65", processes=2, engine="zero")
    assert done.returncode != 0
    assert done.stderr.count("--resolution=65: must be a multiple of 8") == 1
    assert "Traceback" not in done.stderr.split("ChildFailedError")[0].split("torch/distributed")[0]


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_bytes_of_weights_and_optimizer_are_those_computed(mode):
    """What one of two devices holds, counted over its tensors, against `sana_kit.flops.training_bytes`."""
    bench = KIT / "tests" / "benchmarks" / "bench_memory.py"
    flags = ["--config=scaled", f"--train_mode={mode}", "--processes=2", "--json"]
    done = run([sys.executable, bench, *flags])
    assert done.returncode == 0, done.stderr[-4000:]
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    computed, allocated = figures["computed"], figures["allocated"]
    for part in ("weights", "gradients", "masters", "moments"):
        assert abs(allocated[part] / computed[part] - 1) < 0.01, (part, figures)
    # The few activations and what gloo copies come on top of what is passing: here 3 MB.
    assert 0 <= allocated["passing"] - computed["passing"] < 4e6, figures


def test_the_shared_memory_operator_is_not_compiled(monkeypatch):
    """DeepSpeed asks its table of operators before it compiles one; for the table it looks for a C compiler."""
    import deepspeed.ops

    table = dict(deepspeed.ops.__compatible_ops__)
    assert "deepspeed_shm_comm" in table
    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", table, raising=False)
    zero.leave_out_shm_operator()
    assert (
        table["deepspeed_shm_comm"] is False and importlib.import_module("deepspeed.comm.torch").build_shm_op() is None
    )
