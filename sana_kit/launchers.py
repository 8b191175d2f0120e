"""Who started this process: a launcher whose variables count, or a shell in which an old launcher's are left over.

A process is one of several only where a launcher says so: torchrun and accelerate (TORCHELASTIC_RUN_ID), DeepSpeed's
launcher (CROSS_RANK), MPI and SLURM (their daemon is among the process's ancestors). Who starts the ranks by hand, or
in pods of Kubernetes, sets SANA_LAUNCHED=1 beside RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

Nothing here imports torch.
"""

from __future__ import annotations

import os
import shlex
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager

# Variables that torch and accelerate believe, wherever they come from.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# (rank, world size, local rank, local world size) as MPI's launchers and SLURM's srun name them.
DAEMON_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)
DAEMONS = (
    "hydra_pmi_proxy",
    "mpiexec",
    "mpiexec.hydra",
    "mpirun",
    "orted",
    "orterun",
    "pmi_proxy",
    "prted",
    "prterun",
    "slurmstepd",
)
ANNOUNCED_SECONDS = 5.0  # a wait for other processes is told after this time
REPEATED_SECONDS = 60.0  # and again after each of these


def ancestors() -> list[str]:
    """Names of the programs above this process, its parent first."""
    import psutil

    names = []
    try:
        for process in psutil.Process().parents():
            names.append(process.name())
    except psutil.Error:
        pass
    return names


# Set by `sana_kit.launch` for its processes: the flags of `accelerate launch` with which the same run can be started.
ACCELERATE_FLAGS = "SANA_ACCELERATE_FLAGS"


def accelerate_flags(script: str) -> list[str]:
    """The flags that stand between `accelerate launch` and `script` in the command that started this process.

    The kit's launcher says them; of a plain `accelerate launch` they are read from the command line of an ancestor. []
    where neither started this process.
    """
    import psutil

    if ACCELERATE_FLAGS in os.environ:
        return shlex.split(os.environ[ACCELERATE_FLAGS])
    try:
        for process in psutil.Process().parents():
            words = process.cmdline()
            begins = [i for i in range(1, len(words)) if words[i] == "launch" and words[i - 1].endswith("accelerate")]
            if begins and script in words[begins[0] :]:
                return words[begins[0] + 1 : words.index(script, begins[0])]
    except psutil.Error:
        pass
    return []


def _number(environment: MutableMapping[str, str], name: str) -> int | None:
    value = environment.get(name, "").strip()
    return int(value) if value.isdigit() else None


def _daemon_ranks(environment: MutableMapping[str, str], names: Iterable[str]) -> dict[str, str] | None:
    """The four `RANK_VARIABLES` from MPI's or SLURM's own; None where none of their daemons is above this process."""
    if not set(names) & set(DAEMONS):
        return None
    for variables in DAEMON_VARIABLES:
        numbers = [_number(environment, name) for name in variables]
        rank, world_size, local_rank, local_size = numbers
        if rank is None or world_size is None or local_rank is None or world_size < 2:
            continue
        found = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": local_rank}
        if local_size is not None:
            found["LOCAL_WORLD_SIZE"] = local_size
        return {name: str(number) for name, number in found.items()}
    return None


def settle_launcher(
    environment: MutableMapping[str, str] | None = None,
    names: Iterable[str] | None = None,
    say: Callable[[str], None] | None = None,
) -> None:
    """Keep a launcher's variables where one is, and take them out of the environment where none is.

    Call it first thing in a script, before torch or accelerate read them. What is taken out is told in one line.

    Args:
        environment: `os.environ` unless given; changed in place.
        names: programs above this process; `ancestors()` unless given.
        say: called with that line; standard error unless given.
    """
    environment = os.environ if environment is None else environment
    foreign = [name for variables in DAEMON_VARIABLES[:3] for name in variables]
    present = [name for name in (*RANK_VARIABLES, *foreign) if environment.get(name)]
    slurm = _number(environment, "SLURM_STEP_NUM_TASKS") or 1
    if not present and slurm < 2:
        return
    by_agent = "TORCHELASTIC_RUN_ID" in environment or "CROSS_RANK" in environment
    complete = all(_number(environment, name) is not None for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if complete and (by_agent or environment.get("SANA_LAUNCHED") == "1"):
        return
    ranks = _daemon_ranks(environment, ancestors() if names is None else names)
    if ranks is not None:
        environment.update(ranks)
        if ranks["WORLD_SIZE"] == ranks.get("LOCAL_WORLD_SIZE"):  # one machine: its own address does
            environment.setdefault("MASTER_ADDR", "127.0.0.1")
            environment.setdefault("MASTER_PORT", "29500")
        return
    for name in present:
        del environment[name]
    if not present:
        return
    listed = ", ".join(present)
    line = (
        f"note: {listed} in the environment: ignored, since no launcher started this process. It runs alone;"
        " for several processes use accelerate launch, torchrun, mpirun or srun, or set SANA_LAUNCHED=1."
    )
    if say is None:
        sys.stderr.write(line + "\n")
    else:
        say(line)


def local_rank() -> int:
    """This process's number on its machine, 0 without a launcher."""
    return _number(os.environ, "LOCAL_RANK") or 0


def launched_world_size() -> int:
    """The world size that the launcher promised through the environment; 1 without one."""
    return _number(os.environ, "WORLD_SIZE") or 1


@contextmanager
def announced(
    line: str,
    after: float = ANNOUNCED_SECONDS,
    again: float = REPEATED_SECONDS,
    say: Callable[[str], object] | None = None,
    over: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Around a wait for other processes: tells `line` if it takes longer than `after` seconds, and then again.

    Args:
        say: called with it; standard error unless given.
        over: asked before each time; True ends the telling, though not the wait.
    """
    say = say or (lambda text: sys.stderr.write(text + "\n"))
    done = threading.Event()

    def tell() -> None:
        wait = after
        while not done.wait(wait) and not over():
            say(line)
            wait = again

    thread = threading.Thread(target=tell, name="announced wait", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def announced_wait(
    after: float = ANNOUNCED_SECONDS, again: float = REPEATED_SECONDS, say: Callable[[str], object] | None = None
) -> Iterator[None]:
    """Around the making of the process group: tells what is awaited, and why, if it takes longer than `after` seconds.

    Silent for one process and on ranks other than the first of a machine.
    """
    world_size = launched_world_size()
    if world_size == 1 or local_rank() != 0:
        yield
        return
    address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    line = (
        f"rank {os.environ.get('RANK', '?')} waits for the other processes of {world_size} at {address}, since"
        f" WORLD_SIZE={world_size} was set by the launcher. Start the other machines, or check that they reach it."
    )
    with announced(line, after, again, say):
        yield
