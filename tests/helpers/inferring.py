"""Runs of the inference scripts in this process, and what they left."""

from __future__ import annotations

import json

import tiny

from helpers.drawing import input_image
from sana_kit.inference.command import main


def infer(model, output, *flags, lora_default=None):
    """Exit code of a run with small images; flags given later count."""
    argv = ["--model_path", model, "--output_path", output, "--height", "64", "--width", "96"]
    argv += ["--num_inference_steps", "2", "--complex_human_instruction", "none", *flags]
    return main("test", [str(word) for word in argv], lora_default)


def manifest(folder):
    return {line["file"]: line for line in map(json.loads, (folder / "manifest.jsonl").read_text().splitlines())}


def images(folder):
    """file name -> bytes of the images of a run."""
    return {path.name: path.read_bytes() for path in folder.glob("*-seed*.png")}


def member_runs(folder, model, sprint):
    """Flags of two runs with all that is drawn from and along, by name; writes what they need into `folder`.

    `sprint`: SANA-Sprint in 3 steps, from noise and from images. `sana`: a ControlNet and perturbed attention, from an
    image within a mask. Groups of two images, of one kind each.
    """
    input_image(folder / "init.png")
    input_image(folder / "other.png", seed=1)
    input_image(folder / "mask.png", mask=True)
    controlnet = tiny.make_tiny_controlnet(folder / "controlnet", model)
    (folder / "prompts.csv").write_text("prompt,init_image\na red square,\na dog,init.png\na cat,other.png\n")
    common = ["--height", 64, "--width", 96, "--dtype", "fp32", "--complex_human_instruction", "none"]
    common += ["--seeds", 8, 23, "--batch_size", 2]
    sana = [
        "--model_path",
        model,
        *common,
        "--num_inference_steps",
        3,
        "--prompt",
        "a red square",
        "--prompt",
        "a dog",
    ]
    sana += ["--controlnet", controlnet, "--control_image", folder / "other.png", "--pag_scale", 2, "--pag_layers", 1]
    sana += ["--init_image", folder / "init.png", "--mask_image", folder / "mask.png", "--strength", 0.7]
    runs = {
        "sprint": [
            "--model_path",
            sprint,
            *common,
            "--num_inference_steps",
            3,
            "--prompts_file",
            folder / "prompts.csv",
        ],
        "sana": sana,
    }
    return {name: [str(word) for word in flags] for name, flags in runs.items()}


def draw_here(runs, folder):
    """The images of `member_runs` as {run: {file name: bytes}}, drawn in this process."""
    for name, flags in runs.items():
        assert main("here", [*flags, "--output_path", str(folder / name)]) == 0
    return {name: images(folder / name) for name in runs}
