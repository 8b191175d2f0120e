"""Runs of the inference scripts in this process, and what they left."""

from __future__ import annotations

import json

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
