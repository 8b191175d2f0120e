"""Start a run on this machine: every problem told first, then its processes, then how it ended.

    python -m sana_kit.launch PARENT --config_file bf16_accelerate_config.yaml [--num_processors 2] -- TRAINER FLAGS

The launcher script calls it and passes its own process number, PARENT: when that process dies, the kernel ends this
one, and with it the run (Linux). Wrong flags are told before torch is imported, a wrong model, data set or column
before DeepSpeed is and before a process starts. Exit code: the trainer's.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sana_kit.errors import Problem, UserError, show_error
from sana_kit.flags import Parser, PlainHelp
from sana_kit.launchers import ACCELERATE_FLAGS
from sana_kit.quiet import SIGNAL_NAMES, leave_on_signals, quiet_libraries
from sana_kit.training.config import TrainConfig, parse_args

if TYPE_CHECKING:
    from sana_kit.launch.ranks import Launch

KIT = Path(__file__).resolve().parent.parent.parent
TRAINER = KIT / "train_dreambooth_lora_sana.py"
# Settings that the launcher has under names of its own.
LAUNCHER_NAMES = {"pretrained_model_name_or_path": "model_name", "train_batch_size": "batch_size"}
_PR_SET_PDEATHSIG = 1


def as_flag(field: str) -> str:
    """A setting as what the launcher's user can type."""
    return f"--{LAUNCHER_NAMES.get(field, field)}"


def tie(parent: int) -> None:
    """Get a SIGTERM when `parent` dies; end at once if it is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(f"process {parent}, which started this run, is gone")


def find_devices() -> tuple[str, int]:
    """(kind, how many) of this host's devices, after the doctor's lines about it were printed.

    Raises:
        UserError: something keeps every run from starting here.
    """
    from sana_kit import doctor

    found = doctor.examine()
    print("\n".join([*found.lines, *(f"warning    {text}" for text in found.warnings)]), flush=True)
    if found.fatal:
        raise UserError([Problem("", None, text) for text in found.fatal])
    return found.kind, found.count


def completed(config: TrainConfig, words: list[str], decides: set[str]) -> list[str]:
    """The trainer's words with bf16 and one micro-step, where neither they nor the accelerate config say otherwise."""
    defaults = {"mixed_precision": "bf16", "gradient_accumulation_steps": "1"}
    left_open = {name: value for name, value in defaults.items() if name not in config.given | decides}
    return [*(f"--{name}={value}" for name, value in left_open.items()), *words]


def prepare(options: argparse.Namespace, words: list[str]) -> tuple[Launch, TrainConfig] | int:
    """Everything up to the first process.

    Returns: (the `Launch`, the run's settings), or the exit code of a dry run.

    Raises:
        UserError: every problem that was found.
    """
    sys.argv[0] = str(TRAINER)  # whose flags they are, and so whose name stands before what is wrong with one
    parse_args(words)  # a misspelt flag answers before anything is imported
    kind, count = find_devices()
    from sana_kit.launch import host
    from sana_kit.launch.ranks import Launch

    accelerate = host.AccelerateConfig(options.config_file)
    words = completed(parse_args(words), words, accelerate.decides)
    config = parse_args(words)
    processes = options.num_processors
    if accelerate.machines == 1:
        processes = host.processes_here(accelerate, kind, count, processes, options.small)
    if kind == "cpu":
        local = max(1, (processes or accelerate.processes or 1) // accelerate.machines)
        os.environ.setdefault("OMP_NUM_THREADS", str(host.host_threads(local)))
    launched = host.launch_words(accelerate, processes)
    if "mixed_precision" in config.given:
        launched += ["--mixed_precision", config.mixed_precision]
    os.environ[ACCELERATE_FLAGS] = shlex.join(host.without_free_port(launched, accelerate))
    try:
        launch = Launch([*launched, str(TRAINER), *words])
        if accelerate.machines > 1 and not config.dry_run:  # their ranks look, and each hears what another found
            return launch, config
        return checked(launch, config, processes or accelerate.processes or 1)
    except UserError:
        raise
    except ValueError as error:  # accelerate's own words about its config
        raise UserError(Problem("config_file", options.config_file, str(error))) from error


def checked(launch: Launch, config: TrainConfig, processes: int) -> tuple[Launch, TrainConfig] | int:
    """`launch` and `config` after the trainer's own checks, in the environment that its processes will get."""
    from sana_kit.training.check import check

    with launch.environment():
        found = check(config, shapes=False)
        if config.dry_run:
            from sana_kit.training.plan import print_plan

            own = config.dry_run_processes or processes
            return print_plan(found.config.replaced(dry_run_processes=own), found.base_model)
    return launch, config


def run(launch: Launch, config: TrainConfig) -> int:
    """Train, and say last how it ended if not well. Returns the exit code.

    Only the first of several machines writes, so that only it can say what is saved.
    """
    from sana_kit.launch.ranks import NO_CHECKPOINT, RunSummary, pass_on

    summary = RunSummary(Path(config.output_dir))
    with tempfile.TemporaryDirectory(prefix="sana-") as folder:
        errors = Path(folder) / "error"
        os.environ["SANA_ERROR_FILE"] = str(errors)
        for caught in SIGNAL_NAMES:
            signal.signal(caught, lambda number, frame: pass_on(number, folder))
        code, number = launch.run()
        told = errors.read_text(encoding="utf-8").strip() if errors.is_file() else ""
    step = summary.stopped_at()
    if step is not None:  # asked to stop through this process, or each rank by itself (as SLURM does)
        number = number or code - 128
        name = SIGNAL_NAMES.get(number, f"signal {number}")
        print(
            f"stopped by {name} after update {step}, which is saved: the same command with"
            " -- --resume_from_checkpoint=latest goes on from there",
            file=sys.stderr,
        )
        return 130 if number == signal.SIGINT else 143
    if told:
        print(f"\n{told}", file=sys.stderr)
        return code if number is None else 1
    if number is not None:
        saved = "" if launch.arguments.machine_rank else NO_CHECKPOINT
        print(f"stopped by {SIGNAL_NAMES.get(number, number)}{saved}", file=sys.stderr)
    elif code:
        print(f"error: training ended with exit code {code}", file=sys.stderr)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; see the head of this file."""
    parser = Parser(prog="python -m sana_kit.launch", description=__doc__, formatter_class=PlainHelp)
    parser.add_argument("parent", type=int, help="process with which the run ends")
    parser.add_argument("--config_file", required=True, help="accelerate config")
    parser.add_argument("--num_processors", type=int, help="processes; default: the devices found")
    parser.add_argument("--small", action="store_true", help="two processes on a host without accelerator")
    parser.add_argument("words", nargs="*", help="the trainer's flags, after a lone --")
    argv = list(sys.argv[1:] if argv is None else argv)
    at = argv.index("--") if "--" in argv else len(argv)
    options, words = parser.parse_args(argv[:at]), argv[at + 1 :]
    tie(options.parent)
    quiet_libraries()
    leave_on_signals(" before the run began")
    try:
        prepared = prepare(options, words)
    except UserError as error:
        show_error(str(error.as_flags(as_flag)))
        return 2 if {problem.field for problem in error.problems} & {"config_file", "num_processors"} else 1
    if isinstance(prepared, int):
        return prepared
    gc.enable()
    return run(*prepared)


if __name__ == "__main__":
    gc.disable()  # the imports of the checks are quicker so
    sys.exit(main())
