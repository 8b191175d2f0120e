"""Optimizers, adapters and what is drawn of the data under ZeRO-2 with two processes: all runs share one launch."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
from helpers import KIT, SHORT_RUN, adapter_weights, launch, run_trainer, same
from helpers.shards import write_shards
from PIL import Image
from safetensors.torch import load_file

WORKER = "tests/distributed/workers/several_runs.py"
RUNS = {
    "schedulefree, LoRA+": ["--optimizer=schedulefree", "--lora_plus_ratio=4", "--upcast_before_saving"],
    "DoRA, rsLoRA": ["--use_dora", "--use_rslora", "--lora_layers=attention", "--upcast_before_saving"],
    "LoKr": ["--adapter_type=lokr", "--rank=2", "--lora_layers=attention+ffn", "--upcast_before_saving"],
    "LoHa": ["--adapter_type=loha", "--lora_layers=all", "--ema_decay=0.9"],
    "ControlNet": ["--train_mode=controlnet", "--control_edges"],
    "streaming": ["--streaming", "--stream_window=4", "--caption_column=txt", "--caption_dropout=0.2"],
    "AdamW, LoRA+, no decay": ["--lora_plus_ratio=4", "--no_decay_norms", "--adam_weight_decay=0.1"],
}


def flags_of(name, common, output):
    if name == "streaming":  # shards of 3, 1 and 4 images: the third update begins the second window
        shards = (
            next(Path(flag.partition("=")[2]) for flag in common if flag.startswith("--encodings_dir=")) / "shards"
        )
        if not shards.exists():
            write_shards(shards, [3, 1, 4])
        own = ("--data_sets=", "--instance_data_dir=", "--encodings_dir=", "--mask_outside=")
        common = [*(flag for flag in common if not flag.startswith(own)), f"--dataset_name={shards}"]
    if name == "ControlNet":  # one data set alone
        common = [flag for flag in common if not flag.startswith("--data_sets=")]
    return [*common, *RUNS[name], f"--output_dir={output}"]


@pytest.fixture(scope="module")
def common(tiny_model, tmp_path_factory):
    """Two data sets of other weights; every second image of one has several captions, one is drawn, and a mask."""
    folder = tiny.write_image_folder(tmp_path_factory.mktemp("data") / "images")
    for path in sorted(folder.glob("*.txt"))[::2]:
        path.write_text(f"{path.read_text()}\nsomething\na drawing of a square")
        image = Image.open(path.with_suffix(".png"))
        mask = Image.new("L", image.size)
        mask.paste(255, (0, 0, image.width // 2, image.height))
        mask.save(path.with_suffix(".mask.png"))
    other = tiny.write_image_folder(folder.with_name("other"), count=2)
    other = {"instance_data_dir": str(other), "weight": 1.5, "caption_prefix": "TOK, "}
    encodings = tmp_path_factory.mktemp("encodings")
    return [
        f"--pretrained_model_name_or_path={tiny_model}",
        f"--instance_data_dir={folder}",
        f"--data_sets={json.dumps(other)}",
        f"--encodings_dir={encodings}",
        *SHORT_RUN,
        "--mask_outside=0.1",
        "--train_batch_size=1",
    ]


@pytest.fixture(scope="module")
def launched(common, tmp_path_factory):
    """{name: (folder of the whole run, folder of the run that went on after its second update)}."""
    root = tmp_path_factory.mktemp("runs")
    found, runs = {}, []
    for number, name in enumerate(RUNS):
        whole, half = root / f"whole-{number}", root / f"half-{number}"
        runs.append([flags_of(name, common, whole), None])
        more = [*flags_of(name, common, half), "--resume_from_checkpoint=latest"]
        runs.append([more, str(whole / "checkpoint-2")])
        found[name] = whole, half
    (root / "runs.json").write_text(json.dumps(runs))
    done = launch(WORKER, root / "runs.json", processes=2, engine="zero", env={"PYTHONPATH": f"{KIT}:{KIT / 'tests'}"})
    assert done.returncode == 0, done.stderr[-4000:]
    return found


def result(folder):
    """The adapter or the ControlNet of a run or checkpoint."""
    file = folder / "controlnet" / "diffusion_pytorch_model.safetensors"
    return load_file(file) if file.exists() else adapter_weights(folder)


@pytest.mark.parametrize("name", RUNS)
def test_a_resume_under_zero2_is_the_run_to_the_bit(launched, name):
    whole, half = launched[name]
    assert same(result(whole), result(half))
    file = "checkpoint-4/optimizer.safetensors"
    assert same(load_file(whole / file), load_file(half / file))
    assert same(result(whole / "checkpoint-4"), result(half / "checkpoint-4"))


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_of_two_processes_goes_on_in_one(launched, common, name, tmp_path):
    """The same updates within the rounding of bf16: one process takes both images at once."""
    whole, _ = launched[name]
    shutil.copytree(whole / "checkpoint-2", tmp_path / "checkpoint-2")
    more = [*flags_of(name, common, tmp_path), "--train_batch_size=2", "--resume_from_checkpoint=latest"]
    assert run_trainer(*more) == 0
    before = result(whole / "checkpoint-2")
    after, here = result(whole), result(tmp_path)
    moved = sum((after[key].float() - before[key].float()).square().sum() for key in after).sqrt()
    apart = sum((after[key].float() - here[key].float()).square().sum() for key in after).sqrt()
    print(f"apart {apart / moved:.3f} of the way")
    assert apart < 0.2 * moved  # 0.05 to 0.13 was measured


def test_the_result_of_schedule_free_adamw_is_its_average(launched):
    whole, _ = launched["schedulefree, LoRA+"]
    state, written = load_file(whole / "checkpoint-4" / "optimizer.safetensors"), adapter_weights(whole)
    names = [key.removesuffix("|z") for key in state if key.endswith("|z")]
    assert len(names) == len(written) > 20
    for name in names:
        y, z = state[f"{name}|master"], state[f"{name}|z"]
        file = written[f"transformer.{name.replace('.default', '')}"]
        assert file.equal(y + (z - y) * (1 - 1 / 0.9)), name
