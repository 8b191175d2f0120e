"""What the three infer_sana_text2img_*.py scripts run: command line, checks, sharing of jobs, output folder, figures.

The scripts differ in their defaults only. One process or many take the same path: the job list is fixed first, whole
groups of it go to the ranks, and what is finished is kept when the same command is started again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import io
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

DEFAULT_MODEL = "Efficient-Large-Model/Sana_1600M_4Kpx_BF16_diffusers"
DEFAULT_PROMPTS = Path(__file__).with_name("prompts.jsonl")
DEFAULT_SEEDS = (8, 23, 42, 1334)
MANIFEST = "manifest.jsonl"
CONTACT_SHEET_LIMIT = 200  # pictures: more make a sheet that no viewer opens
PNG_LEVEL = 1  # zlib: 2.4 times as fast as Pillow's default 6 for 14 % more bytes (measured at 2048 px)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations, which names the nearest flag for a misspelt one."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_args(self, args=None, namespace=None):
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            said = []
            for word in unknown:
                near = difflib.get_close_matches(word.split("=")[0], flags, n=1) if word.startswith("-") else []
                said.append(f"{word} (did you mean {near[0]}?)" if near else word)
            self.error("unrecognized arguments: " + " ".join(said))
        return known


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults behind the help of flags that have a value."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.const is not None else super()._get_help_string(action)


def build_parser(description: str, lora_default: str | None = None) -> argparse.ArgumentParser:
    """The flags of the inference scripts. `lora_default`: an adapter that the script takes if none is named."""
    parser = Parser(description=description, formatter_class=_Help)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model_path",
        default=DEFAULT_MODEL,
        help="diffusers folder, hub name, or the output folder of a full fine-tuning (which holds transformer/)",
    )
    model.add_argument(
        "--base_model", help="base of a fully fine-tuned transformer that names none: diffusers folder or hub name"
    )
    model.add_argument("--revision", help="revision of a hub model: branch, tag or commit")
    model.add_argument("--variant", help="variant of the weights files, such as fp16")
    model.add_argument("--cache_dir", help="where hub models are kept; default: huggingface_hub's own")
    model.add_argument("--dtype", default="bf16", help="of the transformer: bf16, fp32 or fp16 (not for bf16 weights)")
    model.add_argument(
        "--vae_dtype", help="of the VAE's decoder: bf16 or fp32; default: bf16, and fp32 where --dtype is fp32"
    )
    model.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, npu or npu:N")
    model.add_argument("--attention", default="auto", help="cross-attention kernel: auto, sdpa or npu_fusion")
    lora = parser.add_argument_group("LoRA")
    lora.add_argument(
        "--lora_weights",
        default=lora_default,
        help="adapter: a safetensors file, or a folder that holds pytorch_lora_weights.safetensors",
    )
    lora.add_argument("--lora_scale", type=float, default=1.0, help="strength of the adapter")
    lora.add_argument(
        "--no_fuse_lora",
        dest="fuse_lora",
        action="store_false",
        help="keep the adapter beside the weights instead of merging it into them for the run",
    )
    what = parser.add_argument_group("pictures")
    what.add_argument("--prompt", action="append", help="a prompt; may be given several times")
    what.add_argument(
        "--prompts_file",
        help="prompts: a .txt file with one a line, or a .jsonl file with objects of prompt and, if wanted,"
        f" negative_prompt, seeds, height, width; default without --prompt: {DEFAULT_PROMPTS.name} of the kit",
    )
    what.add_argument(
        "--negative_prompt", help="for every prompt; default: the one in the prompts file, else the empty text"
    )
    what.add_argument("--seeds", type=int, nargs="+", default=list(DEFAULT_SEEDS), help="one picture per prompt each")
    what.add_argument("--num_inference_steps", type=int, default=28, help="denoising steps")
    what.add_argument("--guidance_scale", type=float, default=2.0, help="classifier-free guidance; 1 and below: none")
    what.add_argument(
        "--height", type=int, help="pixels; default: the checkpoint's native size, or the width if given"
    )
    what.add_argument(
        "--width", type=int, help="pixels; default: the checkpoint's native size, or the height if given"
    )
    what.add_argument(
        "--complex_human_instruction",
        default="default",
        help="lines put before each prompt: default (SanaPipeline's own), none, a file, or a JSON list",
    )
    what.add_argument("--max_sequence_length", type=int, default=300, help="tokens of a prompt that count")
    what.add_argument(
        "--no_resolution_binning",
        dest="resolution_binning",
        action="store_false",
        help="work at the size asked for, never at the nearest trained size; default: at that one where its pixels are"
        " within a factor of 2",
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--batch_size",
        default="auto",
        help="pictures per call of the transformer: a number, or auto (by size and device)",
    )
    run.add_argument("--output_path", default="./infer_result", help="folder for pictures, manifest and contact sheet")
    run.add_argument(
        "--overwrite", action="store_true", help="make finished pictures again instead of keeping those that are whole"
    )
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def read_prompts(path: str) -> tuple[list, list[str]]:
    """(list of generation.Prompt, problems) of a .txt or .jsonl file; problems name the line."""
    from sana_kit.generation import Prompt

    file = Path(path)
    if not file.is_file():
        return [], [f"--prompts_file={path}: no such file. Give a .txt or .jsonl file."]
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        return [], [f"--prompts_file={path}: is not UTF-8 text ({error.reason} at byte {error.start})."]
    if file.suffix.lower() not in (".jsonl", ".json"):
        prompts = [Prompt(line.strip()) for line in lines if line.strip()]
        return prompts, [] if prompts else [f"--prompts_file={path}: holds no prompt."]
    prompts, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompts.append(_prompt_of(json.loads(line)))
        except ValueError as error:
            problems.append(f"--prompts_file={path}, line {number}: {error}")
    if not prompts and not problems:
        problems.append(f"--prompts_file={path}: holds no prompt.")
    return prompts, problems


def _prompt_of(entry):
    """A generation.Prompt of one JSON value; ValueError with a sentence about what is wrong with it."""
    from sana_kit.generation import Prompt

    if isinstance(entry, str):
        entry = {"prompt": entry}
    if not isinstance(entry, dict):
        raise ValueError("each line must be a JSON object or a JSON string.")
    unknown = set(entry) - {field.name for field in dataclasses.fields(Prompt)}
    if unknown:
        raise ValueError(
            f"unknown entries {sorted(unknown)}; known are prompt, negative_prompt, seeds, height, width."
        )
    if not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        raise ValueError("prompt must be a text that is not empty.")
    if not isinstance(entry.get("negative_prompt"), (str, type(None))):
        raise ValueError("negative_prompt must be a text.")
    seeds = entry.get("seeds")
    if seeds is not None and not (isinstance(seeds, list) and seeds and all(type(seed) is int for seed in seeds)):
        raise ValueError("seeds must be a list of whole numbers.")
    for side in ("height", "width"):
        if entry.get(side) is not None and type(entry[side]) is not int:
            raise ValueError(f"{side} must be a whole number of pixels.")
    return Prompt(**{**entry, "seeds": None if seeds is None else tuple(seeds)})


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


class InputError(ValueError):
    """Problems that the user can mend, one a line."""


class RankFailed(RuntimeError):
    """Another rank failed; that rank shows the whole error."""


def _hide_progress_bars() -> None:
    """Loading bars of the libraries: the main process shows them for all."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


class Ranks:
    """The processes of a run. Object exchange goes over a gloo group of its own.

    Gloo, because the devices' own back ends limit how long a rank may wait (HCCL 1836 s by default), and an idle rank
    waits for the whole run; gloo also notices at once when a peer has died.
    """

    def __init__(self, device_flag: str):
        """RuntimeError where ranks do not find one another. A device that is not there becomes `device_problem`."""
        from sana_kit import devices

        self.world = devices.launched_world_size()
        self.rank, self.group, self.own = 0, None, False
        self.device_problem: str | None = None
        if self.world == 1:
            try:
                self.device = devices.pick_device(device_flag)
            except ValueError as error:
                self.device, self.device_problem = devices.pick_device("cpu"), str(error)
        else:
            from datetime import timedelta

            import torch.distributed

            kind = devices.accelerator_type()
            if device_flag not in ("auto", kind):
                self.device_problem = (
                    f"--device={device_flag}: with {self.world} processes each takes its own {kind} device. Leave"
                    " --device out, and hide devices by CUDA_VISIBLE_DEVICES or ASCEND_RT_VISIBLE_DEVICES."
                )
            self.own = not torch.distributed.is_initialized()
            state = devices.distributed_state()
            self.rank, self.device = state.process_index, state.device
            self.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))
        devices.prepare_backend(self.device)
        if not self.main:
            _hide_progress_bars()

    @property
    def main(self) -> bool:
        return self.rank == 0

    def gather(self, value) -> list:
        """Every rank's value, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        import torch.distributed

        values = [None] * self.world
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def together(self, action: Callable, checks_input: bool = False):
        """Run `action` on every rank; if it fails anywhere, it fails everywhere. Returns this rank's result.

        Args:
            checks_input: a ValueError is the user's to mend: every rank raises all ranks' messages, each once.

        Raises:
            InputError: with `checks_input`, where no rank failed in another way.
            the rank's own exception: on a rank that failed.
            RankFailed: on the others.
        """
        result = failure = None
        try:
            result = action()
        except Exception as error:
            failure = error
        kind = None
        if failure is not None:
            kind = "input" if checks_input and isinstance(failure, ValueError) else "failure"
        reports = self.gather((kind, f"{type(failure).__name__}: {failure}" if kind == "failure" else str(failure)))
        kinds = {kind for kind, _ in reports}
        if "input" in kinds and "failure" not in kinds:
            raise InputError("\n".join(dict.fromkeys(text for kind, text in reports if kind))) from failure
        if failure is not None:
            raise failure
        for rank, (kind, text) in enumerate(reports):
            if kind is not None:
                raise RankFailed(f"rank {rank} failed: {text}")
        return result

    def close(self) -> None:
        """Leave the process group, at the end of a run that went well."""
        if self.own:
            import torch.distributed

            torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Checks


@dataclasses.dataclass
class Plan:
    """Everything that is known before weights are loaded."""

    model: object
    lora: object | None
    dtype: object
    vae_dtype: object
    instruction: list[str] | None
    jobs: list
    groups: list
    notes: list[str]


def check(args, device, device_problem: str | None = None) -> Plan:
    """Check all arguments, the model's and the adapter's files; plan the jobs. Loads nothing, writes nothing.

    `device_problem`: what was wrong with --device, told with the rest.

    Raises:
        ValueError: every problem found, one a line.
    """
    import torch

    from sana_kit import devices, generation, models

    problems: list[str] = [device_problem] if device_problem else []
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
    dtype = dtypes.get(args.dtype)
    if dtype is None:
        problems.append(f"--dtype={args.dtype}: unknown. Use bf16, fp32 or fp16.")
        dtype = torch.bfloat16
    if args.vae_dtype not in (None, "bf16", "fp32"):
        problems.append(
            f"--vae_dtype={args.vae_dtype}: use bf16 or fp32 (DC-AE was trained in bf16, and fp16 overflows in it)."
        )
    vae_dtype = dtypes.get(args.vae_dtype) or models.default_vae_dtype(dtype)
    for flag, value, low in (
        ("--num_inference_steps", args.num_inference_steps, 1),
        ("--max_sequence_length", args.max_sequence_length, 1),
    ):
        if value < low:
            problems.append(f"{flag}={value}: must be at least {low}.")
    for flag, value in (("--guidance_scale", args.guidance_scale), ("--lora_scale", args.lora_scale)):
        if not abs(value) < 1e6:
            problems.append(f"{flag}={value}: must be a finite number.")
    for seed in args.seeds:
        if not -(2**63) <= seed < 2**64:
            problems.append(f"--seeds {seed}: out of the range of a 64-bit number.")
    batch_size = args.batch_size
    if batch_size != "auto":
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            problems.append(f"--batch_size={batch_size}: must be auto or a whole number of at least 1.")
            batch_size = "auto"
        else:
            batch_size = int(batch_size)
    instruction = None
    try:
        instruction = generation.parse_instruction(args.complex_human_instruction)
    except ValueError as error:
        problems.append(str(error))
    try:
        devices.resolve_attention(args.attention, device)
    except ValueError as error:
        problems.append(str(error))

    prompts: list = []
    for text in args.prompt or []:
        if text.strip():
            prompts.append(generation.Prompt(text))
        else:
            problems.append("--prompt: must not be empty.")
    if args.prompts_file is not None or not args.prompt:
        listed, found = read_prompts(args.prompts_file or str(DEFAULT_PROMPTS))
        prompts += listed
        problems += found
    problems += check_output_path(args.output_path)

    model, found = models.find_model(
        args.model_path,
        base_model=args.base_model,
        revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
        dtype=dtype,
    )
    problems += found
    lora = None
    if args.lora_weights is not None:
        if model is None:
            _, problem = models.lora_file(args.lora_weights)
            problems += [problem] if problem else []
        else:
            lora, found = models.read_lora(args.lora_weights, model.transformer_config)
            problems += found
    elif args.lora_scale != 1.0 or not args.fuse_lora:
        problems.append(
            "--lora_scale and --no_fuse_lora have no effect without --lora_weights. Give it, or leave them out."
        )

    notes: list[str] = []
    jobs: list = []
    if model is not None:
        height = args.height or args.width or model.native_size
        width = args.width or args.height or model.native_size
        sizes = {(entry.height or height, entry.width or width) for entry in prompts}
        for h, w in sorted(sizes):
            size_problems, note = _check_size(h, w, model, args.resolution_binning)
            problems += size_problems
            notes += [note] if note else []
        identity = {
            "model": model.fingerprint,
            "lora": None if lora is None else [lora.sha256, args.lora_scale, args.fuse_lora],
            "dtype": args.dtype,
            "vae_dtype": str(vae_dtype),
            "instruction": instruction,
            "max_sequence_length": args.max_sequence_length,
            "binning": args.resolution_binning,
        }
        if not problems:
            jobs = generation.plan_jobs(
                prompts,
                args.seeds,
                height=height,
                width=width,
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                negative_prompt=args.negative_prompt,
                fingerprint=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
            )
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    asked = sum(len(entry.seeds or args.seeds) for entry in prompts)
    if asked != len(jobs):
        notes.append(f"{asked - len(jobs)} of {asked} pictures were asked for twice and are made once.")
    groups = generation.group_jobs(jobs, batch_size, device=device, pixels_per_token=model.pixel_multiple**2)
    return Plan(model, lora, dtype, vae_dtype, instruction, jobs, groups, notes)


def _check_size(height: int, width: int, model, binning: bool) -> tuple[list[str], str | None]:
    """(problems, a line for the log) of one picture size."""
    from sana_kit import generation

    if height < 1 or width < 1:
        return [f"--height={height} --width={width}: must be positive."], None
    made = generation.generation_size(height, width, model.transformer_config["sample_size"], binning)
    multiple = model.pixel_multiple
    if made[0] % multiple or made[1] % multiple:
        near = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
        return [
            f"--height={height} --width={width}: must be multiples of {multiple} px for this model; the nearest is"
            f" --height={near[0]} --width={near[1]}."
        ], None
    try:
        generation.check_decodable(*made, factor=model.vae_factor)
    except ValueError as error:
        return [f"--height={height} --width={width}: {error}"], None
    if made != (height, width):
        return [], (
            f"Resolution binning: {width}x{height} is made at {made[1]}x{made[0]}, the nearest trained size, and"
            " resized."
        )
    if binning:
        at_bin = generation.nearest_bin(height, width, model.transformer_config["sample_size"]) == (height, width)
        return [], None if at_bin else f"Resolution binning is off for {width}x{height}: no trained size is near it."
    return [], None


def check_output_path(path: str) -> list[str]:
    """Problems of an output folder that may not exist yet; creates nothing."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        return [f"--output_path={path}: is a file. Name a folder."]
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        return [f"--output_path={path}: {existing} is a file. Name a folder."]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"--output_path={path}: {existing} is not writable. Name another folder, or change its permissions."]
    return []


# ---------------------------------------------------------------------------------------------------------------------
# Output folder


class OutputFolder:
    """Pictures, and what is known of them: manifest.jsonl, and one part of it per rank while a run goes on.

    A picture is written beside and renamed, then its line is appended to the rank's part; a picture counts as finished
    when a line names it and its bytes have that line's SHA-256. So a kill at any moment costs the pictures under way.
    """

    def __init__(self, path: str, rank: int):
        self.path = Path(path)
        self.part = self.path / f".manifest-rank{rank:05d}.jsonl"

    def open(self) -> None:
        """Main process, holding the lock: remove half-written files, merge parts that a killed run left."""
        for leftover in self.path.glob(".*.png.*.tmp"):
            leftover.unlink(missing_ok=True)
        self.merge_parts({})

    def merge_parts(self, order: dict[str, int]) -> list[dict]:
        """Main process, when no rank writes: parts into manifest.jsonl, the latest line of each file; returns lines.

        `order`: file name -> place; named files come last, in this order, after what was there before.
        """
        from sana_kit.reports import read_log, write_atomic

        manifest = self.path / MANIFEST
        parts = sorted(self.path.glob(".manifest-rank*.jsonl"))
        known: dict[str, dict] = {}
        for source in [manifest, *parts]:
            if source.is_file():
                for line in read_log(source)[0]:
                    if isinstance(line.get("file"), str):
                        known[line["file"]] = line
        lines = sorted(known.values(), key=lambda line: order.get(line["file"], -1))
        if parts or (lines and order):
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_atomic(manifest, lambda file: file.write(text.encode("utf-8", "backslashreplace")))
        for part in parts:
            part.unlink(missing_ok=True)
        return lines

    def finished(self, jobs: Sequence) -> tuple[set[str], list[str]]:
        """(file names of jobs that are done and whole, file names that the manifest names but that are damaged)."""
        from sana_kit.checkpoints import file_sha256
        from sana_kit.reports import read_log

        manifest = self.path / MANIFEST
        lines = read_log(manifest)[0] if manifest.is_file() else []
        hashes = {line.get("file"): line.get("sha256") for line in lines}
        whole, damaged = set(), []
        for job in jobs:
            if job.file_name in hashes:
                path = self.path / job.file_name
                if path.is_file() and file_sha256(path) == hashes[job.file_name]:
                    whole.add(job.file_name)
                else:
                    damaged.append(job.file_name)
        return whole, damaged

    def save(self, job, image, facts: dict) -> dict:
        """Write one picture and its line; returns the line. Bytes depend on picture and job alone (no time stamps)."""
        from sana_kit.reports import write_atomic

        data = encode_png(image, job)
        line = {
            "file": job.file_name,
            "prompt": job.prompt,
            "negative_prompt": job.negative_prompt,
            "seed": job.seed,
            "height": job.height,
            "width": job.width,
            "num_inference_steps": job.num_inference_steps,
            "guidance_scale": job.guidance_scale,
            **facts,
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        write_atomic(self.path / job.file_name, lambda file: file.write(data))
        with open(self.part, "a", encoding="utf-8", errors="backslashreplace") as part:
            part.write(json.dumps(line, ensure_ascii=False) + "\n")
        return line


def encode_png(image, job) -> bytes:
    """PNG bytes with the job's settings in a text chunk, so that a picture tells how it was made."""
    from PIL.PngImagePlugin import PngInfo

    settings = {
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "seed": job.seed,
        "num_inference_steps": job.num_inference_steps,
        "guidance_scale": job.guidance_scale,
        "size": [job.width, job.height],
    }
    info = PngInfo()
    info.add_text("sana", json.dumps(settings))  # ASCII: json escapes every other letter
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info, compress_level=PNG_LEVEL)
    return buffer.getvalue()


class Writer:
    """Encodes and writes pictures in a thread, while the device works on the next ones."""

    def __init__(self, folder: OutputFolder, on_error: Callable):
        self.folder, self.on_error = folder, on_error
        self.lines: list[dict] = []
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._waiting: list = []

    def submit(self, job, image, facts: dict) -> None:
        while len(self._waiting) >= 4:  # bounds the memory of finished pictures (50 MB each at 4096 px)
            self._take()
        self._waiting.append((job, self._pool.submit(self.folder.save, job, image, facts)))

    def _take(self) -> None:
        job, future = self._waiting.pop(0)
        try:
            self.lines.append(future.result())
        except Exception as error:
            self.on_error([job], error)

    def close(self) -> None:
        while self._waiting:
            self._take()
        self._pool.shutdown()


def make_contact_sheet(folder: Path, jobs: Sequence, made: set[str]) -> Path | None:
    """contact_sheet.png of a run: a row per prompt where each has the same seeds, else rows of six."""
    from PIL import Image

    from sana_kit.reports import contact_sheet

    rows: dict[tuple[str, str], list] = {}
    for job in jobs:
        rows.setdefault((job.prompt, job.negative_prompt), []).append(job)
    widths = {len(row) for row in rows.values()}
    regular = len(widths) == 1 and 2 <= max(widths) <= 8
    shown = list(jobs[:CONTACT_SHEET_LIMIT])
    if regular:
        columns = max(widths)
        shown = shown[: max(columns, len(shown) // columns * columns)]
    if not any(job.file_name in made for job in shown):
        return None
    images = [
        folder / job.file_name if job.file_name in made else Image.new("RGB", (job.width, job.height), (200, 200, 200))
        for job in shown
    ]
    state = ["" if job.file_name in made else " (failed)" for job in shown]
    if regular:
        labels = [f"seed {job.seed}{note}" for job, note in zip(shown, state, strict=True)]
        prompts = [shown[start].prompt for start in range(0, len(shown), columns)]
        return contact_sheet(images, labels, folder / "contact_sheet.png", columns, row_labels=prompts)
    labels = [f"{job.prompt} | seed {job.seed}{note}" for job, note in zip(shown, state, strict=True)]
    return contact_sheet(images, labels, folder / "contact_sheet.png", min(6, len(shown)))


# ---------------------------------------------------------------------------------------------------------------------
# The run


def run(args) -> dict:
    """Make the pictures that `args` ask for; returns the summary, whose "failed" lists the jobs that failed.

    Raises:
        InputError: problems that the user can mend, all at once, before weights are loaded.
        RankFailed: on ranks that are well, when another one failed.
    """
    ranks = Ranks(args.device)
    plan = ranks.together(lambda: check(args, ranks.device, ranks.device_problem), checks_input=True)
    views = ranks.gather([job.file_name for job in plan.jobs])
    if any(view != views[0] for view in views):
        odd = [rank for rank, view in enumerate(views) if view != views[0]]
        raise InputError(
            f"--model_path={args.model_path}: ranks {odd} see other model or adapter files, or other prompts, than"
            " rank 0. Give every machine the same ones."
        )
    with contextlib.ExitStack() as stack:
        folder = OutputFolder(args.output_path, ranks.rank)
        ranks.together(lambda: _take_folder(args.output_path, folder, ranks, stack), checks_input=True)
        summary = _run_in_folder(args, ranks, plan, folder)
    ranks.close()
    return summary


def _take_folder(path: str, folder: OutputFolder, ranks: Ranks, stack: contextlib.ExitStack) -> None:
    """Main process: lock the folder for this run and tidy it."""
    if not ranks.main:
        return
    from sana_kit.checkpoints import locked_output_dir

    try:
        stack.enter_context(locked_output_dir(Path(path), flag="--output_path"))
        folder.open()
    except OSError as error:
        raise ValueError(f"--output_path={path}: cannot be written ({error}). Name another folder.") from None


def _check_shared(path: str, ranks: Ranks) -> None:
    """Raise InputError unless all ranks see one output folder."""
    if ranks.world == 1:
        return
    token = Path(path) / f".run-{ranks.gather(os.urandom(8).hex())[0]}"
    ranks.together(lambda: token.touch() if ranks.main else None)
    deadline = time.monotonic() + 10  # network file systems show a new file late
    while not token.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = ranks.gather(token.exists())
    if ranks.main:
        token.unlink(missing_ok=True)
    if not all(seen):
        blind = [rank for rank, sees in enumerate(seen) if not sees]
        raise InputError(
            f"--output_path={path}: ranks {blind} do not see rank 0's folder of that name. With several machines it"
            " must lie on a file system that they share."
        )


def _run_in_folder(args, ranks: Ranks, plan: Plan, folder: OutputFolder) -> dict:
    from sana_kit import devices

    say = print if ranks.main else (lambda *_, **__: None)
    _check_shared(args.output_path, ranks)
    done, damaged = ranks.gather(folder.finished(plan.jobs) if ranks.main and not args.overwrite else (set(), []))[0]
    pending = [group for group in plan.groups if any(job.file_name not in done for job in group)]
    say(
        f"{len(plan.jobs)} pictures, {len(done)} of them finished before; {ranks.world} process(es) on"
        f" {ranks.device.type}"
    )
    for note in plan.notes:
        say(note)
    if damaged:
        say(f"{len(damaged)} finished picture(s) are missing or damaged and are made again: {damaged[0]} ...")

    failures: list[tuple[int, str]] = []  # (job index, error)

    def fail(jobs: Sequence, error: BaseException) -> None:
        text = explain(error)
        failures.extend((job.index, text) for job in jobs if job.file_name not in done)

    seconds = {"load": 0.0, "encode": 0.0, "generate": 0.0}
    lines: list[dict] = []
    if pending:
        prompts, negatives, text_errors = _encode(args, ranks, plan, pending, seconds)
        mine = []
        for group in pending[ranks.rank :: ranks.world]:
            fit = []
            for job in group:
                errors = [text_errors.get((job.prompt, False)), text_errors.get((job.negative_prompt, True))]
                if any(errors):
                    failures.extend([(job.index, errors[0] or errors[1])] if job.file_name not in done else [])
                else:
                    fit.append(job)
            if any(job.file_name not in done for job in fit):
                mine.append(fit)
        lines = _generate(args, ranks, plan, folder, mine, done, (prompts, negatives), fail, seconds)
    results = ranks.gather((failures, lines, devices.peak_memory_bytes(ranks.device)))
    finish = lambda: _finish(args, ranks, plan, folder, done, results, seconds) if ranks.main else None  # noqa: E731
    summary = ranks.gather(ranks.together(finish))[0]
    _tell(summary, say)
    return summary


def _encode(args, ranks: Ranks, plan: Plan, pending: list, seconds: dict):
    """(prompt -> embeds, negative prompt -> embeds, (text, negative) -> error): each distinct text once in the run.

    A few ranks encode and all get the result: the text encoder is the largest part of the model to load.
    """
    import torch

    from sana_kit import devices, generation, models

    texts = generation.job_texts(job for group in pending for job in group)
    per_rank = 4 if ranks.device.type == "cpu" else 64  # texts that are worth loading the encoder on one more rank
    encoders = min(ranks.world, -(-len(texts) // per_rank))
    errors: dict[tuple[str, bool], str] = {}
    cut: list[str] = []

    def encode():
        if ranks.rank >= encoders:
            return {}
        start = time.perf_counter()
        tokenizer, encoder = models.load_text_encoder(
            plan.model, device=ranks.device, dtype=models.text_dtype(plan.dtype)
        )
        seconds["load"] += time.perf_counter() - start
        cut.extend(generation.texts_cut(tokenizer, texts[ranks.rank :: encoders], args.max_sequence_length))
        return generation.encode_texts(
            tokenizer,
            encoder,
            texts[ranks.rank :: encoders],
            plan.instruction,
            device=ranks.device,
            max_sequence_length=args.max_sequence_length,
            on_error=lambda text, negative, error: errors.update({(text, negative): explain(error)}),
        )

    start = time.perf_counter()
    encoded = ranks.together(encode)
    devices.empty_cache(ranks.device)
    merged: dict[tuple[str, bool], torch.Tensor] = {}
    too_long = []
    for part, part_errors, part_cut in ranks.gather((encoded, errors, cut)):
        merged.update(part)
        errors.update(part_errors)
        too_long += part_cut
    if too_long and ranks.main:
        print(
            f"{len(too_long)} prompt(s) have more than --max_sequence_length={args.max_sequence_length} tokens; the"
            f" rest of them is not seen: {too_long[0][:60]} ..."
        )
    seconds["encode"] += time.perf_counter() - start - seconds["load"]
    return *generation.split_texts(merged), errors


def _generate(args, ranks, plan, folder, groups, done, embeds, fail, seconds) -> list[dict]:
    """Load what this rank needs, make its groups, write its pictures; returns their manifest lines."""
    from sana_kit import generation, models
    from sana_kit.reports import console_bar

    def load():
        if not groups:
            return None
        return models.load_pipeline(
            plan.model,
            lora_weights=plan.lora,
            lora_scale=args.lora_scale,
            fuse_lora=args.fuse_lora,
            device=ranks.device,
            dtype=plan.dtype,
            vae_dtype=plan.vae_dtype,
            attention=args.attention,
            text_encoder=False,
        )

    start = time.perf_counter()
    pipeline = ranks.together(load)
    seconds["load"] += time.perf_counter() - start
    start = time.perf_counter()
    writer = Writer(folder, fail)
    facts = {"model": args.model_path, "lora_weights": args.lora_weights, "dtype": args.dtype}
    if plan.lora is not None:
        facts["lora_scale"] = args.lora_scale
    steps = sum(group[0].num_inference_steps for group in groups)

    def on_picture(job, image, took: float) -> None:
        if job.file_name not in done:
            writer.submit(job, image, {"seconds": round(took, 3), **facts})

    try:
        if groups:
            with console_bar(steps, f"denoising {sum(map(len, groups))} pictures", main_process=ranks.main) as bar:
                generation.generate_groups(
                    groups,
                    transformer=pipeline.transformer,
                    vae=pipeline.vae,
                    scheduler=pipeline.scheduler,
                    prompt_embeds=embeds[0],
                    negative_prompt_embeds=embeds[1],
                    device=ranks.device,
                    dtype=plan.dtype,
                    use_resolution_binning="auto" if args.resolution_binning else False,
                    on_step=bar.update,
                    on_picture=on_picture,
                    on_error=fail,
                )
    finally:
        writer.close()
    ranks.gather(None)  # the slowest rank ends the run
    seconds["generate"] += time.perf_counter() - start
    return writer.lines


def _finish(
    args, ranks: Ranks, plan: Plan, folder: OutputFolder, done: set[str], results: list, seconds: dict
) -> dict:
    """Main process: merge the manifest, make contact sheet and gallery, count; returns the summary."""
    from sana_kit import reports

    failures = dict(sorted(failure for part, _, _ in results for failure in part))
    new = [line for _, lines, _ in results for line in lines]
    folder.merge_parts({job.file_name: job.index for job in plan.jobs})
    made = done | {line["file"] for line in new}
    if made:
        make_contact_sheet(folder.path, plan.jobs, made)
        reports.write_gallery(folder.path)
    elapsed = seconds["encode"] + seconds["generate"]
    steps = sum(line["num_inference_steps"] for line in new)
    summary = {
        "pictures": len(plan.jobs),
        "made": len(new),
        "kept": len(done),
        "failed": [
            {"file": plan.jobs[index].file_name, "prompt": plan.jobs[index].prompt, "error": text}
            for index, text in failures.items()
        ],
        "world_size": ranks.world,
        "device": ranks.device.type,
        "largest_group": max(len(group) for group in plan.groups),
        "load_seconds": round(seconds["load"], 3),
        "encode_seconds": round(seconds["encode"], 3),
        "generate_seconds": round(seconds["generate"], 3),
        "images_per_second": len(new) / elapsed if new else 0.0,
        "iterations_per_second": steps / elapsed if new else 0.0,
        "peak_memory_bytes": max(peak for _, _, peak in results),
        "output_path": str(folder.path),
    }
    text = json.dumps(summary, indent=1, ensure_ascii=True)
    reports.write_atomic(folder.path / "summary.json", lambda file: file.write(text.encode()))
    return summary


def _tell(summary: dict, say: Callable) -> None:
    if summary["made"]:
        elapsed = summary["encode_seconds"] + summary["generate_seconds"]
        say(
            f"Loading {summary['load_seconds']:.1f} s; prompts {summary['encode_seconds']:.1f} s, {summary['made']}"
            f" pictures {summary['generate_seconds']:.1f} s. Peak memory {summary['peak_memory_bytes'] / 1e9:.2f} GB."
        )
        say(
            f"E2E without loading: {summary['images_per_second']:.4f} images/s, {summary['iterations_per_second']:.2f}"
            f" it/s (denoising steps of all pictures) in {elapsed:.1f} s with {summary['world_size']} process(es)"
        )
    say(f"Pictures, {MANIFEST}, contact_sheet.png and gallery.html are in {summary['output_path']}")


def explain(error: BaseException) -> str:
    """One line for a failed picture, with a remedy where there is one."""
    from sana_kit.encodings import is_out_of_memory

    text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": ")
    if is_out_of_memory(error):
        return f"out of memory; use a smaller --batch_size or size ({text})"
    return text


def main(description: str, argv: Sequence[str] | None = None, lora_default: str | None = None) -> int:
    """Run a script: 0 when every picture is there, 1 when some failed, 2 for problems with the arguments."""
    rank = int(os.environ.get("RANK", "0") or 0)
    args = build_parser(description, lora_default).parse_args(argv)
    try:
        summary = run(args)
    except InputError as error:
        if rank == 0:
            print("error:\n  " + str(error).replace("\n", "\n  "), file=sys.stderr, flush=True)
        return 2
    except RankFailed as error:
        print(f"rank {rank} stops: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr, flush=True)
        return 130
    except Exception:
        print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return 1
    if summary["failed"] and rank == 0:
        print(
            f"{len(summary['failed'])} of {summary['pictures']} pictures failed, the others are done:", file=sys.stderr
        )
        for failure in summary["failed"][:20]:
            print(f"  {failure['file']}: {failure['error']}", file=sys.stderr)
        if len(summary["failed"]) > 20:
            print(f"  and {len(summary['failed']) - 20} more, see summary.json", file=sys.stderr)
    return 1 if summary["failed"] else 0
