"""Validation images during training, drawn with the live weights."""

from __future__ import annotations

import io
import logging
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

import torch
from accelerate.utils import gather_object

from sana_kit import devices
from sana_kit.distributed import StopSignal
from sana_kit.encodings.dataset import EncodedDataset
from sana_kit.files import write_atomic
from sana_kit.generation.generate import generate
from sana_kit.generation.inputs import NO_INPUTS
from sana_kit.generation.jobs import Job, slug
from sana_kit.models.controlnet import ControlledTransformer
from sana_kit.models.folder import Model
from sana_kit.models.loading import load_scheduler, load_vae
from sana_kit.progress import console_bar
from sana_kit.training.config import TrainConfig
from sana_kit.training.control import validation_inputs
from sana_kit.training.ema import WeightAverage
from sana_kit.training.engine import Engine
from sana_kit.training.plan import Plan
from sana_kit.training.state import TrainState
from sana_kit.training.trackers import log_images

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger("sana")


def is_due(config: TrainConfig, plan: Plan, state: TrainState) -> bool:
    """Whether a validation belongs after this update: every --validation_steps, else as --validation_epochs pass."""
    if config.validation_steps is not None:
        return state.global_step % config.validation_steps == 0
    if config.streaming:  # how long an epoch is, is not known
        return False
    period = config.validation_epochs * plan.epoch_samples
    return state.samples_seen // period > (state.samples_seen - plan.samples_per_step) // period


class Validator:
    """Draws the validation prompts with the live weights: no pipeline is reloaded, every rank draws its share.

    Knows when it is due; without prompts it never is.
    """

    def __init__(
        self,
        config: TrainConfig,
        plan: Plan,
        base_model: Model,
        engine: Engine,
        encoded: EncodedDataset,
        instruction: list[str] | None,
        average: WeightAverage,
        stop: StopSignal,
    ):
        """`encoded` holds the embeddings of the prompts with `instruction`, and of the empty prompt without."""
        self.config, self.plan, self.base_model, self.engine = config, plan, base_model, engine
        self.average, self.stop = average, stop
        prompts = config.validation.prompts
        self.embeddings = {prompt: encoded.prompt(prompt, instruction) for prompt in prompts}
        self.negative_embeddings = {"": encoded.prompt("", None)} if prompts else {}
        self._inputs = validation_inputs(config)
        self.jobs = [self._job(number, prompt) for number, prompt in enumerate(self._every_image(prompts))]
        self._vae: torch.nn.Module | None = None

    def _every_image(self, prompts: tuple[str, ...]) -> list[tuple[str, int]]:
        seeds = [self.config.seed + number for number in range(self.config.num_validation_images)]
        return [(prompt, seed) for prompt in prompts for seed in seeds]

    def _job(self, index: int, wanted: tuple[str, int]) -> Job:
        config, (prompt, seed) = self.config, wanted
        side = config.validation_resolution or config.side
        return Job(
            index=index,
            prompt=prompt,
            negative_prompt="",
            seed=seed,
            height=side,
            width=side,
            num_inference_steps=config.validation_inference_steps,
            guidance_scale=config.validation_guidance_scale,
            file_name=f"{index:02d}-{slug(prompt)}-seed{seed}.png",
            inputs=self._inputs.get(prompt, NO_INPUTS),
        )

    def due(self, state: TrainState) -> bool:
        """Whether images belong after this update: every --validation_steps, else as --validation_epochs pass.

        Not after the last one, which the run's final images follow.
        """
        return bool(self.jobs) and state.global_step < self.plan.steps and is_due(self.config, self.plan, state)

    def draw(self, step: int) -> list[dict]:
        """Draw, save as PNG below validation/, hand to the trackers; every rank calls it.

        A stop that is asked for meanwhile ends it after the image at hand.

        Returns: [{"file", "prompt", "seed"}, ...] of the drawn images, file relative to the output folder.
        """
        self._fetch_vae()
        bar = console_bar(
            len(self._mine()) * self.config.validation_inference_steps,
            "validation",
            main_process=self.engine.ranks.is_main,
            leave=False,
        )
        try:
            with self.average.in_model():
                drawn = self._draw_mine(bar)
        finally:
            bar.close()
            self._vae.to("cpu")
            devices.empty_cache(self.engine.device)
        return self._keep(drawn, step)

    def _fetch_vae(self) -> None:
        """Loaded once, kept in host memory between validations."""
        device = self.engine.device
        if self._vae is None:
            self._vae = load_vae(self.base_model, device=device, dtype=devices.DTYPES[self.config.vae_dtype])
        self._vae.to(device)

    def _mine(self) -> list[Job]:
        """This rank's images; of partitioned weights all ranks draw all, and the first keeps them."""
        ranks = self.engine.ranks
        return self.jobs if self.engine.partitioned else self.jobs[ranks.rank :: ranks.world_size]

    def _draw_mine(self, bar: tqdm) -> list[tuple[dict, bytes]]:
        """(entry, PNG) of this rank's images."""
        together, engine, done = self.engine.partitioned, self.engine, []
        model = engine.transformer
        controlled = isinstance(model, ControlledTransformer)
        images = generate(
            [[job] for job in self._mine()],
            transformer=model.transformer if controlled else model,
            controlnet=model.residuals if controlled else None,
            vae=self._vae,
            scheduler=load_scheduler(self.base_model),
            prompt_embeds=self.embeddings,
            negative_prompt_embeds=self.negative_embeddings,
            device=engine.device,
            dtype=engine.compute_dtype,
            on_step=bar.update,
        )
        for job, image, _ in images:
            if not together or engine.ranks.is_main:
                png = io.BytesIO()
                image.save(png, format="PNG")
                done.append(({"file": job.file_name, "prompt": job.prompt, "seed": job.seed}, png.getvalue()))
            if self.stop.agreed() if together else self.stop.requested:
                break
        return done

    def _keep(self, drawn: list[tuple[dict, bytes]], step: int) -> list[dict]:
        """Gathered as PNG: the main process writes them all, whether or not machines share the output folder."""
        images, folder = [], Path("validation", f"step-{step:06d}")
        for entry, png in sorted(gather_object(drawn), key=lambda pair: pair[0]["file"]):
            file = folder / entry["file"]
            images.append({**entry, "file": str(file)})
            if self.engine.ranks.is_main:
                path = Path(self.config.output_dir, file)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, partial(_write, png), durable=False)
        if self.engine.ranks.is_main and images:
            for tracker in self.engine.accelerator.trackers:
                log_images(tracker, images, Path(self.config.output_dir), step)
        return images


def _write(data: bytes, handle: IO[bytes]) -> None:
    handle.write(data)
