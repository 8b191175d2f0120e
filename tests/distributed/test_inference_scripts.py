"""The three inference scripts, launched as a user does: one, two and three processes, kills, a failing rank.

python -m pytest tests/distributed/test_inference_scripts.py
"""

import json
import sys

import pytest
from helpers import KIT, WITHOUT_TORCH, launch_command, run, start
from helpers.drawing import write_lora
from helpers.inferring import draw_here, images, infer, manifest, member_runs
from helpers.waiting import finish, kill, tree, until

SMALL = ("--height", 64, "--width", 96, "--num_inference_steps", 2, "--complex_human_instruction", "none")
JOBS = ("--prompt", "a red square", "--prompt", "a dog", "--seeds", 8, 23, 42)


@pytest.fixture(scope="module")
def base(tiny_model, tmp_path_factory):
    """An undisturbed run of JOBS in this process."""
    folder = tmp_path_factory.mktemp("base") / "out"
    assert infer(tiny_model, folder, *JOBS) == 0
    return folder


def test_single_device_script_is_the_same_run(base, tiny_model, run_script, tmp_path):
    """Without a launcher, from another folder, with its default output folder."""
    flags = ("--model_path", tiny_model, *SMALL, *JOBS)
    done = run_script("infer_sana_text2img_bf16.py", *flags, engine="python", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert images(tmp_path / "infer_result") == images(base)
    assert "images/s" in done.stdout and "it/s" in done.stdout


def test_two_processes_make_the_same_bytes(base, tiny_model, run_script, tmp_path):
    flags = ("--model_path", tiny_model, "--output_path", tmp_path / "out", *SMALL, *JOBS)
    done = run_script("infer_sana_text2img_distrib.py", *flags, processes=2, engine="ddp")
    assert done.returncode == 0, done.stderr
    assert images(tmp_path / "out") == images(base)
    assert list(manifest(tmp_path / "out")) == list(manifest(base))
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["world_size"] == 2 and summary["made"] == 6
    assert done.stdout.count("images/s") == 1  # the main process alone speaks


def test_three_processes_two_of_them_idle_with_all_inputs_and_groups(tiny_model, tiny_sprint, run_script, tmp_path):
    """Six images in groups of four are two groups: the third rank has nothing to do.

    LoRA, ControlNet, perturbed attention, init image and mask, all in one launch.
    """
    lora = write_lora(tiny_model, tmp_path / "lora")
    inputs = member_runs(tmp_path, tiny_model, tiny_sprint)["sana"]
    flags = (*inputs, "--lora_weights", lora, "--dtype", "bf16", "--seeds", 8, 23, 42, "--batch_size", 4)
    assert infer(tiny_model, tmp_path / "alone", *flags) == 0
    where = ("--output_path", tmp_path / "out")
    done = run_script("infer_sana_text2img_lora_bf16.py", *flags, *where, processes=3, engine="ddp")
    assert done.returncode == 0, done.stderr
    assert images(tmp_path / "out") == images(tmp_path / "alone") and len(images(tmp_path / "out")) == 6


def test_two_processes_draw_sprint_as_one_does(tiny_model, tiny_sprint, run_script, tmp_path):
    """Its steps draw noise anew, from the generator of each image; some images begin from others."""
    flags = member_runs(tmp_path, tiny_model, tiny_sprint)["sprint"]
    (alone,) = draw_here({"alone": flags}, tmp_path).values()
    where = ("--output_path", tmp_path / "two")
    done = run_script("infer_sana_text2img_distrib.py", *flags, *where, processes=2, engine="ddp")
    assert done.returncode == 0, done.stderr
    assert images(tmp_path / "two") == alone and len(set(alone.values())) == len(alone) == 6
    assert json.loads((tmp_path / "two/summary.json").read_text())["world_size"] == 2


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("raise", "the disk of rank 1 is gone"),
        ("kill", "SIGKILL"),
        ("apart", "ranks [1] do not see rank 0's folder"),
    ],
)
def test_a_ranks_failure_ends_the_run_with_its_error(tiny_model, run_script, tmp_path, fault, told):
    flags = ("--model_path", tiny_model, "--output_path", "out" if fault == "apart" else tmp_path / "out", *SMALL)
    env = {"FAULT": fault, "PLACE": str(tmp_path)}
    done = run_script(
        "tests/distributed/workers/faulty_inference.py", *flags, *JOBS, processes=2, engine="ddp", env=env
    )
    assert done.returncode != 0 and told in done.stderr
    assert not list(tmp_path.rglob("*-seed*.png")) or fault == "kill"


def test_a_killed_run_goes_on_where_it_was(tiny_model, run_script, tmp_path):
    """SIGKILL of launcher and ranks while images are written; the same command makes the rest, byte for byte."""
    jobs = ("--prompt", "a red square", "--prompt", "a dog", "--seeds", *range(60), "--num_inference_steps", 6)
    out = tmp_path / "out"
    flags = ["--model_path", tiny_model, "--output_path", out, *SMALL, *jobs]
    command = launch_command("infer_sana_text2img_distrib.py", *flags, processes=2, engine="ddp")
    with open(tmp_path / "log", "w") as log:
        run = start(command, log)
    until(lambda: len(images(out)) >= 5, run, tmp_path / "log")
    kill(tree(run.pid))
    finish(run)
    cut = images(out)
    assert 5 <= len(cut) < 120, (tmp_path / "log").read_text()
    assert infer(tiny_model, out, *jobs) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert 3 <= summary["kept"] <= len(cut) and summary["kept"] + summary["made"] == 120
    assert infer(tiny_model, tmp_path / "whole", *jobs) == 0
    assert images(out) == images(tmp_path / "whole")
    assert not list(out.glob(".manifest-rank*")) and not list(out.glob("*.tmp"))


@pytest.mark.parametrize("script", ["bf16", "lora_bf16", "distrib"])
def test_help_is_there_without_torch(script):
    """What makes it quick: nothing heavy is imported before the command line is read."""
    done = run([sys.executable, WITHOUT_TORCH, KIT / f"infer_sana_text2img_{script}.py", "--help"], fresh=True)
    assert done.returncode == 0 and "--lora_weights" in done.stdout, done.stderr


MODULES = ("convert", "doctor", "encode", "encodings", "flops", "launch", "overlay", "parity", "playground", "reports")


@pytest.mark.parametrize("module", MODULES)
def test_help_of_a_module_is_there_without_torch(module):
    done = run([sys.executable, WITHOUT_TORCH, f"sana_kit.{module}", "--help"], fresh=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr
