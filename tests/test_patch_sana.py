"""Tests of patch_sana.py: the hooks in one process and under DeepSpeed with two, the patch tool on our fake upstream
trainer and on diffusers' real ones.

    pytest tests/test_patch_sana.py                                                       # without the slow ones: -m
    "not slow" SANA_DIFFUSERS_CHECKOUT=PATH/diffusers pytest tests/test_patch_sana.py -k upstream    # a git checkout
    with its history

The file is also the program that the DeepSpeed test launches on each rank: `accelerate launch tests/test_patch_sana.py
MODEL OUT`.
"""

import errno
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from helpers.tiny import make_tiny_pipeline, write_image_folder  # noqa: E402

import patch_sana  # noqa: E402
from sana_kit import patch_upstream  # noqa: E402

FAKE = TESTS / "fake_upstream_trainer.py"
ADAPTER = patch_sana.ADAPTER_FILE
REFERENCE_COMMIT = "cd0a4a82cf8625b96e2889afee2fce5811b35c05"
TRAINER = "train_dreambooth_lora_sana.py"


# ---------------------------------------------------------------------------------------------------------------------
# One process, no DeepSpeed
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps its state in the process: leave none for, and take none from, other tests."""
    from accelerate.state import AcceleratorState, GradientState

    def reset():
        AcceleratorState._reset_state(True)
        GradientState._reset_state()

    reset()
    yield
    reset()


def lora_transformer(folder, rank=4, alpha=4, dtype=None, layers=("to_k", "to_q", "to_v"), seed=0):
    import torch
    from diffusers import SanaTransformer2DModel
    from peft import LoraConfig

    transformer = SanaTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    transformer.requires_grad_(False)
    if dtype:
        transformer.to(dtype)
    torch.manual_seed(seed)
    transformer.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(layers))
    )
    return transformer


def bare(accelerator):
    return lambda model: getattr(accelerator.unwrap_model(model), "_orig_mod", accelerator.unwrap_model(model))


class Run:
    """A training run as the trainer sets it up: hooks registered, transformer and optimizer prepared."""

    def __init__(self, folder, mixed_precision=None, accelerator=None, wrap=lambda model: model, **lora):
        import torch
        from accelerate import Accelerator

        self.accelerator = accelerator or Accelerator(cpu=True)
        self.bare = lora_transformer(folder, **lora)
        args = SimpleNamespace(mixed_precision=mixed_precision)
        parts = dict(accelerator=self.accelerator, unwrap_model=bare(self.accelerator), transformer=self.bare)
        self.save_hook = patch_sana.create_save_model_hook(**parts)
        self.load_hook = patch_sana.create_load_model_hook(**parts, args=args)
        self.accelerator.register_save_state_pre_hook(self.save_hook)
        self.accelerator.register_load_state_pre_hook(self.load_hook)
        parameters = [parameter for parameter in self.bare.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        self.transformer, self.optimizer = self.accelerator.prepare(wrap(self.bare), optimizer)

    def inputs(self, step, rank=0):
        import torch

        generator = torch.Generator().manual_seed(100 * step + rank)
        config, dtype = self.bare.config, self.bare.dtype
        return {
            "hidden_states": torch.randn(1, config.in_channels, 8, 8, generator=generator).to(dtype),
            "encoder_hidden_states": torch.randn(1, 5, config.caption_channels, generator=generator).to(dtype),
            "encoder_attention_mask": torch.ones(1, 5),
            "timestep": torch.tensor([300.0]),
        }

    def train(self, steps, rank=0):
        for step in steps:
            loss = self.transformer(**self.inputs(step, rank), return_dict=False)[0].float().square().mean()
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def weights(self):
        tensors = patch_sana._adapter_tensors(self.bare)
        return {key: tensor.detach().clone() for key, tensor in tensors.items()}

    def save(self, folder, **kwargs):
        self.accelerator.save_state(str(folder), **kwargs)
        self.accelerator.wait_for_everyone()  # accelerate does not
        return Path(folder)


def same(left, right):
    import torch

    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


def renew(*args, **kwargs):
    """A run in a 'new process': accelerate keeps every model it ever prepared."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return Run(*args, **kwargs)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_round_trip_is_bit_exact_and_training_goes_on_the_same(tiny_model, tmp_path, precision):
    import torch
    from safetensors import safe_open

    dtype = getattr(torch, precision)
    first = Run(tiny_model, dtype=dtype).train(range(3))
    checkpoint = first.save(tmp_path / "checkpoint-3")
    saved = first.weights()
    first.train(range(3, 5))

    with safe_open(checkpoint / ADAPTER, "pt") as file:
        keys = set(file.keys())
        stored = {key: file.get_tensor(key) for key in keys}
    assert len(keys) == 24 and all(re.fullmatch(r"transformer\..+\.lora_[AB]\.weight", key) for key in keys)
    assert same(stored, saved)
    names = {path.name for path in checkpoint.iterdir()}
    assert not {name for name in names if name.startswith(("model", "pytorch_model"))}, "the base model was saved"

    second = renew(tiny_model, dtype=dtype, seed=1)
    assert not same(second.weights(), saved)
    base = {k: v.clone() for k, v in second.bare.state_dict().items() if "lora_" not in k}
    second.accelerator.load_state(str(checkpoint))
    assert same(second.weights(), saved)
    assert same(base, {k: v for k, v in second.bare.state_dict().items() if "lora_" not in k})
    second.train(range(3, 5))  # the optimizer still holds the parameters that were loaded
    assert same(second.weights(), first.weights())


def test_saved_adapter_works_in_the_pipeline_with_its_alpha(tiny_model, tmp_path, caplog):
    import torch
    from diffusers import SanaPipeline
    from diffusers.loaders import lora_base

    run = Run(tiny_model, rank=4, alpha=12).train(range(2))
    reads_alpha = hasattr(lora_base, "LORA_ADAPTER_METADATA_KEY")  # since diffusers 0.34
    assert ("set_adapters(name, 3)" in caplog.text) == (not reads_alpha)
    checkpoint = run.save(tmp_path / "c")
    pipeline = SanaPipeline.from_pretrained(tiny_model)
    with torch.no_grad():
        run.bare.eval()
        trained = run.bare(**run.inputs(9)).sample
        plain = pipeline.transformer(**run.inputs(9)).sample
        pipeline.load_lora_weights(str(checkpoint), adapter_name="trained")
        if not reads_alpha:
            pipeline.set_adapters("trained", 3)  # the remedy that the warning names
        loaded = pipeline.transformer(**run.inputs(9)).sample
    assert torch.allclose(loaded, trained, atol=0 if reads_alpha else 1e-5, rtol=0)
    assert not torch.allclose(plain, trained, atol=1e-3)


def test_metadata_rebuilds_the_configuration_and_equal_runs_give_equal_bytes(tiny_model, tmp_path):
    from peft import LoraConfig

    run = Run(tiny_model, rank=2, alpha=6)
    one, two = (run.save(tmp_path / name) / ADAPTER for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    _, lora_config, base = patch_sana.read_adapter(one.parent)
    assert (lora_config["r"], lora_config["lora_alpha"]) == (2, 6)
    assert sorted(lora_config["target_modules"]) == ["to_k", "to_q", "to_v"]
    assert LoraConfig(**lora_config).to_dict() == run.bare.peft_config["default"].to_dict()
    assert base["class"] == "SanaTransformer2DModel" and base["config"]["num_layers"] == 2
    assert str(tiny_model) not in one.read_bytes().decode("latin-1"), "a published file would tell local paths"


def test_fp16_run_trains_float32_weights_after_loading(tiny_model, tmp_path):
    import torch

    first = Run(tiny_model).train(range(2))
    checkpoint = first.save(tmp_path / "c")
    second = renew(tiny_model, mixed_precision="fp16", dtype=torch.float16)
    assert {w.dtype for w in second.weights().values()} == {torch.float16}
    second.load_hook([second.transformer], str(checkpoint))
    assert same(second.weights(), first.weights())
    assert second.bare.proj_out.weight.dtype == torch.float16


def test_weights_that_must_be_rounded_are_told(tiny_model, tmp_path, caplog):
    import torch

    first = Run(tiny_model).train(range(2))
    checkpoint = first.save(tmp_path / "c")
    second = renew(tiny_model, dtype=torch.bfloat16)
    with caplog.at_level("WARNING"):
        second.load_hook([second.transformer], str(checkpoint))
    assert "24 tensors were rounded" in caplog.text
    assert same(second.weights(), {k: w.to(torch.bfloat16) for k, w in first.weights().items()})


def test_compiled_models_save_and_load_under_the_same_keys(tiny_model, tmp_path):
    import accelerate
    import torch

    def compile_blocks(model):  # accelerate's regional compilation; versions that have none take any compiled part
        if hasattr(accelerate.utils, "compile_regions"):
            return accelerate.utils.compile_regions(model, backend="eager")
        for index, block in enumerate(model.transformer_blocks):
            model.transformer_blocks[index] = torch.compile(block, backend="eager")
        return model

    plain = Run(tiny_model)
    expected = patch_sana.read_adapter(plain.save(tmp_path / "plain"))[0]
    for name, wrap in {"blocks": compile_blocks, "whole": lambda m: torch.compile(m, backend="eager")}.items():
        compiled = renew(tiny_model, seed=1, wrap=wrap)
        compiled.load_hook([compiled.transformer], str(tmp_path / "plain"))
        weights = [compiled.bare.state_dict()]
        compiled.save_hook([compiled.transformer], weights, str(tmp_path / name))
        assert weights == []
        tensors, _, base = patch_sana.read_adapter(tmp_path / name)
        assert same(tensors, expected)
        assert base["sha256"] == patch_sana.read_adapter(tmp_path / "plain")[2]["sha256"]


def test_wrapped_for_data_parallel_training(tiny_model, tmp_path):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    expected = patch_sana.read_adapter(Run(tiny_model).save(tmp_path / "plain"))[0]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = renew(tiny_model, seed=1, wrap=DistributedDataParallel)
        assert isinstance(wrapped.transformer, DistributedDataParallel)
        models = [wrapped.transformer]
        wrapped.load_hook(models, str(tmp_path / "plain"))
        assert models == [], "accelerate would load the base model"
        wrapped.save_hook([wrapped.transformer], [{}], str(tmp_path / "ddp"))
        assert same(patch_sana.read_adapter(tmp_path / "ddp")[0], expected)
    finally:
        dist.destroy_process_group()


def test_file_of_diffusers_own_hook_loads_with_a_warning(tiny_model, tmp_path, caplog):
    from diffusers import SanaPipeline
    from peft.utils import get_peft_model_state_dict

    first = Run(tiny_model).train(range(1))
    SanaPipeline.save_lora_weights(tmp_path / "c", get_peft_model_state_dict(first.bare))
    second = renew(tiny_model, seed=1)
    with caplog.at_level("WARNING"):
        second.load_hook([second.transformer], str(tmp_path / "c"))
    assert "does not say which base model" in caplog.text
    assert same(second.weights(), first.weights())


def refused(run, folder):
    """The message of the ValueError that loading `folder` raises; the live weights must be untouched by it."""
    before = run.weights()
    with pytest.raises(ValueError) as caught:
        run.load_hook([run.transformer], str(folder))
    assert same(run.weights(), before)
    return str(caught.value)


def test_every_misfit_is_named_at_once(tiny_model, tmp_path):
    other = make_tiny_pipeline(tmp_path / "three_layers", layers=3)
    checkpoint = Run(tiny_model, rank=4, alpha=4).save(tmp_path / "c")
    message = refused(renew(other, rank=8, alpha=16, layers=("to_k", "to_q", "to_out.0")), checkpoint)
    assert "num_layers 2 in the file, 3 here" in message and "three_layers" in message
    assert f"SanaTransformer2DModel {tiny_model.name}" in message
    assert "r 4 in the file, 8 here" in message and "lora_alpha 4 in the file, 16 here" in message
    assert (
        "8 unexpected keys" in message and "transformer.transformer_blocks.{0-1}.attn1.to_v.lora_A.weight" in message
    )
    assert "20 missing keys" in message and "transformer.transformer_blocks.2.attn2.to_k.lora_B.weight" in message
    assert "16 tensors of another shape" in message
    assert "transformer.transformer_blocks.{0-1}.attn1.to_q.lora_A.weight (4, 32) in the file, (8, 32) here" in message


def test_check_adapter_changes_nothing_and_compares_weights_when_asked(tiny_model, tmp_path):
    import torch

    first = Run(tiny_model).train(range(2))
    checkpoint = first.save(tmp_path / "c")
    patch_sana.check_adapter(checkpoint, first.bare, same_weights=True)
    rounded = renew(tiny_model, dtype=torch.bfloat16)
    rounded.load_hook([rounded.transformer], str(checkpoint))
    patch_sana.check_adapter(checkpoint, rounded.bare, same_weights=True)

    other = renew(tiny_model, seed=1)
    before = other.weights()
    patch_sana.check_adapter(checkpoint, other.bare, same_weights=False)
    with pytest.raises(ValueError, match="24 of 24 tensors differ from the float32 masters"):
        patch_sana.check_adapter(checkpoint, other.bare, same_weights=True)
    with pytest.raises(ValueError, match="r 4 in the file, 8 here(.|\n)*tensors of another shape"):
        patch_sana.check_adapter(checkpoint, renew(tiny_model, rank=8).bare, same_weights=False)
    assert same(other.weights(), before)


def test_another_base_model_is_told_by_its_weights_but_not_by_its_dtype(tiny_model, tmp_path):
    import torch

    checkpoint = Run(tiny_model).save(tmp_path / "c")
    retrained = make_tiny_pipeline(tmp_path / "retrained", seed=1)
    message = refused(renew(retrained), checkpoint)
    assert "another base model" in message and "other weights (sha256" in message and "retrained" in message
    message = refused(renew(retrained, dtype=torch.bfloat16), checkpoint)
    assert "differ by more than the dtypes explain" in message
    for dtype in (torch.bfloat16, torch.float16):
        same_base = renew(tiny_model, dtype=dtype)
        same_base.load_hook([same_base.transformer], str(checkpoint))

    merged = renew(tiny_model)
    with torch.no_grad():
        merged.bare.transformer_blocks[1].attn2.to_v.base_layer.weight.add_(1e-3)
    assert "other weights" in "".join(
        patch_sana._base_differences(
            patch_sana.read_adapter(checkpoint)[2], patch_sana.base_model_fingerprint(merged.bare)
        )
    )


def test_files_that_are_not_safetensors_are_named(tiny_model, tmp_path):
    import torch

    run = Run(tiny_model)
    whole = (run.save(tmp_path / "c") / ADAPTER).read_bytes()
    cases = {"empty": b"", "text": b"<html>not found</html>", "cut": whole[: len(whole) // 2], "header": whole[:100]}
    for name, data in cases.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / ADAPTER).write_bytes(data)
        message = refused(run, tmp_path / name)
        assert "not a whole safetensors file" in message and str(tmp_path / name / ADAPTER) in message
    (tmp_path / "pickled").mkdir()
    torch.save(run.weights(), tmp_path / "pickled" / "pytorch_lora_weights.bin")
    message = refused(run, tmp_path / "pickled")
    assert "No LoRA weights at" in message and "pytorch_lora_weights.bin" in message
    torch.save(run.weights(), tmp_path / "pickled" / ADAPTER)  # a pickle under the right name is not unpickled
    assert "not a whole safetensors file" in refused(run, tmp_path / "pickled")


def test_full_disk_leaves_the_older_file_whole(tiny_model, tmp_path):
    run = Run(tiny_model)
    checkpoint = run.save(tmp_path / "c")
    before = (checkpoint / ADAPTER).read_bytes()
    names = sorted(os.listdir(checkpoint))
    run.train(range(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the kernel refuses to write further, as on a full disk
    try:
        with pytest.raises(OSError) as caught:
            run.save_hook([run.transformer], [], str(checkpoint))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert (checkpoint / ADAPTER).read_bytes() == before and sorted(os.listdir(checkpoint)) == names


def test_other_engines_and_other_models_are_refused(tiny_model, tmp_path):
    import torch
    from accelerate import DistributedType

    run = Run(tiny_model)
    with pytest.raises(ValueError, match="exactly one prepared SanaTransformer2DModel.*2 models, among them Linear"):
        run.save_hook([run.transformer, torch.nn.Linear(1, 1)], [{}, {}], str(tmp_path))
    sharded = SimpleNamespace(distributed_type=DistributedType.FSDP, is_main_process=True)
    hook = patch_sana.create_save_model_hook(sharded, lambda model: model, run.bare)
    with pytest.raises(ValueError, match="distributed_type FSDP.*DEEPSPEED"):
        hook([run.bare], [], str(tmp_path))
    assert os.listdir(tmp_path) == []
    run.bare.delete_adapters("default")
    with pytest.raises(ValueError, match="no LoRA adapter.*add_adapter"):
        run.save_hook([run.bare], [], str(tmp_path))


def test_importing_the_file_is_light_and_needs_nothing_else_of_the_kit(tmp_path):
    shutil.copy(patch_sana.__file__, tmp_path)
    code = "import sys, patch_sana; print([m for m in ('torch', 'peft', 'diffusers', 'sana_kit') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------------------------------
# DeepSpeed, two processes
# ---------------------------------------------------------------------------------------------------------------------
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch_deepspeed(folder, command, zero_stage=2, timeout=600):
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
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        + ["--main_process_port", str(free_port())]
        + [str(part) for part in command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def test_zero2_engine_and_adapter_file(tiny_model, tmp_path):
    pytest.importorskip("deepspeed")
    output = launch_deepspeed(tmp_path, [__file__, tiny_model, tmp_path / "out"])
    print(output)
    assert sorted(re.findall(r"rank (\d) is content", output)) == ["0", "1"]


def worker(model, out):
    """What each of the two ranks of `test_zero2_engine_and_adapter_file` does."""
    import torch
    import torch.distributed as dist
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, gather_object

    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    assert accelerator.num_processes == 2 and accelerator.distributed_type.name == "DEEPSPEED"
    rank, out = accelerator.process_index, Path(out)
    accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    written = []
    write_adapter = patch_sana.write_adapter
    patch_sana.write_adapter = lambda folder, *rest: (written.append(str(folder)), write_adapter(folder, *rest))

    seen = []
    run = Run(model, accelerator=accelerator, dtype=torch.bfloat16)
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: seen.append((len(models), weights)))
    accelerator.register_load_state_pre_hook(lambda models, folder: seen.append(models))

    def masters():
        return [part.detach().clone() for part in run.transformer.optimizer.single_partition_of_fp32_groups]

    def on_main(action):
        accelerator.wait_for_everyone()  # until every rank has read what is changed now
        if accelerator.is_main_process:
            action()
        accelerator.wait_for_everyone()

    def refusal(folder, **kwargs):
        try:
            accelerator.load_state(str(folder), **kwargs)
        except ValueError as error:
            return str(error)
        raise AssertionError(f"{folder} was loaded")

    # Saved once, by the main process, the live bf16 weights and nothing of the base.
    run.train(range(3), rank)
    run.save(out / "a")
    assert gather_object([len(written)]) == [1, 0]
    assert seen == [(1, [])]
    weights_a, masters_a = run.weights(), masters()
    tensors, lora_config, base = patch_sana.read_adapter(out / "a")
    assert same(tensors, weights_a) and {w.dtype for w in tensors.values()} == {torch.bfloat16}
    assert len(tensors) == 24 and all(".lora_" in key for key in tensors)
    assert any(not torch.equal(m, m.to(torch.bfloat16).float()) for m in masters_a), "masters hold more than bf16"

    # Going on and coming back restores weights and masters; the hook sees no model and changes nothing.
    run.train(range(3, 5), rank)
    run.save(out / "b")
    assert not same(run.weights(), weights_a)
    accelerator.load_state(str(out / "a"))
    assert seen[-1] == []
    assert same(run.weights(), weights_a)
    assert all(torch.equal(x, y) for x, y in zip(masters(), masters_a, strict=True))

    # Without the optimizer state DeepSpeed makes the masters from the weights; file and engine agree.
    accelerator.load_state(str(out / "a"), load_optimizer_states=False)
    assert same(run.weights(), weights_a)
    assert all(torch.equal(x, y.to(torch.bfloat16).float()) for x, y in zip(masters(), masters_a, strict=True))

    # Without the frozen base, which is what our trainer does.
    run.save(out / "small", exclude_frozen_parameters=True)
    accelerator.load_state(str(out / "small"), load_module_strict=False)
    assert same(run.weights(), weights_a)
    engine_file = "pytorch_model/mp_rank_00_model_states.pt"
    assert (out / "small" / engine_file).stat().st_size < (out / "a" / engine_file).stat().st_size / 2

    # An adapter file of another run, in one tensor.
    key = sorted(tensors)[5]
    changed = {**tensors, key: tensors[key] + 1}
    on_main(lambda: (shutil.copytree(out / "a", out / "x"), write_adapter(out / "x", changed, lora_config, base)))
    message = refusal(out / "x")
    assert "1 of 24 tensors differ from what the DeepSpeed engine loaded" in message and key in message, message

    # The whole file of another step.
    on_main(lambda: shutil.copy(out / "b" / ADAPTER, out / "x" / ADAPTER))
    assert "tensors differ from what the DeepSpeed engine loaded" in refusal(out / "x")

    # The optimizer state of another step: the next step would replace the weights that were loaded.
    def mix():
        shutil.copy(out / "a" / ADAPTER, out / "x" / ADAPTER)
        for path in (out / "b" / "pytorch_model").glob("*optim_states.pt"):
            shutil.copy(path, out / "x" / "pytorch_model")

    on_main(mix)
    message = refusal(out / "x")
    assert "float32 masters of this rank do not round to the live weights" in message, message
    accelerator.load_state(str(out / "x"), load_optimizer_states=False)
    assert same(run.weights(), weights_a)

    # Another rank, missing and unexpected keys, another base: all named.
    odd = {"transformer.odd.lora_A.weight": torch.zeros(1, 1), **tensors, key: torch.zeros(3, 3)}
    gone = sorted(tensors)[7]
    del odd[gone]
    elsewhere = {**base, "name": "elsewhere", "config": {**base["config"], "num_layers": 7}}
    on_main(lambda: write_adapter(out / "x", odd, {**lora_config, "r": 9}, elsewhere))
    message = refusal(out / "x", load_optimizer_states=False)
    for part in ("r 9 in the file, 4 here", "transformer.odd.lora_A.weight", gone, f"{key} (3, 3)", "elsewhere"):
        assert part in message, (part, message)
    assert "num_layers 7 in the file, 2 here" in message, message

    # Cut off: no adapter; no optimizer state; no engine at all.
    on_main(lambda: os.truncate(out / "x" / ADAPTER, 500))
    assert "not a whole safetensors file" in refusal(out / "x")
    on_main(lambda: os.unlink(out / "x" / ADAPTER))
    assert "No LoRA weights at" in refusal(out / "x")
    on_main(lambda: (shutil.copy(out / "a" / ADAPTER, out / "x" / ADAPTER), shutil.copytree(out / "a", out / "y")))
    on_main(lambda: [path.unlink() for path in (out / "x" / "pytorch_model").glob("*optim_states.pt")])
    for folder in ("x", "y"):  # y: no engine state at all. DeepSpeed raises before the hooks run.
        on_main(lambda folder=folder: shutil.rmtree(out / "y" / "pytorch_model") if folder == "y" else None)
        try:
            accelerator.load_state(str(out / folder))
        except (FileNotFoundError, ValueError, AssertionError) as error:
            print(f"rank {rank}, {folder}: {type(error).__name__}: {error}", flush=True)
        else:
            raise AssertionError(f"{folder} was loaded")
    # A hook called by itself says what is wrong.
    run.train(range(7, 8), rank)
    try:
        run.load_hook([], str(out / "y"))
    except ValueError as error:
        assert "there is no DeepSpeed engine state" in str(error) and "tensors differ" in str(error), error
    else:
        raise AssertionError("the hook accepted a checkpoint without engine state")
    accelerator.wait_for_everyone()

    print(f"rank {rank} is content", flush=True)
    dist.destroy_process_group()


def patched_fake(folder):
    folder.mkdir(exist_ok=True)
    trainer = folder / TRAINER
    shutil.copy(FAKE, trainer)
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


# ---------------------------------------------------------------------------------------------------------------------
# The patch tool
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def trainer(tmp_path):
    folder = tmp_path / "dreambooth"
    folder.mkdir()
    path = folder / TRAINER
    shutil.copy(FAKE, path)
    path.chmod(0o754)
    return path


def tree(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mode) for path in sorted(folder.iterdir())}


def check_patch_cycle(trainer, capsys):
    """Dry run, patch, patch again, revert: what each writes, keeps and restores."""
    before = tree(trainer.parent)
    assert patch_sana.main([str(trainer), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert tree(trainer.parent) == before
    removed, added = (re.findall(rf"^\{sign}(?!\{sign})(.*)$", shown, re.MULTILINE) for sign in "-+")
    stripped = [line.strip() for line in added]
    assert [line.strip() for line in removed] == [
        "from accelerate import Accelerator",
        "vae.to(dtype=torch.float32)",
        "accelerator.register_save_state_pre_hook(save_model_hook)",
        "accelerator.register_load_state_pre_hook(load_model_hook)",
        "if accelerator.is_main_process:",
        "if args.checkpoints_total_limit is not None:",
    ]
    for line in (
        "from accelerate import Accelerator, DistributedType",
        "from patch_sana import create_load_model_hook, create_save_model_hook",
        "vae.to(dtype=torch.bfloat16)  # patch_sana: was torch.float32",
        "create_save_model_hook(accelerator=accelerator, unwrap_model=unwrap_model, transformer=transformer)",
        "if accelerator.is_main_process or accelerator.distributed_type == DistributedType.DEEPSPEED:",
        "if args.checkpoints_total_limit is not None and accelerator.is_main_process:",
        "accelerator.wait_for_everyone()  # patch_sana: no rank makes the new folder before old ones are pruned",
        'accelerator.print("")',
    ):
        assert stripped.count(line) == 1, line

    assert patch_sana.main([str(trainer)]) == 0
    patched = tree(trainer.parent)
    name = trainer.name
    assert set(patched) == {*before, "patch_sana.py", f"{name}.orig"}
    assert patched[f"{name}.orig"] == before[name]
    assert patched[name][1] == before[name][1] and patched[name][0] != before[name][0]
    assert patched["patch_sana.py"][0] == Path(patch_sana.__file__).read_bytes()
    compile(patched[name][0], name, "exec")

    capsys.readouterr()
    assert patch_sana.main([str(trainer)]) == 0
    assert "already patched" in capsys.readouterr().out
    assert tree(trainer.parent) == patched

    assert patch_sana.main([str(trainer), "--revert", "--dry-run"]) == 0
    assert tree(trainer.parent) == patched
    assert patch_sana.main([str(trainer), "--revert"]) == 0
    assert tree(trainer.parent) == before


def test_patch_dry_run_idempotent_revert(trainer, capsys):
    check_patch_cycle(trainer, capsys)


def test_patch_keeps_windows_line_endings(trainer, capsys):
    trainer.write_bytes(trainer.read_bytes().replace(b"\n", b"\r\n"))
    assert patch_sana.main([str(trainer)]) == 0
    patched = trainer.read_bytes()
    assert patched.count(b"\n") == patched.count(b"\r\n") and b"create_save_model_hook" in patched
    assert patch_sana.main([str(trainer), "--revert"]) == 0
    assert trainer.read_bytes() == FAKE.read_bytes().replace(b"\n", b"\r\n")


def refused_patch(trainer, capsys, *flags):
    before = tree(trainer.parent)
    assert patch_sana.main([str(trainer), *flags]) == 1
    assert tree(trainer.parent) == before
    message = capsys.readouterr().err
    assert str(trainer) in message and "was not changed" in message
    return message


@pytest.mark.parametrize("edit", patch_upstream.EDITS, ids=lambda edit: edit.purpose.split(",")[0])
def test_each_missing_or_doubled_anchor_is_named(trainer, capsys, edit):
    source = FAKE.read_text()
    match = re.search(edit.pending, source, re.MULTILINE)
    trainer.write_text(source[: match.start()] + "\n" + source[match.end() :])
    message = refused_patch(trainer, capsys)
    assert f"`{edit.anchor}` is missing" in message and message.count("\n  - ") == 1
    following = source[match.end() :].split("\n", 2)[: 2 if "(?=" in edit.pending else 0]
    trainer.write_text(source + "\n" + match.group() + "\n".join(following) + "\n")
    message = refused_patch(trainer, capsys)
    assert f"`{edit.anchor}` is there 2 times" in message


def test_another_file_is_refused_with_every_anchor(trainer, capsys):
    trainer.write_text("print('something else')\n")
    message = refused_patch(trainer, capsys)
    for edit in patch_upstream.EDITS:
        assert f"`{edit.anchor}` is missing" in message
    assert "SanaTransformer2DModel is missing" in message and "unwrap_model is missing" in message
    trainer.write_bytes(b"\xff\xfe\x00binary")
    assert "not UTF-8" in refused_patch(trainer, capsys)


def by_hand(source):
    """The reference kit's manual, followed with an editor, and the barrier that it lacks."""
    for old, new in (
        ("import Accelerator\n", "import Accelerator, DistributedType\n# from accelerate import Accelerator\n"),
        ("if is_wandb", "from patch_sana import create_save_model_hook, create_load_model_hook\n\nif is_wandb"),
        ("    vae.to(dtype=torch.float32)", "    vae.to(dtype=torch.bfloat16)\n    # vae.to(dtype=torch.float32)"),
        (
            "    accelerator.register_save_state_pre_hook(save_model_hook)\n"
            "    accelerator.register_load_state_pre_hook(load_model_hook)\n",
            "    save_Model_Hook = create_save_model_hook(\n          accelerator=accelerator,\n"
            "          unwrap_model=unwrap_model,\n          transformer=transformer,\n    )\n"
            "    load_Model_Hook = create_load_model_hook(\n          accelerator=accelerator,\n"
            "          unwrap_model=unwrap_model,\n          transformer=transformer,\n          args=args,\n    )\n"
            "    accelerator.register_save_state_pre_hook(save_Model_Hook)\n"
            "    accelerator.register_load_state_pre_hook(load_Model_Hook)\n"
            "    # accelerator.register_save_state_pre_hook(save_model_hook)\n",
        ),
        (
            "if accelerator.is_main_process:\n                    if global_step % args.ch",
            "if accelerator.is_main_process or accelerator.distributed_type == DistributedType.DEEPSPEED:\n"
            "                    if global_step % args.ch",
        ),
        (
            "                        save_path = ",
            "                        accelerator.wait_for_everyone()\n                        save_path = ",
        ),
        ("total_limit is not None:", "total_limit is not None and accelerator.is_main_process:"),
        (
            "args.max_train_steps:\n                break\n",
            'args.max_train_steps:\n                break\n            accelerator.print("")\n',
        ),
    ):
        assert source.count(old) >= 1, old
        source = source.replace(old, new, 1) if "is_wandb" not in old else source.replace(f"\n{old}", f"\n{new}", 1)
    return source


def test_edits_made_by_hand_are_recognised_and_completed(trainer, capsys):
    trainer.write_text(by_hand(FAKE.read_text()))
    edited = trainer.read_bytes()
    assert patch_sana.main([str(trainer)]) == 0
    assert trainer.read_bytes() == edited and not Path(f"{trainer}.orig").exists()
    assert (trainer.parent / "patch_sana.py").exists()

    half = by_hand(FAKE.read_text()).replace("not None and accelerator.is_main_process:", "not None:")
    half = half.replace("                        accelerator.wait_for_everyone()\n", "")
    trainer.write_text(half)
    assert patch_sana.main([str(trainer)]) == 0
    completed = trainer.read_text()
    assert len(completed.splitlines()) == len(half.splitlines()) + 2
    assert "total_limit is not None and accelerator.is_main_process:" in completed
    assert completed.count("accelerator.wait_for_everyone()  # patch_sana") == 1
    assert patch_sana.main([str(trainer), "--revert"]) == 0
    assert trainer.read_text() == half


def test_nothing_that_is_kept_or_edited_is_lost(trainer, capsys):
    original = Path(f"{trainer}.orig")
    original.write_text("an older diffusers\n")
    assert f"{original} is there already" in refused_patch(trainer, capsys)
    assert "was changed after it was patched" not in capsys.readouterr().err
    original.unlink()

    assert f"no {original}" in refused_patch(trainer, capsys, "--revert")
    assert patch_sana.main([str(trainer)]) == 0
    trainer.write_text(trainer.read_text() + "# my own line\n")
    assert "was changed after it was patched" in refused_patch(trainer, capsys, "--revert")


def test_another_patch_sana_beside_the_trainer_comes_back(trainer, capsys):
    beside = trainer.parent / "patch_sana.py"
    beside.write_text("# the reference kit's\n")
    before = tree(trainer.parent)
    assert patch_sana.main([str(trainer)]) == 0
    assert beside.read_bytes() == Path(patch_sana.__file__).read_bytes()
    assert patch_sana.main([str(trainer), "--revert"]) == 0
    assert tree(trainer.parent) == before


def test_patch_run_from_beside_the_trainer_and_through_a_link(trainer, tmp_path):
    beside = trainer.parent / "patch_sana.py"
    shutil.copy(patch_sana.__file__, beside)
    kit = {**os.environ, "PYTHONPATH": str(Path(patch_sana.__file__).parent)}  # a copied kit has sana_kit beside it
    link = tmp_path / "link.py"
    link.symlink_to(trainer)
    before = tree(trainer.parent)
    for flags, code in (([], 0), ([], 0), (["--revert"], 0), (["--revert"], 1)):
        done = subprocess.run([sys.executable, beside, link, *flags], capture_output=True, text=True, env=kit)
        assert done.returncode == code, done.stderr
    assert link.is_symlink() and tree(trainer.parent).keys() - {"__pycache__"} == before.keys()
    assert tree(trainer.parent) == before


def test_full_disk_while_patching_changes_nothing(trainer, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        message = refused_patch(trainer, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.strerror(errno.EFBIG) in message


def test_wrong_paths(trainer, tmp_path, capsys):
    for path, part in ((trainer.parent, f"did you mean {trainer}"), (tmp_path / "no.py", "there is no file")):
        with pytest.raises(SystemExit) as caught:
            patch_sana.main([str(path)])
        assert caught.value.code == 2 and part in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# diffusers' real trainers
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(params=[REFERENCE_COMMIT, "HEAD"], ids=["reference", "today"])
def upstream_trainer(request, tmp_path):
    checkout = os.environ.get("SANA_DIFFUSERS_CHECKOUT")
    if not checkout:
        pytest.skip("SANA_DIFFUSERS_CHECKOUT is not set: give the path of a git checkout of huggingface/diffusers")
    show = subprocess.run(
        ["git", "-C", checkout, "show", f"{request.param}:examples/dreambooth/{TRAINER}"], capture_output=True
    )
    if show.returncode:
        pytest.fail(f"git show in SANA_DIFFUSERS_CHECKOUT={checkout}: {show.stderr.decode()}")
    folder = tmp_path / "dreambooth"
    folder.mkdir()
    (folder / TRAINER).write_bytes(show.stdout)
    return folder / TRAINER


def test_patch_upstream_trainers(upstream_trainer, capsys):
    check_patch_cycle(upstream_trainer, capsys)


STAND_IN_TRANSFORMS = '''
"""The few transforms that diffusers' trainer uses, on PIL images: torchvision has no build for every torch."""
import enum, random
import numpy, torch
from PIL import Image, ImageOps

class InterpolationMode(enum.Enum):
    BILINEAR = 2

class Compose:
    def __init__(self, parts): self.parts = parts
    def __call__(self, value):
        for part in self.parts: value = part(value)
        return value

class Resize:
    def __init__(self, size, interpolation): self.size = size
    def __call__(self, image):
        scale = self.size / min(image.size)
        return image.resize([round(side * scale) for side in image.size], Image.BILINEAR)

class CenterCrop:
    def __init__(self, size): self.size = size
    def __call__(self, image): return ImageOps.fit(image, (self.size, self.size))

class RandomCrop(CenterCrop):
    @staticmethod
    def get_params(image, size):
        height, width = size
        return random.randint(0, image.height - height), random.randint(0, image.width - width), height, width

class RandomHorizontalFlip:
    def __init__(self, p): pass
    def __call__(self, image): return ImageOps.mirror(image)

class ToTensor:
    def __call__(self, image): return torch.from_numpy(numpy.array(image)).permute(2, 0, 1) / 255

class Normalize:
    def __init__(self, mean, std): self.mean, self.std = mean[0], std[0]
    def __call__(self, tensor): return (tensor - self.mean) / self.std
'''

GLOO_RUNNER = '''
"""Run a script as if started by itself, with gloo for DeepSpeed on hosts without a device, which upstream does not "
"pass."""
import importlib.util, os, runpy, sys
import accelerate
from accelerate.utils import InitProcessGroupKwargs

original = accelerate.Accelerator.__init__
def with_gloo(self, *args, **kwargs):
    kwargs["kwargs_handlers"] = [*(kwargs.get("kwargs_handlers") or []), InitProcessGroupKwargs(backend="gloo")]
    original(self, *args, **kwargs)
accelerate.Accelerator.__init__ = with_gloo
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
import diffusers, transformers.image_utils  # they look for torchvision themselves and must not find the stand-in
if importlib.util.find_spec("torchvision") is None:
    sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "stand_in"))
runpy.run_path(sys.argv[0], run_name="__main__")
'''


@pytest.mark.slow
def test_patched_upstream_trainer_trains_saves_and_resumes_under_zero2(upstream_trainer, tiny_model, tmp_path):
    pytest.importorskip("deepspeed")
    from diffusers import SanaPipeline

    transforms = tmp_path / "stand_in" / "torchvision" / "transforms"
    transforms.mkdir(parents=True)
    (transforms.parent / "__init__.py").write_text("")
    (transforms / "__init__.py").write_text(STAND_IN_TRANSFORMS)
    (transforms / "functional.py").write_text(
        "def crop(image, top, left, height, width):\n    return image.crop((left, top, left + width, top + height))\n"
    )
    runner = tmp_path / "run_with_gloo.py"
    runner.write_text(GLOO_RUNNER)
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
    command = [runner, upstream_trainer] + [f"--{name}={value}" for name, value in flags.items()]
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


if __name__ == "__main__":
    worker(*sys.argv[1:])
