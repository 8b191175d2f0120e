"""Quantised drawing with the real libraries, in one process that has them; what cannot be is refused.

python -m pytest tests/distributed/test_quantize.py
The libraries are installed beside the environment, into the folder that SANA_QUANTIZE_LIBRARIES names or a temporary
one: within it they would make each import of diffusers slower, in every process of the suite.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from helpers import KIT, script_environment
from helpers.drawing import write_lora
from helpers.inferring import manifest

pytestmark = pytest.mark.slow

LIBRARIES = ("torchao==0.18.0", "bitsandbytes==0.50.2")


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    folder = os.environ.get("SANA_QUANTIZE_LIBRARIES")
    if folder:
        return Path(folder)
    target = tmp_path_factory.mktemp("libraries")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), *LIBRARIES]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{' '.join(LIBRARIES)} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return target


@pytest.fixture(scope="module")
def told(libraries, tmp_path_factory):
    """What the worker measured."""
    folder = tmp_path_factory.mktemp("quantized")
    model = tiny.make_tiny_pipeline(folder / "model", heads=8)
    lora = write_lora(model, folder / "lora")
    environment = script_environment()
    places = [environment["PYTHONPATH"], str(KIT / "tests"), str(KIT / "tests/helpers"), str(libraries)]
    done = subprocess.run(
        [sys.executable, str(KIT / "tests/distributed/workers/quantized.py"), model, lora, folder / "out"],
        env={**environment, "PYTHONPATH": os.pathsep.join(places)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {**json.loads((folder / "out/told.json").read_text()), "out": folder / "out"}


@pytest.mark.parametrize(("name", "layer", "text"), [("int8", 0.01, 0.03), ("fp8", 0.05, 0.08), ("nf4", 0.15, 0.3)])
def test_layers_and_text_are_as_near_as_the_bits_allow(told, name, layer, text):
    """Measured: layers 0.005, 0.031, 0.11; text 0.018, 0.060, 0.21."""
    assert 0 < told[name]["layer_error"] < layer and 0 < told[name]["text_error"] < text, told[name]


@pytest.mark.parametrize(("name", "levels"), [("int8", 0.5), ("fp8", 4), ("nf4", 10)])
def test_images_are_near_those_of_the_whole_weights(told, name, levels):
    """In 8-bit levels, measured: 0.1, up to 1.9, up to 5.0; the adapter itself changes an image by 15.9."""
    part = told[name]
    for way in ("levels", "levels_with_adapter", "levels_with_adapter_apart"):
        assert 0 < part[way] < levels, part
    assert told["adapter"] > 2 * part["levels_with_adapter"]


def test_weights_take_fewer_bytes(told):
    """Of float32: 4 bytes become 1 or a half, beside what is not quantised."""
    whole = told["bytes"]["none"]
    assert told["bytes"]["int8"] < 0.4 * whole and told["bytes"]["fp8"] < 0.4 * whole
    assert told["bytes"]["nf4"] < 0.3 * whole


def test_the_scripts_draw_and_name_it(told):
    assert [told[name]["exit"] for name in ("int8", "fp8", "nf4")] == [0, 0, 0]
    lines = manifest(told["out"]).values()
    assert [line["quantize"] for line in lines] == ["int8", "fp8", "nf4"]
    assert len({line["sha256"] for line in lines}) == 3


def test_training_on_few_bits_and_with_8_bit_moments(libraries):
    """The tests that skip without the libraries, in a process that has them; none is skipped there."""
    files = ["unit/models/test_quantize.py", "integration/test_base_quantization.py"]
    optimizers = "integration/test_checkpoints.py::test_every_optimizer_resumes_to_the_bit"
    files += [f"{optimizers}[{name}]" for name in ("adamw8bit", "adamw8bit-torchao")]
    environment = script_environment()
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], str(libraries)])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{file}" for file in files)]
    done = subprocess.run(command, env=environment, cwd=KIT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    last = done.stdout.strip().splitlines()[-1]
    assert "passed" in last and "skipped" not in last, last
