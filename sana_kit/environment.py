"""The Python environment of the launcher and the tests: the active one where it serves, else .venv, made and filled.

    python3 sana_kit/environment.py              prints the Python to use, on standard output
    python3 sana_kit/environment.py --tests      the same, with what the tests need on top

Runs before anything is installed, so it imports the standard library only.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

KIT = Path(__file__).resolve().parent.parent
SUPPORTED = ((3, 10), (3, 12))


def read_requirements(path: Path) -> list[tuple[str, str]]:
    """(name, version specifier) of each line of a requirements file."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.split("#")[0].strip()
        match = re.fullmatch(r"([A-Za-z0-9_.-]+)\s*(.*)", line)
        if match:
            found.append((match.group(1), match.group(2)))
    return found


def numbers(version: str) -> tuple[int, ...]:
    """The leading release numbers of a version: '2.13.0+cpu' -> (2, 13, 0)."""
    return tuple(int(part) for part in re.match(r"\d+(\.\d+)*", version).group(0).split("."))


def unmet(requirements: list[tuple[str, str]], version_of=importlib.metadata.version) -> list[str]:
    """What an environment lacks of `requirements`, in words; only >= and == are used in this kit's files."""
    lacking = []
    for name, specifier in requirements:
        try:
            installed = version_of(name)
        except importlib.metadata.PackageNotFoundError:
            lacking.append(f"{name} is missing")
            continue
        for operator, wanted in re.findall(r"(>=|==)\s*([0-9][^,\s]*)", specifier):
            have, want = numbers(installed), numbers(wanted)
            width = max(len(have), len(want))
            have, want = (n + (0,) * (width - len(n)) for n in (have, want))
            if (operator == ">=" and have < want) or (operator == "==" and have != want):
                lacking.append(f"{name} is {installed}, {operator}{wanted} is needed")
    return lacking


def on_ascend_host() -> bool:
    """Whether this machine has an Ascend driver or CANN."""
    return any(Path(path).exists() for path in ("/dev/davinci_manager", "/usr/local/Ascend")) or bool(
        os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    )


def install(python: str, files: list[Path]) -> None:
    """pip install the requirements files into the environment of `python`, pinned to the tested versions."""
    command = [
        python,
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "-c",
        str(KIT / "sana_kit/constraints.txt"),
    ]
    # torch first, by its exact version: a range may take another build, and deepspeed's set-up looks for it.
    torch = next(
        line for line in (KIT / "sana_kit/constraints.txt").read_text().splitlines() if line.startswith("torch==")
    )
    first = [torch] + ([f"torch_npu=={torch.split('==')[1]}"] if on_ascend_host() else [])
    for step in ([*first], [part for file in files for part in ("-r", str(file))]):
        print("+ pip install " + " ".join(step), file=sys.stderr, flush=True)
        done = subprocess.run([*command, *step], stdout=sys.stderr)
        if done.returncode:
            print(f"error: pip could not install {' '.join(step)} (see above)", file=sys.stderr)
            sys.exit(1)


def is_whole(python: str) -> bool:
    """Whether a Python runs and has pip; that of a half-made environment (Debian without python3-venv) has not."""
    if not Path(python).exists():
        return False
    return subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0


def make_venv(venv: Path) -> bool:
    """Make the environment anew, whatever is there; where that fails nothing half-made is left, and why is told."""
    if venv.exists():
        print(f"{venv} is there but cannot be used (no working Python with pip): it is made again", file=sys.stderr)
    command = [sys.executable, "-m", "venv", "--clear", str(venv)]
    if subprocess.run(command, stdout=sys.stderr).returncode == 0 and is_whole(str(venv / "bin" / "python")):
        return True
    shutil.rmtree(venv, ignore_errors=True)
    remedy = "on Debian and Ubuntu: apt-get install python3-venv"
    print(f"error: could not make {venv.name} ({remedy}); nothing was left there", file=sys.stderr)
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", action="store_true", help="also what the tests need")
    arguments = parser.parse_args()
    files = [KIT / "requirements_sana.txt"] + ([KIT / "tests" / "requirements.txt"] if arguments.tests else [])
    requirements = [requirement for file in files for requirement in read_requirements(file)]

    lacking = unmet(requirements)
    if not lacking:
        print(sys.executable)
        return 0
    if not SUPPORTED[0] <= sys.version_info[:2] <= SUPPORTED[1]:
        print(
            f"error: Python {platform.python_version()} is active; 3.10 to 3.12 are supported."
            " Put another one first on PATH, or name it: PYTHON=python3.11",
            file=sys.stderr,
        )
        return 1
    venv = KIT / ".venv"
    python = str(venv / "bin" / "python")
    if not is_whole(python):
        print(f"the active environment lacks: {'; '.join(lacking)}\nmaking {venv}", file=sys.stderr, flush=True)
        if not make_venv(venv):
            return 1
    check = (
        "import sys; sys.path.insert(0, sys.argv[1]); import environment as e; from pathlib import Path;"
        "print('\\n'.join(e.unmet([r for f in sys.argv[2:] for r in e.read_requirements(Path(f))])))"
    )

    def lacking_in_venv() -> str:
        command = [python, "-c", check, str(KIT / "sana_kit"), *map(str, files)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    if lacking_in_venv():
        install(python, files)
        still = lacking_in_venv()
        if still:
            print(f"error: after installing, .venv still lacks: {still}", file=sys.stderr)
            return 1
    print(python)
    return 0


if __name__ == "__main__":
    sys.exit(main())
