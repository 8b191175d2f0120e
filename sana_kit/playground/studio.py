"""Draws what the page asks for: the inference scripts' checks, jobs, `generate` and file names, weights kept loaded.

An image has the bytes that `infer_sana_text2img_bf16.py` or `infer_sana_text2img_lora_bf16.py` gives for the same
settings (a test compares them), so what was found here can be repeated there.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from sana_kit import devices
from sana_kit.devices import is_out_of_memory
from sana_kit.errors import Problem, UserError
from sana_kit.generation.generate import generate
from sana_kit.generation.jobs import Job
from sana_kit.generation.texts import encode_texts, job_texts
from sana_kit.inference.config import InferConfig, LoraSettings
from sana_kit.inference.output import OutputFolder
from sana_kit.inference.plan import Plan, check
from sana_kit.models.adapter import Lora, apply_loras
from sana_kit.models.fused import fuse_blocks
from sana_kit.models.loading import load_pipeline

SIDES = {"base": ("base",), "lora": ("lora",), "both": ("base", "lora")}
MOST_SEEDS = 16
KEPT_TEXTS = 256  # prompt embeddings kept in memory, about 1 MB each at the largest

Event = dict[str, Any]


class Stopped(Exception):
    """The page asked for an end."""


class _Adapter:
    """An adapter that is put into the weights and taken out again; base and merged weights are those of the scripts.

    The layers' own weights are kept in host memory: 1.2 GB for attention layers of the 1.6B model.
    """

    def __init__(self, transformer: torch.nn.Module, loras: Sequence[tuple[Lora, float]]):
        self.transformer, self.loras = transformer, loras
        self.layers = dict(transformer.named_modules())
        names = dict.fromkeys(name for lora, _ in loras for name in lora.scaling)
        self.kept = {name: self.layers[name].weight.detach().to("cpu", copy=True) for name in names}
        self.scale: float | None = None

    def set(self, scale: float | None) -> None:
        """Merge the adapter at a scale; None: the base model."""
        if scale == self.scale:
            return
        with torch.no_grad():
            for name, weight in self.kept.items():
                self.layers[name].weight.copy_(weight)
        self.scale = None
        if scale is not None:
            apply_loras(self.transformer, [(lora, factor * scale) for lora, factor in self.loras], fuse=True)
            self.scale = scale


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One request, checked: (side, plan) of the sides in order, and the adapter's scale."""

    plans: tuple[tuple[str, Plan], ...]
    lora_scale: float

    @property
    def images(self) -> int:
        """How many images it makes."""
        return sum(len(plan.jobs) for _, plan in self.plans)

    @property
    def notes(self) -> list[str]:
        """What the user should know of it, each line once."""
        return list(dict.fromkeys(note for _, plan in self.plans for note in plan.notes))


class Studio:
    """The model of one process, its adapter, and one thread that draws: requests wait for one another."""

    def __init__(self, config: InferConfig):
        """Check model, adapter and folder; loads nothing.

        Raises:
            UserError: every problem found.
        """
        problem = None
        try:
            self.device = devices.pick_device(config.model.device)
        except UserError as error:
            self.device, problem = devices.pick_device("cpu"), error.problems[0]
        self.config = config
        self.plan = check(config, self.device, problem)
        _check_weights_stay_plain(config)
        self.folder = OutputFolder(config.run.output_path, 0)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="draw")
        self._texts: dict[tuple[str, bool, str], torch.Tensor] = {}
        self._pipeline: Any = None
        self._adapter: _Adapter | None = None

    def load(self) -> None:
        """Load the whole pipeline, text encoder included (5 GB in bf16 beside SANA's weights)."""
        plan, model = self.plan, self.config.model
        self._pipeline = load_pipeline(
            plan.model,
            device=self.device,
            dtype=plan.dtype,
            vae_dtype=plan.vae_dtype,
            attention=model.attention,
            quantize=model.quantize,
        )
        if model.fused_blocks != "off":
            fuse_blocks(self._pipeline.transformer.requires_grad_(False), model.fused_blocks)
        if plan.loras:
            self._adapter = _Adapter(self._pipeline.transformer, plan.loras)

    def defaults(self) -> dict[str, Any]:
        """What the page shows at first: sizes, steps and guidance of the model, and what is loaded."""
        job, plan = self.plan.jobs[0], self.plan
        return {
            "model": self.config.model.model_path,
            "lora": ",".join(self.config.lora.lora_weights) or None,
            "device": str(self.device),
            "width": job.width,
            "height": job.height,
            "multiple": plan.model.pixel_multiple,
            "steps": job.num_inference_steps,
            "guidance": job.guidance_scale,
            "negative": job.negative_prompt is not None,
            "folder": str(self.folder.path),
        }

    def check(self, request: Mapping[str, Any]) -> Drawing:
        """A request of the page as plans.

        Args:
            request: prompt (text), seeds (list of whole numbers), steps, width, height (whole numbers), guidance and
                lora_scale (numbers), side (base, lora or both), and, if wanted, negative_prompt (text).

        Raises:
            UserError: every problem found.
        """
        problems, values = _read(request)
        side = values["side"]
        if side != "base" and not self.plan.loras:
            problems.append(Problem("side", side, "the page was started without an adapter", "Choose the base model."))
        if problems:
            raise UserError(problems)
        instruction = self.plan.instruction
        images = dataclasses.replace(
            self.config.images,
            prompt=(values["prompt"],),
            negative_prompt=values["negative_prompt"] or None,
            seeds=tuple(values["seeds"]),
            num_inference_steps=values["steps"],
            guidance_scale=values["guidance"],
            width=values["width"],
            height=values["height"],
            # both sides with what the adapter was trained with
            complex_human_instruction="none" if instruction is None else json.dumps(instruction),
        )
        adapters = {
            "base": LoraSettings(),
            "lora": dataclasses.replace(self.config.lora, lora_scale=values["lora_scale"]),
        }
        plans = []
        for name in SIDES[side]:
            config = dataclasses.replace(self.config, images=images, lora=adapters[name])
            plans.append((name, check(config, self.device)))
        return Drawing(tuple(plans), values["lora_scale"])

    def draw(self, drawing: Drawing) -> Iterator[Event]:
        """Draw in the studio's thread; yields its events, the last one "done", "stopped" or "error".

        "step" has done and total denoising steps; "image" has side, seed, file, width, height and seconds (0 for an
        image that was drawn before). Closing the iterator ends the drawing at its next step.
        """
        events: queue.Queue[Event] = queue.Queue()
        stop = threading.Event()
        self._thread.submit(self._work, drawing, events.put, stop)
        try:
            while True:
                event = events.get()
                yield event
                if event["kind"] in ("done", "stopped", "error"):
                    return
        finally:
            stop.set()

    def close(self) -> None:
        """Wait for the drawing under way."""
        self._thread.shutdown(cancel_futures=True)

    def _work(self, drawing: Drawing, tell: Any, stop: threading.Event) -> None:
        start = time.perf_counter()
        try:
            self._draw(drawing, tell, stop)
        except Stopped:
            tell({"kind": "stopped"})
        except Exception as error:
            tell({"kind": "error", "text": _explain(error)})
            devices.empty_cache(self.device)
        else:
            tell({"kind": "done", "seconds": round(time.perf_counter() - start, 2)})
        finally:
            self.folder.merge_parts({})

    def _draw(self, drawing: Drawing, tell: Any, stop: threading.Event) -> None:
        todo = {side: self._left(plan, side, tell) for side, plan in drawing.plans}
        total = sum(group[0].num_inference_steps for groups in todo.values() for group in groups)
        done = 0

        def step() -> None:
            nonlocal done
            if stop.is_set():
                raise Stopped
            done += 1
            tell({"kind": "step", "done": done, "total": total})

        for side, plan in drawing.plans:
            if not todo[side]:
                continue
            if stop.is_set():
                raise Stopped
            prompts, negatives = self._encode(plan, [job for group in todo[side] for job in group])
            if self._adapter is not None:
                self._adapter.set(drawing.lora_scale if side == "lora" else None)
            facts: dict[str, object] = {"model": self.config.model.model_path, "dtype": self.config.model.dtype}
            if side == "lora":
                facts |= {"lora_weights": ",".join(self.config.lora.lora_weights), "lora_scale": drawing.lora_scale}
            drawn = generate(
                todo[side],
                transformer=self._pipeline.transformer,
                vae=self._pipeline.vae,
                scheduler=self._pipeline.scheduler,
                prompt_embeds=prompts,
                negative_prompt_embeds=negatives,
                device=self.device,
                dtype=plan.dtype,
                on_step=step,
            )
            for job, image, seconds in drawn:
                self.folder.save(job, image, {"seconds": round(seconds, 3), **facts})
                tell(_image(side, job, seconds))

    def _left(self, plan: Plan, side: str, tell: Any) -> list[list[Job]]:
        """The groups that are not there yet, whole; images that are there are told at once."""
        whole, _ = self.folder.finished(plan.jobs)
        left = [group for group in plan.groups if any(job.file_name not in whole for job in group)]
        again = {job.file_name for group in left for job in group}
        for job in plan.jobs:
            if job.file_name not in again:
                tell(_image(side, job, 0.0))
        return left

    def _encode(self, plan: Plan, jobs: list[Job]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """(prompt -> embeds, negative prompt -> embeds), from memory where a text was there before."""
        lines = json.dumps(plan.instruction)
        for text, negative in job_texts(jobs):
            key = (text, negative, "" if negative else lines)
            if key not in self._texts:
                while len(self._texts) >= KEPT_TEXTS:
                    self._texts.pop(next(iter(self._texts)))
                encoded = encode_texts(
                    self._pipeline.tokenizer,
                    self._pipeline.text_encoder,
                    [(text, negative)],
                    plan.instruction,
                    device=self.device,
                    max_sequence_length=self.config.images.max_sequence_length,
                )
                self._texts[key] = encoded[text, negative]
        prompts = {job.prompt: self._texts[job.prompt, False, lines] for job in jobs}
        negatives = {job.negative_prompt: self._texts[job.negative_prompt, True, ""] for job in jobs if job.guided}
        return prompts, negatives


def _check_weights_stay_plain(config: InferConfig) -> None:
    """UserError where an adapter could not be taken in and out of the weights, or sizes not be chosen anew."""
    model, problems = config.model, []
    if model.cuda_graphs:
        reason = "each size and number of images that the page is asked for would be one more graph"
        problems.append(Problem("cuda_graphs", None, reason, "Leave it out."))
    if config.lora.lora_weights:
        reason = "the page takes the adapter in and out of the weights, which it cannot with this"
        remedy = "Leave it out, or show the base model alone."
        if model.quantize is not None:
            problems.append(Problem("quantize", model.quantize, reason, remedy))
        if model.fused_blocks != "off":
            problems.append(Problem("fused_blocks", model.fused_blocks, reason, remedy))
    if problems:
        raise UserError(problems)


def _image(side: str, job: Job, seconds: float) -> Event:
    size = {"width": job.width, "height": job.height}
    return {
        "kind": "image",
        "side": side,
        "seed": job.seed,
        "file": job.file_name,
        "seconds": round(seconds, 2),
        **size,
    }


def _explain(error: Exception) -> str:
    if is_out_of_memory(error):
        return "The device's memory is not enough for this size. Choose a smaller one."
    return f"{type(error).__name__}: {error}"


def _read(request: Mapping[str, Any]) -> tuple[list[Problem], dict[str, Any]]:
    """(what is wrong with the kinds of the values, the values); their ranges are checked with the plan."""
    problems: list[Problem] = []
    values: dict[str, Any] = {}
    whole = {"steps": 1, "width": 1, "height": 1}
    for name in ("prompt", "negative_prompt"):
        value = request.get(name, "")
        values[name] = value if isinstance(value, str) else ""
        if not isinstance(value, str) or (name == "prompt" and not value.strip()):
            problems.append(Problem(name, None if name == "prompt" else value, "must be a text that is not empty"))
    for name in whole:
        values[name] = request.get(name)
        if not _is_whole(values[name]) or values[name] < 1:
            problems.append(Problem(name, values[name], "must be a whole number of at least 1"))
    for name, default in (("guidance", None), ("lora_scale", 1.0)):
        value = request.get(name, default)
        values[name] = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0.0
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            problems.append(Problem(name, value, "must be a number"))
    seeds = request.get("seeds")
    values["seeds"] = seeds
    if not isinstance(seeds, list) or not 1 <= len(seeds) <= MOST_SEEDS or not all(map(_is_whole, seeds)):
        problems.append(Problem("seeds", seeds, f"must be 1 to {MOST_SEEDS} whole numbers"))
    values["side"] = request.get("side", "both")
    if values["side"] not in SIDES:
        problems.append(Problem("side", values["side"], f"must be one of {', '.join(SIDES)}"))
        values["side"] = "base"
    return problems, values


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
