"""The overlay over a diffusers checkout: laid, laid again, undone byte for byte, and refused where it should be.

Run: pytest tests/docs/test_overlay.py. A small stand-in for the checkout serves; with
SANA_DIFFUSERS_CHECKOUT=PATH the scripts run from a copy of a real one.
"""

import hashlib
import io
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from sana_kit import overlay

ROOT = Path(__file__).parents[2]


def snapshot(folder):
    """{relative path: (content hash, executable)} of every file, and None for every folder."""
    return {
        str(path.relative_to(folder)): None
        if path.is_dir()
        else (hashlib.sha256(path.read_bytes()).hexdigest(), bool(path.stat().st_mode & stat.S_IXUSR))
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def checkout(tmp_path):
    """A diffusers checkout as far as the overlay looks at it."""
    folder = tmp_path / "diffusers"
    examples = folder / "examples" / "dreambooth"
    examples.mkdir(parents=True)
    (folder / "src" / "diffusers").mkdir(parents=True)
    (folder / "src" / "diffusers" / "__init__.py").write_text("")
    (folder / "setup.py").write_text("")
    (examples / "train_dreambooth_lora_sana.py").write_bytes(b"# diffusers' own trainer\r\n\xff")
    (examples / "requirements_sana.txt").write_text("accelerate>=1.0.0\n")
    (examples / "README.md").write_text("# DreamBooth\n")
    (examples / "train_dreambooth.py").write_text("# another trainer\n")
    (examples / "train_dreambooth_lora_sana.py").chmod(0o755)
    return folder


@pytest.fixture
def kit(tmp_path):
    """A small kit with everything around it that must not be copied."""
    folder = tmp_path / "kit"
    for name in (
        *("train_dreambooth_lora_sana.py", "patch_sana.py", "requirements_sana.txt", "README.md", "run.sh"),
        *("sana_kit/__init__.py", "sana_kit/devices.py", "sana_kit/assets/manifest.jsonl", "tests/test_x.py"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the kit's {name}\n")
    (folder / "run.sh").chmod(0o755)
    for name in (
        *(".git/config", ".venv/bin/python", "env/pyvenv.cfg", "env/lib/x.py", "sana_kit/__pycache__/devices.pyc"),
        *("output/pytorch_lora_weights.safetensors", "my_run/train_log.jsonl", "my_run/report.html", "run.log"),
        *("images_made/manifest.jsonl", "images_made/a.png", "a_model/model_index.json", ".gitignore"),
        *(".pytest_cache/x", ".report_cache/y.webp", "tests/.ruff_cache/z"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not the kit's")
    outside = tmp_path / "outside.txt"
    outside.write_text("secret")
    (folder / "link.txt").symlink_to(outside)
    return folder


def test_only_the_kit_itself_is_copied(kit):
    assert [str(name) for name in overlay.kit_files(kit)] == [
        "README.md",
        "patch_sana.py",
        "requirements_sana.txt",
        "run.sh",
        "sana_kit/__init__.py",
        "sana_kit/assets/manifest.jsonl",
        "sana_kit/devices.py",
        "tests/test_x.py",
        "train_dreambooth_lora_sana.py",
    ]


def test_every_tracked_file_of_this_kit_is_copied():
    """Nothing that belongs to the kit is lost by the rules of what to skip."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the kit's own git checkout to know which files are the kit's")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    tracked = {name for name in tracked if name and (ROOT / name).is_file()}
    missing = tracked - {str(name) for name in overlay.kit_files(ROOT)}
    assert {name for name in missing if not name.startswith(".")} == set()


def test_what_git_ignores_is_not_copied(kit):
    shutil.rmtree(kit / ".git")
    (kit / ".gitignore").write_text("*.bin\n")
    (kit / "tests" / ".gitignore").write_text("/build/\n")
    for name in ("sana_kit/a.bin", "tests/build/x.py"):
        (kit / name).parent.mkdir(exist_ok=True)
        (kit / name).write_text("")
    names = {"sana_kit/a.bin", "tests/build/x.py"}
    assert names <= {str(name) for name in overlay.kit_files(kit)}  # without git nobody says that they are ignored
    subprocess.run(["git", "init", "-q"], cwd=kit, check=True)
    found = {str(name) for name in overlay.kit_files(kit)}
    assert not names & found and "sana_kit/devices.py" in found


def test_lay_and_undo_leave_the_checkout_as_it_was(checkout, kit):
    before, target = snapshot(checkout), checkout / "examples" / "dreambooth"
    planned = overlay.install(checkout, kit=kit, dry_run=True)
    assert snapshot(checkout) == before
    done = overlay.install(checkout, kit=kit)
    assert done == planned
    assert done["train_dreambooth_lora_sana.py"] == "replaced" and done["patch_sana.py"] == "added"
    for name in overlay.kit_files(kit):
        assert (target / name).read_bytes() == (kit / name).read_bytes()
    assert os.access(target / "run.sh", os.X_OK)
    assert (target / "train_dreambooth.py").read_text() == "# another trainer\n"
    laid = snapshot(checkout)
    assert set(overlay.undo(checkout, dry_run=True).values()) == {"restored", "removed"}
    assert snapshot(checkout) == laid
    (target / "sana_kit" / "__pycache__").mkdir()  # as running the scripts from there leaves them
    (target / "sana_kit" / "__pycache__" / "devices.cpython-311.pyc").write_bytes(b"x")
    (target / "__pycache__").mkdir()
    (target / "__pycache__" / "patch_sana.cpython-311.pyc").write_bytes(b"x")
    overlay.undo(checkout)
    assert snapshot(checkout) == before


def test_laying_again_updates_and_keeps_the_first_backup(checkout, kit):
    before = snapshot(checkout)
    overlay.install(checkout, kit=kit)
    assert set(overlay.install(checkout, kit=kit).values()) == {"unchanged"}
    (kit / "patch_sana.py").write_text("a newer version\n")
    (kit / "run.sh").unlink()
    (kit / "sana_kit" / "new.py").write_text("new\n")
    done = overlay.install(checkout, kit=kit)
    assert {name: what for name, what in done.items() if what != "unchanged"} == {
        "patch_sana.py": "updated",
        "run.sh": "removed",
        "sana_kit/new.py": "added",
    }
    assert not (checkout / "examples" / "dreambooth" / "run.sh").exists()
    overlay.undo(checkout)
    assert snapshot(checkout) == before


def test_a_users_changes_are_never_lost(checkout, kit):
    overlay.install(checkout, kit=kit)
    target = checkout / "examples" / "dreambooth"
    (target / "patch_sana.py").write_text("my own change\n")
    (target / "sana_kit" / "mine.py").write_text("my own file\n")
    with pytest.raises(ValueError, match="changed since the overlay was laid: patch_sana.py"):
        overlay.install(checkout, kit=kit)
    assert overlay.undo(checkout)["patch_sana.py"] == "kept as patch_sana.py.changed"
    assert (target / "patch_sana.py.changed").read_text() == "my own change\n"
    assert not (target / "patch_sana.py").exists()
    assert [path.name for path in (target / "sana_kit").iterdir()] == ["mine.py"]
    assert (target / "train_dreambooth_lora_sana.py").read_bytes() == b"# diffusers' own trainer\r\n\xff"


@pytest.mark.parametrize("copies_before_the_fault", [0, 1, 4, 10])
def test_an_interrupted_overlay_can_be_undone_or_finished(checkout, kit, monkeypatch, copies_before_the_fault):
    before, real, count = snapshot(checkout), overlay._copy, [0]

    def failing(source, target):
        if count[0] == copies_before_the_fault:
            raise OSError(28, "No space left on device")
        count[0] += 1
        real(source, target)

    monkeypatch.setattr(overlay, "_copy", failing)
    with pytest.raises(OSError):
        overlay.install(checkout, kit=kit)
    monkeypatch.setattr(overlay, "_copy", real)
    target = checkout / "examples" / "dreambooth"
    if (target / overlay.RECORD / "manifest.json").is_file():
        saved = shutil.copytree(checkout, checkout.with_name("second"))
        overlay.undo(saved)
        assert snapshot(saved) == before
    else:  # nothing had been laid yet
        assert (target / "README.md").read_text() == "# DreamBooth\n"
    overlay.install(checkout, kit=kit)
    assert (target / "README.md").read_text() == "the kit's README.md\n"
    overlay.undo(checkout)
    assert snapshot(checkout) == before


def test_a_damaged_backup_is_told_before_anything_is_touched(checkout, kit):
    overlay.install(checkout, kit=kit)
    backup = checkout / "examples" / "dreambooth" / overlay.RECORD / "backup" / "README.md"
    backup.write_text("damaged")
    laid = snapshot(checkout)
    with pytest.raises(ValueError, match="README.md: the kept original is missing or damaged"):
        overlay.undo(checkout)
    assert snapshot(checkout) == laid


def test_what_it_refuses(checkout, kit, tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        overlay.install(tmp_path / "nowhere", kit=kit)
    with pytest.raises(ValueError, match="not a diffusers checkout, it lacks src/diffusers/__init__.py, setup.py"):
        overlay.install(kit, kit=kit)
    with pytest.raises(ValueError, match="not the kit's folder, it lacks train_dreambooth_lora_sana.py"):
        overlay.install(checkout, kit=tmp_path)
    with pytest.raises(ValueError, match="no overlay of this kit"):
        overlay.undo(checkout)
    (checkout / "examples" / "dreambooth" / "run.sh").mkdir()
    before = snapshot(checkout)
    with pytest.raises(ValueError, match="a folder stands where the kit has a file, or the reverse: run.sh"):
        overlay.install(checkout, kit=kit)
    (checkout / "examples" / "dreambooth" / "run.sh").rmdir()
    (checkout / "examples" / "dreambooth" / "sana_kit").write_text("a file")
    with pytest.raises(ValueError, match="sana_kit/devices.py"):
        overlay.install(checkout, kit=kit)
    (checkout / "examples" / "dreambooth" / "sana_kit").unlink()
    (checkout / "examples" / "dreambooth" / "run.sh").mkdir()
    assert snapshot(checkout) == before
    with pytest.raises(ValueError, match="lies there itself"):
        overlay.install(checkout, kit=_lay_by_hand(kit, checkout))


def _lay_by_hand(kit, checkout):
    target = checkout / "examples" / "dreambooth"
    (target / "run.sh").rmdir()
    shutil.copytree(kit, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("link.txt"))
    return target


@pytest.mark.parametrize("way", ["overlay", "cp -r"])
def test_the_scripts_run_from_there(checkout, tmp_path, way):
    """The real kit, laid by command or by cp, finds its own modules from examples/dreambooth."""
    if os.environ.get("SANA_DIFFUSERS_CHECKOUT"):  # a real one, or a bare repository: its examples and what marks it
        shutil.rmtree(checkout)
        checkout.mkdir()
        parts = ["examples/dreambooth", "src/diffusers/__init__.py", "setup.py"]
        command = ["git", "-C", os.environ["SANA_DIFFUSERS_CHECKOUT"], "archive", "HEAD", *parts]
        packed = subprocess.run(command, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(checkout)
    before, target = snapshot(checkout), checkout / "examples" / "dreambooth"
    run = {"capture_output": True, "text": True, "timeout": 300}
    if way == "overlay":
        done = subprocess.run([sys.executable, "-m", "sana_kit.overlay", str(checkout)], cwd=ROOT, **run)
        assert done.returncode == 0, done.stderr
        assert "replaced  train_dreambooth_lora_sana.py" in done.stdout and "sana_kit/ (" in done.stdout
    else:
        names = sorted({name.parts[0] for name in overlay.kit_files(ROOT)})
        subprocess.run(["cp", "-r", *(str(ROOT / name) for name in names), str(target)], check=True)
    script = (
        "import sana_kit.reports, sys; print(sana_kit.reports.__file__); import patch_sana; print(patch_sana.__file__)"
    )
    found = subprocess.run([sys.executable, "-c", script], cwd=target, **run)
    assert found.returncode == 0, found.stderr
    assert all(Path(line).is_relative_to(target) for line in found.stdout.split())
    helped = subprocess.run([sys.executable, "train_dreambooth_lora_sana.py", "--help"], cwd=target, **run)
    assert helped.returncode == 0 and "--pretrained_model_name_or_path" in helped.stdout, helped.stderr
    if way == "overlay":
        undone = subprocess.run([sys.executable, "-m", "sana_kit.overlay", str(checkout), "--undo"], cwd=ROOT, **run)
        assert undone.returncode == 0, undone.stderr
        assert snapshot(checkout) == before


def test_command_line_tells_an_error_as_help(tmp_path, capsys):
    assert overlay.main([str(tmp_path)]) == 2
    assert "clone huggingface/diffusers" in capsys.readouterr().err
