"""An inference run: the job list is fixed first, whole groups of it go to the ranks, finished images are kept."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from sana_kit import devices
from sana_kit.devices import is_out_of_memory
from sana_kit.distributed import Ranks
from sana_kit.errors import InputError, RankFailed, UserError
from sana_kit.files import write_atomic
from sana_kit.generation.generate import generate_groups
from sana_kit.generation.texts import encode_texts, job_texts, split_texts, texts_cut
from sana_kit.inference.config import build_parser
from sana_kit.inference.output import MANIFEST, OutputFolder, Writer, make_contact_sheet
from sana_kit.inference.plan import Plan, check
from sana_kit.locks import lock_folder
from sana_kit.models.loading import load_pipeline, load_text_encoder, text_dtype
from sana_kit.reports.gallery import write_gallery
from sana_kit.runlog import console_bar


def run(args) -> dict:
    """Make the images that `args` ask for; returns the summary, whose "failed" lists the jobs that failed.

    Raises:
        InputError: problems that the user can mend, all at once, before weights are loaded.
        RankFailed: on ranks that are well, when another one failed.
    """
    ranks = Ranks.start(args.device)
    plan = ranks.run_on_all(lambda: check(args, ranks.device, ranks.device_problem), checks_input=True)
    views = ranks.gather([job.file_name for job in plan.jobs])
    if any(view != views[0] for view in views):
        odd = [rank for rank, view in enumerate(views) if view != views[0]]
        raise InputError(
            f"--model_path={args.model_path}: ranks {odd} see other model or adapter files, or other prompts, than"
            " rank 0. Give every machine the same ones."
        )
    with contextlib.ExitStack() as stack:
        folder = OutputFolder(args.output_path, ranks.rank)
        ranks.run_on_all(lambda: _take_folder(args.output_path, folder, ranks, stack), checks_input=True)
        summary = _run_in_folder(args, ranks, plan, folder)
    ranks.close()
    return summary


def _take_folder(path: str, folder: OutputFolder, ranks: Ranks, stack: contextlib.ExitStack) -> None:
    """Main process: lock the folder for this run and tidy it."""
    if not ranks.is_main:
        return

    try:
        stack.enter_context(lock_folder(path, field="output_path"))
        folder.open()
    except OSError as error:
        raise ValueError(f"--output_path={path}: cannot be written ({error}). Name another folder.") from None


def _check_shared(path: str, ranks: Ranks) -> None:
    """Raise InputError unless all ranks see one output folder."""
    if ranks.world_size == 1:
        return
    token = Path(path) / f".run-{ranks.gather(os.urandom(8).hex())[0]}"
    ranks.run_on_all(lambda: token.touch() if ranks.is_main else None)
    deadline = time.monotonic() + 10  # network file systems show a new file late
    while not token.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = ranks.gather(token.exists())
    if ranks.is_main:
        token.unlink(missing_ok=True)
    if not all(seen):
        blind = [rank for rank, sees in enumerate(seen) if not sees]
        raise InputError(
            f"--output_path={path}: ranks {blind} do not see rank 0's folder of that name. With several machines it"
            " must lie on a file system that they share."
        )


def _run_in_folder(args, ranks: Ranks, plan: Plan, folder: OutputFolder) -> dict:

    say = print if ranks.is_main else (lambda *_, **__: None)
    _check_shared(args.output_path, ranks)
    done, damaged = ranks.gather(folder.finished(plan.jobs) if ranks.is_main and not args.overwrite else (set(), []))[
        0
    ]
    pending = [group for group in plan.groups if any(job.file_name not in done for job in group)]
    say(
        f"{len(plan.jobs)} images, {len(done)} of them finished before; {ranks.world_size} process(es) on"
        f" {ranks.device.type}"
    )
    for note in plan.notes:
        say(note)
    if damaged:
        say(f"{len(damaged)} finished image(s) are missing or damaged and are made again: {damaged[0]} ...")

    failures: list[tuple[int, str]] = []  # (job index, error)

    def fail(jobs: Sequence, error: BaseException) -> None:
        text = explain(error)
        failures.extend((job.index, text) for job in jobs if job.file_name not in done)

    seconds = {"load": 0.0, "encode": 0.0, "generate": 0.0}
    lines: list[dict] = []
    if pending:
        prompts, negatives, text_errors = _encode(args, ranks, plan, pending, seconds)
        mine = []
        for group in pending[ranks.rank :: ranks.world_size]:
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
    finish = lambda: _finish(args, ranks, plan, folder, done, results, seconds) if ranks.is_main else None  # noqa: E731
    summary = ranks.gather(ranks.run_on_all(finish))[0]
    _tell(summary, say)
    return summary


def _encode(args, ranks: Ranks, plan: Plan, pending: list, seconds: dict):
    """(prompt -> embeds, negative prompt -> embeds, (text, negative) -> error): each distinct text once in the run.

    A few ranks encode and all get the result: the text encoder is the largest part of the model to load.
    """
    import torch

    texts = job_texts(job for group in pending for job in group)
    per_rank = 4 if ranks.device.type == "cpu" else 64  # texts that are worth loading the encoder on one more rank
    encoders = min(ranks.world_size, -(-len(texts) // per_rank))
    errors: dict[tuple[str, bool], str] = {}
    cut: list[str] = []

    def encode():
        if ranks.rank >= encoders:
            return {}
        start = time.perf_counter()
        tokenizer, encoder = load_text_encoder(plan.model, device=ranks.device, dtype=text_dtype(plan.dtype))
        seconds["load"] += time.perf_counter() - start
        cut.extend(texts_cut(tokenizer, texts[ranks.rank :: encoders], args.max_sequence_length))
        return encode_texts(
            tokenizer,
            encoder,
            texts[ranks.rank :: encoders],
            plan.instruction,
            device=ranks.device,
            max_sequence_length=args.max_sequence_length,
            on_error=lambda text, negative, error: errors.update({(text, negative): explain(error)}),
        )

    start = time.perf_counter()
    encoded = ranks.run_on_all(encode)
    devices.empty_cache(ranks.device)
    merged: dict[tuple[str, bool], torch.Tensor] = {}
    too_long = []
    for part, part_errors, part_cut in ranks.gather((encoded, errors, cut)):
        merged.update(part)
        errors.update(part_errors)
        too_long += part_cut
    if too_long and ranks.is_main:
        print(
            f"{len(too_long)} prompt(s) have more than --max_sequence_length={args.max_sequence_length} tokens; the"
            f" rest of them is not seen: {too_long[0][:60]} ..."
        )
    seconds["encode"] += time.perf_counter() - start - seconds["load"]
    return *split_texts(merged), errors


def _generate(args, ranks, plan, folder, groups, done, embeds, fail, seconds) -> list[dict]:
    """Load what this rank needs, make its groups, write its images; returns their manifest lines."""

    def load():
        if not groups:
            return None
        return load_pipeline(
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
    pipeline = ranks.run_on_all(load)
    seconds["load"] += time.perf_counter() - start
    start = time.perf_counter()
    writer = Writer(folder, fail)
    facts = {"model": args.model_path, "lora_weights": args.lora_weights, "dtype": args.dtype}
    if plan.lora is not None:
        facts["lora_scale"] = args.lora_scale
    steps = sum(group[0].num_inference_steps for group in groups)

    def on_image(job, image, took: float) -> None:
        if job.file_name not in done:
            writer.submit(job, image, {"seconds": round(took, 3), **facts})

    try:
        if groups:
            with console_bar(steps, f"denoising {sum(map(len, groups))} images", main_process=ranks.is_main) as bar:
                generate_groups(
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
                    on_image=on_image,
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

    failures = dict(sorted(failure for part, _, _ in results for failure in part))
    new = [line for _, lines, _ in results for line in lines]
    folder.merge_parts({job.file_name: job.index for job in plan.jobs})
    made = done | {line["file"] for line in new}
    if made:
        make_contact_sheet(folder.path, plan.jobs, made)
        write_gallery(folder.path)
    elapsed = seconds["encode"] + seconds["generate"]
    steps = sum(line["num_inference_steps"] for line in new)
    summary = {
        "images": len(plan.jobs),
        "made": len(new),
        "kept": len(done),
        "failed": [
            {"file": plan.jobs[index].file_name, "prompt": plan.jobs[index].prompt, "error": text}
            for index, text in failures.items()
        ],
        "world_size": ranks.world_size,
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
    write_atomic(folder.path / "summary.json", lambda file: file.write(text.encode()))
    return summary


def _tell(summary: dict, say: Callable) -> None:
    if summary["made"]:
        elapsed = summary["encode_seconds"] + summary["generate_seconds"]
        say(
            f"Loading {summary['load_seconds']:.1f} s; prompts {summary['encode_seconds']:.1f} s, {summary['made']}"
            f" images {summary['generate_seconds']:.1f} s. Peak memory {summary['peak_memory_bytes'] / 1e9:.2f} GB."
        )
        say(
            f"E2E without loading: {summary['images_per_second']:.4f} images/s, {summary['iterations_per_second']:.2f}"
            f" it/s (denoising steps of all images) in {elapsed:.1f} s with {summary['world_size']} process(es)"
        )
    say(f"Images, {MANIFEST}, contact_sheet.png and gallery.html are in {summary['output_path']}")


def explain(error: BaseException) -> str:
    """One line for a failed image, with a remedy where there is one."""

    text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": ")
    if is_out_of_memory(error):
        return f"out of memory; use a smaller --batch_size or size ({text})"
    return text


def main(description: str, argv: Sequence[str] | None = None, lora_default: str | None = None) -> int:
    """Run a script: 0 when every image is there, 1 when some failed, 2 for problems with the arguments."""
    rank = int(os.environ.get("RANK", "0") or 0)
    args = build_parser(description, lora_default).parse_args(argv)
    try:
        summary = run(args)
    except (InputError, UserError) as error:
        if rank == 0:
            text = str(error.as_flags() if isinstance(error, UserError) else error)
            print("error:\n  " + text.replace("\n", "\n  "), file=sys.stderr, flush=True)
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
        print(f"{len(summary['failed'])} of {summary['images']} images failed, the others are done:", file=sys.stderr)
        for failure in summary["failed"][:20]:
            print(f"  {failure['file']}: {failure['error']}", file=sys.stderr)
        if len(summary["failed"]) > 20:
            print(f"  and {len(summary['failed']) - 20} more, see summary.json", file=sys.stderr)
    return 1 if summary["failed"] else 0
