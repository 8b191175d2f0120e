"""Validation images during training, drawn with the live weights."""

from __future__ import annotations

import io
from pathlib import Path

from sana_kit import devices
from sana_kit.files import write_atomic
from sana_kit.generation.generate import generate
from sana_kit.generation.jobs import Job, slug
from sana_kit.models.loading import load_scheduler, load_vae
from sana_kit.runlog import console_bar
from sana_kit.training.config import validation_prompts
from sana_kit.training.engine import compute_dtype


class Validation:
    """Images of the validation prompts with the live weights: no pipeline is reloaded, every rank draws its
    share.
    """

    def __init__(self, args, accelerator, encoded, base, instruction):
        self.args, self.accelerator, self.base = args, accelerator, base
        self.prompts = validation_prompts(args)
        self.embeddings = {prompt: encoded.prompt(prompt, instruction) for prompt in self.prompts}
        self.negative_embeddings = {"": encoded.prompt("", None)}
        self.vae = None

    def run(self, transformer, step: int) -> list[dict]:
        """Draw, save as PNG below validation/, log to the trackers; every rank calls it.

        Returns: on the main process [{"file", "prompt", "seed"}, ...], file relative to the output folder.
        """
        from accelerate.utils import gather_object

        args, accelerator = self.args, self.accelerator
        size = args.validation_resolution or args.resolution
        folder = Path(args.output_dir, "validation", f"step-{step:06d}")
        base_seed = args.seed or 0
        jobs = []
        for prompt in self.prompts:
            for number in range(args.num_validation_images):
                index, seed = len(jobs), base_seed + number
                jobs.append(
                    Job(
                        index=index,
                        prompt=prompt,
                        negative_prompt="",
                        seed=seed,
                        height=size,
                        width=size,
                        num_inference_steps=args.validation_inference_steps,
                        guidance_scale=args.validation_guidance_scale,
                        file_name=f"{index:02d}-{slug(prompt)}-seed{seed}.png",
                    )
                )
        if self.vae is None:  # loaded once, kept in host memory between validations
            dtype = devices.DTYPES[args.vae_dtype]
            self.vae = load_vae(self.base, device=accelerator.device, dtype=dtype)
        self.vae.to(accelerator.device)
        mine = jobs[accelerator.process_index :: accelerator.num_processes]
        partitioned = any(hasattr(parameter, "ds_id") for parameter in transformer.parameters())
        if partitioned:  # ZeRO-3: each forward is a collective, so all ranks draw all images, and the first keeps them
            mine = jobs
        bar = console_bar(
            len(mine) * args.validation_inference_steps,
            "validation",
            main_process=accelerator.is_main_process,
            leave=False,
        )
        done = []

        try:
            drawn = generate(
                [[job] for job in mine],
                transformer=transformer,
                vae=self.vae,
                scheduler=load_scheduler(self.base),
                prompt_embeds=self.embeddings,
                negative_prompt_embeds=self.negative_embeddings,
                device=accelerator.device,
                dtype=compute_dtype(args),
                on_step=bar.update,
            )
            for job, image, _ in drawn:
                if partitioned and not accelerator.is_main_process:
                    continue
                png = io.BytesIO()
                image.save(png, format="PNG")
                done.append(({"file": job.file_name, "prompt": job.prompt, "seed": job.seed}, png.getvalue()))
        finally:
            bar.close()
            self.vae.to("cpu")
            devices.empty_cache(accelerator.device)
        # Gathered as PNG: the main process writes them all, whether or not machines share the output folder.
        images = []
        for entry, png in sorted(gather_object(done), key=lambda pair: pair[0]["file"]):
            path = folder / entry["file"]
            images.append({**entry, "file": str(path.relative_to(args.output_dir))})
            if accelerator.is_main_process:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, lambda handle, png=png: handle.write(png), durable=False)
        if accelerator.is_main_process:
            self._track(images, step)
        return images

    def _track(self, images: list[dict], step: int) -> None:
        import numpy as np
        from PIL import Image

        paths = [Path(self.args.output_dir, entry["file"]) for entry in images]
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard" and paths:
                stacked = np.stack([np.asarray(Image.open(path)) for path in paths])
                tracker.writer.add_images("validation", stacked, step, dataformats="NHWC")
            elif tracker.name == "wandb":
                import wandb

                shown = [wandb.Image(str(p), caption=e["prompt"]) for p, e in zip(paths, images, strict=True)]
                tracker.log({"validation": shown}, step=step)
            elif tracker.name == "comet_ml":
                for path in paths:
                    tracker.writer.log_image(str(path), name=path.name, step=step)


def validation_due(args, step: int, samples_seen: int, samples_per_step: int, num_images: int) -> bool:
    """Whether a validation belongs after this step: every --validation_steps, else as --validation_epochs pass."""
    if step >= args.max_train_steps:
        return False  # the final validation follows
    if args.validation_steps is not None:
        return step % args.validation_steps == 0
    per_validation = args.validation_epochs * num_images
    return samples_seen // per_validation > (samples_seen - samples_per_step) // per_validation
