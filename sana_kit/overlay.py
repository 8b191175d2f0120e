"""Copy the kit over a diffusers checkout, as the reference kit is installed, and take it back again byte for byte.

    python -m sana_kit.overlay PATH/diffusers               copies the kit over PATH/diffusers/examples/dreambooth
    python -m sana_kit.overlay PATH/diffusers --dry-run     says what it would do
    python -m sana_kit.overlay PATH/diffusers --undo        restores what was there before

Files that it replaces are kept in examples/dreambooth/.sana_kit_overlay beside a manifest with the hash of every file,
so nothing that was changed in between is lost unseen. `cp -r KIT/* PATH/diffusers/examples/dreambooth/` works as well,
but cannot be undone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sana_kit.files import file_sha256, write_atomic

KIT = Path(__file__).resolve().parent.parent
TARGET = Path("examples") / "dreambooth"
RECORD = ".sana_kit_overlay"
# Never part of the kit, wherever they lie: version control, environments, caches, what runs left behind.
_SKIPPED_FOLDERS = {
    ".git",
    ".ci",
    ".github",
    ".venv",
    "venv",
    "__pycache__",
    ".pytest_cache",
    ".ruff_cache",
    ".mypy_cache",
    ".report_cache",
    ".ipynb_checkpoints",
    "node_modules",
    "wandb",
    RECORD,
}
_SKIPPED_TOP_FOLDERS = {"output", "infer_result", "quickstart_output", "logs", "runs"}
_SKIPPED_SUFFIXES = {".pyc", ".pyo", ".log", ".tmp", ".swp"}
# What marks a folder as the kit's, and one as diffusers'.
_KIT_MARKS = ("train_dreambooth_lora_sana.py", "patch_sana.py", "sana_kit/devices.py")
_DIFFUSERS_MARKS = ("src/diffusers/__init__.py", "setup.py", "examples/dreambooth")


def _is_the_users(folder: Path) -> bool:
    """Whether a folder beside the kit's own is what a run wrote there, or a model put there."""
    marks = ("train_log.jsonl", "summary.json", "manifest.jsonl", "model_index.json")
    return any((folder / name).is_file() for name in marks)


def kit_files(kit: str | os.PathLike = KIT) -> list[Path]:
    """The files of the kit, relative to its folder and sorted: without version control, environments, caches, outputs.

    As `cp -r KIT/*` does, it takes no hidden file of the top folder; unlike it, nothing that git ignores.

    Links are followed where they stay inside the kit and left out elsewhere.
    """
    kit, found = Path(kit).resolve(), []
    for folder, folders, files in os.walk(kit):
        here = Path(folder)
        folders[:] = sorted(
            name
            for name in folders
            if name not in _SKIPPED_FOLDERS
            and not (here == kit and (name in _SKIPPED_TOP_FOLDERS or _is_the_users(here / name)))
            and not (here / name / "pyvenv.cfg").is_file()
        )
        for name in files:
            path = here / name
            if (here == kit and name.startswith(".")) or path.suffix in _SKIPPED_SUFFIXES or not path.is_file():
                continue
            if path.is_symlink() and not path.resolve().is_relative_to(kit):
                continue
            found.append(path.relative_to(kit))
    ignored = _ignored_by_git(kit, found)
    return sorted(name for name in found if name not in ignored)


def _ignored_by_git(kit: Path, names: list[Path]) -> set[Path]:
    """Those of `names` that the kit's own git checkout ignores (builds, downloads); none where it is no checkout."""
    if not (kit / ".git").exists() or shutil.which("git") is None:
        return set()
    asked = "\0".join(map(str, names)).encode()
    answer = subprocess.run(["git", "check-ignore", "--stdin", "-z"], cwd=kit, input=asked, capture_output=True)
    if answer.returncode not in (0, 1):  # 1: none is ignored
        reason = answer.stderr.decode(errors="replace").strip()
        print(f"warning: git cannot say what {kit} ignores, so builds in it are copied too: {reason}", file=sys.stderr)
        return set()
    return {Path(name) for name in answer.stdout.decode().split("\0") if name}


def _target(diffusers: Path) -> Path:
    """examples/dreambooth of a diffusers checkout.

    Raises:
        ValueError: the folder is missing or is no diffusers checkout; the message names what it lacks.
    """
    if not diffusers.is_dir():
        raise ValueError(
            f"{diffusers}: no such folder. Name a diffusers checkout (git clone of huggingface/diffusers)."
        )
    missing = [mark for mark in _DIFFUSERS_MARKS if not (diffusers / mark).exists()]
    if missing:
        raise ValueError(
            f"{diffusers}: not a diffusers checkout, it lacks {', '.join(missing)}. Release archives and installed"
            " packages carry no examples: clone huggingface/diffusers."
        )
    return (diffusers / TARGET).resolve()


def _read_record(target: Path) -> dict | None:
    path = target / RECORD / "manifest.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(record["files"], dict)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{path}: damaged ({error}); the originals beside it in backup/ are whole.") from error
    return record


def _copy(source: Path, target: Path) -> None:
    """Copy content and mode so that `target` is never half-written."""
    target.parent.mkdir(parents=True, exist_ok=True)

    def write(file) -> None:
        with open(source, "rb") as original:
            shutil.copyfileobj(original, file)

    write_atomic(target, write)
    shutil.copymode(source, target)


def install(diffusers: str | os.PathLike, *, kit: str | os.PathLike = KIT, dry_run: bool = False) -> dict[str, str]:
    """Copy the kit over examples/dreambooth; returns {file: what was done with it}.

    "added"; "replaced": a file of diffusers', kept in the backup; "updated": one of an earlier overlay; "removed": one
    of an earlier overlay that the kit has no more; "unchanged". Running it again is safe and keeps the first backup.

    Args:
        diffusers: a diffusers checkout.
        kit: the kit's folder.
        dry_run: only say what would be done.

    Raises:
        ValueError: not a diffusers checkout, not the kit, or a file of an earlier overlay was changed since.
    """
    kit = Path(kit).resolve()
    missing = [mark for mark in _KIT_MARKS if not (kit / mark).is_file()]
    if missing:
        raise ValueError(f"{kit}: not the kit's folder, it lacks {', '.join(missing)}.")
    target = _target(Path(diffusers))
    if target == kit or kit.is_relative_to(target):
        raise ValueError(
            f"{target}: this copy of the kit lies there itself; run the command from the kit's own folder."
        )
    record = _read_record(target) or {"files": {}, "folders": []}
    known, done = record["files"], {}
    files = kit_files(kit)
    changed = []
    for name, entry in known.items():
        if (target / name).is_file() and (now := file_sha256(target / name)) not in (
            *entry["laid"],
            entry["original"],
        ):
            if not (kit / name).is_file() or file_sha256(kit / name) != now:
                changed.append(name)
    if changed:
        raise ValueError(
            f"{target}: changed since the overlay was laid: {', '.join(changed)}. Copy your changes into the kit; or"
            " run `--undo` first, which keeps each of them as NAME.changed."
        )
    blocked = [str(name) for name in files if (target / name).is_dir()]
    blocked += [str(name) for name in files if any((target / p).is_file() for p in list(name.parents)[:-1])]
    if blocked:
        raise ValueError(f"{target}: a folder stands where the kit has a file, or the reverse: {', '.join(blocked)}.")

    def save(state: str) -> None:
        if not dry_run:
            text = json.dumps({**record, "state": state}, indent=1, sort_keys=True)
            write_atomic(target / RECORD / "manifest.json", lambda file: file.write(text.encode()))

    # First the plan and all backups, then the copies: an interruption at any point can be undone or gone on with.
    for name in map(str, files):
        source, there = kit / name, target / name
        entry = known.get(name)
        installed = file_sha256(source)
        if entry is None:
            original = file_sha256(there) if there.is_file() else None
            if original is not None and not dry_run:
                _copy(there, target / RECORD / "backup" / name)
            entry = {"original": original, "laid": []}
            done[name] = "added" if original is None else "unchanged" if original == installed else "replaced"
        else:
            same = there.is_file() and file_sha256(there) == installed
            done[name] = "unchanged" if same else "updated" if there.is_file() else "added"
        known[name] = {**entry, "laid": sorted({*entry["laid"], installed})}
    for folder in sorted({str(parent) for name in files for parent in list(name.parents)[:-1]}):
        if not (target / folder).exists() and folder not in record["folders"]:
            record["folders"].append(folder)
    stale = [name for name in known if Path(name) not in files]
    save("laying")
    for name, what in done.items():
        if what != "unchanged" and not dry_run:
            _copy(kit / name, target / name)
    for name in stale:
        done[name] = "removed"
        if not dry_run:
            _restore(target, name, known[name])
            del known[name]
    save("laid")
    return done


def _remove_empty(folder: Path) -> None:
    """Remove a folder unless it is gone already or somebody's file is in it."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _restore(target: Path, name: str, entry: dict) -> None:
    """Put back the original of one file, or take the kit's away where there was none."""
    if entry["original"] is None:
        (target / name).unlink(missing_ok=True)
        return
    backup = target / RECORD / "backup" / name
    if not backup.is_file() or file_sha256(backup) != entry["original"]:
        raise ValueError(f"{backup}: the kept original is missing or damaged; restore it with `git checkout`.")
    _copy(backup, target / name)


def undo(diffusers: str | os.PathLike, *, dry_run: bool = False) -> dict[str, str]:
    """Take the overlay back; returns {file: "restored", "removed", "unchanged", "already gone", or where it is kept}.

    Files that were changed after the overlay was laid are not lost: the changed one stays as NAME.changed.

    Raises:
        ValueError: no diffusers checkout, or no overlay in it.
    """
    target = _target(Path(diffusers))
    record = _read_record(target)
    if record is None:
        raise ValueError(f"{target}: no overlay of this kit is there (no {RECORD}/manifest.json).")
    for name, entry in record["files"].items():
        backup = target / RECORD / "backup" / name
        if entry["original"] is not None and (not backup.is_file() or file_sha256(backup) != entry["original"]):
            raise ValueError(f"{backup}: the kept original is missing or damaged; restore it with `git checkout`.")
    done = {}
    for name, entry in record["files"].items():
        there = target / name
        now = file_sha256(there) if there.is_file() else None
        changed = now is not None and now not in (*entry["laid"], entry["original"])
        if now is not None and now == entry["original"]:
            done[name] = "unchanged"
            continue
        if changed:
            done[name] = f"kept as {there.name}.changed"
        elif entry["original"] is not None:
            done[name] = "restored"
        else:
            done[name] = "removed" if now is not None else "already gone"
        if dry_run:
            continue
        if changed:
            os.replace(there, there.with_name(f"{there.name}.changed"))
        _restore(target, name, entry)
    if not dry_run:
        for folder in sorted(record["folders"], key=len, reverse=True):
            cache = target / folder / "__pycache__"
            if cache.is_dir():
                shutil.rmtree(cache)  # of the kit's modules, made by running them from there
            _remove_empty(target / folder)
        for name, entry in record["files"].items():
            if entry["original"] is None and name.endswith(".py"):
                for cached in (target / name).parent.glob(f"__pycache__/{Path(name).stem}.*.pyc"):
                    cached.unlink()
        _remove_empty(target / "__pycache__")
        shutil.rmtree(target / RECORD)
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sana_kit.overlay", description=__doc__.splitlines()[0])
    parser.add_argument("diffusers", help="a diffusers checkout")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    parser.add_argument("--undo", action="store_true", help="restore what was there before")
    options = parser.parse_args(arguments)
    try:
        if options.undo:
            done = undo(options.diffusers, dry_run=options.dry_run)
        else:
            done = install(options.diffusers, dry_run=options.dry_run)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    target = Path(options.diffusers) / TARGET
    counts: dict[str, int] = {}
    for name, what in sorted(done.items()):
        kind = what if not what.startswith("kept") else "kept"
        counts[kind] = counts.get(kind, 0) + 1
        if what != "unchanged" and not (what in ("added", "removed") and "/" in name):
            print(f"{what:>10}  {name}")
    folders: dict[tuple[str, str], int] = {}
    for name, what in done.items():
        if what in ("added", "removed") and "/" in name:
            key = (what, name.split("/")[0])
            folders[key] = folders.get(key, 0) + 1
    for (what, folder), count in sorted(folders.items()):
        print(f"{what:>10}  {folder}/ ({count} files)")
    total = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    print(f"{'Would change' if options.dry_run else 'Done in'} {target}: {total or 'nothing to do'}.")
    if not options.undo and not options.dry_run:
        print(f"Originals are kept in {target / RECORD}; `--undo` restores them.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
