"""One of two ranks under DeepSpeed ZeRO-2: the hooks of patch_sana.py against the engine's own state.

    accelerate launch --config_file ZERO2.yaml adapter_hooks.py MODEL OUT

Each part below is a claim of the hooks; the last line says that this rank went through all of them.
"""

import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object

sys.path[:0] = [str(Path(__file__).resolve().parents[3]), str(Path(__file__).resolve().parents[2])]

from helpers import same  # noqa: E402
from helpers.hooked_run import HookedRun  # noqa: E402

import patch_sana  # noqa: E402

ADAPTER = patch_sana.ADAPTER_FILE
write_adapter = patch_sana.write_adapter


class Rank:
    """The run of this rank and what was seen of it."""

    def __init__(self, model, out):
        self.accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
        assert self.accelerator.num_processes == 2 and self.accelerator.distributed_type.name == "DEEPSPEED"
        self.rank, self.out = self.accelerator.process_index, Path(out)
        self.accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
        self.written, self.seen = [], []
        patch_sana.write_adapter = self.record_and_write
        self.run = HookedRun(model, accelerator=self.accelerator, dtype=torch.bfloat16)
        self.accelerator.register_save_state_pre_hook(
            lambda models, weights, _: self.seen.append((len(models), weights))
        )
        self.accelerator.register_load_state_pre_hook(lambda models, _: self.seen.append(models))

    def record_and_write(self, folder, *rest):
        self.written.append(str(folder))
        write_adapter(folder, *rest)

    def masters(self):
        """The float32 masters of this rank's share, from the ZeRO optimizer."""
        return [part.detach().clone() for part in self.run.transformer.optimizer.single_partition_of_fp32_groups]

    def on_main(self, action):
        """Change files when every rank has read what is there, and go on when all can see the change."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            action()
        self.accelerator.wait_for_everyone()

    def refusal(self, folder, **kwargs):
        try:
            self.accelerator.load_state(str(folder), **kwargs)
        except ValueError as error:
            return str(error)
        raise AssertionError(f"{folder} was loaded")


def saved_once_with_nothing_of_the_base(rank):
    """The main process writes the live bf16 weights."""
    run, out = rank.run, rank.out
    run.train(range(3), rank.rank)
    run.save(out / "a")
    assert gather_object([len(rank.written)]) == [1, 0]
    assert rank.seen == [(1, [])]
    tensors, lora_config, base = patch_sana.read_adapter(out / "a")
    assert same(tensors, run.weights()) and {w.dtype for w in tensors.values()} == {torch.bfloat16}
    assert len(tensors) == 24 and all(".lora_" in key for key in tensors)
    assert any(not torch.equal(m, m.to(torch.bfloat16).float()) for m in rank.masters()), "masters hold more than bf16"
    return tensors, lora_config, base


def going_on_and_coming_back(rank):
    """Weights and masters are restored; the hook sees no model and changes nothing."""
    run, out, accelerator = rank.run, rank.out, rank.accelerator
    weights, masters = run.weights(), rank.masters()
    run.train(range(3, 5), rank.rank)
    run.save(out / "b")
    assert not same(run.weights(), weights)
    accelerator.load_state(str(out / "a"))
    assert rank.seen[-1] == []
    assert same(run.weights(), weights)
    assert all(torch.equal(x, y) for x, y in zip(rank.masters(), masters, strict=True))

    # Without the optimizer state DeepSpeed makes the masters from the weights; file and engine agree.
    accelerator.load_state(str(out / "a"), load_optimizer_states=False)
    assert same(run.weights(), weights)
    assert all(torch.equal(x, y.to(torch.bfloat16).float()) for x, y in zip(rank.masters(), masters, strict=True))

    # Without the frozen base.
    run.save(out / "small", exclude_frozen_parameters=True)
    accelerator.load_state(str(out / "small"), load_module_strict=False)
    assert same(run.weights(), weights)
    engine_file = f"{patch_sana.ENGINE_FOLDER}/mp_rank_00_model_states.pt"
    assert (out / "small" / engine_file).stat().st_size < (out / "a" / engine_file).stat().st_size / 2


def files_of_other_runs_and_steps(rank, tensors, lora_config, base):
    """One tensor, the whole file, the optimizer state, the description: each is told."""
    run, out = rank.run, rank.out
    weights = run.weights()
    key = sorted(tensors)[5]
    changed = {**tensors, key: tensors[key] + 1}
    rank.on_main(lambda: (shutil.copytree(out / "a", out / "x"), write_adapter(out / "x", changed, lora_config, base)))
    message = rank.refusal(out / "x")
    assert "1 of 24 tensors differ from what the DeepSpeed engine loaded" in message and key in message, message

    rank.on_main(lambda: shutil.copy(out / "b" / ADAPTER, out / "x" / ADAPTER))
    assert "tensors differ from what the DeepSpeed engine loaded" in rank.refusal(out / "x")

    def mix():  # the next step would replace the weights that were loaded
        shutil.copy(out / "a" / ADAPTER, out / "x" / ADAPTER)
        for path in (out / "b" / patch_sana.ENGINE_FOLDER).glob("*optim_states.pt"):
            shutil.copy(path, out / "x" / patch_sana.ENGINE_FOLDER)

    rank.on_main(mix)
    message = rank.refusal(out / "x")
    assert "float32 masters do not round to the live weights" in message, message
    rank.accelerator.load_state(str(out / "x"), load_optimizer_states=False)
    assert same(run.weights(), weights)

    odd = {"transformer.odd.lora_A.weight": torch.zeros(1, 1), **tensors, key: torch.zeros(3, 3)}
    gone = sorted(tensors)[7]
    del odd[gone]
    elsewhere = {**base, "name": "elsewhere", "config": {**base["config"], "num_layers": 7}}
    rank.on_main(lambda: write_adapter(out / "x", odd, {**lora_config, "r": 9}, elsewhere))
    message = rank.refusal(out / "x", load_optimizer_states=False)
    for part in ("r 9 in the file, 4 here", "transformer.odd.lora_A.weight", gone, f"{key} (3, 3)", "elsewhere"):
        assert part in message, (part, message)
    assert "num_layers 7 in the file, 2 here" in message, message


def files_that_are_cut_off_or_missing(rank):
    """No whole adapter, no optimizer state, no engine at all."""
    out, accelerator = rank.out, rank.accelerator
    rank.on_main(lambda: os.truncate(out / "x" / ADAPTER, 500))
    assert "not a whole safetensors file" in rank.refusal(out / "x")
    rank.on_main(lambda: os.unlink(out / "x" / ADAPTER))
    assert "No LoRA weights at" in rank.refusal(out / "x")
    rank.on_main(
        lambda: (shutil.copy(out / "a" / ADAPTER, out / "x" / ADAPTER), shutil.copytree(out / "a", out / "y"))
    )
    rank.on_main(lambda: [path.unlink() for path in (out / "x" / patch_sana.ENGINE_FOLDER).glob("*optim_states.pt")])
    rank.on_main(lambda: shutil.rmtree(out / "y" / patch_sana.ENGINE_FOLDER))
    for folder in ("x", "y"):  # DeepSpeed raises before the hooks run
        try:
            accelerator.load_state(str(out / folder))
        except (FileNotFoundError, ValueError, AssertionError) as error:
            print(f"rank {rank.rank}, {folder}: {type(error).__name__}: {error}", flush=True)
        else:
            raise AssertionError(f"{folder} was loaded")
    rank.run.train(range(7, 8), rank.rank)
    try:  # a hook called by itself says what is wrong
        rank.run.load_hook([], str(out / "y"))
    except ValueError as error:
        assert "there is no DeepSpeed engine state" in str(error) and "tensors differ" in str(error), error
    else:
        raise AssertionError("the hook accepted a checkpoint without engine state")
    accelerator.wait_for_everyone()


def main(model, out):
    rank = Rank(model, out)
    tensors, lora_config, base = saved_once_with_nothing_of_the_base(rank)
    going_on_and_coming_back(rank)
    files_of_other_runs_and_steps(rank, tensors, lora_config, base)
    files_that_are_cut_off_or_missing(rank)
    print(f"rank {rank.rank} went through all parts", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
