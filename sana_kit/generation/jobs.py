"""Jobs: one image each, fixed before a rank is asked, grouped by what can share a call of the transformer."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import unicodedata
from collections.abc import Callable, Iterable, Sequence

import torch

from sana_kit.generation.inputs import NO_INPUTS, Inputs, first_step

AUTO_BATCH_TOKENS = 8192  # image tokens per call (twice that with guidance) that keep a big matrix unit busy


@dataclasses.dataclass(frozen=True)
class Job:
    """One image. `height`, `width` in pixels; `index` is its place in the job list; `file_name` without folder.

    `negative_prompt` is None for a model that takes none (SANA-Sprint).
    """

    prompt: str
    negative_prompt: str | None
    seed: int
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    index: int
    file_name: str
    inputs: Inputs = NO_INPUTS

    @property
    def guided(self) -> bool:
        """Whether the image is drawn away from its negative prompt (classifier-free guidance)."""
        return self.guidance_scale > 1.0 and self.negative_prompt is not None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One entry of a prompt list; what is None comes from the flags. Images are paths."""

    prompt: str
    negative_prompt: str | None = None
    seeds: tuple[int, ...] | None = None
    height: int | None = None
    width: int | None = None
    init_image: str | None = None
    strength: float | None = None
    mask_image: str | None = None
    control_image: str | None = None


def steps_of(job: Job) -> int:
    """The denoising steps that are done for a job: fewer than it names where it begins from an image."""
    skipped = 0 if job.inputs.init_image is None else first_step(job.num_inference_steps, job.inputs.strength)
    return job.num_inference_steps - skipped


def slug(text: str, length: int = 40, size: int = 96) -> str:
    """A readable part of a file name: letters and digits of every script, single hyphens between; never empty.

    Nothing else passes: no separator, dot, control or invisible character. NFC, since file systems differ in what
    they make of other forms.

    Args:
        length: most characters; size: most bytes of UTF-8 (file systems count bytes, and give a name 255 or less).
    """
    kept = []
    for letter in unicodedata.normalize("NFC", text).lower():
        # a mark belongs to the letter before it: without it Hindi or Thai is not readable
        fits = letter.isalnum() or (unicodedata.category(letter)[0] == "M" and kept and kept[-1] != "-")
        if fits or not kept or kept[-1] != "-":
            kept.append(letter if fits else "-")
    words = unicodedata.normalize("NFC", "".join(kept)).strip("-")[:length]
    while len(words.encode()) > size:
        words = words[:-1]
    return words.rstrip("-") or "image"


def job_hash(**values: object) -> str:
    """Eight hexadecimal digits that stand for everything that makes an image what it is."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def plan_jobs(
    prompts: Iterable[str | Prompt],
    seeds: Sequence[int],
    *,
    height: int,
    width: int,
    num_inference_steps: int,
    guidance_scale: float,
    negative_prompt: str | None = None,
    takes_negative: bool = True,
    inputs: Callable[[Prompt], Inputs] = lambda entry: NO_INPUTS,
    fingerprint: str = "",
) -> list[Job]:
    """Prompts x seeds as a list of jobs, prompt by prompt, each distinct one once.

    Args:
        negative_prompt: for every prompt; None keeps each prompt's own (the empty text where it has none).
        takes_negative: False for a model that takes no negative prompt; all jobs then have None.
        inputs: of a prompt: what its images are drawn from and along beside it.
        fingerprint: stands for model, LoRA and dtypes in the file names, so that runs of two models in one folder keep
            their images apart.

    File names are `slug-hash-seedN-WIDTHxHEIGHT.png`: made of letters, digits, hyphens and one dot, so they cannot
    leave the folder that they are put into.
    """
    jobs: dict[str, Job] = {}
    for entry in prompts:
        entry = Prompt(entry) if isinstance(entry, str) else entry
        negative = negative_prompt if negative_prompt is not None else (entry.negative_prompt or "")
        negative = negative if takes_negative else None
        h, w = entry.height or height, entry.width or width
        given = inputs(entry)
        for seed in entry.seeds if entry.seeds is not None else seeds:
            digest = job_hash(
                prompt=entry.prompt,
                negative=negative,
                steps=num_inference_steps,
                guidance=float(guidance_scale),
                fingerprint=fingerprint,
                **given.identity(),
            )
            file_name = f"{slug(entry.prompt)}-{digest}-seed{seed}-{w}x{h}.png"
            jobs.setdefault(
                file_name,
                Job(
                    prompt=entry.prompt,
                    negative_prompt=negative,
                    seed=int(seed),
                    height=int(h),
                    width=int(w),
                    num_inference_steps=int(num_inference_steps),
                    guidance_scale=float(guidance_scale),
                    index=len(jobs),
                    file_name=file_name,
                    inputs=given,
                ),
            )
    return list(jobs.values())


def resolve_batch_size(
    batch_size: int | str, height: int, width: int, *, device: torch.device, pixels_per_token: int
) -> int:
    """The number of images per call for `--batch_size auto|N`.

    'auto' depends on the size and the kind of device alone, never on free memory or the number of processes: the
    number decides how bf16 rounds. It is 1 on CPU; on accelerators up to 8, by the number of image tokens.
    """
    if batch_size != "auto":
        return int(batch_size)
    if device.type == "cpu":
        return 1
    tokens = max(1, height * width // pixels_per_token)
    return max(1, min(8, AUTO_BATCH_TOKENS // tokens))


def group_jobs(
    jobs: Sequence[Job], batch_size: int | str, *, device: torch.device, pixels_per_token: int
) -> list[list[Job]]:
    """Jobs that share one call of the transformer: neighbours of equal size, steps and guidance, a batch at most.

    Fixed by the job list alone. Whole groups go to a rank, never parts of them.
    """

    def same(job: Job) -> tuple:
        return job.height, job.width, job.num_inference_steps, job.guidance_scale, job.guided, job.inputs.kind

    groups = []
    for (height, width, *_), run in itertools.groupby(jobs, key=same):
        alike = list(run)
        size = resolve_batch_size(batch_size, height, width, device=device, pixels_per_token=pixels_per_token)
        groups += [alike[start : start + size] for start in range(0, len(alike), size)]
    return groups
