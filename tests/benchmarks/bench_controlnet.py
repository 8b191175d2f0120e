"""Does a ControlNet learn to follow outlines? Trained on the quick start's shipped model, measured, and shown.

    python tests/benchmarks/bench_controlnet.py OUTPUT_FOLDER [--steps 2000] [--reuse]

The model draws each of its subjects in the middle of a white page. Its own drawings, made smaller, mirrored at random
and put anywhere on the page, are the training images, and `--control_edges` makes their outlines. Every fifth subject
is kept out of the training; on those the outlines say where and how large, which the model alone cannot know. Printed
is, for them, the correlation of the outlines of what was drawn with the outlines that were asked for: without the
ControlNet, with it, and with it against those of another image; sheet.png shows the first twelve. About 13 minutes on
one core.
"""

import argparse
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

KIT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(KIT))  # run as a file, from any folder

from sana_kit.data.outlines import outlines  # noqa: E402

ASSETS = KIT / "sana_kit" / "quickstart_assets"
SIDE, COPIES, SEEDS, SHOWN = 64, 5, (1, 2), 12
DRAWING = ["--model_path", ASSETS / "model", "--height", SIDE, "--width", SIDE, "--num_inference_steps", 20]
DRAWING += ["--guidance_scale", 2.0, "--dtype", "fp32", "--complex_human_instruction", "none"]


def run(script, *words):
    """A script of the kit in a process of one thread."""
    command = [sys.executable, KIT / script, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(KIT), "ACCELERATE_USE_CPU": "true"}
    subprocess.run(list(map(str, command)), env=environment, check=True, cwd=KIT)


def draw(folder, jobs, *more):
    """{(prompt, seed): image} of [{"prompt", "seeds", ...}, ...]."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / "prompts.jsonl"
    listed.write_text("\n".join(map(json.dumps, jobs)))
    run("infer_sana_text2img_bf16.py", *DRAWING, "--prompts_file", listed, "--output_path", folder, *more)
    lines = map(json.loads, (folder / "manifest.jsonl").read_text().splitlines())
    return {(line["prompt"], line["seed"]): Image.open(folder / line["file"]).convert("RGB") for line in lines}


def place(drawing, key):
    """A drawing smaller, mirrored or not, anywhere on a white page; `key` decides."""
    random = np.random.default_rng(zlib.crc32(key.encode()))
    side = int(random.integers(28, 54))
    small = drawing.resize((side, side), Image.Resampling.LANCZOS)
    page = Image.new("RGB", (SIDE, SIDE), "white")
    corner = tuple(int(random.integers(0, SIDE - side + 1)) for _ in range(2))
    page.paste(ImageOps.mirror(small) if random.random() < 0.5 else small, corner)
    return page


def lines_of(image):
    return np.array(outlines(image))[..., 0].astype(float)


def correlation(first, second):
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])


def make_sheet(rows, path):
    """Rows of outline, image without, image with the ControlNet, image that the outline is of; two a line."""
    big, gap, head = 2 * SIDE, 6, 22
    width, height = 2 * 4 * (big + gap) + 4 * gap, head + (len(rows) + 1) // 2 * (big + gap)
    sheet = Image.new("RGB", (width, height), "#d8d8d8")
    pen = ImageDraw.Draw(sheet)
    for half in range(2):
        for column, name in enumerate(("outline", "without", "with ControlNet", "outline's image")):
            pen.text((half * (width + 2 * gap) // 2 + column * (big + gap) + gap, 5), name, fill="black")
    for number, row in enumerate(rows):
        left, top = number % 2 * (width + 2 * gap) // 2, head + number // 2 * (big + gap)
        for column, image in enumerate(row):
            scaled = image.resize((big, big), Image.Resampling.LANCZOS)
            sheet.paste(scaled, (left + column * (big + gap) + gap, top))
    sheet.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def make_images(folder, subjects):
    """Training images with a caption beside each, and {subject: its drawing} of the subjects that are kept out."""
    drawn = draw(folder / "drawings", [{"prompt": subject, "seeds": list(SEEDS)} for subject in subjects])
    held_out = subjects[::5]
    images = folder / "images"
    images.mkdir(exist_ok=True)
    for (subject, seed), drawing in drawn.items():
        for copy in range(COPIES if subject not in held_out else 0):
            name = f"{subject.replace(' ', '-')}-{seed}-{copy}"
            place(drawing, name).save(images / f"{name}.png")
            (images / f"{name}.txt").write_text(subject)
    return images, {subject: drawn[subject, SEEDS[0]] for subject in held_out}


def train(folder, images, steps):
    run(
        "train_dreambooth_lora_sana.py",
        "--train_mode=controlnet",
        "--control_edges",
        f"--pretrained_model_name_or_path={ASSETS / 'model'}",
        f"--instance_data_dir={images}",
        f"--output_dir={folder / 'run'}",
        "--overwrite_output_dir",
        "--complex_human_instruction=none",
        f"--resolution={SIDE}",
        f"--max_train_steps={steps}",
        "--train_batch_size=16",
        "--learning_rate=1e-3",
        "--lr_scheduler=cosine",
        "--lr_warmup_steps=50",
        "--caption_dropout=0.1",
        "--mixed_precision=no",
        "--checkpointing_steps=500",
        "--checkpoints_total_limit=1",
        "--seed=0",
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--reuse", action="store_true", help="draw with the ControlNet that is in the folder")
    parser.add_argument("--controlnet", type=Path, help="another one than the run's, such as a checkpoint")
    options = parser.parse_args()
    folder = options.output.resolve()
    subjects = json.loads((ASSETS / "training.json").read_text())["subjects"]
    images, held_out = make_images(folder, subjects)
    if not options.reuse:
        train(folder, images, options.steps)
    controls = folder / "controls"
    controls.mkdir(exist_ok=True)
    asked, jobs = {}, []
    for subject, drawing in held_out.items():
        asked[subject] = place(drawing, f"held out {subject}")
        outlines(asked[subject]).save(controls / f"{subject.replace(' ', '-')}.png")
        jobs.append({"prompt": subject, "seeds": [7]})
    without = draw(folder / "without", jobs)
    guided = [{**job, "control_image": str(controls / f"{job['prompt'].replace(' ', '-')}.png")} for job in jobs]
    drawn = draw(folder / "with", guided, "--controlnet", options.controlnet or folder / "run", "--overwrite")
    figures, rows = [], []
    for number, subject in enumerate(asked):
        lines = lines_of(asked[subject])
        other = lines_of(asked[list(asked)[(number + 1) % len(asked)]])
        alone, followed = without[subject, 7], drawn[subject, 7]
        parts = (correlation(lines_of(alone), lines), correlation(lines_of(followed), lines))
        figures.append((*parts, correlation(lines_of(followed), other)))
        rows.append((outlines(asked[subject]), alone, followed, asked[subject]))
        print(f"{subject:24} " + " ".join(f"{part:6.2f}" for part in figures[-1]))
    mean, least = np.mean(figures, 0), np.min(figures, 0)
    print(f"correlation of outlines, mean of {len(figures)} subjects that were not trained on: without {mean[0]:.2f}")
    print(f"with the ControlNet {mean[1]:.2f} (least {least[1]:.2f}); with it, against other outlines {mean[2]:.2f}")
    make_sheet(rows[:SHOWN], folder / "sheet.png")
    print(folder / "sheet.png")


if __name__ == "__main__":
    main()
