"""Checkpoints of real runs of the trainer in this process: two runs in one folder, going back, gradients that are not
finite, every optimizer through save and resume.
"""

import json
import shutil
from importlib.util import find_spec

import pytest
import tiny
import torch
from helpers import adapter_weights, events, run_trainer, same
from safetensors.torch import load_file

from sana_kit.errors import CheckpointError
from sana_kit.training import checkpoint_folders as folders
from sana_kit.training.optimizers import OPTIMIZERS
from sana_kit.training.validation import Validator


@pytest.fixture(scope="module")
def encodings(tmp_path_factory):
    return tmp_path_factory.mktemp("encodings")


@pytest.fixture
def flags(tiny_model, image_folder, encodings):
    """A short run on six images; --output_dir is still needed."""
    return [
        f"--pretrained_model_name_or_path={tiny_model}",
        f"--instance_data_dir={image_folder}",
        f"--encodings_dir={encodings}",
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


def steps(output) -> list[int]:
    return [step for step, _ in folders.list_checkpoints(output)]


def state_of(folder) -> dict:
    return json.loads((folder / "trainer_state.json").read_text())


# ---------------------------------------------------------------------------------------------------------------------
# Two runs in one folder


@pytest.fixture
def used(flags, tmp_path):
    """A folder that holds checkpoint-20 and -30 of a finished run, and a finished adapter."""
    output = tmp_path / "out"
    assert run_trainer(*flags, f"--output_dir={output}", "--max_train_steps=30", "--checkpointing_steps=10") == 0
    shutil.rmtree(output / "checkpoint-10")
    return output


FRESH = ["--max_train_steps=12", "--checkpointing_steps=5", "--checkpoints_total_limit=2"]


def test_a_fresh_run_in_a_used_folder_is_refused_before_anything_and_nothing_is_touched(flags, used):
    before = {path: path.read_bytes() for path in used.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds 2 checkpoint.*checkpoint-20, checkpoint-30.*--overwrite_output_dir"):
        run_trainer(*flags, f"--output_dir={used}", *FRESH)
    assert {path: path.read_bytes() for path in used.rglob("*") if path.is_file()} == before


def test_overwriting_keeps_both_runs(flags, used, capsys):
    old = adapter_weights(used)
    assert run_trainer(*flags, f"--output_dir={used}", *FRESH, "--overwrite_output_dir") == 0
    assert steps(used) == [5, 10]
    (aside,) = used.glob("previous-*")
    assert steps(aside) == [20, 30] and same(adapter_weights(aside), old)
    # as it was asked for: said, and no warning in log and report
    assert f"INFO what lay in {used} was set aside in {aside.name}" in capsys.readouterr().err
    assert not [entry for entry in events(used, "warning") if "set aside" in entry["message"]]
    assert events(aside, "end") and len(events(used, "start")) == 1  # each log is of one run
    assert folders.find_checkpoint(used, "latest")[0].name == "checkpoint-10"
    ids = {state_of(folder / f"checkpoint-{step}")["run_id"] for folder, step in ((used, 5), (used, 10), (aside, 20))}
    assert len(ids) == 2


def test_going_back_sets_later_checkpoints_aside_and_prunes_only_what_it_wrote_itself(flags, used):
    more = ["--max_train_steps=30", "--checkpointing_steps=4", "--checkpoints_total_limit=1"]
    assert run_trainer(*flags, f"--output_dir={used}", *more, "--resume_from_checkpoint=checkpoint-20") == 0
    (aside,) = used.glob("later-*")
    assert steps(aside) == [30] and steps(used) == [28]
    assert any("set aside in later-" in entry["message"] for entry in events(used, "warning"))
    assert state_of(used / "checkpoint-28")["run_id"] == state_of(aside / "checkpoint-30")["run_id"]


def test_a_run_id_lives_through_resumes_and_the_sequence_grows(flags, tmp_path):
    run_trainer(*flags, f"--output_dir={tmp_path}", "--max_train_steps=2", "--checkpointing_steps=1")
    more = ["--max_train_steps=4", "--checkpointing_steps=1", "--resume_from_checkpoint=latest"]
    run_trainer(*flags, f"--output_dir={tmp_path}", *more)
    states = [state_of(tmp_path / f"checkpoint-{step}") for step in (1, 2, 3, 4)]
    assert len({state["run_id"] for state in states}) == 1
    assert [state["sequence"] for state in states] == [1, 2, 3, 4]


def test_a_checkpoint_of_format_1_resumes_to_the_bit(flags, tmp_path):
    """As the kit before run ids wrote it: the run's own seed decided the crops then, and still does after a resume."""
    whole, old = tmp_path / "whole", tmp_path / "old"
    more = ["--max_train_steps=4", "--checkpointing_steps=2", "--lora_dropout=0.1"]
    run_trainer(*flags, f"--output_dir={whole}", *more, "--crop_seed=0")
    shutil.copytree(whole / "checkpoint-2", old / "checkpoint-2")
    state = state_of(old / "checkpoint-2")
    for key in ("run_id", "sequence", "written", "loss_scale"):
        del state[key]
    state["run"]["pictures"] = state["run"].pop("images")
    group = {"lr": 1e-2, "weight_decay": 1e-4, "eps": 1e-8, "amsgrad": False}
    state["optimizer"] = {"class": "AdamW", "state": {"step": 2.0}, "groups": [group]}
    (old / "checkpoint-2" / "trainer_state.json").write_text(json.dumps({**state, "format": 1}))
    folders.write_manifest(old / "checkpoint-2")
    run_trainer(*flags, f"--output_dir={old}", *more, "--resume_from_checkpoint=latest", "--checkpoints_total_limit=1")
    assert same(adapter_weights(whole), adapter_weights(old))
    assert steps(old) == [4]  # the older one was of the same run, so its limit holds for it
    name = "optimizer.safetensors"
    assert same(load_file(whole / "checkpoint-4" / name), load_file(old / "checkpoint-4" / name))


# ---------------------------------------------------------------------------------------------------------------------
# What differs from the run that wrote the checkpoint


def test_a_resume_tells_what_has_changed_about_data_and_flags(flags, tmp_path):
    output, images = tmp_path / "out", tiny.write_image_folder(tmp_path / "images")
    flags = [flag for flag in flags if "instance_data_dir" not in flag] + [f"--instance_data_dir={images}"]
    run_trainer(*flags, f"--output_dir={output}", "--max_train_steps=2", "--checkpointing_steps=2")
    (images / "image_03.txt").write_text("another caption")
    more = ["--max_train_steps=3", "--resume_from_checkpoint=latest", "--center_crop"]
    more += ["--complex_human_instruction=default"]
    run_trainer(*flags, f"--output_dir={output}", *more)
    told = "\n".join(entry["message"] for entry in events(output, "warning"))
    assert "the captions are other ones than when the checkpoint was written" in told
    assert "center_crop was False when the checkpoint was written and is True now" in told
    assert "complex_human_instruction was none" in told

    (images / "image_03.txt").write_text("another caption")
    shutil.copy(images / "image_02.png", images / "image_03.png")
    before = len(events(output, "warning"))
    run_trainer(*flags, f"--output_dir={output}", *more[1:], "--max_train_steps=4")
    told = "\n".join(entry["message"] for entry in events(output, "warning")[before:])
    assert "are other ones than when the checkpoint was written" in told


@pytest.mark.parametrize("flag, words", [("--optimizer=adafactor", "optimizer"), ("--rank=8", "rank 4")])
def test_another_kind_of_run_is_refused_before_encoding(flags, tmp_path, flag, words, monkeypatch):
    run_trainer(*flags, f"--output_dir={tmp_path}", "--max_train_steps=1", "--checkpointing_steps=1")

    def refuse(*args, **kwargs):
        raise AssertionError("encoding began")

    monkeypatch.setattr("sana_kit.training.samples.encode", refuse)
    with pytest.raises(ValueError, match=f"checkpoint-1 was trained with {words}"):
        run_trainer(*flags, f"--output_dir={tmp_path}", "--resume_from_checkpoint=latest", flag)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients that are not finite, beside losses that are


@pytest.fixture
def bad_gradient(monkeypatch):
    """Let the gradients of some updates hold one NaN; the losses stay as they are."""
    from sana_kit.training import engine as module

    def install(*updates):
        seen, norm = [], module.gradient_norm

        def poisoned(parameters, max_norm):
            seen.append(1)
            if len(seen) in updates:
                parameters[-1].grad.view(-1)[0] = float("nan")
            return norm(parameters, max_norm)

        monkeypatch.setattr(module, "gradient_norm", poisoned)

    return install


def finite(folder) -> bool:
    return all(torch.isfinite(tensor).all() for tensor in adapter_weights(folder).values())


def test_a_bad_gradient_stops_the_run_and_no_checkpoint_holds_it(flags, tmp_path, bad_gradient):
    bad_gradient(5)
    more = [f"--output_dir={tmp_path}", "--max_train_steps=12", "--checkpointing_steps=3", "--logging_steps=100"]
    message = r"gradient is not finite \(loss \d.*at step 5, images \[.*Last good checkpoint: checkpoint-3"
    with pytest.raises(FloatingPointError, match=message):
        run_trainer(*flags, *more)
    assert steps(tmp_path) == [3] and finite(tmp_path / "checkpoint-3")


def test_a_bad_gradient_in_the_last_update_is_no_finished_run(flags, tmp_path, bad_gradient):
    bad_gradient(4)
    with pytest.raises(FloatingPointError, match="at step 4"):
        run_trainer(*flags, f"--output_dir={tmp_path}", "--max_train_steps=4")
    assert not (tmp_path / "pytorch_lora_weights.safetensors").exists()


def test_skipping_leaves_the_update_out_and_adams_count_with_it(flags, tmp_path, bad_gradient):
    bad_gradient(2, 3)
    more = [f"--output_dir={tmp_path}", "--max_train_steps=6", "--checkpointing_steps=6", "--on_nan=skip"]
    assert run_trainer(*flags, *more) == 0
    assert events(tmp_path, "end")[0]["summary"]["skipped_updates"] == 2
    assert state_of(tmp_path / "checkpoint-6")["optimizer"]["numbers"]["step"]["value"] == 4
    assert finite(tmp_path)
    told = [entry["message"] for entry in events(tmp_path, "warning")]
    assert [("at step 2" in told[0]), ("at step 3" in told[1])] == [True, True]


def test_too_many_skipped_updates_in_a_row_end_the_run(flags, tmp_path, bad_gradient):
    bad_gradient(*range(5, 100))
    more = [f"--output_dir={tmp_path}", "--max_train_steps=60", "--checkpointing_steps=4", "--on_nan=skip"]
    with pytest.raises(
        FloatingPointError, match=r"6 updates in a row were skipped.*Last good checkpoint: checkpoint-8"
    ):
        run_trainer(*flags, *more, "--max_skipped_updates=5")
    assert all(finite(folder) for _, folder in folders.list_checkpoints(tmp_path))


def test_weights_that_are_not_finite_are_never_saved(flags, tmp_path, monkeypatch):
    """However they came to be: here the optimizer itself spoils one."""
    from sana_kit.training.engine import Engine

    step, calls = Engine.step, []

    def spoiling(engine):
        step(engine)
        calls.append(1)
        if len(calls) == 4:
            with torch.no_grad():
                engine.named_parameters[3][1].view(-1)[0] = float("inf")

    monkeypatch.setattr(Engine, "step", spoiling)
    more = [f"--output_dir={tmp_path}", "--checkpointing_steps=2", "--logging_steps=100"]
    with pytest.raises(CheckpointError, match="holds values that are not finite.*untouched: checkpoint-2"):
        run_trainer(*flags, *more, "--max_train_steps=4")
    assert steps(tmp_path) == [2] and not [path for path in tmp_path.iterdir() if "partial" in path.name]
    calls.clear()
    more[0] = f"--output_dir={tmp_path / 'other'}"
    with pytest.raises(CheckpointError, match="the result was not written: 1 of"):
        run_trainer(*flags, more[0], "--max_train_steps=4", "--logging_steps=100")
    assert not (tmp_path / "other" / "pytorch_lora_weights.safetensors").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Every optimizer, every mode


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw"])
def test_every_optimizer_resumes_to_the_bit(flags, tmp_path, name):
    kind = OPTIMIZERS[name]
    if (kind.devices and "cpu" not in kind.devices) or (find_spec(kind.package) is None):
        pytest.skip(f"{name} cannot run here")
    more = [f"--optimizer={name}", f"--learning_rate={kind.learning_rate or 1e-3}"]
    if "8bit" in name:  # 8-bit moments begin at 4096 weights, more than this model's LoRA layers have
        more += ["--train_mode=full"]
    with torch.compiler.set_stance("force_eager"):  # torchao's step compiles for half a minute
        whole, _ = run_and_resume(flags, more, tmp_path)
    moments = load_file(whole / "checkpoint-4" / "optimizer.safetensors").values()
    assert any(tensor.dtype == torch.uint8 for tensor in moments) == ("8bit" in name)


def run_and_resume(flags, more, tmp_path):
    """(output folder of four updates, that of a run that goes on after the second), equal to the bit."""
    whole, half = tmp_path / "whole", tmp_path / "half"
    more = ["--max_train_steps=4", "--checkpointing_steps=2", *more]
    run_trainer(*flags, *more, f"--output_dir={whole}")
    shutil.copytree(whole / "checkpoint-2", half / "checkpoint-2")
    run_trainer(*flags, *more, f"--output_dir={half}", "--resume_from_checkpoint=latest")
    for folder in (whole, whole / "checkpoint-4"):
        files = [path.relative_to(folder) for path in folder.glob("*.safetensors")]
        files += [path.relative_to(folder) for path in folder.glob("transformer/*.safetensors")]
        assert files
        for file in files:
            assert same(load_file(folder / file), load_file(half / folder.relative_to(whole) / file)), file
    return whole, half


def test_schedule_free_adamw_draws_and_hands_out_its_average(flags, tmp_path, monkeypatch):
    """Validation in the middle changes no bit; images and result have the package's own average."""
    optimizer_class = pytest.importorskip("pytorch_optimizer").ScheduleFreeAdamW
    drawn = []
    draw = Validator._draw_mine

    def seen(self, bar):
        drawn.append({name: p.detach().clone() for name, p in self.engine.named_parameters})
        return draw(self, bar)

    monkeypatch.setattr(Validator, "_draw_mine", seen)
    more = ["--optimizer=schedulefree", "--lora_plus_ratio=4", "--validation_steps=1", "--num_validation_images=1"]
    more += ["--validation_prompt=a red square", "--validation_inference_steps=1", "--upcast_before_saving"]
    whole, _ = run_and_resume(flags, [*more, "--learning_rate=1e-2"], tmp_path)
    undisturbed = tmp_path / "undisturbed"
    run_trainer(*flags, *more, "--learning_rate=1e-2", "--max_train_steps=4", "--num_validation_images=0",
                f"--output_dir={undisturbed}")  # fmt: skip
    assert same(adapter_weights(whole), adapter_weights(undisturbed))
    state = load_file(whole / "checkpoint-4" / "optimizer.safetensors")
    kept, _ = state_of(whole / "checkpoint-4")["optimizer"]["groups"]
    assert kept["weight_sum"] > 0 and kept["train_mode" if "train_mode" in kept else "step"]
    shown, written = drawn[4], adapter_weights(whole)  # steps 0, 1, 2, 3 and the end of the first run
    for name, image_weight in shown.items():
        master = torch.nn.Parameter(state[f"{name}|master"].clone())
        own = optimizer_class([master], lr=1.0)
        own.state[master] = {"z": state[f"{name}|z"]}
        own.param_groups[0]["train_mode"] = True
        own.eval()
        file = written[f"transformer.{name.replace('.default', '')}"]
        assert torch.equal(file, image_weight) and torch.allclose(file, master, rtol=1e-5, atol=1e-7), name
        if "lora_B" in name:
            assert not torch.equal(file, state[f"{name}|master"])


def test_full_fine_tuning_writes_plain_names_under_a_dynamo_backend(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    more = ["--train_mode=full", "--max_train_steps=2", "--checkpointing_steps=1", "--learning_rate=1e-3"]
    assert run_trainer(*flags, *more, f"--output_dir={tmp_path}") == 0
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        tensors = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
        assert tensors and not [key for key in tensors if "_orig_mod" in key]
    names = load_file(tmp_path / "checkpoint-1" / "optimizer.safetensors")
    assert not [key for key in names if "_orig_mod" in key]
    from diffusers import SanaTransformer2DModel

    model, loading = SanaTransformer2DModel.from_pretrained(tmp_path / "transformer", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and model is not None
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert run_trainer(*flags, *more, f"--output_dir={tmp_path}", "--resume_from_checkpoint=latest") == 0


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"])
def test_foreign_engines_are_refused_at_start(flags, tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match="the accelerate config asks for .*distributed_type DEEPSPEED"):
        run_trainer(*flags, f"--output_dir={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_fp16_of_the_accelerate_config_is_refused_on_the_cpu(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    flags = [flag for flag in flags if "mixed_precision" not in flag]
    with pytest.raises(ValueError, match="--mixed_precision=fp16: fp16 needs an accelerator"):
        run_trainer(*flags, f"--output_dir={tmp_path / 'out'}")
