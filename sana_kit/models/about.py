"""What a LoRA file says of its own training, in the kit's key and in those that other tools show."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from sana_kit import __version__

KEY = "sana_kit"  # metadata key of the kit: a JSON object


@dataclasses.dataclass(frozen=True)
class LoraAbout:
    """A LoRA's training.

    Attributes:
        rank, alpha: of the adapter.
        base_model: hub name or folder's name of the base; base_sha256 stands for its weights, as patch_sana.py's
            `base_model_fingerprint` gives it.
        instruction: the lines before each caption, as they were encoded; None: none.
        trigger: the words that all captions share, None where there are none.
        resolution: side of the training images in pixels.
        steps: updates so far; images: size of the data set.
        kit_version: of the kit that trained it.
    """

    rank: int
    alpha: float
    base_model: str = ""
    base_sha256: str | None = None
    instruction: tuple[str, ...] | None = None
    trigger: str | None = None
    resolution: int | None = None
    steps: int | None = None
    images: int | None = None
    kit_version: str = __version__


def shared_words(captions: Iterable[str]) -> str | None:
    """The words that all captions end with, or begin with, whichever are more: the trigger. None without any."""
    words = [caption.split() for caption in dict.fromkeys(captions)]
    if not words:
        return None
    beginning = os.path.commonprefix(words)
    ending = os.path.commonprefix([caption[::-1] for caption in words])[::-1]
    longest = ending if len(ending) >= len(beginning) else beginning
    found = " ".join(longest).strip(" ,.;:")
    return found if any(letter.isalnum() for letter in found) else None


def about_metadata(about: LoraAbout) -> dict[str, str]:
    """Entries for a safetensors file's metadata: the kit's own, kohya's `ss_*`, and ModelSpec's `modelspec.*`.

    Pure and without a clock: equal arguments give equal bytes, so a resumed run writes the same file.
    """
    size, trigger, name = about.resolution, about.trigger, about.base_model
    hint = None
    if about.instruction:
        hint = "Trained with lines before each caption: " + "\n".join(about.instruction)
    known = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": about.rank,
        "ss_network_alpha": about.alpha,
        "ss_base_model_version": "sana",
        "ss_sd_model_name": name,
        "ss_sd_model_hash": about.base_sha256,
        "ss_resolution": size and f"({size}, {size})",
        "ss_steps": about.steps,
        "ss_num_train_images": about.images,
        # what AUTOMATIC1111 and ComfyUI's loaders list as words to use, with the number of images that have them
        "ss_tag_frequency": trigger and json.dumps({"captions": {trigger: about.images or 1}}, ensure_ascii=False),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "sana/lora",
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.title": f"LoRA of {name or 'SANA'}" + (f": {trigger}" if trigger else ""),
        "modelspec.resolution": size and f"{size}x{size}",
        "modelspec.trigger_phrase": trigger,
        "modelspec.usage_hint": hint,
    }
    shown = {key: str(value) for key, value in known.items() if value not in (None, "")}
    return {KEY: json.dumps(dataclasses.asdict(about), ensure_ascii=False, sort_keys=True), **shown}


def read_about(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a file's metadata says of its training, by the fields of `LoraAbout`; empty where it says nothing.

    Only values of the right kind are taken: a file comes from anywhere.
    """
    try:
        told = json.loads(metadata.get(KEY, "{}"))
    except ValueError:
        return {}
    if not isinstance(told, dict):
        return {}
    kinds: dict[str, type | tuple[type, ...]] = {
        "rank": int,
        "alpha": (int, float),
        "resolution": int,
        "steps": int,
        "images": int,
    }
    found: dict = {}
    for field in dataclasses.fields(LoraAbout):
        value, kind = told.get(field.name), kinds.get(field.name, str)
        if field.name == "instruction" and field.name in told:
            lines = value is None or (isinstance(value, list) and all(isinstance(line, str) for line in value))
            found |= {"instruction": value} if lines else {}
        elif isinstance(value, kind) and not isinstance(value, bool):
            found[field.name] = value
    if found.get("resolution", 1) < 1:
        del found["resolution"]
    return found
