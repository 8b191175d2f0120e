"""The embedded default: a small, really trained Sana, a captioned image set in a style of its own, and the measuring
of what fine-tuning changed.

Used by finetune_sana_dreambooth_lora_deepspeed_bf16.sh --quickstart; by hand:

    python -m sana_kit.quickstart --print training_flags      # one a line; also inference_flags, model_path, ...
    python -m sana_kit.quickstart --compare BEFORE_DIR AFTER_DIR before_after.png
    python -m sana_kit.quickstart --print prompts --instance_data_dir MY_IMAGES --instance_prompt "in my style"

What it ships is in sana_kit/quickstart_assets (OpenMoji drawings, CC BY-SA 4.0, see ATTRIBUTION.md there) and was made
by sana_kit/make_quickstart_model.py. The model draws OpenMoji's coloured images at 64 px; the set shows a part of
the same subjects in midnight-blue lines and teal fills on gold paper, which the model has never drawn.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from sana_kit.data.endings import common_ending, same_ending
from sana_kit.errors import ImageError
from sana_kit.files import file_sha256
from sana_kit.flags import Parser, PlainHelp
from sana_kit.reports.before_after import COLUMNS, Pair, before_after_sheet, read_images
from sana_kit.reports.colours import SIDE as PIXELS
from sana_kit.reports.colours import colour_distance, colour_quantiles, pixels_of, quantile_distance
from sana_kit.reports.gallery import write_gallery
from sana_kit.reports.report import write_report
from sana_kit.reports.result_block import made_by

if TYPE_CHECKING:
    import numpy as np

    from sana_kit.data.image_set import ImageSet

ASSETS = Path(__file__).resolve().parent / "quickstart_assets"
SUMS = "SHA256SUMS"
TRIGGER = "in midnight style"
MAX_PROMPTS = 11  # pairs on the before/after sheet
SEEDS = (8, 23)
REMEDY = "Unpack the kit again, or run `git checkout -- sana_kit/quickstart_assets`."

# For 2 CPU cores: ZeRO-2, 2 processes, bf16. The instruction that SanaPipeline puts before every prompt was written
# for Gemma-2-2b-it; this model's small text encoder was trained without it.
TRAINING_FLAGS = (
    "--resolution=64",
    "--train_batch_size=6",
    "--max_train_steps=500",
    "--learning_rate=4e-3",
    "--lr_scheduler=cosine",
    "--lr_warmup_steps=10",
    "--rank=32",
    "--lora_alpha=32",
    "--lora_layers=to_q,to_k,to_v,to_out.0,proj_out,linear_1,linear_2,time_embed.linear",
    "--complex_human_instruction=none",
    "--mixed_precision=bf16",
    "--seed=0",
)
# Images along the training, so that console and report show it learning: a second for each time.
VALIDATION_FLAGS = (
    "--validation_steps=125",
    "--num_validation_images=1",
    "--validation_inference_steps=12",
    "--validation_guidance_scale=2.0",
)
INFERENCE_FLAGS = (
    "--height=64",
    "--width=64",
    "--num_inference_steps=20",
    "--guidance_scale=2.0",
    "--batch_size=11",
    "--dtype=fp32",  # twice as fast as bf16 on CPUs without bf16 units
    "--complex_human_instruction=none",
    "--seeds",
    *map(str, SEEDS),
)


@dataclasses.dataclass(frozen=True)
class QuickStart:
    """What `prepare` found, checked.

    Attributes:
        model_path: folder of a complete SanaPipeline (bfloat16 safetensors).
        dataset_path: folder in the pokemon-blip-captions layout, columns `image` (PNG, 128 x 128) and `text`; or the
            user's own folder of images.
        captions: of the data set, in its order.
        trigger: the words that the captions of the set end with, or its only caption.
        prompts: of the before/after sheet.
        seen: the prompts among them that are captions of the set; the model never saw the style of the others.
        seeds: of the before/after sheet.
        training_flags, inference_flags: words for the command lines of the trainer (but for what names the images
            and captions) and of the inference scripts.
    """

    model_path: str
    dataset_path: str
    captions: tuple[str, ...]
    trigger: str
    prompts: tuple[str, ...]
    seen: tuple[str, ...]
    seeds: tuple[int, ...]
    training_flags: tuple[str, ...]
    inference_flags: tuple[str, ...]


def _verify(folder: Path) -> list[str]:
    """Problems of the shipped files against SHA256SUMS, one text each."""
    listed = folder / SUMS
    if not listed.is_file():
        return [f"{listed}: not there"]
    problems = []
    for line in listed.read_text(encoding="utf-8").splitlines():
        digest, name = line.split("  ", 1)
        path = folder / name
        if not path.is_file():
            problems.append(f"{path}: not there")
        elif file_sha256(path) != digest:
            problems.append(f"{path}: not the file that was shipped ({path.stat().st_size:,} bytes)")
    return problems


def _dataset_rows(dataset_path: str | Path) -> list[tuple[bytes, str]]:
    """(encoded image, caption) of each row of the shipped parquet file."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(Path(dataset_path) / "data" / "train-001.parquet", columns=["image", "text"])
    return [(row["image"]["bytes"], row["text"]) for row in table.to_pylist()]


def _shipped_rows() -> list[tuple[Image.Image, str]]:
    return [(Image.open(io.BytesIO(data)), text) for data, text in _dataset_rows(ASSETS / "style_dataset")]


def _own_images(images: str | Path, instance_prompt: str | None, skip_bad_images: bool) -> tuple[ImageSet, list[str]]:
    """The user's folder as a `dataset.ImageSet`, and its captions, each on one line.

    Raises:
        ValueError: as `dataset.load_images`.
    """
    from sana_kit.data.discover import load_images  # with torch, which the shipped set does not need

    found = load_images(
        instance_data_dir=str(images), instance_prompt=instance_prompt, skip_bad_images=skip_bad_images
    )
    return found, [" ".join(caption.split()) for caption in found.captions]


def _own_rows(
    images: str | Path, instance_prompt: str | None, skip_bad_images: bool = False
) -> list[tuple[Image.Image, str]]:
    """(image, caption) of each image of a user's folder, PIL at 64 x 64: photographs would fill the memory.

    Raises:
        ValueError: as `dataset.load_images`, or an image whose pixels cannot be read and may not be left out.
    """
    found, captions = _own_images(images, instance_prompt, skip_bad_images)
    rows = []
    for index, caption in enumerate(captions):
        try:
            small = found.load(index).resize((PIXELS, PIXELS), Image.Resampling.BOX)
        except ImageError as error:
            if not skip_bad_images:
                raise ValueError(f"{images}: {error}") from error
            continue
        rows.append((small, caption))
    return rows


def own_prompts(captions: Sequence[str], subjects: list[str]) -> tuple[tuple[str, ...], str]:
    """Prompts of the before/after sheet for a user's own captions, and what these have in common.

    Up to 5 of the captions, evenly taken, then subjects that the small model knows, with the common words after them,
    as far as the sheet has room: what the LoRA does to what it has not seen.
    """
    distinct = list(dict.fromkeys(captions))
    trigger = common_ending(distinct if len(distinct) == 1 else captions)
    shown = min(5, len(distinct))
    chosen = [distinct[i * len(distinct) // shown] for i in range(shown)]
    others = [f"{subject} {trigger}".strip() for subject in subjects]
    chosen += [prompt for prompt in others if prompt not in distinct]
    return tuple(chosen[:MAX_PROMPTS]), trigger


def prepare(
    folder: str | Path | None = None,
    images: str | Path | None = None,
    instance_prompt: str | None = None,
    skip_bad_images: bool = False,
) -> QuickStart:
    """Check the shipped files and say where they are.

    Args:
        folder: copy model and data set there first (an existing whole copy is kept); None uses them where they are.
        images: the user's own folder of images with captions in .txt files, instead of the shipped set.
        instance_prompt: the caption of those among them that have none.
        skip_bad_images: leave unreadable ones out instead of an error.

    Raises:
        ValueError: files are missing or differ from SHA256SUMS, all of them named; the images cannot be used.
    """
    problems = _verify(ASSETS)
    if problems:
        raise ValueError("\n".join(["the quick start's files are damaged:", *problems, REMEDY]))
    place = ASSETS
    if folder is not None:
        place = Path(folder)
        if place.exists() and not place.is_dir():
            raise ValueError(f"{place}: is a file; name a folder for the quick start's model and data set.")
        if _verify(place):
            shutil.copytree(ASSETS, place, dirs_exist_ok=True)
            problems = _verify(place)
            if problems:
                raise ValueError("\n".join(["copying the quick start's files failed:", *problems]))
    lines = (place / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = tuple(json.loads(line)["prompt"] for line in lines)
    trigger, shipped = TRIGGER, place / "style_dataset"
    dataset_path: str | Path = shipped
    if images is None:
        captions = tuple(caption for _, caption in _dataset_rows(shipped))
    else:
        captions = tuple(_own_images(images, instance_prompt, skip_bad_images)[1])
        prompts, trigger = own_prompts(captions, [prompt.removesuffix(f" {TRIGGER}") for prompt in prompts])
        dataset_path = images
    # one that the set holds and one that it does not, where there are both
    shown = [f"--validation_prompt={prompt}" for prompt in dict.fromkeys((prompts[0], prompts[-1]))]
    return QuickStart(
        model_path=str(place / "model"),
        dataset_path=str(dataset_path),
        captions=captions,
        trigger=trigger,
        prompts=prompts,
        seen=tuple(prompt for prompt in prompts if prompt in captions),
        seeds=SEEDS,
        training_flags=(*TRAINING_FLAGS, *shown, *VALIDATION_FLAGS),
        inference_flags=INFERENCE_FLAGS,
    )


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure(before_dir: str | Path, after_dir: str | Path, rows: list[tuple] | None = None) -> dict:
    """What the fine-tuning did to the images, from the output folders of two inference runs.

    `colour_distance` to the fine-tuning set, in 8-bit levels. A plain square of the right colours would be near, too:
    whether the subjects are still there is for the eye to say, on the sheet.

    Args:
        rows: (PIL image, caption) of each image of the set; None takes the shipped one.

    Returns:
        dict: distance_before, distance_after, their noise (half the range over seeds; None with one seed), factor
        (before / after), floor (distance between two halves of the set: no distance means less; None for one image),
        seen and unseen (the same figures for prompts in the set and others, None where there are none), images.

    Raises:
        ValueError: the folders do not hold the same prompts and seeds, or one of them cannot be read.
    """
    before, after = read_images(before_dir), read_images(after_dir)
    if set(before) != set(after):
        odd = sorted(set(before) ^ set(after))
        shown = "; ".join(f"'{prompt}' seed {seed}" for prompt, seed in odd[:5])
        raise ValueError(
            f"{before_dir} and {after_dir} do not hold the same prompts and seeds ({len(odd)} without a partner): "
            + shown
        )
    rows = rows if rows is not None else _shipped_rows()
    captions = {caption for _, caption in rows}
    style = [pixels_of(shown) for shown, _ in rows]

    def by_key(paths: Mapping[tuple, Path]) -> dict[tuple, np.ndarray]:
        pixels = {}
        for key, path in paths.items():
            with Image.open(path) as image:
                pixels[key] = pixels_of(image)
        return pixels

    sides = {"before": by_key(before), "after": by_key(after)}
    seeds = sorted({seed for _, seed in before})
    target = colour_quantiles(style)

    def figures(keys: list[tuple]) -> dict | None:
        if not keys:
            return None
        result = {}
        for side, pixels in sides.items():
            result[f"distance_{side}"] = quantile_distance(colour_quantiles([pixels[key] for key in keys]), target)
            groups = [[pixels[key] for key in keys if key[1] == seed] for seed in seeds]
            by_seed = [quantile_distance(colour_quantiles(group), target) for group in groups if group]
            result[f"noise_{side}"] = (max(by_seed) - min(by_seed)) / 2 if len(by_seed) > 1 else None
        result["factor"] = result["distance_before"] / max(result["distance_after"], 1e-6)
        return result

    return {
        **figures(list(before)),
        "floor": colour_distance(style[::2], style[1::2]) if len(style) > 1 else None,
        "seen": figures([key for key in before if key[0] in captions]),
        "unseen": figures([key for key in before if key[0] not in captions]),
        "images": len(before),
    }


def describe(result: dict) -> str:
    """The figures of `measure` as plain lines."""

    def line(name: str, part: dict | None) -> str | None:
        if part is None:
            return None
        texts = []
        for side in ("before", "after"):
            noise = part[f"noise_{side}"]
            texts.append(f"{part[f'distance_{side}']:.1f}" + ("" if noise is None else f" ± {noise:.1f}"))
        return f"{name}: {texts[0]} without LoRA, {texts[1]} with LoRA, {part['factor']:.1f} times nearer"

    lines = [
        "Colour distance to the training images, in 8-bit levels (± half the range over seeds):",
        line("  all prompts          ", result),
        line("  in the training set  ", result["seen"]),
        line("  not in it            ", result["unseen"]),
        f"  two halves of the set: {result['floor']:.1f} apart" if result["floor"] is not None else None,
    ]
    return "\n".join(text for text in lines if text)


def write_sheet(
    before_dir: str | Path,
    after_dir: str | Path,
    path: str | Path,
    rows: list[tuple] | None = None,
    columns: int = COLUMNS,
) -> Path:
    """Before/after sheet: each prompt's image without and with the LoRA, of the first seed that all prompts have.

    Args:
        rows: as for `measure`.
        columns: pairs in a row; 3 for a phone, 6 for docs/quickstart.png.

    Raises:
        ValueError: no prompt and seed that both folders hold.
    """
    before, after = read_images(before_dir), read_images(after_dir)
    captions = {caption for _, caption in (rows if rows is not None else _shipped_rows())}
    shared = [key for key in before if key in after]
    prompts = list(dict.fromkeys(prompt for prompt, _ in shared))[:MAX_PROMPTS]
    seeds = [s for s in dict.fromkeys(seed for _, seed in shared) if all((p, s) in shared for p in prompts)]
    if not seeds:
        raise ValueError(f"{before_dir} and {after_dir} hold no seed with the same prompts.")
    # What all prompts end with is said once, so that the labels stay short enough to read.
    ending = same_ending([prompt.split() for prompt in prompts]) if len(prompts) > 1 else ""
    end = f" {ending}" if ending and ending not in prompts else ""
    sections = []
    for heading, chosen in (
        ("In the training images", [prompt for prompt in prompts if prompt in captions]),
        ("Not in the training images", [prompt for prompt in prompts if prompt not in captions]),
    ):
        keys = [(prompt, seeds[0]) for prompt in chosen]
        pairs = [Pair(before[key], after[key], key[0].removesuffix(end)) for key in keys]
        sections += [(heading, pairs)] if pairs else []
    note = f"Every prompt ends with “{ending}”." if end else ""
    title = "Without (left) and with (right) the LoRA"
    return before_after_sheet(sections, path, title=title, note=note, columns=columns)


# ---- command line ---------------------------------------------------------------------------------------------------

# Behind the figures of a user's own images, which are of their colours alone.
OWN_IMAGES_NOTE = """\
The small model draws line drawings on light paper. Of photographs, or of light lines on dark paper, it learns the
colours and loses the subjects: that takes a large model (docs/training.md, "A trial without a card")."""

PRINTABLE = tuple(field.name for field in dataclasses.fields(QuickStart))


def as_shell(found: QuickStart) -> str:
    """Everything that was found as bash assignments, quickstart_NAME=..., texts and arrays; for `eval`."""
    lines = []
    for name in PRINTABLE:
        value = getattr(found, name)
        quoted = shlex.quote(value) if isinstance(value, str) else f"({shlex.join(map(str, value))})"
        lines.append(f"quickstart_{name}={quoted}")
    return "\n".join(lines)


def _compare(args: argparse.Namespace) -> None:
    """Sheet, figures, the pages of the run and its last lines."""
    before, after, out = args.compare
    own = args.instance_data_dir
    rows = _own_rows(own, args.instance_prompt, args.skip_bad_images) if own else _shipped_rows()
    result = measure(before, after, rows)
    write_sheet(before, after, out, rows, max(1, args.columns))
    print(describe(result))
    if own:
        print(OWN_IMAGES_NOTE)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"before and after: {out}")
    if args.run:
        write_report(args.run)
        print(f"gallery: {write_gallery(after, before)}")
        print("\n".join(made_by(args.run)))


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m sana_kit.quickstart", description=__doc__, formatter_class=PlainHelp)
    parser.add_argument("--folder", help="Copy model and data set there first; default: use them where they are.")
    parser.add_argument(
        "--print", dest="printed", choices=PRINTABLE, help="Check the files and print this, one item a line."
    )
    parser.add_argument(
        "--compare", nargs=3, metavar=("BEFORE_DIR", "AFTER_DIR", "OUT.png"), help="Sheet and figures."
    )
    parser.add_argument("--columns", type=int, default=COLUMNS, help="With --compare: pairs in a row of the sheet.")
    parser.add_argument("--shell", action="store_true", help="Check the files and print all as bash assignments.")
    parser.add_argument(
        "--run", metavar="DIR", help="With --compare: also write report and gallery of this run, and say what it made."
    )
    parser.add_argument("--json", help="With --compare: also write the figures there.")
    parser.add_argument("--instance_data_dir", help="Your own images, with .txt captions, instead of the shipped.")
    parser.add_argument("--instance_prompt", help="The caption of those of your images that have none.")
    parser.add_argument("--skip_bad_images", action="store_true", help="Leave out those that cannot be read.")
    args = parser.parse_args(arguments)
    own, how = args.instance_data_dir, (args.instance_prompt, args.skip_bad_images)
    if not args.printed and not args.shell and not args.compare:
        parser.error("nothing to do: give --print, --shell or --compare")
    try:
        if args.printed:
            value = getattr(prepare(args.folder, own, *how), args.printed)
            print("\n".join(map(str, (value,) if isinstance(value, str) else value)))
        if args.shell:
            print(as_shell(prepare(args.folder, own, *how)))
        if args.compare:
            _compare(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
