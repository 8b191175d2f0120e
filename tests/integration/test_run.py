"""A run as its user sees it: plan, settings in a file, what is told at the end, a start that has nothing to do."""

import html
import json
import re
import shutil

import pytest
import tiny
import yaml
from helpers import adapter_weights, events, run_trainer, same
from safetensors import safe_open

from sana_kit.environment import KIT, python_word, short_path
from sana_kit.errors import EncodingStopped, UserError
from sana_kit.training.config import parse_args
from sana_kit.training.prior import generate_class_images


@pytest.fixture(scope="module")
def flags(tiny_model, image_folder):
    return [
        f"--pretrained_model_name_or_path={tiny_model}",
        f"--instance_data_dir={image_folder}",
        "--instance_prompt=a drawing",
        "--resolution=64",
        "--train_batch_size=2",
        "--report_to=none",
        "--learning_rate=1e-2",
        "--complex_human_instruction=none",
    ]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    """The output folder of a run of two updates."""
    output = tmp_path_factory.mktemp("run") / "out"
    more = ["--max_train_steps=2", "--checkpointing_steps=1", "--seed=3"]
    assert run_trainer(*flags, *more, f"--output_dir={output}") == 0
    return output


def contents(folder):
    """{path: (bytes, time of change)} of everything but the lock, and the store, which notes what was used when."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    files = [path for path in files if "encodings" not in path.relative_to(folder).parts]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def test_a_finished_run_started_again_leaves_everything_as_it_is(flags, finished, capsys):
    before = contents(finished)
    more = ["--max_train_steps=2", "--checkpointing_steps=1", "--resume_from_checkpoint=latest"]
    assert run_trainer(*flags, *more, f"--output_dir={finished}") == 0
    assert contents(finished) == before
    assert "this run is finished" in capsys.readouterr().err


def test_a_finished_run_without_a_checkpoint_at_its_end_is_left_as_it_is_too(flags, tmp_path, capsys):
    """Its last checkpoint is older, or there is none; naming that checkpoint goes back to it."""
    output = tmp_path / "out"
    run = [*flags, "--max_train_steps=3", "--seed=3", f"--output_dir={output}"]
    for every in ("2", "9"):
        shutil.rmtree(output, ignore_errors=True)
        assert run_trainer(*run, f"--checkpointing_steps={every}") == 0
        before = contents(output)
        assert run_trainer(*run, f"--checkpointing_steps={every}", "--resume_from_checkpoint=latest") == 0
        assert contents(output) == before and "this run is finished" in capsys.readouterr().err
        if every == "9":
            with pytest.raises(UserError, match="after 3 updates, and no checkpoint to go on from"):
                run_trainer(*run, "--max_train_steps=4", "--resume_from_checkpoint=latest")
            assert adapter_weights(output)
        if every == "2":
            assert run_trainer(*run, "--checkpointing_steps=2", "--resume_from_checkpoint=checkpoint-2") == 0
            assert contents(output) != before and "this run is finished" not in capsys.readouterr().err


def test_a_run_that_ended_before_its_result_was_written_writes_it(flags, finished, tmp_path):
    """Killed between the last checkpoint and the end; and a result that belongs to a shorter run is written anew."""
    whole = tmp_path / "whole"
    shutil.copytree(finished, whole)
    shorter = json.loads((whole / "summary.json").read_text()) | {"global_step": 1}
    (whole / "summary.json").write_text(json.dumps(shorter))
    shutil.copy(whole / "checkpoint-1" / "pytorch_lora_weights.safetensors", whole)
    more = ["--max_train_steps=2", "--checkpointing_steps=1", "--resume_from_checkpoint=latest"]
    assert run_trainer(*flags, *more, f"--output_dir={whole}") == 0
    assert same(adapter_weights(whole), adapter_weights(finished))


def test_the_end_tells_what_was_made_and_how_to_draw_with_it(flags, tmp_path, tiny_model, capsys):
    assert run_trainer(*flags, "--max_train_steps=1", f"--output_dir={tmp_path / 'o'}") == 0
    lines = capsys.readouterr().out.strip().splitlines()
    page = html.unescape((tmp_path / "o" / "report.html").read_text())
    command = lines[-1].removeprefix("draw with it: ")
    assert f"Draw with it: {command}</p>" in re.sub("</?span>|</?code[^>]*>", "", page)
    assert lines[-5].startswith("steps 1, ")
    assert lines[-4].endswith("pytorch_lora_weights.safetensors") and "report.html" in lines[-3]
    script = short_path(KIT / "infer_sana_text2img_lora_bf16.py")
    assert lines[-1] == (
        f"draw with it: {python_word()} {script} --model_path {tiny_model}"
        f" --lora_weights {tmp_path / 'o'} --prompt 'a drawing'"
    )


def test_the_settings_of_a_run_start_it_again(flags, finished, tmp_path):
    """run.yaml holds no secret and nothing of one start; the command line overrides it."""
    saved = yaml.safe_load((finished / "run.yaml").read_text())
    assert saved["seed"] == 3 and saved["max_train_steps"] == 2 and saved["learning_rate"] == 0.01
    assert not {"config", "hub_token", "resume_from_checkpoint", "overwrite_output_dir", "dry_run"} & set(saved)
    assert run_trainer(f"--config={finished / 'run.yaml'}", f"--output_dir={tmp_path / 'again'}") == 0
    assert same(adapter_weights(finished), adapter_weights(tmp_path / "again"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("resolutoin: 64\n", "there is no setting 'resolutoin'. Did you mean resolution?"),
        ("- 1\n", "holds no settings"),
        ("{", "cannot be read"),
    ],
)
def test_a_file_of_settings_that_cannot_be_used_is_named(tmp_path, text, told, capsys):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        parse_args([f"--config={tmp_path / 'run.yaml'}"])
    assert stop.value.code == 2 and told in capsys.readouterr().err


def test_the_configuration_is_frozen():
    config = parse_args(["--pretrained_model_name_or_path=x"])
    with pytest.raises(AttributeError):
        config.data.resolution = 3
    with pytest.raises(AttributeError):
        config.resolution = 3
    assert config.replaced(resolution=3).resolution == 3 and config.resolution == 512


def test_a_dry_run_tells_the_plan_and_writes_nothing(flags, tmp_path, capsys):
    more = ["--max_train_steps=7", "--dry_run", "--dry_run_processes=8", "--chip=910B", "--with_prior_preservation"]
    more += [f"--class_data_dir={tmp_path / 'class'}", "--class_prompt=a square", "--num_class_images=20"]
    more += ["--memory_budget=8"]
    assert run_trainer(*flags, *more, f"--output_dir={tmp_path / 'o'}") == 0
    told = capsys.readouterr().out
    assert "updates: 7 of 16 images (2 per device x 1 accumulation x 8 processes), 5.60 epochs" in told
    assert "(+ 20 of the class)" in told and "h on 8 x 910b" in told.lower() and "activations: " in told
    assert "recomputation: 0 of " in told and "of the budget of 8 GB" in told
    assert not (tmp_path / "o").exists() and not (tmp_path / "class").exists()


def test_a_dry_run_finds_the_problems_of_a_run(flags, tmp_path):
    with pytest.raises(UserError, match="--resolution=63: must be a multiple"):
        run_trainer(*flags, "--resolution=63", "--dry_run", f"--output_dir={tmp_path}")


def test_the_adapter_says_how_it_was_trained(flags, finished):
    """Issue of drawing with another instruction, or at another size, than the training had."""
    for folder, steps in ((finished, 2), (finished / "checkpoint-1", 1)):
        with safe_open(folder / "pytorch_lora_weights.safetensors", framework="pt") as file:
            metadata = file.metadata()
        about = json.loads(metadata["sana_kit"])
        assert about["instruction"] is None and about["resolution"] == 64 and about["steps"] == steps
        assert metadata["ss_steps"] == str(steps)


def test_an_epoch_with_class_images_is_one_of_the_larger_set(flags, tmp_path):
    """5 of the one, 20 of the other kind: 20 samples, as diffusers counts, so that every class image is seen."""
    few, many = (
        tiny.write_image_folder(tmp_path / "few", count=5),
        tiny.write_image_folder(tmp_path / "many", count=20),
    )
    more = ["--with_prior_preservation", f"--class_data_dir={many}", "--class_prompt=a square"]
    more += ["--num_class_images=20", "--train_batch_size=1", "--logging_steps=5", f"--instance_data_dir={few}"]
    words = [flag for flag in flags if "instance_data_dir" not in flag]
    assert run_trainer(*words, *more, f"--output_dir={tmp_path / 'o'}") == 0
    (last,) = events(tmp_path / "o", "end")
    assert last["summary"]["global_step"] == 20
    assert [step["epoch"] for step in events(tmp_path / "o", "step")] == [0.25, 0.5, 0.75, 1.0]


class _Stop:
    """A stop that is asked for after the first image."""

    requested = False

    def __init__(self, folder):
        self.folder = folder

    def __getattribute__(self, name):
        if name == "requested":
            return len(list(object.__getattribute__(self, "folder").glob("*.png"))) > 0
        return object.__getattribute__(self, name)

    def agreed(self):
        return self.requested


def test_class_images_stop_after_the_one_at_hand(flags, tiny_model, tmp_path):
    from sana_kit.distributed import Ranks
    from sana_kit.models.folder import find_model

    config = parse_args(
        [*flags, "--with_prior_preservation", f"--class_data_dir={tmp_path / 'class'}", "--class_prompt=a square",
         "--num_class_images=4", "--sample_batch_size=1", "--validation_inference_steps=1", "--seed=0",
         "--mixed_precision=no"]
    )  # fmt: skip
    base, _ = find_model(str(tiny_model))
    with pytest.raises(EncodingStopped):
        generate_class_images(config, base, None, Ranks.start("cpu"), _Stop(tmp_path / "class"))
    assert len(list((tmp_path / "class").glob("*.png"))) == 1


def test_crops_belong_to_the_image_unless_asked_and_stay_with_a_resume(tiny_model, tmp_path):
    """Without --seed, too, a second run finds all encodings; --crop_seed asks for others, which a resume keeps."""
    folder = tiny.write_image_folder(tmp_path / "images", count=4)
    flags = [f"--pretrained_model_name_or_path={tiny_model}", f"--instance_data_dir={folder}", "--resolution=64"]
    flags += ["--report_to=none", "--checkpointing_steps=1", f"--encodings_dir={tmp_path / 'store'}", "--random_flip"]
    flags += ["--instance_prompt=x", "--train_batch_size=1"]

    def shards():
        return sorted(path.name for path in (tmp_path / "store" / "latents").glob("*.safetensors"))

    assert run_trainer(*flags, "--max_train_steps=1", f"--output_dir={tmp_path / 'a'}") == 0
    first = shards()
    assert run_trainer(*flags, "--max_train_steps=1", f"--output_dir={tmp_path / 'b'}") == 0
    assert shards() == first
    output = f"--output_dir={tmp_path / 'c'}"
    assert run_trainer(*flags, "--max_train_steps=1", "--crop_seed=3", output) == 0
    asked = shards()
    assert len(asked) > len(first)
    assert run_trainer(*flags, "--max_train_steps=2", output, "--resume_from_checkpoint=latest") == 0
    assert shards() == asked and events(tmp_path / "c", "resume")[0]["config"]["crop_seed"] == 3
