"""The hooks of patch_sana.py in one process, without DeepSpeed.

python -m pytest tests/unit/test_patch_sana.py
"""

import errno
import os
import re
import resource
from types import SimpleNamespace

import pytest
from helpers import same
from helpers.hooked_run import HookedRun, renew, reset_accelerate
from helpers.tiny import make_tiny_pipeline

import patch_sana

ADAPTER = patch_sana.ADAPTER_FILE


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps its state in the process: leave none for, and take none from, other tests."""
    reset_accelerate()
    yield
    reset_accelerate()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_round_trip_is_bit_exact_and_training_goes_on_the_same(tiny_model, tmp_path, precision):
    import torch
    from safetensors import safe_open

    dtype = getattr(torch, precision)
    first = HookedRun(tiny_model, dtype=dtype).train(range(3))
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

    run = HookedRun(tiny_model, rank=4, alpha=12).train(range(2))
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

    run = HookedRun(tiny_model, rank=2, alpha=6)
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

    first = HookedRun(tiny_model).train(range(2))
    checkpoint = first.save(tmp_path / "c")
    second = renew(tiny_model, mixed_precision="fp16", dtype=torch.float16)
    assert {w.dtype for w in second.weights().values()} == {torch.float16}
    second.load_hook([second.transformer], str(checkpoint))
    assert same(second.weights(), first.weights())
    assert second.bare.proj_out.weight.dtype == torch.float16


def test_weights_that_must_be_rounded_are_told(tiny_model, tmp_path, caplog):
    import torch

    first = HookedRun(tiny_model).train(range(2))
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

    plain = HookedRun(tiny_model)
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

    expected = patch_sana.read_adapter(HookedRun(tiny_model).save(tmp_path / "plain"))[0]
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

    first = HookedRun(tiny_model).train(range(1))
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
    checkpoint = HookedRun(tiny_model, rank=4, alpha=4).save(tmp_path / "c")
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

    first = HookedRun(tiny_model).train(range(2))
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

    checkpoint = HookedRun(tiny_model).save(tmp_path / "c")
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

    run = HookedRun(tiny_model)
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
    run = HookedRun(tiny_model)
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

    run = HookedRun(tiny_model)
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


def test_the_private_names_are_still_there():
    """What patch_sana.py relies on without a promise, besides what the tests above and the distributed ones run."""
    import inspect

    import torch

    assert hasattr(torch.compile(torch.nn.Linear(1, 1), backend="eager"), "_orig_mod")
    utils = pytest.importorskip("deepspeed.utils")
    assert "ds_id" in inspect.getsource(utils.safe_get_full_fp32_param)


def test_further_metadata_travels_with_the_file(tiny_model, tmp_path):
    run, written = HookedRun(tiny_model), []

    def metadata():
        written.append(1)
        return {"ss_steps": str(len(written))}

    hook = patch_sana.create_save_model_hook(run.accelerator, lambda model: model, run.bare, metadata)
    for number in (1, 2):
        hook([run.bare], [], str(tmp_path / str(number)))
        found = patch_sana.open_adapter(tmp_path / str(number) / ADAPTER)
        assert found.metadata["ss_steps"] == str(number)
        assert found.base_model["class"] == "SanaTransformer2DModel" and found.lora_config["r"] == 4
