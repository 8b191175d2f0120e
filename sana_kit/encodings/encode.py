"""Encode what is missing, once: every rank its share, then the VAE and the text encoder leave memory."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from sana_kit import devices
from sana_kit.data.image_set import ImageSet, bad_image_problems, check_images, default_workers
from sana_kit.encodings.dataset import EncodedImages
from sana_kit.encodings.keys import PromptKeys, latents_key
from sana_kit.encodings.missing import encode_missing_images, encode_missing_prompts
from sana_kit.encodings.ranks import EncodingTeam
from sana_kit.encodings.store import refresh_listing, scan_store
from sana_kit.errors import StoreError
from sana_kit.models.folder import component_folder, component_identity, vae_geometry

VISIBLE_SECONDS = 60.0  # how long a shared file system may take to show another rank's shards


def encode(
    images: ImageSet,
    *,
    accelerator,
    pretrained_model_name_or_path: str,
    store_dir: str,
    resolution: int,
    center_crop: bool = False,
    random_flip: bool = False,
    seed: int = 0,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    max_sequence_length: int = 300,
    complex_human_instruction: list[str] | None = None,
    vae_dtype: torch.dtype = torch.bfloat16,
    text_encoder_dtype: torch.dtype = torch.bfloat16,
    vae_batch_size: int | str = "auto",
    text_batch_size: int = 16,
    extra_prompts: list[tuple[str, list[str] | None]] = (),
    skip_bad_images: bool = False,
    num_workers: int | None = None,
    should_stop=None,
    log=None,
) -> EncodedImages:
    """Encode what is missing in the store, every rank its share, and return the data set of encodings.

    A collective call: every rank of `accelerator` (an Accelerator or PartialState) must make it, with equal arguments.
    The VAE and the text encoder are loaded only where something is missing, one after the other, and have left memory
    when this returns. Images still to be encoded are first decoded once, so that a corrupt one is an error before
    any weight is loaded. Machines with separate store folders are noticed: each then encodes all by itself.

    Items are encoded in groups that depend on the data set and the batch sizes alone, not on what is already there or
    on the number of ranks, so an interrupted encoding ends with the same bits as an undisturbed one.

    Args:
        store_dir: folder of the encodings; may be shared by runs, flags, models and data sets.
        extra_prompts: (prompt, instruction) pairs to encode too: validation prompts, negative ones (instruction None).
        vae_batch_size: images per VAE pass; 'auto' fits the device's free memory. Halved when memory runs out.
        num_workers: threads that decode ahead; None takes this process's share of the cores.
        should_stop: called between groups; True ends with EncodingStopped on every rank.
        log: called with a line of text, on the first rank; default: the module's logger.

    Raises:
        ValueError: flags, model parts or images that cannot be used, all of them at once; raised on every rank.
        StoreError: the store cannot be written or read; raised on every rank.
        EncodingStopped: see should_stop.
        RuntimeError: a rank failed in the models; every rank raises that rank's text.
    """
    started = time.monotonic()
    messages: list[str] = []

    def tell(text):
        messages.append(text)
        if accelerator.process_index == 0:
            (log or _default_log)(text)

    workers = default_workers() if num_workers is None else num_workers
    instruction = list(complex_human_instruction) if complex_human_instruction else None
    transform = {"resolution": resolution, "center_crop": center_crop, "random_flip": random_flip, "seed": seed}
    model = {
        "pretrained_model_name_or_path": pretrained_model_name_or_path,
        "revision": revision,
        "variant": variant,
        "cache_dir": cache_dir,
    }
    store = Path(store_dir)
    team = EncodingTeam(accelerator, store)

    def settle():
        """Check the flags; say what the encodings depend on."""
        geometry = _check_arguments(
            model, resolution, max_sequence_length, vae_dtype, text_encoder_dtype, vae_batch_size, text_batch_size
        )
        parts = ("vae", "text_encoder", "tokenizer")
        return geometry, {
            p: component_identity(pretrained_model_name_or_path, p, revision, variant, cache_dir) for p in parts
        }

    try:
        geometry, identity = team.run_alone(settle)
        dtype_names = {v: k for k, v in devices.DTYPES.items()}
        latents_of = {"vae": identity["vae"], "vae_dtype": dtype_names[vae_dtype], **transform}
        make_key = PromptKeys(
            max_sequence_length=max_sequence_length,
            tokenizer=identity["tokenizer"],
            text_encoder=identity["text_encoder"],
            dtype=dtype_names[text_encoder_dtype],
        )

        def plan(images):
            return _Plan(store, images, latents_of, instruction, extra_prompts, make_key, tell)

        todo = team.run_alone(lambda: plan(images))
        encoded = {"images": 0, "prompts": 0}
        own_seconds = {"images": 0.0, "prompts": 0.0}
        if any(team.gather(todo.incomplete())):
            team.meet()
            # Images that cannot be decoded: an error, or left out, before any weight is loaded.
            checked = team.run(lambda: check_images(images, todo.samples_to_check(team), num_workers=workers))
            bad = dict(sorted(item for found in checked for item in found))
            if bad:
                text = bad_image_problems(list(bad.values()))
                left = images.without(list(bad))
                if not skip_bad_images or not len(left):
                    raise ValueError("The training images cannot be used:\n- " + text)
                tell("--skip_bad_images: " + text)
                images = left
                todo = team.run_alone(lambda: plan(images))
            team.run_alone(lambda: _check_space(store, todo.latents, geometry, resolution, vae_dtype))
            # Captions, then images: each model is alone in memory.
            jobs = {
                "prompts": lambda: encode_missing_prompts(
                    todo, store / "prompts", model, text_encoder_dtype, max_sequence_length, text_batch_size,
                    accelerator.device, team, should_stop,
                ),
                "images": lambda: encode_missing_images(
                    todo, store / "latents", model, vae_dtype, vae_batch_size, transform, workers,
                    accelerator.device, team, should_stop, tell,
                ),
            }  # fmt: skip
            for kind, job in jobs.items():
                results = team.run(job)
                encoded[kind] = sum(count for count, _ in results)
                own_seconds[kind] = results[accelerator.process_index][1]
            found = todo.found()
            team.run_alone(todo.complete)
        else:
            found = todo.found()
    finally:
        team.part()
    images.release()
    warn_truncation(todo, resolution, max_sequence_length, tell)
    facts = {
        "seconds": time.monotonic() - started,
        "encoded_images": encoded["images"],
        "encoded_prompts": encoded["prompts"],
        "reused_images": found["images"],
        "reused_prompts": found["prompts"],
        "image_seconds": own_seconds["images"],
        "prompt_seconds": own_seconds["prompts"],
        "bytes": {"latents": int(todo.latents.nbytes.sum()), "prompts": int(todo.texts.nbytes.sum())},
        "scaling_factor": geometry["scaling_factor"],
        "vae_factor": geometry["factor"],
        "latent_channels": geometry["latent_channels"],
        "messages": messages,
    }
    return EncodedImages(todo, make_key, facts)


def warn_truncation(todo, resolution, max_sequence_length, tell):
    """Say how many captions were cut and how many images had to be enlarged."""
    cut = int((todo.texts.tokens[np.unique(todo.caption_rows)] >= max_sequence_length).sum())
    if cut:
        tell(
            f"{cut} caption(s) reach --max_sequence_length={max_sequence_length} tokens; the rest is cut off, as by"
            " SanaPipeline."
        )
    small = sum(min(todo.images.size(i)) < resolution for i in todo.first_sample)
    if small:
        tell(f"{small} image(s) are smaller than --resolution={resolution} and were enlarged.")


def _default_log(text: str):
    import logging

    logging.getLogger(__name__).warning(text)


def _check_arguments(model, resolution, max_sequence_length, vae_dtype, text_dtype, vae_batch, text_batch) -> dict:
    """The VAE's geometry. Raises ValueError gathering everything that is wrong with the flags and the model folder."""
    problems, geometry = [], None
    source = model["pretrained_model_name_or_path"], model["revision"], model["cache_dir"]
    try:
        geometry = vae_geometry(*source)
    except ValueError as error:
        problems.append(str(error))
    for part in ("text_encoder", "tokenizer") if geometry else ():
        try:
            component_folder(source[0], part, source[1], source[2])
        except ValueError as error:
            problems.append(str(error))
    if geometry and (resolution < geometry["factor"] or resolution % geometry["factor"]):
        factor = geometry["factor"]
        nearest = max(factor, round(resolution / factor) * factor)
        problems.append(
            f"--resolution={resolution}: must be a multiple of {factor}, the VAE's factor; the nearest is {nearest}."
        )
    if text_dtype == torch.float16:
        problems.append("--text_encoder_dtype=fp16: Gemma-2 gives NaN in fp16; use bf16 or fp32.")
    for flag, dtype in (("--text_encoder_dtype", text_dtype), ("--vae_dtype", vae_dtype)):
        if dtype not in devices.DTYPES.values():
            problems.append(f"{flag}={dtype}: use one of {', '.join(devices.DTYPES)}.")
    if max_sequence_length < 1:
        problems.append(f"--max_sequence_length={max_sequence_length}: must be at least 1.")
    if vae_batch != "auto" and (not isinstance(vae_batch, int) or vae_batch < 1):
        problems.append(f"--vae_batch_size={vae_batch}: must be 'auto' or at least 1.")
    if text_batch < 1:
        problems.append(f"--text_batch_size={text_batch}: must be at least 1.")
    if problems:
        raise ValueError("The images cannot be encoded:" + "".join(f"\n- {p}" for p in problems))
    return geometry


class _Plan:
    """What a data set needs, each distinct thing once, in an order that all ranks agree on, and where it lies on disk.

    Attributes:
        latent_keys, prompt_keys: key -> row.
        latent_rows, caption_rows: (N,) int64, the row of each sample's latents and of its caption.
        first_sample: a sample of each latent row.
        prompts: (prompt, instruction) of each prompt row.
        latents, texts: the indexes of the store.
    """

    def __init__(self, store, images, latents_of, instruction, extra_prompts, make_key, tell):
        self.store, self.images, self.tell = store, images, tell
        self.latent_keys: dict[str, int] = {}
        self.latent_rows, self.first_sample = np.zeros(len(images), np.int64), []
        for i in range(len(images)):
            key = latents_key(images, i, **latents_of)
            row = self.latent_keys.setdefault(key, len(self.latent_keys))
            if row == len(self.first_sample):
                self.first_sample.append(i)
            self.latent_rows[i] = row
        self.prompt_keys: dict[str, int] = {}
        self.prompts: list[tuple[str, list[str] | None]] = []
        self.caption_rows = np.zeros(len(images), np.int64)
        known: dict[str, int] = {}
        for i, caption in enumerate(images.captions):
            if caption not in known:
                known[caption] = self._prompt_row(caption, instruction, make_key)
            self.caption_rows[i] = known[caption]
        for prompt, its_instruction in extra_prompts:
            self._prompt_row(prompt, its_instruction, make_key)
        self.scan()

    def _prompt_row(self, prompt, instruction, make_key):
        row = self.prompt_keys.setdefault(make_key(prompt, instruction), len(self.prompt_keys))
        if row == len(self.prompts):
            self.prompts.append((prompt, instruction or None))
        return row

    def scan(self):
        """Look what the store holds now."""
        self.latents = scan_store(self.store / "latents", self.latent_keys, self.tell)
        self.texts = scan_store(self.store / "prompts", self.prompt_keys, self.tell)

    def incomplete(self) -> int:
        """How many encodings are missing."""
        return len(self.latents.missing()) + len(self.texts.missing())

    def found(self) -> dict[str, int]:
        """How many distinct encodings were there at the last scan."""
        return {
            "images": len(self.latent_keys) - len(self.latents.missing()),
            "prompts": len(self.prompt_keys) - len(self.texts.missing()),
        }

    def samples_to_check(self, team) -> list[int]:
        """A sample of each missing latent row of this rank's share."""
        missing = set(self.latents.missing().tolist())
        return [self.first_sample[row] for row in team.share(range(len(self.latent_keys))) if row in missing]

    def complete(self):
        """Scan until nothing is missing: other ranks' shards may take a moment to show on a shared file system.

        Raises:
            StoreError: something is missing although every rank has finished.
        """
        deadline = time.monotonic() + VISIBLE_SECONDS
        while True:
            self.scan()
            if not self.incomplete():
                return
            if time.monotonic() > deadline:
                total = len(self.latent_keys) + len(self.prompt_keys)
                raise StoreError(
                    f"Encodings: {self.incomplete()} of {total} are missing in {self.store} after all ranks have"
                    " finished. Is another process deleting files there? Start again to encode them."
                )
            refresh_listing(self.store / "latents")
            refresh_listing(self.store / "prompts")
            time.sleep(0.5)


def _check_space(store, latents, geometry, resolution, vae_dtype):
    """Raise StoreError when the missing latents cannot fit on the disk; captions' lengths are not known yet."""
    import shutil

    side = resolution // geometry["factor"]
    size = torch.finfo(vae_dtype).bits // 8
    needed = len(latents.missing()) * geometry["latent_channels"] * side * side * size
    free = shutil.disk_usage(store).free
    if needed > free:
        raise StoreError(
            f"Encodings: {len(latents.missing())} latents need {needed / 2**20:.0f} MiB, but {store} has only"
            f" {free / 2**20:.0f} MiB free. Free some space or choose another folder for the encodings."
        )
