"""Fixtures: a tiny real SANA pipeline and small image sets, made once per session; `helpers` has the functions.

pytest.ini puts the kit, tests/ and tests/helpers/ on the Python path: `import tiny`, `from helpers import same`.
"""

import gc
import os
import shutil

import pytest
import tiny
from helpers import KIT, launch, script_environment

__all__ = ["KIT", "launch", "script_environment"]

gc.disable()  # looking for garbage is a quarter of the time that importing takes; on again once all is collected


def keep_what_is_there():
    """What has been imported is no garbage: runs in this process look for theirs often, up to half a second each."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish(session):
    keep_what_is_there()
    gc.enable()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a complete tiny SanaPipeline (see tiny.make_tiny_pipeline)."""
    folder = tiny.make_tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny-sana")
    keep_what_is_there()  # diffusers and transformers import the classes of models when they are asked for
    return folder


@pytest.fixture(scope="session")
def tiny_sprint(tmp_path_factory):
    """Folder of a complete tiny SanaSprintPipeline."""
    return tiny.make_tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny-sprint", sprint=True, sample_size=32)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Six images with a caption file each."""
    return tiny.write_image_folder(tmp_path_factory.mktemp("images") / "folder")


@pytest.fixture(scope="session")
def parquet_dataset(tmp_path_factory):
    """The same six in the pokemon-blip-captions layout."""
    return tiny.write_parquet_dataset(tmp_path_factory.mktemp("data") / "pokemon")


@pytest.fixture(scope="session")
def run_script():
    """The function `launch`."""
    return launch


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium found: install Debian's chromium, or set CHROMIUM=path")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the playwright package")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()
