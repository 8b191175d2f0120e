"""Python programs started by fork from a process that has torch, diffusers, DeepSpeed and the kit imported already.

Importing these costs each process of a launch some ten seconds of CPU; a fork of this one costs none. `start` gives
a program its own arguments, environment, folder, session and output, and runs it as `__main__`, so that only the
imports differ from a fresh interpreter. `accelerate launch` and torch's elastic agent run here as they are; the ranks
that they start with Popen are forked too. Variables that are read while modules are imported decide which process is
forked. A program outside the kit's folder imports the kit's modules anew, from where its path leads.

Used by helpers.start; SANA_FRESH=1 starts fresh interpreters everywhere instead. By itself it is a server:
    python tests/helpers/warm.py FILE_DESCRIPTOR_OF_A_SOCKET
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy
from PIL import Image

KIT = Path(__file__).resolve().parents[2]
READ_AT_IMPORT = ("PYTHON", "OMP_", "LD_", "HF_", "DS_", "TRANSFORMERS_", "DIFFUSERS_", "TORCH_DEVICE", "ASCEND_")
MODULES = ("sana_kit.", "accelerate.commands.launch", "torch.distributed.run")
OWN = ("sana_kit", "patch_sana", "train_dreambooth_lora_sana")
# What the trainer, the launchers and the drawing scripts import in the end, late imports of DeepSpeed's too.
IMPORTED = (
    "accelerate.commands.launch",
    "datasets",
    "deepspeed.launcher.runner",
    "deepspeed.module_inject",
    "deepspeed.moe.layer",
    "deepspeed.ops.adam",
    "deepspeed.ops.op_builder.builder",
    "torch._inductor.compile_fx",
    "numpy.ctypeslib",
    "diffusers.models.autoencoders.autoencoder_dc",
    "diffusers.models.transformers.sana_transformer",
    "diffusers.pipelines.sana.pipeline_sana",
    "diffusers.pipelines.sana.pipeline_sana_sprint",
    "peft",
    "psutil",
    "torch.distributed.run",
    "torch.utils.tensorboard",
    "torchvision.transforms.functional",
    "transformers.models.gemma.tokenization_gemma_fast",
    "transformers.models.gemma2.modeling_gemma2",
    "train_dreambooth_lora_sana",
    "sana_kit.inference.command",
)


# ---------------------------------------------------------------------------------------------------------------------
# In the process that is forked


def is_python(words: Sequence[str]) -> bool:
    """Whether a command is this interpreter with a program: PYTHON [-u] SCRIPT ..., or PYTHON -m MODULE of MODULES."""
    program = [word for word in words[1:4] if word != "-u"]
    if words[0] != sys.executable or len(program) < 1:
        return False
    if program[0] == "-m":
        return program[1].startswith(MODULES)
    return program[0].endswith(".py")


def become(words: Sequence[str], env: Mapping[str, str], cwd: str | None, files: Sequence[int] = ()) -> None:
    """Be the program of a command in this forked process, until it ends; `files` become its descriptors 0, 1 and 2."""
    code = 1
    try:
        for descriptor, file in enumerate(files):
            os.dup2(file, descriptor)
        os.closerange(3, 4096)  # what a new interpreter would not have: sockets of the launcher, our own
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd or ".")
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = run_program([word for word in words[1:] if word != "-u"])
        threading._shutdown()
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_program(words: Sequence[str]) -> int:
    """Run SCRIPT ... or -m MODULE ... as `__main__`; the exit code, after the traceback where it raised."""
    numpy.random.seed()
    place = Path.cwd() if words[0] == "-m" else Path(words[0]).resolve().parent
    if not place.is_relative_to(KIT):
        for name in [name for name in sys.modules if name.split(".")[0] in OWN]:
            del sys.modules[name]
    try:
        if words[0] == "-m":
            sys.argv = list(words[1:])
            sys.path[0] = str(place)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            sys.path[0] = str(place)
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            main.__file__ = words[0]
            exec(compile(Path(words[0]).read_bytes(), words[0], "exec"), main.__dict__)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return (stop.code or 0) & 255
        print(stop.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


class ForkingPopen(subprocess.Popen):
    """Popen whose Python programs are forks of this process, where nothing is redirected; else as ever."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        # rest: startupinfo, creationflags, shell, six ends of pipes (-1: none), restore_signals, gid, gids, uid,
        # umask, start_new_session, ... (Python 3.10 to 3.14)
        words = [args] if isinstance(args, str) else list(map(str, args))
        if not is_python(words) or preexec_fn is not None or any(end != -1 for end in rest[3:9]):
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
            return
        self.pid = os.fork()
        if not self.pid:
            if rest[14]:
                os.setsid()
            become(words, dict(os.environ) if env is None else env, cwd)
        self._child_created = True


def serve(request: dict, files: Sequence[int], told: socket.socket) -> None:
    """Fork the program of a request, tell its number, wait for it, tell its exit code; this process is its parent."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    pid = os.fork()
    if not pid:
        os.setsid()
        become(request["words"], request["env"], request["cwd"], files)
    told.sendall(f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    told.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def main(descriptor: int) -> None:
    """Import everything, then fork a program for each request until the other side is gone."""
    sys.path[0] = str(KIT)
    Image.init()
    for name in IMPORTED:
        try:
            importlib.import_module(name)
        except ImportError:  # of another stack of versions: the programs import it themselves, or do without
            continue
    import accelerate.commands.launch
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess_handler.Popen = ForkingPopen
    accelerate.commands.launch.subprocess = types.SimpleNamespace(**{**vars(subprocess), "Popen": ForkingPopen})
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    control = socket.socket(fileno=descriptor)
    while True:
        head, files, _, _ = socket.recv_fds(control, 8, 4)
        if not head:
            return
        with control.makefile("rb", buffering=0) as stream:
            left, parts = int.from_bytes(head, "big"), []
            while left:
                parts.append(stream.read(left))
                left -= len(parts[-1])
        if not os.fork():
            control.close()
            serve(json.loads(b"".join(parts)), files[:3], socket.socket(fileno=files[3]))
        for file in files:
            os.close(file)


# ---------------------------------------------------------------------------------------------------------------------
# In the tests


class Program:
    """A started program, with the part of Popen's interface that the tests use."""

    def __init__(self, told: socket.socket, words: Sequence[str]) -> None:
        self.args, self.returncode = list(words), None
        self._told = told.makefile("r")
        self.pid = int(self._told.readline())
        self._waiter = threading.Thread(target=self._wait, daemon=True)
        self._waiter.start()

    def _wait(self) -> None:
        self.returncode = int(self._told.readline())

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._waiter.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)


_servers: dict[tuple, socket.socket] = {}


def _server(env: Mapping[str, str]) -> socket.socket:
    """The socket of the process to fork for programs of this environment; started when first asked for."""
    key = tuple(sorted((name, value) for name, value in env.items() if name.startswith(READ_AT_IMPORT)))
    if key not in _servers:
        mine, its = socket.socketpair()
        command = [sys.executable, str(Path(__file__).resolve()), str(its.fileno())]
        subprocess.Popen(command, env=dict(env), pass_fds=[its.fileno()], cwd=KIT, start_new_session=True)
        its.close()
        _servers[key] = mine
    return _servers[key]


def start(
    words: Sequence[str], *, env: Mapping[str, str], cwd: str | os.PathLike, stdout: int, stderr: int
) -> Program:
    """Start a Python program (see is_python) with its output going to two descriptors."""
    mine, its = socket.socketpair()
    request = json.dumps({"words": list(words), "env": dict(env), "cwd": str(cwd)}).encode()
    control = _server(env)
    with open(os.devnull) as nothing:
        socket.send_fds(control, [len(request).to_bytes(8, "big")], [nothing.fileno(), stdout, stderr, its.fileno()])
    control.sendall(request)
    its.close()
    return Program(mine, words)


if __name__ == "__main__":
    main(int(sys.argv[1]))
