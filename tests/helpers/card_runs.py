"""A finished run's folder for the tests of the model card and of its upload."""

import re

import yaml
from PIL import Image

from sana_kit import model_card
from sana_kit.runlog import JsonLinesLog

TOKEN = "hf_abcdefghijklmnopqrstuvwx"


def front_matter(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.S)[1])


def make_run_folder(tmp_path):
    """A finished run's folder: log, validation images, weights, and things that must stay on the machine."""
    folder = tmp_path / "my-lora"
    prompts = ['a "quoted" prompt: with\nlines & `ticks` | bars', "一只小狗"]
    config = {
        "pretrained_model_name_or_path": "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
        "dataset_name": "lambdalabs/pokemon-blip-captions",
        "instance_prompt": "a photo of sks dog",
        "validation_prompt": prompts,
        "max_train_steps": 500,
        "learning_rate": 1e-4,
        "variant": "bf16",
        "rank": 4,
        "lora_alpha": 4,
        "train_mode": "lora",
    }
    with JsonLinesLog(folder / "train_log.jsonl") as log:
        log.write("start", step=0, world_size=1, config=config)
        for step in (0, 500):
            files = [f"validation/step-{step:06d}/{i:02d}.png" for i in range(2)]
            for file in files:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (1600, 800), "red" if step else "gray").save(folder / file)
            log.write("validation", step=step, files=files, prompts=prompts, seeds=[8, 8])
    (folder / model_card.ADAPTER_FILE).write_bytes(b"weights" * 1000)
    (folder / "checkpoint-500").mkdir()
    (folder / "checkpoint-500" / "optimizer.bin").write_bytes(b"state")
    (folder / "encodings").mkdir()
    (folder / "encodings" / "latents.safetensors").write_bytes(b"private images")
    return folder


def write(folder, **changes):
    arguments = {
        "base_model": "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
        "dataset": "lambdalabs/pokemon-blip-captions",
        "trigger": "a photo of sks dog",
        "rank": 4,
        "command": f"accelerate launch train.py --hub_token={TOKEN} --hub_token {TOKEN} --rank=4",
        **changes,
    }
    return model_card.write_model_card(folder, **arguments)
