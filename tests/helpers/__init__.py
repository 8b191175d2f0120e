"""What tests of several rooms share: launched scripts, a trainer in this process, what a run wrote, comparisons.

`helpers/tiny.py` makes the models and images; it is imported as `tiny`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from helpers import warm
from helpers.waiting import finish

KIT = Path(__file__).resolve().parents[2]
WITHOUT_TORCH = KIT / "tests" / "distributed" / "workers" / "without_torch.py"
TRAINER = "train_dreambooth_lora_sana.py"
LAUNCHED = ("ACCELERATE_", "MASTER_", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_", "OMPI_", "SLURM_")


# Flags of a run of four updates with two checkpoints; model, images and --output_dir are still needed. Given again, a
# flag counts as given last.
SHORT_RUN = (
    "--instance_prompt=a drawing",
    "--resolution=64",
    "--train_batch_size=2",
    "--max_train_steps=4",
    "--checkpointing_steps=2",
    "--seed=0",
    "--mixed_precision=bf16",
    "--report_to=none",
    "--learning_rate=1e-2",
    "--complex_human_instruction=none",
)


def free_port() -> int:
    """A TCP port of this machine that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def same(first: Mapping, second: Mapping) -> bool:
    """Whether two mappings of tensors are equal to the bit: keys, dtypes and values."""
    import torch

    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first
    )


def adapter_weights(folder: str | os.PathLike) -> dict:
    """The tensors of the adapter file in a checkpoint or output folder."""
    from safetensors.torch import load_file

    return load_file(Path(folder) / "pytorch_lora_weights.safetensors")


def events(output_dir: str | os.PathLike, kind: str | None = None) -> list[dict]:
    """The lines of a run's train_log.jsonl, all or those of one kind ("step", "warning", ...)."""
    lines = [json.loads(line) for line in (Path(output_dir) / "train_log.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["event"])]


def script_environment(threads: int = 1) -> dict[str, str]:
    """The environment of a launched script: offline, few threads, no accelerate or port settings from outside.

    SANA_STACK_PATH is a folder that tests/stacks/run.sh adds to its Python path.
    """
    keep = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHED)}
    keep.pop("WORLD_SIZE", None)
    return {
        **keep,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(KIT), *filter(None, [os.environ.get("SANA_STACK_PATH")])]),
    }


def launch_command(script, *flags, processes=1, engine="single", config=None, port=None) -> list[str]:
    """The command line of `launch`."""
    command = [sys.executable]
    if engine != "python":
        command += ["-m", "accelerate.commands.launch", "--main_process_port", str(port or free_port())]
        command += ["--num_processes", str(processes), "--num_machines", "1"]
        if engine == "zero":
            command += ["--config_file", str(config or KIT / "bf16_accelerate_config.yaml")]
        else:
            command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
            command += ["--multi_gpu"] if engine == "ddp" else []
    return [*command, str(KIT / script), *map(str, flags)]


def start(command, log, *, errors=None, env=None, cwd=None, fresh=False):
    """Start a command in a session of its own, its output going to the open file `log` (standard error to `errors`).

    Returns a Popen, or a warm.Program where the command is a Python program: a fork of an interpreter that has
    imported everything (helpers/warm.py). `fresh` or SANA_FRESH=1: a new interpreter all the same.
    """
    command, env, cwd = list(map(str, command)), env or script_environment(), cwd or KIT
    errors = errors or log
    if fresh or os.environ.get("SANA_FRESH") == "1" or not warm.is_python(command):
        return subprocess.Popen(command, stdout=log, stderr=errors, env=env, cwd=cwd, start_new_session=True)
    return warm.start(command, env=env, cwd=cwd, stdout=log.fileno(), stderr=errors.fileno())


def run(command, *, env=None, cwd=None, fresh=False) -> subprocess.CompletedProcess:
    """`start` a command, wait for its end (waiting.finish) and give its output as text."""
    with tempfile.TemporaryFile("w+", errors="replace") as log, tempfile.TemporaryFile("w+", errors="replace") as told:
        process = start(command, log, errors=told, env=env, cwd=cwd, fresh=fresh)
        try:
            code = finish(process)
        finally:
            for file in (log, told):
                file.seek(0)
        return subprocess.CompletedProcess(process.args, code, log.read(), told.read())


def launch(script, *flags, processes=1, engine="single", config=None, env=None, cwd=None, fresh=False):
    """Run a script of the kit as a user would; returns its CompletedProcess with text output.

    engine: 'python' (no launcher), 'single' (accelerate, one process), 'ddp' (accelerate --multi_gpu: gloo on CPU),
    'zero' (the kit's own yaml, DeepSpeed ZeRO-2 in bf16, or `config`). fresh: see `start`.
    """
    command = launch_command(script, *flags, processes=processes, engine=engine, config=config)
    return run(command, env={**script_environment(), **(env or {})}, cwd=cwd, fresh=fresh)


def run_trainer(*flags) -> int:
    """The trainer's `main` in this process, with a fresh accelerate state as a launcher gives it; the exit code."""
    from accelerate.state import AcceleratorState

    import train_dreambooth_lora_sana as trainer
    from sana_kit.errors import UserError
    from sana_kit.training.config import parse_args

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return trainer.main(parse_args([str(flag) for flag in flags]))
    except UserError as error:
        raise error.as_flags() from error
