"""Fixtures: a tiny real SANA pipeline and small image sets, made once per session; a runner for the real scripts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KIT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(KIT), str(KIT / "tests")]

import tiny  # noqa: E402


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a complete tiny SanaPipeline (see tiny.make_tiny_pipeline)."""
    return tiny.make_tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny-sana")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Six images with a caption file each."""
    return tiny.write_image_folder(tmp_path_factory.mktemp("images") / "folder")


@pytest.fixture(scope="session")
def parquet_dataset(tmp_path_factory):
    """The same six in the pokemon-blip-captions layout."""
    return tiny.write_parquet_dataset(tmp_path_factory.mktemp("data") / "pokemon")


def script_environment(threads=1):
    """The environment of a launched script: offline, few threads, no accelerate or port settings from outside.

    SANA_STACK_PATH is a folder that tests/stacks/run.sh adds to its Python path.
    """
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "MASTER_", "RANK", "LOCAL_RANK"))}
    keep.pop("WORLD_SIZE", None)
    return {
        **keep,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(KIT), *filter(None, [os.environ.get("SANA_STACK_PATH")])]),
    }


def launch(script, *flags, processes=1, engine="single", config=None, timeout=420, env=None, cwd=None):
    """Run a script of the kit as a user would; returns subprocess.CompletedProcess with text output.

    engine: 'python' (no launcher), 'single' (accelerate, one process), 'ddp' (accelerate --multi_gpu: gloo on CPU),
    'zero' (the kit's own yaml, DeepSpeed ZeRO-2 in bf16, or `config`).
    """
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable]
    if engine != "python":
        command += ["-m", "accelerate.commands.launch", "--main_process_port", str(port)]
        command += ["--num_processes", str(processes), "--num_machines", "1"]
        if engine == "zero":
            command += ["--config_file", str(config or KIT / "bf16_accelerate_config.yaml")]
        else:
            command += ["--mixed_precision", "no", "--dynamo_backend", "no"] + (
                ["--multi_gpu"] if engine == "ddp" else []
            )
    command += [str(KIT / script), *map(str, flags)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**script_environment(), **(env or {})},
        cwd=cwd or KIT,
    )


@pytest.fixture(scope="session")
def run_script():
    """The function `launch`."""
    return launch
