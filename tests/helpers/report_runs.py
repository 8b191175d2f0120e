"""Output folders of trainings and drawings for the tests of reports, written with the kit's own log."""

from __future__ import annotations

import json
import re

from PIL import Image

from sana_kit.runlog import JsonLinesLog

SUMMARY = {
    "images_per_second": 28.7,
    "iterations_per_second": 0.4484,
    "final_loss": 0.123456,
    "duration_seconds": 1234.56,
    "batch_size": 8,
    "world_size": 8,
    "device": "Ascend910B3",
    "device_type": "npu",
}


def make_run(folder, steps=60, resume_at=None, validations=(0, 30, 60), finish=True, **step_fields):
    """A training's output folder, written with the kit's own log; loss is 1 / step, of the resumed run 2 / step."""
    prompts = ["a red <b>square</b> & more", "a blue circle, with a rather long description that goes on and on"]
    config = {
        "pretrained_model_name_or_path": "Some/Model",
        "dataset_name": "images",
        "rank": 4,
        "learning_rate": 1e-4,
        "max_train_steps": steps,
        "hub_token": "hf_verysecret",
        "revision": None,
        "validation_prompt": prompts,
    }
    log = JsonLinesLog(folder / "train_log.jsonl")

    def validate(step):
        files = []
        for index, color in enumerate(("red", "blue")):
            path = folder / "validation" / f"step-{step:06d}" / f"{index:02d}-seed8.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), color if step else "gray").save(path)
            files.append(str(path.relative_to(folder)))
        log.write("validation", step=step, files=files, prompts=prompts, seeds=[8, 8])

    def train(first, last, factor):
        for step in range(first, last + 1):
            fields = {
                "loss": factor / step,
                "learning_rate": 1e-4,
                "images_per_second": 20.0,
                "peak_memory_bytes": 2**30,
                "mfu": None,
                "grad_norm": None,
                **step_fields,
            }
            log.write("step", step=step, epoch=0, **fields)
            if step in validations:
                validate(step)

    log.write("start", step=0, world_size=2, config=config)
    if 0 in validations:
        validate(0)
    train(1, steps, 1)
    log.write("checkpoint", step=steps // 2, path=f"checkpoint-{steps // 2}", seconds=0.5)
    log.write("warning", step=steps // 3, message="a caption was cut </script><script>alert(1)</script>")
    if resume_at is not None:
        log.write("resume", step=resume_at, world_size=4, config={**config, "learning_rate": 5e-5})
        train(resume_at + 1, steps, 2)
    if finish:
        log.write("end", step=steps, summary={**SUMMARY, "images_per_second": 19.5})
    log.close()
    return folder


def page_data(path):
    text = path.read_text(encoding="utf-8")
    return text, json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def make_images(folder, prompts, seeds, lora=None, skip=()):
    folder.mkdir(parents=True)
    with open(folder / "manifest.jsonl", "w") as manifest:
        for index, prompt in enumerate(prompts):
            for seed in seeds:
                if (prompt, seed) in skip:
                    continue
                name = f"{index:02d} {'lora' if lora else 'base'} #{seed}.png"
                Image.new("RGB", (96, 64), (200, 40 * index, seed)).save(folder / name)
                line = {
                    "file": name,
                    "prompt": prompt,
                    "negative_prompt": "",
                    "seed": seed,
                    "height": 64,
                    "width": 96,
                    "num_inference_steps": 28,
                    "guidance_scale": 2.0,
                    "seconds": 1.25,
                    "model": "Some/Model",
                    "lora_weights": lora,
                }
                manifest.write(json.dumps(line) + "\n")
    return folder
