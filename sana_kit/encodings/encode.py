"""Encode what is missing, once: every rank its share, then the VAE and the text encoder leave memory."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from sana_kit import devices
from sana_kit.data.image_set import ImageSet, bad_image_problems, check_images
from sana_kit.distributed import Ranks
from sana_kit.encodings.dataset import EncodedDataset, EncodingFacts
from sana_kit.encodings.encode_images import encode_missing_images
from sana_kit.encodings.encode_prompts import encode_missing_prompts
from sana_kit.encodings.encoders import Encoders
from sana_kit.encodings.peers import Peers, Stop
from sana_kit.encodings.plan import PARTS, EncodingPlan, ExtraPrompts
from sana_kit.encodings.settings import EncodingSettings, Identity, check_settings
from sana_kit.encodings.usage import Claim, in_short, mark_used
from sana_kit.errors import Problem, StoreError, UserError
from sana_kit.models.folder import Model

logger = logging.getLogger(__name__)


def encode(
    images: ImageSet,
    base_model: Model,
    settings: EncodingSettings,
    *,
    ranks: Ranks,
    seed: int | None = None,
    extra_prompts: ExtraPrompts = (),
    stop: Stop | None = None,
    log: Callable[[str], None] | None = None,
    encoders: Encoders | None = None,
) -> EncodedDataset:
    """Encode what is missing in the store, every rank its share, and return the data set of encodings.

    A collective call: every rank must make it, with equal arguments. The VAE and the text encoder are loaded only
    where something is missing, one after the other, and have left memory when this returns. Images still to be encoded
    are first decoded once, so that a corrupt one is an error before any weight is loaded. Machines with separate store
    folders are noticed: each then encodes all by itself.

    Items are encoded in groups that depend on the data set and the batch sizes alone, not on what is already there or
    on the number of ranks, so an interrupted encoding ends with the same bits as an undisturbed one.

    Args:
        base_model: found and checked (`find_model`); its VAE, text encoder and tokenizer encode.
        seed: random crops and flips are keyed by it and the image's position; None: they belong to the image and the
            settings, so that another run, or the same image elsewhere, finds them again.
        extra_prompts: (prompt, instruction) pairs to encode too: validation prompts, negative ones (instruction None).
        stop: its `requested` is asked between groups; True on one rank ends all with EncodingStopped.
        log: called with a line of text, on the first rank; default: the module's logger.
        encoders: of `base_model`, where they are to serve again; default: they are loaded and let go.

    Raises:
        UserError: settings, model parts, images or data sets that cannot be used, all at once; raised on every rank.
        StoreError: the store cannot be written or read; raised on every rank.
        EncodingStopped: see stop.
        RankFailed: another rank failed in the models.
    """
    started, messages = time.monotonic(), []

    def tell(text: str) -> None:
        messages.append(text)
        if ranks.is_main:
            (log or logger.warning)(text)

    with Peers(ranks, Path(settings.encodings_dir), stop) as peers:
        peers.run(lambda: check_settings(settings, base_model))
        check_same_data(images, ranks)
        identity = peers.run(lambda: Identity.of(base_model))
        claim = Claim(peers.store) if ranks.is_local_main else None
        try:
            given = {"settings": settings, "identity": identity, "extra_prompts": list(extra_prompts)}
            make_plan: Callable[[ImageSet], EncodingPlan] = partial(EncodingPlan, **given, seed=seed, tell=tell)  # type: ignore[arg-type]
            plan, work = _complete_plan(make_plan, images, encoders or Encoders(base_model), peers, tell)
        except BaseException:
            if claim is not None:
                claim.close()
            raise
    _settle(plan, claim, ranks)
    warn_truncation(plan, tell)
    return EncodedDataset(plan, _facts(plan, work, base_model, time.monotonic() - started, messages, ranks), claim)


def _none() -> dict:
    return {"images": 0, "prompts": 0}


@dataclasses.dataclass(frozen=True)
class _Work:
    """What was done: encoded by all ranks, reused, and this rank's seconds; by "images" and "prompts"."""

    encoded: dict[str, int] = dataclasses.field(default_factory=_none)
    reused: dict[str, int] = dataclasses.field(default_factory=_none)
    seconds: dict[str, float] = dataclasses.field(default_factory=_none)


def _facts(
    plan: EncodingPlan, work: _Work, base_model: Model, seconds: float, messages: list[str], ranks: Ranks
) -> EncodingFacts:
    return EncodingFacts(
        seconds=seconds,
        encoded_images=work.encoded["images"],
        encoded_prompts=work.encoded["prompts"],
        reused_images=work.reused["images"],
        reused_prompts=work.reused["prompts"],
        image_seconds=work.seconds["images"],
        prompt_seconds=work.seconds["prompts"],
        bytes={"latents": plan.latents.total_bytes(), "prompts": plan.texts.total_bytes()},
        scaling_factor=base_model.vae_config.get("scaling_factor", 1.0),
        vae_factor=base_model.vae_factor,
        latent_channels=base_model.vae_config["latent_channels"],
        messages=tuple(messages),
        store=in_short(plan.store) if ranks.is_main else "",
    )


def _complete_plan(
    make_plan: Callable[[ImageSet], EncodingPlan],
    images: ImageSet,
    encoders: Encoders,
    peers: Peers,
    tell: Callable[[str], None],
) -> tuple[EncodingPlan, _Work]:
    """The plan with everything encoded; it may be one without bad images."""
    ranks = peers.ranks
    plan = peers.run(lambda: make_plan(images))
    if not any(ranks.gather(plan.incomplete())):
        return plan, _Work(reused=plan.found())
    peers.find()
    peers.run(plan.prepare)  # a rank that took over an earlier run's plan has no keys yet
    bad = _bad_images(plan, peers)
    if bad:
        text = bad_image_problems(list(bad.values()))
        left = images.without(list(bad))
        if not plan.settings.skip_bad_images or not len(left):
            raise UserError(Problem("", None, text), "The training images cannot be used:")
        tell("skip_bad_images: " + text)
        plan = peers.run(lambda: make_plan(left))
        peers.run(plan.prepare)
    peers.run(lambda: _check_space(plan, encoders.model))
    work = _Work(reused=plan.found())
    # Captions, then images: each model is alone in memory.
    jobs = {
        "prompts": lambda: encode_missing_prompts(plan, encoders, ranks.device, peers),
        "images": lambda: encode_missing_images(plan, encoders, ranks.device, peers, tell),
    }
    for kind, job in jobs.items():
        count, work.seconds[kind] = peers.run(job) or (0, 0.0)
        work.encoded[kind] = sum(ranks.gather(count))
        devices.empty_cache(ranks.device)  # of a model that has gone
    peers.run(plan.complete)
    return plan, work


def _bad_images(plan: EncodingPlan, peers: Peers) -> dict[int, str]:
    """{sample: what is wrong} of all missing images that cannot be decoded; each rank looks at its share."""
    missing, samples = set(plan.latents.missing().tolist()), plan.needs.first_sample.tolist()
    own = [samples[row] for row in peers.share(range(len(samples))) if row in missing]
    workers = plan.settings.num_workers
    found = peers.ranks.gather(peers.run(lambda: check_images(plan.images, own, num_workers=workers)))
    return dict(sorted(item for share in found for item in share))


def _settle(plan: EncodingPlan, claim: Claim | None, ranks: Ranks) -> None:
    """Renew what is used, keep the plan for the next run, and give back what only encoding needed."""
    if ranks.is_local_main:
        files = {part: index.files for part, index in zip(PARTS, (plan.latents, plan.texts), strict=True)}
        for part, names in files.items():
            mark_used(plan.store / part, names)
        if plan.needs is not None:
            plan.remember()
        claim.name_shards(files)
    plan.forget_needs()
    plan.images.release()


def check_same_data(images: ImageSet, ranks: Ranks) -> None:
    """Raise UserError on all ranks where data sets differ; it says on which machines, and names some images."""
    views = ranks.gather((images.digest(), socket.gethostname(), len(images)))
    if len({digest for digest, _, _ in views}) == 1:
        return
    # the digests of the samples, so that the images can be named
    ours = np.ascontiguousarray(images.source_digests()[:, :8]).view(np.uint64).ravel()
    first = ranks.agree(ours)
    extra = [images.name(int(i)) for i in np.flatnonzero(~np.isin(ours, first))[:3]]
    lacking = int((~np.isin(first, ours)).sum())
    lines = [f"rank 0 on {views[0][1]} has {views[0][2]} samples"]
    for rank, (extra_there, lacking_there) in enumerate(ranks.gather((extra, lacking))):
        digest, host, count = views[rank]
        if digest == views[0][0]:
            continue
        parts = [f"lacks {lacking_there} of rank 0's images"] if lacking_there else []
        parts += [f"has images that rank 0 lacks, such as {', '.join(extra_there)}"] if extra_there else []
        parts = parts or ["has other captions, or another order"]
        lines.append(f"rank {rank} on {host} has {count} samples: it {' and '.join(parts)}")
    reason = "the data set differs between the ranks: " + "; ".join(lines)
    raise UserError(Problem("", None, reason, "Give every machine the same files, in the same state."))


def warn_truncation(plan: EncodingPlan, tell: Callable[[str], None]) -> None:
    """Say how many captions were cut and how many images had to be enlarged."""
    if plan.images.follows is not None:  # told with the images themselves
        return
    length, resolution = plan.settings.max_sequence_length, plan.settings.resolution
    rows = plan.caption_rows if plan.choice_rows is None else plan.choice_rows
    cut = int((plan.texts.tokens(np.unique(rows)) >= length).sum())
    if cut:
        tell(f"{cut} caption(s) reach max_sequence_length={length} tokens; SanaPipeline cuts the rest off, too.")
    if plan.settings.resolutions or plan.settings.set_rules:  # the trainer tells of each bucket
        return
    small = plan.images.sizes().min(axis=1) < resolution
    count = len(np.unique(plan.latent_rows[small]))
    if count:
        tell(f"{count} image(s) are smaller than resolution={resolution} and were enlarged.")


def _check_space(plan: EncodingPlan, model: Model) -> None:
    """Raise StoreError when the missing latents cannot fit on the disk; captions' lengths are not known yet."""
    missing, side = len(plan.latents.missing()), plan.settings.resolution // model.vae_factor
    width = torch.finfo(plan.settings.vae_dtype).bits // 8
    needed = missing * model.vae_config["latent_channels"] * side * side * width
    free = shutil.disk_usage(plan.store).free
    if needed > free:
        raise StoreError(
            f"Encodings: {missing} latents need {needed / 2**20:.0f} MiB, but {plan.store} has only"
            f" {free / 2**20:.0f} MiB free. Free some space or choose another folder for the encodings."
        )
