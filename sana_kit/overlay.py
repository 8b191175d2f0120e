"""Copy the kit over a diffusers checkout's examples/dreambooth, and take it back.

    python -m sana_kit.overlay PATH/diffusers              copy; what is replaced is kept
    python -m sana_kit.overlay PATH/diffusers --dry-run    say what would be done
    python -m sana_kit.overlay PATH/diffusers --undo       restore what was there before

The originals and the hash of every file that was laid stand in examples/dreambooth/.sana_kit_overlay, so nothing that
was changed in between is lost unseen. `cp -r KIT/* PATH/diffusers/examples/dreambooth/` works as well; git undoes it.
"""

from __future__ import annotations

import collections
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sana_kit.files import file_sha256, write_atomic
from sana_kit.flags import Parser

KIT = Path(__file__).resolve().parent.parent
TARGET = Path("examples") / "dreambooth"
RECORD = ".sana_kit_overlay"
# Never part of the kit: environments, caches, hidden folders, and what runs or downloads left beside it.
_SKIPPED_FOLDERS = {"venv", "__pycache__", "node_modules", "wandb"}
_SKIPPED_TOP_FOLDERS = {"output", "infer_result", "quickstart_output", "playground", "logs", "runs"}
_SKIPPED_SUFFIXES = {".pyc", ".pyo", ".log", ".tmp", ".swp"}
_USERS_MARKS = ("train_log.jsonl", "summary.json", "manifest.jsonl", "model_index.json")
_KIT_MARKS = ("train_dreambooth_lora_sana.py", "patch_sana.py", "sana_kit/devices.py")
_DIFFUSERS_MARKS = ("src/diffusers/__init__.py", "setup.py", "examples/dreambooth")


def kit_files(kit: str | os.PathLike = KIT) -> list[Path]:
    """The files of the kit, relative to its folder and sorted: no hidden ones, environments, caches, outputs.

    What the kit's own git checkout ignores is left out too. Links are followed where they stay inside the kit.
    """
    kit = Path(kit).resolve()

    def is_kits(folder: Path) -> bool:
        if folder.name in _SKIPPED_FOLDERS or folder.name.startswith(".") or (folder / "pyvenv.cfg").is_file():
            return False
        outputs = folder.name in _SKIPPED_TOP_FOLDERS or any((folder / mark).is_file() for mark in _USERS_MARKS)
        return not (folder.parent == kit and outputs)

    found = []
    for here, folders, files in os.walk(kit):
        folders[:] = sorted(name for name in folders if is_kits(Path(here, name)))
        for path in (Path(here, name) for name in files):
            hidden = path.parent == kit and path.name.startswith(".")
            outside = path.is_symlink() and not path.resolve().is_relative_to(kit)
            if path.is_file() and path.suffix not in _SKIPPED_SUFFIXES and not hidden and not outside:
                found.append(path.relative_to(kit))
    ignored = _ignored_by_git(kit, found)
    return sorted(name for name in found if name not in ignored)


def _ignored_by_git(kit: Path, names: list[Path]) -> set[Path]:
    """Those of `names` that the kit's own git checkout ignores; none where it is no checkout or git is missing."""
    if not (kit / ".git").exists() or shutil.which("git") is None:
        return set()
    asked = "\0".join(map(str, names)).encode()
    answer = subprocess.run(["git", "check-ignore", "--stdin", "-z"], cwd=kit, input=asked, capture_output=True)
    return {Path(name) for name in answer.stdout.decode().split("\0") if name}


def _target(diffusers: Path) -> Path:
    """examples/dreambooth of a diffusers checkout.

    Raises:
        ValueError: the folder is missing or is no diffusers checkout; the message names what it lacks.
    """
    if not diffusers.is_dir():
        raise ValueError(f"{diffusers}: no such folder. Name a diffusers checkout (clone huggingface/diffusers).")
    missing = [mark for mark in _DIFFUSERS_MARKS if not (diffusers / mark).exists()]
    if missing:
        remedy = "Release archives and installed packages carry no examples: clone huggingface/diffusers."
        raise ValueError(f"{diffusers}: not a diffusers checkout, it lacks {', '.join(missing)}. {remedy}")
    return (diffusers / TARGET).resolve()


def _read_record(target: Path) -> dict | None:
    """{"files": {name: {"original": hash or None, "laid": hashes}}, "folders": made}, None without an overlay."""
    path = target / RECORD / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _save_record(target: Path, record: dict) -> None:
    text = json.dumps(record, indent=1, sort_keys=True)
    write_atomic(target / RECORD / "manifest.json", lambda file: file.write(text.encode()))


def _copy(source: Path, target: Path) -> None:
    """Copy content and mode so that `target` is never half-written."""
    write_atomic(target, lambda file: file.write(source.read_bytes()), mode_of=source)


def _hash(path: Path) -> str | None:
    return file_sha256(path) if path.is_file() else None


def _is_users(target: Path, name: str, entry: dict) -> bool:
    """Whether somebody changed a laid file since."""
    return _hash(target / name) not in (None, entry["original"], *entry["laid"])


def _check_install(target: Path, kit: Path, files: list[Path], known: dict) -> None:
    """Raise ValueError for whatever keeps the kit from being laid; nothing was touched yet."""
    missing = [mark for mark in _KIT_MARKS if not (kit / mark).is_file()]
    if missing:
        raise ValueError(f"{kit}: not the kit's folder, it lacks {', '.join(missing)}.")
    if target == kit or kit.is_relative_to(target):
        raise ValueError(f"{target}: this copy of the kit lies there itself; run the command from the kit's folder.")
    changed = [n for n, e in known.items() if _is_users(target, n, e) and _hash(target / n) != _hash(kit / n)]
    if changed:
        remedy = "Copy your changes into the kit; or run `--undo` first, which keeps each of them as NAME.changed."
        raise ValueError(f"{target}: changed since the overlay was laid: {', '.join(changed)}. {remedy}")
    blocked = [str(name) for name in files if (target / name).is_dir()]
    blocked += [str(name) for name in files if any((target / p).is_file() for p in list(name.parents)[:-1])]
    if blocked:
        raise ValueError(f"{target}: a folder stands where the kit has a file, or the reverse: {', '.join(blocked)}.")


def install(diffusers: str | os.PathLike, *, kit: str | os.PathLike = KIT, dry_run: bool = False) -> dict[str, str]:
    """Copy the kit over examples/dreambooth; returns {file: what was done with it}.

    "added"; "replaced": a file of diffusers', which is kept; "updated": one of an earlier overlay; "removed": one that
    the kit has no more; "unchanged". Running it again is safe and keeps the first originals.

    Raises:
        ValueError: not a diffusers checkout, not the kit, or a file of an earlier overlay was changed since.
    """
    kit, target = Path(kit).resolve(), _target(Path(diffusers))
    record = _read_record(target) or {"files": {}, "folders": []}
    known, files, done = record["files"], kit_files(kit), {}
    _check_install(target, kit, files, known)
    # First all originals and the record, then the copies: an interruption at any point can be undone or gone on with.
    for name in map(str, files):
        there, now = _hash(target / name), file_sha256(kit / name)
        if there == now:
            done[name] = "unchanged"
        elif there is None:
            done[name] = "added"
        else:
            done[name] = "updated" if name in known else "replaced"
        if name not in known and there is not None and not dry_run:
            _copy(target / name, target / RECORD / "backup" / name)
        entry = known.setdefault(name, {"original": there, "laid": []})
        entry["laid"] = sorted({*entry["laid"], now})
    made = {str(parent) for name in files for parent in list(name.parents)[:-1] if not (target / parent).exists()}
    record["folders"] = sorted({*record["folders"], *made})
    stale = [name for name in known if Path(name) not in files]
    done.update(dict.fromkeys(stale, "removed"))
    if dry_run:
        return done
    _save_record(target, record)
    for name in map(str, files):
        if done[name] != "unchanged":
            _copy(kit / name, target / name)
    for name in stale:
        _restore(target, name, known.pop(name))
    _save_record(target, record)
    return done


def _restore(target: Path, name: str, entry: dict) -> None:
    """Put back the original of one file, or take the kit's away where there was none."""
    if entry["original"] is None:
        (target / name).unlink(missing_ok=True)
    else:
        _copy(target / RECORD / "backup" / name, target / name)


def undo(diffusers: str | os.PathLike, *, dry_run: bool = False) -> dict[str, str]:
    """Take the overlay back; returns {file: "restored", "removed", "unchanged", "already gone", or where it is kept}.

    Files that were changed after the overlay was laid are not lost: the changed one stays as NAME.changed.

    Raises:
        ValueError: no diffusers checkout, no overlay in it, or a kept original is damaged.
    """
    target = _target(Path(diffusers))
    record = _read_record(target)
    if record is None:
        raise ValueError(f"{target}: no overlay of this kit is there (no {RECORD}/manifest.json).")
    for name, entry in record["files"].items():
        backup = target / RECORD / "backup" / name
        if _hash(backup) != entry["original"]:
            raise ValueError(f"{backup}: the kept original is missing or damaged; restore it with `git checkout`.")
    done = {}
    for name, entry in record["files"].items():
        there, now = target / name, _hash(target / name)
        if now is not None and now == entry["original"]:
            done[name] = "unchanged"
            continue
        if _is_users(target, name, entry):
            done[name] = f"kept as {there.name}.changed"
            if not dry_run:
                os.replace(there, there.with_name(f"{there.name}.changed"))
        elif entry["original"] is not None:
            done[name] = "restored"
        else:
            done[name] = "removed" if now is not None else "already gone"
        if not dry_run:
            _restore(target, name, entry)
    if not dry_run:
        _tidy(target, record)
    return done


def _tidy(target: Path, record: dict) -> None:
    """Remove what the overlay and running the kit from there left: folders, compiled modules, the record."""
    for name, entry in record["files"].items():
        if entry["original"] is None and name.endswith(".py"):
            for cached in (target / name).parent.glob(f"__pycache__/{Path(name).stem}.*.pyc"):
                cached.unlink()
    folders = [*record["folders"], "."]
    for folder in sorted((target / name for name in folders), key=lambda path: len(path.parts), reverse=True):
        for empty in (folder / "__pycache__", folder):
            if empty.is_dir() and not any(empty.iterdir()):
                empty.rmdir()
    shutil.rmtree(target / RECORD)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m sana_kit.overlay", description=__doc__.splitlines()[0])
    parser.add_argument("diffusers", help="a diffusers checkout")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    parser.add_argument("--undo", action="store_true", help="restore what was there before")
    options = parser.parse_args(arguments)
    try:
        done = (undo if options.undo else install)(options.diffusers, dry_run=options.dry_run)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lines: collections.Counter = collections.Counter()
    for name, what in done.items():
        if what in ("added", "removed") and "/" in name:  # whole folders in one line
            lines[what, name.split("/")[0] + "/"] += 1
        elif what != "unchanged":
            lines[what, name] += 1
    for (what, name), count in sorted(lines.items()):
        print(f"{what:>10}  {name}" + (f" ({count} files)" if name.endswith("/") else ""))
    total = ", ".join(f"{count} {kind}" for kind, count in sorted(collections.Counter(done.values()).items()))
    place = Path(options.diffusers) / TARGET
    print(f"{'Would change' if options.dry_run else 'Done in'} {place}: {total or 'nothing to do'}.")
    if not options.undo and not options.dry_run:
        print(f"Originals are kept in {place / RECORD}; `--undo` restores them.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
