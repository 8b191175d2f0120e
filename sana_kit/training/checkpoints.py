"""Checkpoints: written beside and renamed when whole, found again, resumed exactly, on any number of processes.

Used by train_dreambooth_lora_sana.py. A `checkpoint-N` folder holds

    pytorch_lora_weights.safetensors   the adapter, as patch_sana.py's save hook writes it (LoRA)
    optimizer.safetensors              per trainable parameter: float32 master, and the optimizer's tensors (Adam
    moments) trainer_state.json                 global step, data position, seed, scheduler, what the run was made of
    random_states.pt                   every rank's generator states, the device's too (plain tensors and numbers)
    manifest.json                      size and SHA-256 of each file: a folder without a true manifest is no checkpoint

Optimizer state is stored per parameter, whole, and not as an engine's shards: DeepSpeed ZeRO-1/2/3, DDP and a single
process write and read the same files, so a checkpoint of P processes resumes on Q. One process writes, so one rename
makes it whole, and machines that share no folder can resume from the first machine's: rank 0 reads and broadcasts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path

import torch

from sana_kit.errors import CheckpointError
from sana_kit.files import apply_umask, file_sha256, sync_path
from sana_kit.training.engine import collect_optimizer_state, parameter_shape, restore_optimizer_state
from sana_kit.training.optim import optimizer_scalars
from sana_kit.training.state import OPTIMIZER_FILE, pack_random_state, unpack_random_state

ADAPTER_FILE = "pytorch_lora_weights.safetensors"


STATE_FILE = "trainer_state.json"


RANDOM_FILE = "random_states.pt"


MANIFEST_FILE = "manifest.json"


FORMAT = 1


CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


def write_manifest(folder: Path) -> None:
    """Write manifest.json with size and SHA-256 of every other file below `folder`, each synced to the disk."""
    files = {}
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST_FILE)
    apply_umask(paths)
    for path in paths:
        sync_path(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    manifest = folder / MANIFEST_FILE
    manifest.write_text(json.dumps({"format": FORMAT, "files": files}, indent=1), encoding="utf-8")
    sync_path(manifest)


def find_damage(folder: Path, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint folder, None if it is whole: a missing manifest, a file missing, cut or
    changed.
    """
    manifest = folder / MANIFEST_FILE
    if not manifest.is_file():
        return f"{MANIFEST_FILE} is missing: it was never finished, or is not a checkpoint of this kit"
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, UnicodeDecodeError) as error:
        return f"{MANIFEST_FILE} is unreadable ({error})"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        if hashes and file_sha256(path) != entry["sha256"]:
            return f"{name} has another SHA-256 than its manifest says"
    return None


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(global step, folder) of everything named checkpoint-N below `output_dir`, oldest first, whole or not."""
    if not output_dir.is_dir():
        return []
    found = []
    for path in output_dir.iterdir():
        match = CHECKPOINT_NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match.group(1)), path))
    return sorted(found)


def find_checkpoint(output_dir: Path, name: str, set_aside: bool = True) -> tuple[Path | None, list[str]]:
    """The folder that `--resume_from_checkpoint=name` means, and notes on what was passed over.

    'latest' is the newest whole checkpoint of `output_dir`, None if there is none; damaged newer ones are renamed to
    `checkpoint-N.damaged` (if `set_aside`) and named in the notes. Anything else is a folder: as given, or in
    `output_dir`.

    Raises:
        ValueError: a checkpoint asked for by name does not exist or is damaged.
    """
    if name == "latest":
        notes = []
        for _, folder in reversed(list_checkpoints(output_dir)):
            damage = find_damage(folder)
            if damage is None:
                return folder, notes
            kept = folder
            if set_aside:
                kept = folder.with_name(folder.name + ".damaged")
                while kept.exists():
                    kept = kept.with_name(kept.name + "_")
                os.replace(folder, kept)
            notes.append(f"{folder.name} is damaged ({damage}); skipped and kept as {kept.name}")
        return None, notes
    candidates = [Path(name), output_dir / name]
    folder = next((path for path in candidates if path.is_dir()), None)
    there = ", ".join(path.name for _, path in list_checkpoints(output_dir)) or "none"
    if folder is None:
        raise ValueError(
            f"--resume_from_checkpoint={name}: no such folder, neither as given nor in {output_dir}. Checkpoints"
            f" there:"
            f" {there}. Use one of them or 'latest'."
        )
    damage = find_damage(folder)
    if damage is not None:
        raise ValueError(
            f"--resume_from_checkpoint={name}: {folder} is not a whole checkpoint: {damage}. Checkpoints in"
            f" {output_dir}:"
            f" {there}. Use another one or 'latest', which skips damaged ones."
        )
    return folder, []


def prune_checkpoints(output_dir: Path, keep: int | None) -> list[str]:
    """Remove the oldest checkpoints so that `keep` remain; called only once the newest is whole. Returns their
    names.
    """
    if keep is None:
        return []
    removed = []
    for _, folder in list_checkpoints(output_dir)[:-keep]:
        # Renamed first: a kill halfway through the removal must not leave half a checkpoint under a checkpoint's name.
        doomed = folder.with_name(f".{folder.name}.removed-{os.getpid()}")
        os.replace(folder, doomed)
        shutil.rmtree(doomed)
        removed.append(folder.name)
    return removed


def remove_leftovers(output_dir: Path) -> list[str]:
    """Remove what a killed run left unfinished (hidden .checkpoint-N.partial-* and .removed-* folders)."""
    removed = []
    if output_dir.is_dir():
        for path in output_dir.iterdir():
            if re.fullmatch(r"\.checkpoint-\d+\.(partial|removed)-\d+", path.name):
                shutil.rmtree(path)
                removed.append(path.name)
    return removed


def save_checkpoint(
    output_dir: Path,
    *,
    accelerator,
    model,
    optimizer,
    named_parameters: list[tuple[str, torch.nn.Parameter]],
    trainer_state: dict,
    random_state: dict,
    write_weights,
    keep: int | None,
) -> tuple[Path, float]:
    """Write `checkpoint-N` for N = trainer_state["global_step"]; every rank must call it. Returns (folder, seconds).

    Args:
        named_parameters: the trainable parameters of the unwrapped model, the same order on every rank.
        random_state: this rank's `devices.random_state()`.
        write_weights: function (folder), called on every rank after the optimizer state was collected; it writes the
            adapter (or the transformer) on the main process.
        keep: how many checkpoints may remain afterwards; the oldest go only after the new one is whole.

    Raises:
        CheckpointError: on every rank, if the main process could not write; nothing is left under the final name and
            older checkpoints are untouched.
    """
    from accelerate.utils import broadcast_object_list, gather_object
    from safetensors.torch import save_file

    started = time.perf_counter()
    step = trainer_state["global_step"]
    final = output_dir / f"checkpoint-{step}"
    partial = output_dir / f".checkpoint-{step}.partial-{os.getpid()}"
    main = accelerator.is_main_process
    failure = None
    if main:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as error:
            failure = error

    # All collectives come first and run on every rank, whatever happens to the main process's files.
    tensors = {}
    for key, tensor in collect_optimizer_state(model, optimizer, named_parameters, keep=main):
        if main:
            tensors[key] = tensor.contiguous()
    random_states = gather_object([pack_random_state(random_state)])
    state = {**trainer_state, "format": FORMAT, "optimizer": optimizer_scalars(optimizer)}

    try:
        write_weights(partial)
        if main and failure is None:
            save_file(tensors, partial / OPTIMIZER_FILE)
            torch.save({"world_size": accelerator.num_processes, "states": random_states}, partial / RANDOM_FILE)
            (partial / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
            write_manifest(partial)
            if final.exists():  # a step reached twice, after a resume from an older checkpoint: the new one counts
                os.replace(final, output_dir / f".{final.name}.removed-{os.getpid()}")
            os.replace(partial, final)
            sync_path(output_dir)
    except Exception as error:  # noqa: BLE001  disk full, quota, permission, ...: told to every rank below
        failure = error
    message = None
    if main and failure is not None:
        shutil.rmtree(partial, ignore_errors=True)
        whole = [path.name for _, path in list_checkpoints(output_dir) if find_damage(path, hashes=False) is None]
        message = (
            f"Could not write {final}: {type(failure).__name__}: {failure}. Older checkpoints are untouched:"
            f" {', '.join(whole) or 'none'}. Free space or choose another --output_dir, then start again with"
            " --resume_from_checkpoint=latest."
        )
    told = [message]
    broadcast_object_list(told)
    if told[0] is not None:
        raise CheckpointError(told[0]) from failure
    if failure is not None:
        raise CheckpointError(f"rank {accelerator.process_index}: {failure}") from failure
    if main:
        prune_checkpoints(output_dir, keep)
        remove_leftovers(output_dir)
    accelerator.wait_for_everyone()
    return final, time.perf_counter() - started


def read_trainer_state(folder: Path | None, accelerator) -> dict:
    """trainer_state.json of the checkpoint, read by the main process and broadcast: the others need not see the
    folder.
    """
    from accelerate.utils import broadcast_object_list

    state = [json.loads((folder / STATE_FILE).read_text(encoding="utf-8")) if accelerator.is_main_process else None]
    broadcast_object_list(state)
    return state[0]


def load_checkpoint(
    folder: Path | None, *, accelerator, model, optimizer, named_parameters, trainer_state: dict, device: torch.device
) -> dict | None:
    """Restore weights, optimizer and random state from a checkpoint; every rank must call it.

    `folder` matters on the main process only, which reads the files and broadcasts tensor by tensor.

    Returns:
        This rank's random state for `devices.set_random_state`, None if another number of processes wrote it.

    Raises:
        CheckpointError: the checkpoint does not fit this model or optimizer.
    """
    from accelerate.utils import broadcast, broadcast_object_list
    from safetensors import safe_open

    main = accelerator.is_main_process
    several = accelerator.num_processes > 1
    handle = safe_open(folder / OPTIMIZER_FILE, framework="pt") if main else None
    shapes = [{k: list(handle.get_slice(k).get_shape()) for k in handle.keys()} if main else None]
    broadcast_object_list(shapes)
    shapes = shapes[0]

    expected = {f"{name}|master": list(parameter_shape(p)) for name, p in named_parameters}
    found = {k: v for k, v in shapes.items() if k.endswith("|master")}
    if expected != found:
        missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
        other = [
            f"{k}: {found[k]} instead of {expected[k]}" for k in expected if k in found and found[k] != expected[k]
        ]
        raise CheckpointError(
            "The checkpoint does not fit this model (another --rank, --lora_layers, --train_mode or base model):"
            f" missing {missing[:3]} ({len(missing)}), unexpected {extra[:3]} ({len(extra)}), other shapes {other[:3]}"
            f" ({len(other)})."
        )

    def read(key: str) -> torch.Tensor | None:
        if key not in shapes:
            return None
        tensor = handle.get_tensor(key) if main else torch.empty(shapes[key], dtype=torch.float32)
        if several:
            tensor = broadcast(tensor.to(device))
        return tensor

    restore_optimizer_state(model, optimizer, named_parameters, trainer_state["optimizer"], read)

    packed = [torch.load(folder / RANDOM_FILE, map_location="cpu", weights_only=True) if main else None]
    broadcast_object_list(packed)
    if packed[0]["world_size"] != accelerator.num_processes:
        return None
    return unpack_random_state(packed[0]["states"][accelerator.process_index])
