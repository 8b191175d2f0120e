"""diffusers' own test file of this trainer, run against ours: SANA_DIFFUSERS_CHECKOUT names a checkout of it."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from helpers import KIT, script_environment

TEST = "examples/dreambooth/test_dreambooth_lora_sana.py"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_diffusers_own_tests_pass(tiny_model, image_folder, tmp_path):
    checkout = os.environ.get("SANA_DIFFUSERS_CHECKOUT")
    if not checkout:
        pytest.skip("SANA_DIFFUSERS_CHECKOUT names no checkout of diffusers")
    command = ["git", "-C", checkout, "archive", "HEAD", TEST, "examples/test_examples_utils.py"]
    with tarfile.open(fileobj=io.BytesIO(subprocess.run(command, capture_output=True, check=True).stdout)) as archive:
        archive.extractall(tmp_path)
    path, text = tmp_path / TEST, (tmp_path / TEST).read_text()
    for old, new in {
        "hf-internal-testing/tiny-sana-pipe": str(tiny_model),
        "examples/dreambooth/train_dreambooth_lora_sana.py": str(KIT / "train_dreambooth_lora_sana.py"),
        "docs/source/en/imgs": str(image_folder),
    }.items():
        assert old in text, old
        text = text.replace(f'"{old}"', f'"{new}"')
    path.write_text(text)
    environment = {**script_environment(), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path.name],
        cwd=path.parent, env=environment, capture_output=True, text=True, timeout=1100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert "6 passed" in done.stdout
