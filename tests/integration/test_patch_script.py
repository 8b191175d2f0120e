"""patch_sana.py as a script and as a file copied alone.

python -m pytest tests/integration/test_patch_script.py
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from helpers.upstream import FAKE_TRAINER, TRAINER

import patch_sana


def contents(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mode) for path in sorted(folder.iterdir()) if path.is_file()}


def fake_trainer(tmp_path):
    folder = tmp_path / "dreambooth"
    folder.mkdir()
    return Path(shutil.copy(FAKE_TRAINER, folder / TRAINER))


def test_importing_the_file_is_light_and_needs_nothing_else_of_the_kit(tmp_path):
    shutil.copy(patch_sana.__file__, tmp_path)
    code = "import sys, patch_sana; print([m for m in ('torch', 'peft', 'diffusers', 'sana_kit') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_patch_run_from_beside_the_trainer_and_through_a_link(tmp_path):
    trainer = fake_trainer(tmp_path)
    beside = trainer.parent / "patch_sana.py"
    shutil.copy(patch_sana.__file__, beside)
    kit = {**os.environ, "PYTHONPATH": str(Path(patch_sana.__file__).parent)}  # a copied kit has sana_kit beside it
    link = tmp_path / "link.py"
    link.symlink_to(trainer)
    before = contents(trainer.parent)
    for flags, code in (([], 0), ([], 0), (["--revert"], 0), (["--revert"], 1)):
        done = subprocess.run([sys.executable, beside, link, *flags], capture_output=True, text=True, env=kit)
        assert done.returncode == code, done.stderr
    assert link.is_symlink()
    assert contents(trainer.parent) == before


def test_the_file_alone_says_what_it_lacks(tmp_path):
    trainer = fake_trainer(tmp_path)
    before = contents(trainer.parent)
    alone = tmp_path / "alone" / "patch_sana.py"
    alone.parent.mkdir()
    shutil.copy(patch_sana.__file__, alone)
    for words in ([trainer], ["--help"]):
        done = subprocess.run([sys.executable, "-I", alone, *words], capture_output=True, text=True)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert f"there is no such file beside {alone}" in done.stderr and "sana_kit" in done.stderr
        assert "The hooks in this file need nothing else." in done.stderr
    assert contents(trainer.parent) == before
