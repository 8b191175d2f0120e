"""What a resumed run needs to be the same run: identity, random states."""

from __future__ import annotations

import os

from sana_kit.data.image_set import ImageSet
from sana_kit.distributed import Ranks
from sana_kit.errors import Problem, UserError

OPTIMIZER_FILE = "optimizer.safetensors"


def pack_random_state(state: dict) -> dict:
    """devices.random_state() without anything that needs a pickle of a class."""
    version, internal, gauss = state["python"]
    name, keys, pos, has_gauss, cached = state["numpy"]
    packed = {
        "python": [version, list(internal), gauss],
        "numpy": [str(name), [int(k) for k in keys], int(pos), int(has_gauss), float(cached)],
        "torch": state["torch"],
    }
    if "device" in state:
        packed["device"] = state["device"].cpu()
    return packed


def unpack_random_state(packed: dict) -> dict:
    """The inverse of `pack_random_state`."""
    import numpy as np

    version, internal, gauss = packed["python"]
    name, keys, pos, has_gauss, cached = packed["numpy"]
    state = {
        "python": (version, tuple(internal), gauss),
        "numpy": (name, np.array(keys, dtype=np.uint32), pos, has_gauss, cached),
        "torch": packed["torch"],
    }
    if "device" in packed:
        state["device"] = packed["device"]
    return state


def run_identity(args, num_images: int, world_size: int) -> dict:
    """What a resumed run should share with the one that wrote the checkpoint."""
    keys = (
        "pretrained_model_name_or_path",
        "train_mode",
        "rank",
        "lora_alpha",
        "lora_layers",
        "resolution",
        "flow_shift",
    )
    keys += ("weighting_scheme", "train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler")
    keys += ("max_train_steps", "seed", "mixed_precision", "lora_dropout", "optimizer")
    return {**{key: getattr(args, key) for key in keys}, "images": num_images, "world_size": world_size}


def differences(before: dict, now: dict) -> list[str]:
    """One sentence per setting that differs from the checkpoint's."""
    return [
        f"{key} was {before[key]} when the checkpoint was written and is {now[key]} now"
        for key in now
        if key in before and before[key] != now[key]
    ]


def check_same_images(images: ImageSet, ranks: Ranks) -> None:
    """Raise UserError on every rank unless all ranks found the same images and captions.

    Machines whose folders differ by one file would train on permutations of different sets without a word.
    """
    found = ranks.gather((images.digest(), len(images), os.uname().nodename))
    odd = [rank for rank, (digest, _, _) in enumerate(found) if digest != found[0][0]]
    if odd:
        rank = odd[0]
        counts = f"{found[0][1]} samples on rank 0 ({found[0][2]}), {found[rank][1]} on rank {rank} ({found[rank][2]})"
        reason = f"ranks {odd} found other images or captions than rank 0: {counts}"
        raise UserError(Problem("dataset_name", None, reason, "Give every machine the same files."))
