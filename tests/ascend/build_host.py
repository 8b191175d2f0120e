"""Build the emulated Ascend host: fetch the torch_npu wheel and compile the stand-in CANN runtime.

Used by run.sh and tests/ascend/test_ascend.py; by hand: `python tests/ascend/build_host.py`. Prints the variables, one
a line, that make a process run on the emulated host. Ends with code 77 and a reason where it cannot be built.
Everything lies in tests/ascend/dist/ (ignored by git), made once per wheel version and once per content of runtime/.
"""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE / "dist"  # a name that ruff and pytest leave out by themselves
SKIP = 77
VERSION = "2.13.0"  # of torch and torch_npu alike: they pair by version
CANN = "9.1.0"  # what the emulated toolkit says of itself
ELF_WITH_IMPORTS = ("libtorch_npu.so", "libtensorpipe.so", "libnpu_profiler.so", "_C.*.so")
CANN_PREFIXES = ("acl", "Hccl", "Msprof", "rt")  # names of the C functions of CANN; rt as in rtKernelLaunch
FLAGS = ["-std=gnu11", "-O3", "-fPIC", "-Wall", "-Wextra", "-Werror"]
# Lets the sums of the attention and norm kernels use vector units; NaN and infinity keep their meaning.
SUM_FLAGS = ["-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"]


class CannotBuild(Exception):
    """Why this machine cannot have an emulated Ascend host."""


def check_host() -> str:
    """The C compiler to use.

    Raises:
        CannotBuild: not Linux, another torch, no compiler or no binutils.
    """
    if sys.platform != "linux":
        raise CannotBuild("torch_npu exists for Linux only")
    try:
        torch = importlib.metadata.version("torch").partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        raise CannotBuild(f"no torch in {sys.executable}") from None
    if torch != VERSION:
        raise CannotBuild(f"torch_npu {VERSION} pairs with torch {VERSION}, here is torch {torch}")
    compiler = os.environ.get("CC") or "gcc"
    for tool in (compiler, "nm"):
        if shutil.which(tool) is None:
            raise CannotBuild(f"no {tool}")
    return compiler


def fetch_wheel() -> Path:
    """The folder of the unpacked wheel, fetched by pip the first time.

    Raises:
        CannotBuild: the package index cannot be reached or has no wheel for this Python and machine.
    """
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}-{platform.machine()}"
    target = BUILD / f"torch_npu-{VERSION}-{tag}"
    if target.is_dir():
        return target
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", f"torch-npu=={VERSION}", "-d", scratch]
        result = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if result.returncode or not wheels:
            reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise CannotBuild(f"torch-npu {VERSION} could not be fetched: {reason}")
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(unpacked)
        _rename(unpacked, target)
    return target


def compile_runtime(compiler: str, wheel: Path) -> Path:
    """A folder laid out as a CANN toolkit; lib64/ has libascendcl, libopapi, libhccl and those only linked to."""
    sources = sorted((HERE / "runtime").iterdir())
    key = hashlib.sha256("".join([compiler, *FLAGS, *SUM_FLAGS, wheel.name, Path(__file__).read_text()]).encode())
    for source in sources:
        key.update(source.read_bytes())
    target = BUILD / f"runtime-{key.hexdigest()[:16]}"
    if target.is_dir():
        return target
    with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
        home = Path(scratch) / "home"
        out = home / "lib64"
        out.mkdir(parents=True)
        include = ["-I", str(wheel / "torch_npu" / "include")]
        objects = {}
        for name, extra in (("acl", []), ("aclnn", SUM_FLAGS), ("hccl", [])):
            objects[name] = Path(scratch) / f"{name}.o"
            source = HERE / "runtime" / f"{name}.c"
            _run([compiler, *FLAGS, *extra, *include, "-c", str(source), "-o", str(objects[name])])
        missing = sorted(_imported(wheel) - _symbols(["--defined-only", *map(str, objects.values())]))
        failing = Path(scratch) / "failing.c"
        lines = ['#include "emulated.h"']
        for name in missing:
            lines.append(f'int {name}(void) {{ return emulated_fail(200006, "{name} is not emulated"); }}')
        failing.write_text("\n".join(lines) + "\n")
        # the compiler knows other types for some of these names
        _run(
            [
                compiler,
                "-O1",
                "-fPIC",
                "-w",
                "-I",
                str(HERE / "runtime"),
                "-c",
                str(failing),
                "-o",
                f"{scratch}/failing.o",
            ]
        )
        shared = [compiler, "-shared", "-Wl,--no-undefined"]
        _run([*shared, "-o", f"{out}/libascendcl.so", str(objects["acl"]), f"{scratch}/failing.o", "-lpthread"])
        for library, name in (("libopapi.so", "aclnn"), ("libhccl.so", "hccl")):
            _run([*shared, "-o", f"{out}/{library}", str(objects[name]), "-L", str(out), "-lascendcl", "-lm"])
        for library in ("libacl_op_compiler.so", "libge_runner.so", "libgraph.so", "libacl_tdt_channel.so"):
            _run([*shared, "-o", f"{out}/{library}", "-L", str(out), "-Wl,--no-as-needed", "-lascendcl"])
        for folder in ("runtime", "compiler", "opp"):  # torch_npu looks for them before it starts
            (home / folder).mkdir()
        (home / "ascend_toolkit_install.info").write_text(f"version={CANN}\n")
        _rename(home, target)
    return target


def _imported(wheel: Path) -> set[str]:
    """The functions of CANN that the wheel's libraries are linked to."""
    files = [str(f) for pattern in ELF_WITH_IMPORTS for f in (wheel / "torch_npu").rglob(pattern)]
    names = _symbols(["-D", "--undefined-only", *files])
    return {n for n in names if n.startswith(CANN_PREFIXES) and "@" not in n}


def _symbols(arguments: list[str]) -> set[str]:
    output = _run(["nm", *arguments])
    return {line.split()[-1] for line in output.splitlines() if line and not line.endswith(":")}


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise CannotBuild(f"{' '.join(command[:2])} … failed:\n{result.stderr}")
    return result.stdout


def _rename(made: Path, target: Path) -> None:
    """Put what was made in its place; another process may have been faster with the same content."""
    try:
        made.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def environment(devices: int | None = None) -> dict[str, str]:
    """The variables that make a process run on the emulated host, to be laid over its own environment.

    Raises:
        CannotBuild: with the reason.
    """
    compiler = check_host()
    wheel = fetch_wheel()
    runtime = compile_runtime(compiler, wheel)

    def prepend(variable: str, *folders: Path) -> str:
        return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get(variable)])])

    result = {
        "PYTHONPATH": prepend("PYTHONPATH", HERE / "host", wheel),
        "LD_LIBRARY_PATH": prepend("LD_LIBRARY_PATH", runtime / "lib64"),
        "ASCEND_HOME_PATH": str(runtime),
        "ASCEND_TOOLKIT_HOME": str(runtime),
        "ASCEND_OPP_PATH": str(runtime / "opp"),
    }
    if devices is not None:
        result["ASCEND_EMULATED_DEVICES"] = str(devices)
    return result


def main() -> int:
    try:
        for name, value in environment().items():
            print(f"{name}={value}")
    except CannotBuild as reason:
        print(f"no emulated Ascend host here: {reason}", file=sys.stderr)
        return SKIP
    return 0


if __name__ == "__main__":
    sys.exit(main())
