"""diffusers' trainer for the tests of the patch: our stand-in for it, and its own source from a checkout."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

TRAINER = "train_dreambooth_lora_sana.py"
FAKE_TRAINER = Path(__file__).with_name("fake_upstream_trainer.py")
REFERENCE_COMMIT = "cd0a4a82cf8625b96e2889afee2fce5811b35c05"


def upstream_source(commit: str) -> bytes:
    """The source of diffusers' trainer at a commit of the checkout SANA_DIFFUSERS_CHECKOUT; skips without one."""
    checkout = os.environ.get("SANA_DIFFUSERS_CHECKOUT")
    if not checkout:
        pytest.skip("SANA_DIFFUSERS_CHECKOUT is not set: give the path of a git checkout of huggingface/diffusers")
    path = f"{commit}:examples/dreambooth/{TRAINER}"
    show = subprocess.run(["git", "-C", checkout, "show", path], capture_output=True)
    if show.returncode:
        pytest.fail(f"git show in SANA_DIFFUSERS_CHECKOUT={checkout}: {show.stderr.decode()}")
    return show.stdout
