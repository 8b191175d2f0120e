"""An inference run: the job list is fixed first, whole groups of it go to the ranks, finished images are kept."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sana_kit import devices
from sana_kit.devices import is_out_of_memory
from sana_kit.distributed import Ranks
from sana_kit.errors import Problem, UserError
from sana_kit.files import write_atomic
from sana_kit.generation.generate import generate
from sana_kit.generation.jobs import Job, steps_of
from sana_kit.generation.texts import encode_texts, job_texts, split_texts, texts_cut
from sana_kit.inference.config import InferConfig
from sana_kit.inference.output import MANIFEST, OutputFolder, Writer, make_contact_sheet
from sana_kit.inference.plan import Plan, check
from sana_kit.locks import lock_folder
from sana_kit.models.attention import set_attention
from sana_kit.models.fused import fuse_blocks
from sana_kit.models.graphs import record_graphs
from sana_kit.models.loading import load_pipeline, load_text_encoder, text_dtype
from sana_kit.models.parts import load_controlnet
from sana_kit.progress import console_bar
from sana_kit.reports.gallery import write_gallery


@dataclasses.dataclass
class _Run:
    """What the parts of a run share; `say` prints on the main process, `seconds` holds load, encode and generate."""

    config: InferConfig
    plan: Plan
    ranks: Ranks
    folder: OutputFolder
    done: set[str]
    failures: list[tuple[int, str]] = dataclasses.field(default_factory=list)  # (job index, error) of this rank
    seconds: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"load": 0.0, "encode": 0.0, "generate": 0.0}
    )

    def say(self, text: str) -> None:
        if self.ranks.is_main:
            print(text, flush=True)

    def fail(self, jobs: Sequence[Job], error: BaseException | str) -> None:
        text = error if isinstance(error, str) else explain(error)
        self.failures.extend((job.index, text) for job in jobs if job.file_name not in self.done)


def run(config: InferConfig) -> dict[str, Any]:
    """Make the images that a configuration asks for; returns the summary, whose "failed" lists what failed.

    Raises:
        UserError: problems that the user can mend, all at once, before weights are loaded.
        RankFailed: on ranks that are well, when another one failed.
    """
    ranks = Ranks.start(config.model.device)
    plan = ranks.run_on_all(lambda: check(config, ranks.device, ranks.device_problem))
    views = ranks.gather([job.file_name for job in plan.jobs])
    if any(view != views[0] for view in views):
        odd = [rank for rank, view in enumerate(views) if view != views[0]]
        reason = f"ranks {odd} see other model or adapter files, or other prompts, than rank 0"
        raise UserError(Problem("model_path", config.model.model_path, reason, "Give every machine the same ones."))
    path = config.run.output_path
    with contextlib.ExitStack() as stack:
        folder = OutputFolder(path, ranks.rank)
        ranks.run_on_all(lambda: _take_folder(path, folder, ranks, stack))
        summary = _run_in_folder(config, ranks, plan, folder)
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
        raise UserError(Problem("output_path", path, f"cannot be written ({error})", "Name another folder.")) from None


def _check_shared(path: str, ranks: Ranks) -> None:
    """Raise UserError unless all ranks see one output folder."""
    if ranks.world_size == 1:
        return
    token = Path(path) / f".run-{ranks.agree(os.urandom(8).hex())}"
    ranks.run_on_all(lambda: token.touch() if ranks.is_main else None)
    deadline = time.monotonic() + 10  # network file systems show a new file late
    while not token.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = ranks.gather(token.exists())
    if ranks.is_main:
        token.unlink(missing_ok=True)
    if not all(seen):
        blind = [rank for rank, sees in enumerate(seen) if not sees]
        reason = f"ranks {blind} do not see rank 0's folder of that name"
        remedy = "With several machines it must lie on a file system that they share."
        raise UserError(Problem("output_path", path, reason, remedy))


def _run_in_folder(config: InferConfig, ranks: Ranks, plan: Plan, folder: OutputFolder) -> dict[str, Any]:
    _check_shared(config.run.output_path, ranks)
    look = ranks.is_main and not config.run.overwrite
    done, damaged = ranks.agree(folder.finished(plan.jobs) if look else (set(), []))
    this = _Run(config, plan, ranks, folder, done)
    pending = [group for group in plan.groups if any(job.file_name not in done for job in group)]
    _tell_plan(this, damaged)
    lines: list[dict[str, Any]] = []
    if pending:
        prompts, negatives, text_errors = _encode(this, pending)
        mine = _fit_groups(this, pending[ranks.rank :: ranks.world_size], text_errors)
        lines = _generate(this, mine, (prompts, negatives))
    results = ranks.gather((this.failures, lines, devices.peak_memory_bytes(ranks.device)))
    summary = ranks.agree(ranks.run_on_all(lambda: _finish(this, results) if ranks.is_main else None))
    _tell_end(this, summary)
    return summary


def _fit_groups(this: _Run, groups: list[list[Job]], text_errors: dict[tuple[str, bool], str]) -> list[list[Job]]:
    """The groups without the jobs whose text failed, and without the groups that hold nothing new."""
    kept = []
    for group in groups:
        fit = []
        for job in group:
            error = text_errors.get((job.prompt, False)) or text_errors.get((job.negative_prompt or "", True))
            if error:
                this.fail([job], error)
            else:
                fit.append(job)
        if any(job.file_name not in this.done for job in fit):
            kept.append(fit)
    return kept


def _tell_plan(this: _Run, damaged: list[str]) -> None:
    """Before anything is loaded: what will be drawn, and what the user should know of it."""
    jobs, ranks, images = this.plan.jobs, this.ranks, this.config.images
    steps = jobs[0].num_inference_steps
    prompts = len({(job.prompt, job.negative_prompt) for job in jobs})
    sizes = sorted({f"{job.width}x{job.height}" for job in jobs})
    source = "" if images.prompt or images.prompts_file else " of the kit's own list (--prompt names others)"
    this.say(
        f"{len(jobs)} images: {prompts} prompts{source}, {', '.join(sizes[:4])}{' ...' if sizes[4:] else ''} px,"
        f" {steps} step{'s' * (steps != 1)} each, on {ranks.device.type} with {ranks.world_size} process(es)"
    )
    left = sum(job.file_name not in this.done for job in jobs)
    this.say(f"{len(this.done)} of them finished before, {left} to draw, into {this.folder.path}")
    for note in this.plan.notes:
        this.say(note)
    if damaged:
        count = len(damaged)
        this.say(f"{count} finished image(s) are missing or damaged and are made again: {damaged[0]} ...")


def _encode(this: _Run, pending: list[list[Job]]) -> tuple[dict, dict, dict[tuple[str, bool], str]]:
    """(prompt -> embeds, negative prompt -> embeds, (text, negative) -> error): each distinct text once in the run.

    A few ranks encode and all get the result: the text encoder is the largest part of the model to load.
    """
    ranks, plan, length = this.ranks, this.plan, this.config.images.max_sequence_length
    texts = job_texts(job for group in pending for job in group)
    per_rank = 4 if ranks.device.type == "cpu" else 64  # texts that are worth loading the encoder on one more rank
    encoders = min(ranks.world_size, -(-len(texts) // per_rank))
    errors: dict[tuple[str, bool], str] = {}
    cut: list[str] = []

    def encode() -> dict[tuple[str, bool], torch.Tensor]:
        if ranks.rank >= encoders:
            return {}
        start = time.perf_counter()
        tokenizer, encoder = load_text_encoder(
            plan.model, device=ranks.device, dtype=text_dtype(plan.dtype), quantize=this.config.model.quantize
        )
        this.seconds["load"] += time.perf_counter() - start
        cut.extend(texts_cut(tokenizer, texts[ranks.rank :: encoders], length))
        return encode_texts(
            tokenizer,
            encoder,
            texts[ranks.rank :: encoders],
            plan.instruction,
            device=ranks.device,
            max_sequence_length=length,
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
    if too_long:
        told = f"{len(too_long)} prompt(s) have more than --max_sequence_length={length} tokens"
        this.say(f"{told}; the rest of them is not seen: {too_long[0][:60]} ...")
    this.seconds["encode"] += time.perf_counter() - start - this.seconds["load"]
    return *split_texts(merged), errors


def _generate(this: _Run, groups: list[list[Job]], embeds: tuple[dict, dict]) -> list[dict[str, Any]]:
    """Load what this rank needs, make its groups, write its images; returns their manifest lines."""
    ranks = this.ranks
    start = time.perf_counter()
    controlnet, pipeline = ranks.run_on_all(lambda: _load(this) if groups else (None, None))
    this.seconds["load"] += time.perf_counter() - start
    start = time.perf_counter()
    writer = Writer(this.folder, this.fail)
    facts, images = _manifest_facts(this), this.config.images
    try:
        if groups:
            steps = sum(steps_of(group[0]) for group in groups)
            label = f"denoising {sum(map(len, groups))} images"
            with console_bar(steps, label, main_process=ranks.is_main) as bar:
                drawn = generate(
                    groups,
                    transformer=pipeline.transformer,
                    vae=pipeline.vae,
                    scheduler=pipeline.scheduler,
                    prompt_embeds=embeds[0],
                    negative_prompt_embeds=embeds[1],
                    device=ranks.device,
                    dtype=this.plan.dtype,
                    use_resolution_binning="auto" if images.resolution_binning else False,
                    controlnet=controlnet,
                    pag_layers=this.plan.pag_layers,
                    # graphs: prompts of one length, the longest
                    **({"caption_multiple": images.max_sequence_length} if this.config.model.cuda_graphs else {}),
                    on_step=bar.update,
                    on_error=this.fail,
                )
                for job, image, took in drawn:
                    if job.file_name not in this.done:
                        writer.submit(job, image, {"seconds": round(took, 3), **facts})
    finally:
        writer.close()
    ranks.barrier()  # the slowest rank ends the run
    this.seconds["generate"] += time.perf_counter() - start
    return writer.lines


def _load(this: _Run) -> tuple[Any, Any]:
    """(ControlNet or None, pipeline without its text encoder) on this rank's device, as the configuration asks."""
    config, plan, ranks = this.config, this.plan, this.ranks
    controlnet = None
    if plan.controlnet is not None:
        controlnet = load_controlnet(plan.controlnet, device=ranks.device, dtype=plan.dtype)
        set_attention(controlnet, config.model.attention, ranks.device)
    pipeline = load_pipeline(
        plan.model,
        lora_weights=plan.loras,
        fuse_lora=config.lora.fuse_lora,
        device=ranks.device,
        dtype=plan.dtype,
        vae_dtype=plan.vae_dtype,
        attention=config.model.attention,
        scheduler=config.images.scheduler,
        quantize=config.model.quantize,
        text_encoder=False,
    )
    if config.model.fused_blocks != "off":
        pipeline.transformer.requires_grad_(False)
        this.say(f"Blocks: {fuse_blocks(pipeline.transformer, config.model.fused_blocks)}")
    if config.model.cuda_graphs:
        record_graphs(pipeline.transformer, training=False)
    devices.keep_freed_memory(ranks.device)
    return controlnet, pipeline


def _manifest_facts(this: _Run) -> dict[str, Any]:
    """What every manifest line of the run says of its model."""
    config, plan = this.config, this.plan
    facts: dict[str, Any] = {
        "model": config.model.model_path,
        "lora_weights": ",".join(config.lora.lora_weights) or None,
        "dtype": config.model.dtype,
    }
    if plan.loras:
        facts["lora_scale"] = config.lora.lora_scale
    if config.model.quantize is not None:
        facts["quantize"] = config.model.quantize
    if config.model.vae is not None:
        facts["vae"] = config.model.vae
    if plan.controlnet is not None:
        facts["controlnet"] = config.inputs.controlnet
    return facts


def _finish(this: _Run, results: list[tuple]) -> dict[str, Any]:
    """Main process: merge the manifest, make contact sheet and gallery, count; returns the summary."""
    plan, folder, seconds = this.plan, this.folder, this.seconds
    failures = dict(sorted(failure for part, _, _ in results for failure in part))
    new = [line for _, lines, _ in results for line in lines]
    folder.merge_parts({job.file_name: job.index for job in plan.jobs})
    made = this.done | {line["file"] for line in new}
    if made:
        make_contact_sheet(folder.path, plan.jobs, made)
        write_gallery(folder.path)
    elapsed = seconds["encode"] + seconds["generate"]
    drawn = {line["file"] for line in new}
    steps = sum(steps_of(job) for job in plan.jobs if job.file_name in drawn)
    summary = {
        "images": len(plan.jobs),
        "made": len(new),
        "kept": len(this.done),
        "failed": [
            {"file": plan.jobs[index].file_name, "prompt": plan.jobs[index].prompt, "error": text}
            for index, text in failures.items()
        ],
        "world_size": this.ranks.world_size,
        "device": this.ranks.device.type,
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


def _tell_end(this: _Run, summary: dict[str, Any]) -> None:
    if summary["made"]:
        elapsed = summary["encode_seconds"] + summary["generate_seconds"]
        this.say(
            f"Loading {summary['load_seconds']:.1f} s; prompts {summary['encode_seconds']:.1f} s, {summary['made']}"
            f" images {summary['generate_seconds']:.1f} s. Peak memory {summary['peak_memory_bytes'] / 1e9:.2f} GB."
        )
        this.say(
            f"E2E without loading: {summary['images_per_second']:.4f} images/s, {summary['iterations_per_second']:.2f}"
            f" it/s (denoising steps of all images) in {elapsed:.1f} s with {summary['world_size']} process(es)"
        )
    this.say(f"Images, {MANIFEST}, contact_sheet.png and gallery.html are in {summary['output_path']}")


def explain(error: BaseException) -> str:
    """One line for a failed image, with a remedy where there is one."""
    text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": ")
    if is_out_of_memory(error):
        return f"out of memory; use a smaller --batch_size or size ({text})"
    return text


def tell_failures(summary: dict[str, Any]) -> int:
    """Name the failed images of a run on rank 0; the script's exit code, 0 or 1."""
    failed = summary["failed"]
    if failed and int(os.environ.get("RANK", "0") or 0) == 0:
        print(f"{len(failed)} of {summary['images']} images failed, the others are done:", file=sys.stderr)
        for failure in failed[:20]:
            print(f"  {failure['file']}: {failure['error']}", file=sys.stderr)
        if len(failed) > 20:
            print(f"  and {len(failed) - 20} more, see summary.json", file=sys.stderr)
    return 1 if failed else 0
