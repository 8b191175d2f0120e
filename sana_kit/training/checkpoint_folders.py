"""The folders of an output folder: which checkpoints are there, whose they are, which is newest, what goes.

A checkpoint belongs to a run (`run_id`) and has a place in the order of writing (`sequence`), both in its
trainer_state.json: its number, the global step, says neither. Nothing is ever deleted but older checkpoints of the
very run that writes, by its own limit; all else that is in the way is set aside.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from patch_sana import ADAPTER_FILE
from sana_kit.errors import CheckpointError, Problem, UserError, setting
from sana_kit.files import apply_umask, file_sha256, remove_leftovers, remove_tree, sync_path

STATE_FILE = "trainer_state.json"
MANIFEST_FILE = "manifest.json"
# 1: no run id, no sequence, one set of numbers for all parameters. 2: since then.
FORMAT = 2

_NAME = re.compile(r"checkpoint-(\d+)")
# What a write that was cut off leaves: `partial` is the new one, `replaced` the one of the same step before it,
# `removed` an old one that was being deleted.
_HIDDEN = re.compile(r"\.(checkpoint-\d+)\.(partial|replaced|removed)-[0-9a-f]+")
# Of a run that trains no adapter: the folder of its weights.
MODEL_FOLDERS = {"full": "transformer", "controlnet": "controlnet"}
# What a run is made for: a LoRA, a transformer, a ControlNet.
RESULTS = (ADAPTER_FILE, *MODEL_FOLDERS.values())
# What a run writes into its output folder, beside checkpoints; encodings stay, since they belong to the images.
RUN_FILES = (
    "train_log.jsonl",
    "summary.json",
    "report.html",
    ".report_cache",
    "README.md",
    "README.generated.md",
    *RESULTS,
    "sana_kit_base.json",
    "validation",
    "training_images",
    "nearest_training_images",
    "model_card",
    "logs",
    "run.yaml",
    "best",
    "raw",
)
# What FORMAT 1 restored of an optimizer's groups.
_FORMAT_1_GROUPS = ("d", "k", "d0", "d_max", "d_numerator")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder called checkpoint-N, whole or not.

    Attributes:
        step: N.
        sequence: its place in the order of writing; 0 for FORMAT 1, whose checkpoints are older than all others.
        run_id: of the run that wrote it.
        readable: whether its state can be read; one that cannot counts as the newest, so that 'latest' names it.
    """

    folder: Path
    step: int
    sequence: int = 0
    run_id: str | None = None
    readable: bool = True

    @property
    def order(self) -> tuple[bool, int, int]:
        """Sorts by the order of writing."""
        return not self.readable, self.sequence, self.step


def read_state(folder: Path) -> dict:
    """trainer_state.json of a checkpoint, brought to today's FORMAT.

    Raises:
        CheckpointError: it is missing, is no JSON, or is of a newer kit.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        return migrate(state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / STATE_FILE} cannot be read ({error}). Use another checkpoint.") from error


def migrate(state: dict) -> dict:
    """A checkpoint's state as today's FORMAT has it.

    Raises:
        CheckpointError: a newer kit wrote it.
    """
    found = state.get("format", 1)
    if found > FORMAT:
        raise CheckpointError(
            f"This checkpoint has format {found}, and this kit knows formats up to {FORMAT}: a newer kit wrote it."
            " Resume it with that one."
        )
    for older in range(found, FORMAT):
        state = _STEPS[older](state)
    return state


def _from_1(state: dict) -> dict:
    """FORMAT 1 as 2 has it."""
    run = {"images" if key == "pictures" else key: value for key, value in state["run"].items()}
    run["crop_seed"] = state.get("seed")  # the run's own seed decided the crops then
    optimizer = state["optimizer"]
    groups = [{k: v for k, v in group.items() if k in _FORMAT_1_GROUPS} for group in optimizer["groups"]]
    # Checkpoints of one run share these; seeds are drawn at random unless given.
    whose = (state.get("seed"), run.get("pretrained_model_name_or_path"), run.get("train_mode"), run.get("rank"))
    return {
        **state,
        "format": 2,
        "run": run,
        "run_id": "format-1 " + " ".join(map(str, whose)),
        "sequence": 0,
        "loss_scale": None,
        "optimizer": {
            "class": optimizer["class"],
            "numbers": optimizer["state"],
            "own_numbers": {},
            "groups": groups,
        },
    }


# FORMAT n -> what makes n + 1 of it.
_STEPS: dict[int, Callable[[dict], dict]] = {1: _from_1}


def all_checkpoints(output_dir: Path) -> list[Checkpoint]:
    """Everything named checkpoint-N in `output_dir`, in the order of writing, whole or not."""
    found = []
    for path in output_dir.iterdir() if output_dir.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if not match or not path.is_dir():
            continue
        try:
            state = read_state(path)
            found.append(Checkpoint(path, int(match[1]), int(state["sequence"]), state["run_id"]))
        except CheckpointError:  # `find_damage` says what is wrong with it where that matters
            found.append(Checkpoint(path, int(match[1]), readable=False))
    return sorted(found, key=lambda checkpoint: checkpoint.order)


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(global step, folder) of `all_checkpoints`."""
    return [(checkpoint.step, checkpoint.folder) for checkpoint in all_checkpoints(output_dir)]


# ---------------------------------------------------------------------------------------------------------------------
# Whole or not


def write_manifest(folder: Path, known: dict[str, dict] | None = None) -> None:
    """Write manifest.json with size and SHA-256 of every other file below `folder`, each synced to the disk.

    Args:
        known: {name: {"bytes", "sha256"}} of files that were hashed and synced while they were written.
    """
    files = dict(known or {})
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST_FILE)
    apply_umask(paths)
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if name not in files:
            sync_path(path)
            files[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    manifest = folder / MANIFEST_FILE
    manifest.write_text(json.dumps({"format": FORMAT, "files": files}, indent=1), encoding="utf-8")
    sync_path(manifest)


def find_damage(folder: Path, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint folder, None if it is whole: no manifest, a file missing, cut off or changed."""
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


def recover(output_dir: Path) -> list[str]:
    """Bring back what a write that was cut off has left hidden, and remove the rest; returns what was brought back.

    A checkpoint that was whole but not yet renamed gets its name; so does the one that it was to replace, where the
    new one is not whole.
    """
    remove_leftovers(output_dir)
    brought_back, hidden = [], []
    for path in output_dir.iterdir() if output_dir.is_dir() else ():
        match = _HIDDEN.fullmatch(path.name)
        if match and path.is_dir():
            hidden.append((match[2], match[1], path))
    for kind, name, path in sorted(hidden, key=lambda entry: entry[:2]):  # partial before replaced
        final = output_dir / name
        if kind != "removed" and not final.exists() and find_damage(path) is None:
            os.replace(path, final)
            brought_back.append(name)
        else:
            remove_tree(path)
    return brought_back


def put_in_place(partial: Path, final: Path) -> None:
    """Give a whole new checkpoint its name; at every moment the old or the new one can be found by `recover`."""
    if final.exists():
        replaced = final.with_name(f".{final.name}.replaced-{uuid.uuid4().hex[:12]}")
        os.replace(final, replaced)
        os.replace(partial, final)
        remove_tree(replaced)
    else:
        os.replace(partial, final)
    sync_path(final.parent)


# ---------------------------------------------------------------------------------------------------------------------
# Which one to resume from, which ones go


def find_checkpoint(output_dir: Path, name: str, set_aside: bool = True) -> tuple[Path | None, list[str]]:
    """The folder that a resume from `name` means, and notes on what was passed over.

    'latest' is the whole checkpoint of `output_dir` that was written last, None if there is none; damaged newer ones
    are renamed to `checkpoint-N.damaged` (if `set_aside`) and named in the notes. Anything else is a folder: as given,
    or in `output_dir`.

    Raises:
        UserError: a checkpoint asked for by name does not exist or is damaged.
        CheckpointError: it is of a newer kit.
    """
    if name == "latest":
        notes = []
        for folder in reversed([checkpoint.folder for checkpoint in all_checkpoints(output_dir)]):
            damage = find_damage(folder)
            if damage is None:
                read_state(folder)
                return folder, notes
            kept = _free_name(folder.with_name(folder.name + ".damaged")) if set_aside else folder
            if set_aside:
                os.replace(folder, kept)
            notes.append(f"{folder.name} is damaged ({damage}); skipped and kept as {kept.name}")
        return None, notes
    folder = next((path for path in (Path(name), output_dir / name) if path.is_dir()), None)
    there = ", ".join(path.name for _, path in list_checkpoints(output_dir)) or "none"
    if folder is None:
        reason = f"no such folder, neither as given nor in {output_dir}. Checkpoints there: {there}"
        raise UserError(Problem("resume_from_checkpoint", name, reason, "Use one of them or 'latest'."))
    damage = find_damage(folder)
    if damage is not None:
        reason = f"{folder} is not a whole checkpoint: {damage}. Checkpoints in {output_dir}: {there}"
        remedy = "Use another one or 'latest', which skips damaged ones."
        raise UserError(Problem("resume_from_checkpoint", name, reason, remedy))
    read_state(folder)
    return folder, []


def folder_problems(output_dir: Path, resume: str | None, overwrite: bool) -> list[Problem]:
    """Why a run may not begin in this output folder: a fresh start where checkpoints or results of another run lie."""
    there = all_checkpoints(output_dir)
    results = [name for name in RESULTS if (output_dir / name).exists()]
    if resume is not None and overwrite:
        reason = f"it sets the old run aside, and {setting('resume_from_checkpoint')} goes on from it"
        return [Problem("overwrite_output_dir", None, reason, "Give one of them.")]
    elsewhere = resume not in (None, "latest") and Path(resume).is_dir()
    if elsewhere and Path(resume).resolve().parent == output_dir.resolve():
        elsewhere = False
    if overwrite or not (there or results) or (resume is not None and not elsewhere):
        return []  # "latest" where only results are: is_finished tells, once the run's length is known
    start = f"{resume} lies elsewhere, and the folder" if elsewhere else "this is a fresh start, and the folder"
    aside = f"choose another {setting('output_dir')}, or set them aside in a subfolder with"
    aside += f" {setting('overwrite_output_dir')}."
    if there:
        names = ", ".join(checkpoint.folder.name for checkpoint in there[-4:])
        reason = f"{start} holds {len(there)} checkpoint(s) of an earlier run ({names})"
        remedy = f"Go on from them with {setting('resume_from_checkpoint')}=latest, {aside}"
    else:
        reason = f"{start} holds results of an earlier run ({', '.join(results)}) and no checkpoint to go on from"
        remedy = aside[0].upper() + aside[1:]
    return [Problem("output_dir", output_dir, reason, remedy)]


def _free_name(path: Path) -> Path:
    while path.exists():
        path = path.with_name(path.name + "_")
    return path


def set_run_aside(output_dir: Path) -> Path | None:
    """Move what an earlier run wrote into `previous-<date>-<run id>`, but for encodings; None if there was nothing.

    A run without a checkpoint has no id to tell: the time of day stands there then.
    """
    there = all_checkpoints(output_dir)
    moved = [checkpoint.folder for checkpoint in there]
    moved += [output_dir / name for name in RUN_FILES if (output_dir / name).exists()]
    if not moved:
        return None
    whose = there[-1].run_id if there else None
    return _move(output_dir, "previous", whose, moved)


def set_later_aside(output_dir: Path, resumed: Path) -> Path | None:
    """Going back to an older checkpoint: move the ones written after it into `later-<date>-<run id>`.

    They belong to a way that the run leaves now, and would count as newer than what it writes next.
    """
    there = all_checkpoints(output_dir)
    chosen = next((c for c in there if c.folder.resolve() == resumed.resolve()), None)
    if chosen is None:
        return None
    later = [c.folder for c in there if c.order > chosen.order]
    return _move(output_dir, "later", chosen.run_id, later) if later else None


def _move(output_dir: Path, why: str, run_id: str | None, paths: Sequence[Path]) -> Path:
    whose = re.sub(r"[^A-Za-z0-9]+", "-", run_id or time.strftime("%H%M%S"))[:8].strip("-")
    target = _free_name(output_dir / f"{why}-{time.strftime('%Y-%m-%d')}-{whose}")
    target.mkdir()
    for path in paths:
        os.replace(path, target / path.name)
    sync_path(output_dir)
    return target


def prune_checkpoints(output_dir: Path, keep: int | None, run_id: str, newest: Path) -> list[str]:
    """Remove this run's oldest checkpoints so that `keep` remain; never `newest`, never another run's.

    Returns the names of the removed ones. One that cannot be removed whole (open files on a network file system) is
    hidden, and removed at the next start.
    """
    if keep is None:
        return []
    mine = [c.folder for c in all_checkpoints(output_dir) if c.run_id == run_id and c.folder != newest]
    removed = []
    for folder in mine[: max(len(mine) - (keep - 1), 0)]:
        # Renamed first: a kill halfway through the removal must not leave half a checkpoint under a checkpoint's name.
        doomed = folder.with_name(f".{folder.name}.removed-{uuid.uuid4().hex[:12]}")
        os.replace(folder, doomed)
        remove_tree(doomed)
        removed.append(folder.name)
    return removed
