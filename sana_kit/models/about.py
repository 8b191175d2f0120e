"""What a LoRA file says of its own training, in the kit's key and in those that other tools show."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

KEY = "sana_kit"  # metadata key of the kit: a JSON object


@dataclasses.dataclass(frozen=True)
class LoraAbout:
    """A LoRA's training.

    Attributes:
        rank, alpha: of the adapter.
        base_model: hub name or folder's name of the base; base_sha256 stands for its weights.
        instruction: the lines before each caption, as they were encoded; None: none.
        trigger: the words that all captions share, None where there are none.
        resolution: side of the training images in pixels.
        steps: updates so far; images: size of the data set.
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
    kit_version: str = ""


def about_metadata(about: LoraAbout) -> dict[str, str]:
    """Entries for a safetensors file's metadata: the kit's own, kohya's `ss_*`, and ModelSpec's `modelspec.*`."""
    known = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": about.rank,
        "ss_network_alpha": about.alpha,
        "ss_base_model_version": "sana",
        "ss_sd_model_name": about.base_model,
        "ss_resolution": about.resolution and f"({about.resolution}, {about.resolution})",
        "ss_steps": about.steps,
        "ss_num_train_images": about.images,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "sana/lora",
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.resolution": about.resolution and f"{about.resolution}x{about.resolution}",
        "modelspec.trigger_phrase": about.trigger,
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
    kinds = {"rank": int, "alpha": (int, float), "resolution": int, "steps": int, "images": int}
    found = {}
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
