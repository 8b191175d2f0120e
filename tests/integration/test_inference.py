"""The run of the inference scripts, in-process on a tiny real model: checks, resume, failures, the output folder.

python -m pytest tests/integration/test_inference.py
"""

import errno
import fcntl
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.drawing import draw, write_lora
from helpers.inferring import images, infer, manifest
from PIL import Image
from safetensors.torch import load_file, save_file

import patch_sana
from sana_kit.generation.denoise import denoise
from sana_kit.generation.jobs import plan_jobs
from sana_kit.generation.texts import encode_job_prompts
from sana_kit.inference.config import parse_config
from sana_kit.inference.plan import check
from sana_kit.models.about import LoraAbout, about_metadata
from sana_kit.models.loading import load_pipeline

LORA_DEFAULT = "./output/pytorch_lora_weights.safetensors"


TWO_BY_TWO = ("--prompt", "a red square", "--prompt", "a dog", "--seeds", "8", "23")


@pytest.fixture(scope="module")
def reference(tiny_model, tmp_path_factory):
    """An undisturbed run of TWO_BY_TWO."""
    folder = tmp_path_factory.mktemp("reference") / "out"
    assert infer(tiny_model, folder, *TWO_BY_TWO) == 0
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves


def test_a_run_writes_images_manifest_sheet_gallery_and_summary(reference, tiny_model):
    import hashlib

    lines = manifest(reference)
    assert len(lines) == 4 and set(lines) == set(images(reference))
    assert [(line["prompt"], line["seed"]) for line in lines.values()] == [
        (prompt, seed) for prompt in ("a red square", "a dog") for seed in (8, 23)
    ]
    for name, line in lines.items():
        data = (reference / name).read_bytes()
        assert line["sha256"] == hashlib.sha256(data).hexdigest() and line["seconds"] > 0
        image = Image.open(reference / name)
        assert image.size == (96, 64) and image.mode == "RGB"
        assert json.loads(image.text["sana"])["prompt"] == line["prompt"]
        assert (line["height"], line["width"], line["num_inference_steps"]) == (64, 96, 2)
        assert (line["guidance_scale"], line["model"], line["lora_weights"]) == (2.0, str(tiny_model), None)
    sheet = Image.open(reference / "contact_sheet.png")
    assert sheet.size[0] > 2 * 96 and sheet.size[1] > 2 * 64
    assert "a red square" in (reference / "gallery.html").read_text(encoding="utf-8")
    summary = json.loads((reference / "summary.json").read_text())
    assert (summary["made"], summary["kept"], summary["failed"]) == (4, 0, [])
    elapsed = summary["encode_seconds"] + summary["generate_seconds"]
    assert summary["images_per_second"] == pytest.approx(4 / elapsed, rel=0.01)
    assert summary["iterations_per_second"] == pytest.approx(8 / elapsed, rel=0.01)
    assert not list(reference.glob("*.tmp")) and not list(reference.glob(".manifest-rank*"))


def test_fused_blocks_are_chosen_said_and_part_of_the_file_names(tiny_model, reference, tmp_path, capsys):
    assert infer(tiny_model, tmp_path, "--prompt", "a dog", "--seeds", "8", "--fused_blocks", "auto") == 0
    assert "Blocks: fused block" in capsys.readouterr().out
    assert not set(images(tmp_path)) & set(images(reference))  # other bits, so no finished image of theirs is kept


def test_the_rates_are_printed_with_loading_apart(tiny_model, tmp_path, capsys):
    assert infer(tiny_model, tmp_path, "--prompt", "a dog", "--seeds", "8") == 0
    said = capsys.readouterr().out
    assert re.search(r"Loading \d", said) and re.search(r"[\d.]+ images/s, [\d.]+ it/s", said)
    assert "Resolution binning is off for 96x64" in said


def test_default_prompts_and_seeds_are_the_kits(tiny_model, tmp_path):
    config = parse_config("test", ["--model_path", str(tiny_model), "--output_path", str(tmp_path)])
    plan = check(config, torch.device("cpu"))
    prompts = {job.prompt for job in plan.jobs}
    assert 8 <= len(prompts) <= 12 and len(plan.jobs) == 4 * len(prompts)
    assert all(job.negative_prompt for job in plan.jobs)
    assert [job.seed for job in plan.jobs[:4]] == [8, 23, 42, 1334]
    first = plan.jobs[0]
    assert (first.num_inference_steps, first.guidance_scale) == (28, 2.0)
    assert (first.height, first.width) == (128, 128)  # the tiny model's native size: 16 latents of 8 px
    usual = parse_config("test", [])
    assert usual.model.model_path == "Efficient-Large-Model/Sana_1600M_4Kpx_BF16_diffusers"


def test_images_are_those_of_load_pipeline_and_generate(reference, tiny_model):
    cpu = torch.device("cpu")
    pipeline = load_pipeline(str(tiny_model), device=cpu)
    jobs = plan_jobs(
        ["a red square", "a dog"], [8, 23], height=64, width=96, num_inference_steps=2, guidance_scale=2.0
    )
    prompts, negatives = encode_job_prompts(pipeline, jobs, None, device=cpu)
    made = draw(pipeline, (prompts, negatives), jobs, dtype=torch.bfloat16, use_resolution_binning="auto")
    for name, image in zip(manifest(reference), made, strict=True):
        assert np.array_equal(np.asarray(Image.open(reference / name)), np.asarray(image))


def test_instruction_reaches_the_images(reference, tiny_model, tmp_path):
    flags = ("--complex_human_instruction", '["Draw well.", "User Prompt: "]')
    assert infer(tiny_model, tmp_path, *TWO_BY_TWO, *flags) == 0
    assert not set(images(tmp_path)) & set(images(reference))  # another image has another name
    assert not set(images(tmp_path).values()) & set(images(reference).values())


def test_whole_groups_in_batches_of_two_differ_by_rounding_only(reference, tiny_model, tmp_path):
    assert infer(tiny_model, tmp_path, *TWO_BY_TWO, "--batch_size", 3, "--dtype", "fp32") == 0
    assert infer(tiny_model, tmp_path / "alone", *TWO_BY_TWO, "--dtype", "fp32") == 0
    assert json.loads((tmp_path / "summary.json").read_text())["largest_group"] == 3
    for name in images(tmp_path):
        a, b = (np.asarray(Image.open(folder / name)).astype(int) for folder in (tmp_path, tmp_path / "alone"))
        assert np.abs(a - b).max() <= 1


# ---------------------------------------------------------------------------------------------------------------------
# LoRA


def test_lora_changes_images_and_stays_apart_in_the_same_folder(reference, tiny_model, tmp_path):
    lora = write_lora(tiny_model, tmp_path / "lora")
    out = tmp_path / "out"
    assert infer(tiny_model, out, *TWO_BY_TWO) == 0
    before = images(out)
    assert before == images(reference)
    assert infer(tiny_model, out, *TWO_BY_TWO, "--lora_weights", lora) == 0
    after = images(out)
    assert len(after) == 8 and all(after[name] == data for name, data in before.items())
    assert len(set(after.values())) == 8
    assert sum(line["lora_weights"] == str(lora) for line in manifest(out).values()) == 4
    assert infer(tiny_model, out, *TWO_BY_TWO, "--lora_weights", tmp_path / "lora", "--no_fuse_lora") == 0
    assert len(images(out)) == 12


def test_lora_script_without_a_usable_adapter_is_an_error(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert infer(tiny_model, "out", lora_default=LORA_DEFAULT) == 1
    assert f"--lora_weights={LORA_DEFAULT}: no such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    write_lora(tiny_model, tmp_path / "output")
    assert infer(tiny_model, "out", "--prompt", "a dog", "--seeds", 8, lora_default=LORA_DEFAULT) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_all_problems_are_told_at_once_before_anything_is_loaded_or_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sana_kit.inference.run.load_text_encoder", None)
    (tmp_path / "broken.jsonl").write_text('{"prompt": ""}\nnot json\n{"prompt": "a", "sede": 1}\n', encoding="utf-8")
    (tmp_path / "file").touch()
    code = infer(
        tmp_path / "nowhere",
        tmp_path / "file" / "out",
        *("--dtype", "fp64", "--vae_dtype", "fp16", "--batch_size", "0", "--num_inference_steps", "0"),
        *(
            "--device",
            "tpu",
            "--guidance_scale",
            "nan",
            "--attention",
            "npu_fusion",
            "--complex_human_instruction",
            "no/such/file",
        ),
        *(
            "--prompts_file",
            tmp_path / "broken.jsonl",
            "--lora_weights",
            tmp_path / "none.safetensors",
            "--prompt",
            " ",
        ),
    )
    said = capsys.readouterr().err
    assert code == 1
    for part in (
        "--device=tpu",
        "--dtype=fp64",
        "--vae_dtype=fp16",
        "--batch_size=0",
        "--num_inference_steps=0",
        "--guidance_scale=nan",
        "--attention=npu_fusion",
        "--complex_human_instruction=no/such/file",
        "line 1: prompt must be",
        "line 2: ",
        "line 3: unknown entries ['sede']",
        "none.safetensors: no such file",
        "--prompt: must not be empty",
        "nowhere: no such folder",
        "is a file. Name a folder",
    ):
        assert part in said, part
    assert sorted(os.listdir(tmp_path)) == ["broken.jsonl", "file"]


def test_size_that_the_model_cannot_make(tiny_model, tmp_path, capsys):
    assert infer(tiny_model, tmp_path / "out", "--height", 100, "--width", 60) == 1
    assert "must be multiples of 8 px for this model. The nearest is height 96, width 64." in capsys.readouterr().err
    assert infer(tiny_model, tmp_path / "out", "--height", -8) == 1
    assert "--height=-8: must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_lora_flags_without_lora_are_errors(tiny_model, tmp_path, capsys):
    assert infer(tiny_model, tmp_path / "out", "--lora_scale", "0.5") == 1
    assert "without --lora_weights" in capsys.readouterr().err


def test_read_only_output_folder(tiny_model, tmp_path, monkeypatch, capsys):
    def refuse(self, *args, **kwargs):  # root may write everywhere
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)
    assert infer(tiny_model, tmp_path / "out") == 1
    assert "cannot be written to (Read-only file system)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Nothing lost


def test_resume_keeps_whole_images_and_makes_the_others_again(reference, tiny_model, tmp_path, capsys):
    out = tmp_path / "out"
    assert infer(tiny_model, out, *TWO_BY_TWO) == 0
    names = sorted(images(out))
    (out / names[0]).unlink()
    (out / names[1]).write_bytes(b"damaged")
    half = out / f".{names[2]}.123.tmp"
    half.write_bytes(b"half an image")
    kept = {name: (out / name).stat().st_mtime_ns for name in names[2:]}
    capsys.readouterr()
    assert infer(tiny_model, out, *TWO_BY_TWO) == 0
    said = capsys.readouterr().out
    assert "2 of them finished before" in said and "2 finished image(s) are missing or damaged" in said
    assert images(out) == images(reference) and not half.exists()
    assert {name: (out / name).stat().st_mtime_ns for name in names[2:]} == kept
    assert len(manifest(out)) == 4


def test_a_finished_run_loads_nothing_and_overwrite_makes_all_again(tiny_model, tmp_path, monkeypatch):
    assert infer(tiny_model, tmp_path, *TWO_BY_TWO) == 0
    first = images(tmp_path)
    assert infer(tiny_model, tmp_path, *TWO_BY_TWO, "--overwrite") == 0
    assert json.loads((tmp_path / "summary.json").read_text())["made"] == 4 and images(tmp_path) == first
    monkeypatch.setattr("sana_kit.inference.run.load_text_encoder", None)
    monkeypatch.setattr("sana_kit.inference.run.load_pipeline", None)
    assert infer(tiny_model, tmp_path, *TWO_BY_TWO) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["kept"] == 4


def test_resumed_groups_are_computed_whole(tiny_model, tmp_path):
    """With several images per call the bytes of a missing one are those of the undisturbed run."""
    flags = (*TWO_BY_TWO, "--batch_size", 3)
    assert infer(tiny_model, tmp_path, *flags) == 0
    first = images(tmp_path)
    (tmp_path / sorted(first)[1]).unlink()
    assert infer(tiny_model, tmp_path, *flags) == 0
    assert images(tmp_path) == first


def test_lines_of_a_killed_run_are_taken_over(reference, tiny_model, tmp_path):
    """A kill leaves parts of the manifest, the last line perhaps cut off."""
    out = tmp_path / "out"
    out.mkdir()
    for name, data in images(reference).items():
        (out / name).write_bytes(data)
    lines = [json.dumps(line) for line in manifest(reference).values()]
    (out / ".manifest-rank00000.jsonl").write_text("\n".join(lines[:2]) + "\n")
    (out / ".manifest-rank00003.jsonl").write_text(lines[2] + "\n" + lines[3][:50])
    assert infer(tiny_model, out, *TWO_BY_TWO) == 0
    assert json.loads((out / "summary.json").read_text())["kept"] == 3
    assert len(manifest(out)) == 4 and not list(out.glob(".manifest-rank*"))


def test_failing_images_are_reported_with_the_others_done(reference, tiny_model, tmp_path, capsys):
    names = sorted(images(reference))
    out = tmp_path / "out"
    (out / names[1]).mkdir(parents=True)  # this image cannot be written
    assert infer(tiny_model, out, *TWO_BY_TWO) == 1
    said = capsys.readouterr().err
    assert "1 of 4 images failed, the others are done" in said and names[1] in said
    assert {name: (out / name).read_bytes() for name in names if name != names[1]} == {
        name: data for name, data in images(reference).items() if name != names[1]
    }
    assert names[1] not in manifest(out) and (out / "contact_sheet.png").is_file()
    (out / names[1]).rmdir()
    assert infer(tiny_model, out, *TWO_BY_TWO) == 0
    assert images(out) == images(reference)


def test_one_bad_prompt_does_not_cost_the_others(tiny_model, tmp_path, capsys):
    """Half of a UTF-16 pair is valid JSON, and no text that a tokenizer takes."""
    (tmp_path / "p.jsonl").write_text('"a dog"\n"bad \\ud800 text"\n"a cat"\n', encoding="utf-8")
    out = tmp_path / "out"
    assert infer(tiny_model, out, "--prompts_file", tmp_path / "p.jsonl", "--seeds", 8, "--batch_size", 2) == 1
    assert "1 of 3 images failed" in capsys.readouterr().err
    assert {line["prompt"] for line in manifest(out).values()} == {"a dog", "a cat"}
    failed = json.loads((out / "summary.json").read_text())["failed"]
    assert len(failed) == 1 and failed[0]["error"]


def test_out_of_memory_names_its_remedy(tiny_model, tmp_path, monkeypatch, capsys):
    real = denoise

    def scarce(transformer, scheduler, latents, *args, **kwargs):
        if latents.shape[0] > 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 8 GiB")
        return real(transformer, scheduler, latents, *args, **kwargs)

    monkeypatch.setattr("sana_kit.generation.generate.denoise", scarce)
    assert infer(tiny_model, tmp_path, *TWO_BY_TWO, "--batch_size", 3) == 1
    said = capsys.readouterr().err
    assert "3 of 4 images failed" in said and "--batch_size" in said and len(images(tmp_path)) == 1


def test_two_runs_in_one_folder_do_not_mix(reference, tiny_model, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 1 on elsewhere")
        lock.flush()
        assert infer(tiny_model, out, *TWO_BY_TWO) == 1
        assert f"--output_path={out}: another live run is writing there" in capsys.readouterr().err
        assert os.listdir(out) == [".lock"]
    assert infer(tiny_model, out, *TWO_BY_TWO) == 0  # a crash leaves the file, not the lock
    assert images(out) == images(reference)


def test_prompts_that_are_cut_are_told(tiny_model, tmp_path, capsys):
    flags = ("--prompt", "a red square on white", "--prompt", "a", "--seeds", 8, "--max_sequence_length", 4)
    assert infer(tiny_model, tmp_path, *flags) == 0
    said = capsys.readouterr().out
    assert "1 prompt(s) have more than --max_sequence_length=4 tokens" in said and "a red square on white" in said


def test_images_asked_for_twice_are_made_once(tiny_model, tmp_path, capsys):
    assert infer(tiny_model, tmp_path, "--prompt", "a dog", "--prompt", "a dog", "--seeds", 8, 8, 23) == 0
    assert len(images(tmp_path)) == 2 and "4 of 6 images were asked for twice" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# What the files say of themselves


def said_of_a_lora(tiny_model, folder, **about):
    """A LoRA file whose metadata tells its training."""
    adapter = patch_sana.open_adapter(write_lora(tiny_model, folder / "plain"))
    told = about_metadata(LoraAbout(rank=4, alpha=8, **about))
    patch_sana.write_adapter(folder, adapter.tensors, adapter.lora_config, {}, told)
    return folder / patch_sana.ADAPTER_FILE


def planned(*words):
    return check(parse_config("test", [str(word) for word in words]), torch.device("cpu"))


def test_a_lora_is_drawn_as_it_was_trained_unless_told_otherwise(tiny_model, tmp_path):
    lora = said_of_a_lora(tiny_model, tmp_path, resolution=64)
    words = ("--model_path", tiny_model, "--output_path", tmp_path / "out", "--lora_weights", lora)
    plan = planned(*words)
    assert plan.instruction is None and {(job.height, job.width) for job in plan.jobs} == {(64, 64)}
    assert "trained without an instruction at 64 px, and is drawn so; --complex_human_instruction" in plan.notes[0]
    plan = planned(*words, "--complex_human_instruction=default", "--height=96")
    assert plan.instruction[-1] == "User Prompt: " and {(job.height, job.width) for job in plan.jobs} == {(96, 96)}
    assert not [note for note in plan.notes if "The LoRA" in note]

    lora = said_of_a_lora(tiny_model, tmp_path / "own", instruction=("Say it: ",))
    plan = planned(*words[:-1], lora)
    assert plan.instruction == ["Say it: "] and "with an instruction of its own, and" in plan.notes[0]
    assert {(job.height, job.width) for job in plan.jobs} == {(128, 128)}

    plan = planned(*words[:-1], write_lora(tiny_model, tmp_path / "silent"))
    assert plan.instruction[-1] == "User Prompt: " and not [note for note in plan.notes if "The LoRA" in note]


def test_several_adapters_of_any_layout_are_drawn_with_and_told(tiny_model, tmp_path):
    first = said_of_a_lora(tiny_model, tmp_path / "a", resolution=64)
    second = said_of_a_lora(tiny_model, tmp_path / "b", resolution=96, instruction=("Say it: ",))
    kohya = tmp_path / "kohya.safetensors"
    names = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    stored = {}
    for name, tensor in load_file(first).items():
        module, end = name.removeprefix("transformer.").rsplit(".lora_", 1)
        stem = f"lora_unet_{module.replace('.', '_')}"
        stored |= {f"{stem}.{names[f'lora_{end}']}": tensor, f"{stem}.alpha": torch.tensor(8.0)}
    save_file(stored, kohya)
    words = (
        "--model_path",
        tiny_model,
        "--output_path",
        tmp_path / "out",
        "--prompt=a",
        "--seeds=8",
        "--lora_weights",
    )
    plan = planned(*words, f"{first}:0.5,{second}", "--lora_scale=2")
    assert [factor for _, factor in plan.loras] == [1.0, 2.0]
    told = "\n".join(plan.notes)
    assert "LoRA, diffusers layout, 12 layers, strength 1." in told and "strength 2." in told
    assert "trained with different instruction and resolution: the usual one is taken" in told
    assert plan.instruction[-1] == "User Prompt: " and plan.jobs[0].height == 128
    assert planned(*words, kohya, "--lora_weights", second).loras[0][0].layout == "kohya"

    small = ("--prompt", "a dog", "--seeds", 8, "--lora_weights")
    for folder, adapters in (("one", f"{first}:0.5"), ("other", f"{kohya}:0.5"), ("both", f"{first}:0.5,{second}")):
        assert infer(tiny_model, tmp_path / folder, *small, adapters, "--dtype", "fp32") == 0
    one, other, both = (list(images(tmp_path / folder).values()) for folder in ("one", "other", "both"))
    assert one == other and both != one  # the same image bytes from either layout


def test_the_plan_is_told_before_anything_is_loaded(tiny_model, tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise RuntimeError("loading begins")

    monkeypatch.setattr("sana_kit.inference.run.load_text_encoder", refuse)
    assert infer(tiny_model, tmp_path / "out", *TWO_BY_TWO) == 1
    said = capsys.readouterr().out
    assert "4 images: 2 prompts, 96x64 px, 2 steps each, on cpu with 1 process(es)" in said
    assert "0 of them finished before, 4 to draw" in said
    assert infer(tiny_model, tmp_path / "kit", "--seeds", "8") == 1
    assert "prompts of the kit's own list (--prompt names others)" in capsys.readouterr().out


def test_paths_begin_at_home(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_lora(tiny_model, tmp_path / "lora")
    (tmp_path / "p.txt").write_text("a dog\n")
    os.symlink(tiny_model, tmp_path / "model")
    flags = ("--lora_weights", "~/lora", "--prompts_file", "~/p.txt", "--seeds", "8")
    assert infer("~/model", "~/out", *flags) == 0
    assert len(images(tmp_path / "out")) == 1


def test_schedulers_by_name(reference, tiny_model, tmp_path):
    """flow-dpm is the tiny model's own solver; Euler draws another image under another name."""
    one = ("--prompt", "a red square", "--seeds", 8)
    for name in ("flow-dpm", "flow-euler"):
        assert infer(tiny_model, tmp_path / name, *one, "--scheduler", name) == 0
    dpm, euler = ({*images(tmp_path / name).items()} for name in ("flow-dpm", "flow-euler"))
    assert {data for _, data in dpm} <= {*images(reference).values()}
    assert not {data for _, data in euler} & {*images(reference).values()}
    assert not {name for name, _ in dpm | euler} & {*images(reference)}


def test_a_checkpoint_with_a_flow_euler_scheduler_is_drawn(tiny_model, tmp_path):
    """What diffusers' conversion writes with `--scheduler_type flow-euler`."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    shutil.copytree(tiny_model, tmp_path / "model")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(tmp_path / "model" / "scheduler")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    assert infer(tmp_path / "model", tmp_path / "out", "--prompt", "a dog", "--seeds", 8) == 0
    assert len(images(tmp_path / "out")) == 1
