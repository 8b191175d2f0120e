"""What a data set needs, each distinct thing once, and where it lies on disk; remembered between runs.

Keys of a million images take seconds to make and to look up in the shards' headers. Where everything is there, the
result is kept in the store (plans/), under a hash of data, settings and model: a warm start reads arrays.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sana_kit.data.image_set import ImageSet
from sana_kit.encodings.keys import PromptKeys, distinct, latents_keys
from sana_kit.encodings.settings import DTYPE_NAMES, EncodingSettings, Identity, Transform, fingerprint
from sana_kit.encodings.store import ShardIndex, refresh_listing, scan_store
from sana_kit.errors import StoreError
from sana_kit.files import write_atomic

VISIBLE_SECONDS = 60.0  # how long a shared file system may take to show another rank's shards

PARTS = ("latents", "prompts")  # the store's folders of shards

# Bytes of a prompt's key that are kept to find it again; 128 bits leave no room for two prompts with one name.
SHORT_KEY = 16

ExtraPrompts = Sequence[tuple[str, list[str] | None]]


def prompt_keys(settings: EncodingSettings, identity: Identity) -> PromptKeys:
    """What makes the keys of prompts under these settings."""
    return PromptKeys(
        max_sequence_length=settings.max_sequence_length,
        tokenizer=identity.tokenizer,
        text_encoder=identity.text_encoder,
        dtype=DTYPE_NAMES[settings.text_encoder_dtype],
    )


@dataclasses.dataclass(frozen=True)
class Needs:
    """What only encoding asks for.

    Attributes:
        transform: sample -> its TransformPlan.
        first_sample: (R,) int32, a sample of each latents row.
        prompts: (prompt, instruction) of each prompt row.
        latent_keys, prompt_keys: (R, 32) and (P, 32) uint8.
    """

    transform: Transform
    first_sample: np.ndarray
    prompts: ExtraPrompts
    latent_keys: np.ndarray
    prompt_keys: np.ndarray


class EncodingPlan:
    """What a data set needs, in an order that all ranks agree on, and where it lies on disk.

    Attributes:
        latent_rows, caption_rows: (N,) int32, the row of each sample's latents and of its caption.
        choice_rows: int32, the row of each of all captions where some samples have several, else None.
        latents, texts: the indexes of the store, over rows.
        short_keys: (P,) byte strings, the beginnings of the prompts' keys.
        needs: keys and what they stand for; None where an earlier run's plan was taken over.
    """

    def __init__(
        self,
        images: ImageSet,
        settings: EncodingSettings,
        identity: Identity,
        extra_prompts: ExtraPrompts,
        *,
        seed: int | None = None,
        tell: Callable[[str], None] | None = None,
    ):
        self.images, self.settings, self.identity, self.seed = images, settings, identity, seed
        self.extra_prompts, self._tell = list(extra_prompts), tell
        self.make_key = prompt_keys(settings, identity)
        self.store = Path(settings.encodings_dir)
        name = fingerprint(settings, identity, self.extra_prompts, _data_digest(images), seed)
        self.path = self.store / "plans" / f"{name}.safetensors"
        self.needs: Needs | None = None
        if not self._recall():
            self.prepare()

    # ----------------------------------------------------------------------------------------------- what is needed

    def prepare(self) -> None:
        """Make all keys and look for them, unless that was done."""
        if self.needs is not None:
            return
        images, settings = self.images, self.settings
        transform = Transform(images, settings, self.seed)
        keys = latents_keys(
            map(transform, range(len(images))),
            images.source_digests(),
            vae=self.identity.vae,
            vae_dtype=DTYPE_NAMES[settings.vae_dtype],
        )
        first_sample, self.latent_rows = distinct(keys)
        latent_keys = keys[first_sample]
        # Captions: each distinct text once, then each distinct key once.
        known: dict[str, int] = {}
        text_rows = np.fromiter((known.setdefault(c, len(known)) for c in images.captions), np.int32, len(images))
        choices = images.all_captions if images.choices is not None else ()
        choice_rows = np.fromiter((known.setdefault(c, len(known)) for c in choices), np.int32, len(choices))
        texts = list(known)
        instruction = settings.complex_human_instruction
        parts = [self.make_key.many(texts, instruction)]
        parts += [np.frombuffer(self.make_key(*extra), np.uint8)[None] for extra in self.extra_prompts]
        keys = np.concatenate(parts)
        first, rows = distinct(keys)
        self.caption_rows = rows[: len(texts)][text_rows]
        self.choice_rows = None if images.choices is None else rows[: len(texts)][choice_rows]
        own = list(instruction) if instruction else None
        prompts = [(text, own) for text in texts] + [(p, list(i) if i else None) for p, i in self.extra_prompts]
        self.needs = Needs(transform, first_sample, [prompts[k] for k in first], latent_keys, keys[first])
        self.short_keys = _short(self.needs.prompt_keys)
        self.scan()

    def forget_needs(self) -> None:
        """Give the memory back that only encoding asks for; the plan can be pickled from now on."""
        self.needs = self._tell = None

    def find_prompt(self, prompt: str, instruction: list[str] | None) -> int | None:
        """The row of a prompt; None where it was not among the captions and extra prompts."""
        key = _short(np.frombuffer(self.make_key(prompt, instruction), np.uint8)[None])
        found = np.flatnonzero(self.short_keys == key[0])
        return int(found[0]) if len(found) else None

    # ------------------------------------------------------------------------------------------------ what is there

    def scan(self) -> None:
        """Look what the store holds now."""
        self.latents = scan_store(self.store / PARTS[0], self.needs.latent_keys, self._tell)
        self.texts = scan_store(self.store / PARTS[1], self.needs.prompt_keys, self._tell)

    def incomplete(self) -> int:
        """How many encodings are missing."""
        return len(self.latents.missing()) + len(self.texts.missing())

    def found(self) -> dict[str, int]:
        """How many distinct encodings were there at the last scan."""
        return {
            "images": int((self.latents.shard >= 0).sum()),
            "prompts": int((self.texts.shard >= 0).sum()),
        }

    def complete(self) -> None:
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
                total = len(self.latents.shard) + len(self.texts.shard)
                raise StoreError(
                    f"Encodings: {self.incomplete()} of {total} are missing in {self.store} after all ranks have"
                    " finished. Is another process deleting files there? Start again to encode them."
                )
            for part in PARTS:
                refresh_listing(self.store / part)
            time.sleep(0.5)

    # --------------------------------------------------------------------------------------- from run to run

    def remember(self) -> None:
        """Keep a complete plan for the next run; a store that cannot be written is not an error here."""
        arrays = {
            "latent_rows": self.latent_rows,
            "caption_rows": self.caption_rows,
            "short_keys": self.short_keys.view(np.uint8).reshape(-1, SHORT_KEY),
        }
        if self.choice_rows is not None:
            arrays["choice_rows"] = self.choice_rows
        notes = {}
        for part, index in zip(PARTS, (self.latents, self.texts), strict=True):
            for name in ("shard", "offset", "shape", "crc"):
                arrays[f"{part}.{name}"] = getattr(index, name)
            files = [[name, os.stat(self.store / part / name).st_size] for name in index.files]
            notes[part] = {"files": files, "shapes": index.shapes, "dtype": index.dtype}
        with suppress(OSError):
            write_atomic(self.path, lambda file: file.write(save(arrays, {"plan": json.dumps(notes)})), durable=False)

    def _recall(self) -> bool:
        """Take over what an earlier run kept; False where there is nothing, or a shard of it is gone."""
        try:
            with safe_open(self.path, "numpy") as file:
                notes = json.loads(file.metadata()["plan"])
                indexes = []
                for part in PARTS:
                    folder, files = self.store / part, notes[part]["files"]
                    if any(os.stat(folder / name).st_size != size for name, size in files):
                        return False
                    index = ShardIndex(folder, 0)
                    index.files, index.dtype = [name for name, _ in files], notes[part]["dtype"]
                    index.shapes = [tuple(shape) for shape in notes[part]["shapes"]]
                    for name in ("shard", "offset", "shape", "crc"):
                        setattr(index, name, file.get_tensor(f"{part}.{name}"))
                    indexes.append(index)
                self.latents, self.texts = indexes
                self.latent_rows, self.caption_rows = file.get_tensor("latent_rows"), file.get_tensor("caption_rows")
                self.choice_rows = file.get_tensor("choice_rows") if self.images.choices is not None else None
                self.short_keys = np.ascontiguousarray(file.get_tensor("short_keys")).view(f"S{SHORT_KEY}").ravel()
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return False
        with suppress(OSError):
            os.utime(self.path)
        return True


def _data_digest(images: ImageSet) -> str:
    """The set's digest, and where samples have rules of sizes of their own, which has which."""
    rules = (images if images.follows is None else images.follows).rules()
    return images.digest() if rules is None else images.digest() + hashlib.sha256(rules.tobytes()).hexdigest()


def _short(keys: np.ndarray) -> np.ndarray:
    """The first SHORT_KEY bytes of keys, (N,) byte strings."""
    return np.ascontiguousarray(keys[:, :SHORT_KEY]).view(f"S{SHORT_KEY}").ravel()
