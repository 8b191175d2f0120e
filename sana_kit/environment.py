"""The Python environment of the launcher and the tests: the active one where it serves, else .venv, made and filled.

    python3 sana_kit/environment.py              prints the Python to use, on standard output
    python3 sana_kit/environment.py --tests      the same, with what the tests need on top
    python3 sana_kit/environment.py --lacking    prints what the active environment lacks; exit code 1 if anything

An environment serves when every line of requirements_sana.txt is met. That is looked up in the installed packages'
metadata with `packaging`, which transformers and accelerate bring along: the rules are pip's own, a tenth of a second
is enough, and neither a network nor pip is needed (`uv venv` makes environments without pip;
`pip install --dry-run --no-index` takes two seconds and fails there).

Runs before anything is installed, so it imports the standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

KIT = Path(__file__).resolve().parent.parent
CONSTRAINTS = KIT / "sana_kit" / "constraints.txt"
# The Pythons that the pinned torch has wheels for.
SUPPORTED = ((3, 10), (3, 14))
# What `python -m venv` makes. A folder with other things in it is the user's and never removed.
VENV_PARTS = {"bin", "include", "lib", "lib64", "share", "pyvenv.cfg", ".gitignore", ".lock", "CACHEDIR.TAG"}
VENV_PARTS |= {"install.log", "etc", "man"}


class EnvironmentProblem(Exception):
    """No environment serves and none can be made; the message says what to do."""


def read_requirements(path: Path) -> list[str]:
    """The requirement lines of a requirements file: comments, options and empty lines left out."""
    lines = (line.split(" #")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith(("#", "-"))]


def unmet(requirements: list[str], version_of: Callable[[str], str] = importlib.metadata.version) -> list[str]:
    """What an environment lacks of `requirements` (lines of a requirements file), in words.

    Pre-releases and local builds (2.13.0+cpu) count by their number; a line whose marker does not apply is met.
    """
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ["packaging is missing"]
    lacking = []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            installed = version_of(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            lacking.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            lacking.append(f"{requirement.name} is {installed}, {requirement.specifier} is needed")
    return lacking


def requirement_files(tests: bool) -> list[Path]:
    """requirements_sana.txt, with `tests` also what the tests need."""
    return [KIT / "requirements_sana.txt"] + ([KIT / "tests" / "requirements.txt"] if tests else [])


def python_word() -> str:
    """What the user types to start this Python: `python` or `python3` where PATH finds this very one, else its path.

    The path is short where it lies beneath the working folder, as .venv often does.
    """
    here = Path(sys.executable)
    for word in ("python", "python3"):
        found = shutil.which(word)
        # the folder decides, not the file alone: every venv's python is a link to the same one
        if found and Path(found).parent == here.parent and os.path.samefile(found, here):
            return word
    return short_path(here)


def short_path(path: Path) -> str:
    """A path as it is typed from the working folder: relative where it lies beneath it, else whole."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path.absolute())


def launchers_environment() -> str | None:
    """The command that activates the environment that the launcher has made; None where it is active, or not made."""
    activate = KIT / ".venv" / "bin" / "activate"
    if not activate.is_file() or Path(sys.prefix).resolve() == (KIT / ".venv").resolve():
        return None
    return f"source {short_path(activate)}"


def missing_package(error: ModuleNotFoundError) -> str | None:
    """What to do about a package that this Python lacks altogether; None where it is there and a part of it is not."""
    package = (error.name or "").partition(".")[0]
    if not package or package in sys.modules or importlib.util.find_spec(package) is not None:
        return None
    told = f"the package {package} is not installed for {sys.executable}."
    if (made := launchers_environment()) is not None:
        return f"{told} The launcher has made an environment: {made}"
    needed = f"-r {short_path(KIT / 'requirements_sana.txt')} -c {short_path(CONSTRAINTS)}"
    return f"{told} The launcher installs what is needed into .venv by itself; by hand: python -m pip install {needed}"


def lacking_here(tests: bool) -> list[str]:
    """What the Python that runs this lacks, in words."""
    return unmet([line for path in requirement_files(tests) for line in read_requirements(path)])


def on_ascend_host() -> bool:
    """Whether this machine has an Ascend driver or CANN."""
    return any(Path(path).exists() for path in ("/dev/davinci_manager", "/usr/local/Ascend")) or bool(
        os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    )


# ---- .venv ----------------------------------------------------------------------------------------------------------


class Venv:
    """The kit's own environment in `folder`.

    A virtual environment holds absolute paths, so it cannot be made beside and renamed: one that is not whole is
    noticed and made again.
    """

    def __init__(self, folder: Path, tests: bool):
        self.folder, self.tests = folder, tests
        self.python = str(folder / "bin" / "python")

    def lacking(self) -> list[str]:
        """What it lacks, in words; of one that does not run, that."""
        command = [self.python, __file__, "--lacking", *(["--tests"] if self.tests else [])]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return [f"{self.python} does not run ({error.strerror})"]
        if done.returncode not in (0, 1) or (done.returncode == 1 and not done.stdout.strip()):
            return [f"{self.python} does not run"]
        return done.stdout.split("\n")[:-1] if done.returncode else []

    def is_whole(self) -> bool:
        """Whether packages can be installed into it: it runs, and so does its pip, or uv serves it from outside."""
        own = "import sys; sys.exit(sys.prefix == sys.base_prefix)"
        test = [self.python, "-c", own] if find_uv() else [self.python, "-m", "pip", "--version"]
        try:
            return subprocess.run(test, capture_output=True).returncode == 0 and (self.folder / "pyvenv.cfg").is_file()
        except OSError:
            return False

    def remove(self) -> None:
        """Remove it, or what a broken-off attempt left of it.

        Raises:
            EnvironmentProblem: the folder holds other things.
        """
        if self.folder.is_symlink() or self.folder.is_file():
            raise EnvironmentProblem(
                f"{self.folder} is no folder, and no environment can be made there. Move it away."
            )
        if not self.folder.exists():
            return
        foreign = sorted(path.name for path in self.folder.iterdir() if path.name not in VENV_PARTS)
        if foreign and not (self.folder / "pyvenv.cfg").is_file():
            raise EnvironmentProblem(
                f"{self.folder} is not a Python environment (it holds {', '.join(foreign[:3])}). Move it away."
            )
        shutil.rmtree(self.folder)

    def make(self) -> None:
        """Make it anew, with pip, empty otherwise.

        Raises:
            EnvironmentProblem: it cannot be made; nothing of it is left.
        """
        self.remove()
        uv = find_uv()
        command = [sys.executable, "-m", "venv", str(self.folder)]
        if uv:
            command = [uv, "venv", "--quiet", "--seed", "--python", sys.executable, str(self.folder)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode == 0 and self.is_whole():
            return
        self.remove()
        package = "python{}.{}-venv".format(*sys.version_info[:2])
        said = done.stdout.strip().splitlines()
        raise EnvironmentProblem(
            f"{sys.executable} cannot make a virtual environment in {self.folder}"
            + (f" ({said[0].strip()})" if said else "")
            + f". On Debian and Ubuntu: apt-get install {package}. Elsewhere: install uv, which needs no such package,"
            " or activate an environment that has what requirements_sana.txt lists."
        )


def find_uv() -> str | None:
    """uv's path where it can be used: not where pip alone knows from where packages are to come (a mirror, a proxy, a
    folder of wheels), which uv would not heed.
    """
    uv = shutil.which("uv")
    if uv is None or any(name.startswith("UV_") and "INDEX" in name for name in os.environ):
        return uv
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
    own = ("index-url", "find-links", "no-index", "trusted-host", "proxy", "client-cert", "constraint")
    return None if any(setting in done.stdout for setting in own) else uv


@contextlib.contextmanager
def one_at_a_time(venv: Path) -> Iterator[None]:
    """Wait while another start of the kit fills the same environment."""
    import fcntl

    handle = os.open(venv.parent, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting: another process fills {venv}", file=sys.stderr, flush=True)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        pass  # a file system without locks: as if alone
    try:
        yield
    finally:
        os.close(handle)


# ---- installing -----------------------------------------------------------------------------------------------------


class Progress:
    """One line on the terminal that says what an installation does; elsewhere a line every half minute."""

    STEPS = ("Collecting ", "Downloading ", "Building ", "Installing ", "Prepared ", "Resolved ", "Installed ")

    def __init__(self, stream: TextIO, every: float = 30.0):
        self.stream, self.every = stream, every
        self.live = stream.isatty()
        self.started = self.told = time.monotonic()

    def show(self, line: str) -> None:
        """Take in a line of pip's or uv's output."""
        text = line.strip()
        if not text.startswith(self.STEPS):
            return
        text = text.replace("Installing collected packages: ", "Installing ")
        now = time.monotonic()
        width = shutil.get_terminal_size().columns - 1
        shown = f"  {now - self.started:4.0f} s  {text}"[:width]
        if self.live:
            self.stream.write(f"\r\033[K{shown}")
        elif now - self.told >= self.every:
            self.told = now
            self.stream.write(shown + "\n")
        self.stream.flush()

    def end(self) -> None:
        """Clear the line."""
        if self.live:
            self.stream.write("\r\033[K")
            self.stream.flush()


def install_steps(files: list[Path]) -> list[list[str]]:
    """What is installed one after the other: torch by its exact version, since a range may take another build and
    DeepSpeed's set-up looks for torch; then all the rest.
    """
    torch = next(line for line in read_requirements(CONSTRAINTS) if line.startswith("torch=="))
    first = [torch] + ([torch.replace("torch", "torch_npu", 1)] if on_ascend_host() else [])
    return [first, [part for path in files for part in ("-r", str(path))]]


def install(venv: Venv) -> None:
    """Fill the environment with the tested versions; everything that pip or uv says goes to install.log in it.

    Raises:
        EnvironmentProblem: it failed.
    """
    uv = find_uv()
    log_path = venv.folder / "install.log"
    command = [uv, "pip", "install", "--python", venv.python] if uv else [venv.python, "-m", "pip", "install"]
    if not uv:
        command += ["--disable-pip-version-check", "--progress-bar", "off"]
    tool = "uv" if uv else "pip"
    print(f"installing with {tool} (gigabytes where torch comes with CUDA); in full: {log_path}", file=sys.stderr)
    progress = Progress(sys.stderr)
    with open(log_path, "a", encoding="utf-8") as log:
        for step in install_steps(requirement_files(venv.tests)):
            words = [*command, "-c", str(CONSTRAINTS), *step]
            log.write("+ " + " ".join(words) + "\n")
            code = _follow(words, log, progress)
            if code:
                progress.end()
                raise EnvironmentProblem(_why(log_path, tool, code))
    progress.end()
    print(f"installed in {time.monotonic() - progress.started:.0f} s", file=sys.stderr)


def _follow(command: list[str], log: TextIO, progress: Progress) -> int:
    """Run an installer, its output into the log and the progress line; its exit code."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    assert process.stdout is not None
    try:
        for line in process.stdout:
            log.write(line)
            log.flush()
            progress.show(line)
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def _why(log_path: Path, tool: str, code: int) -> str:
    """The error of a failed installation: the tool's own last words and where the rest is."""
    lines = [line.strip() for line in log_path.read_text(encoding="utf-8").splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "× ", "x ", "cause:", "caused by"))]
    said = "\n  ".join((errors or lines)[-3:])
    return (
        f"{tool} could not install the environment (exit code {code}):\n  {said}\n"
        f"In full: {log_path}. Start again once the cause is gone: what is installed stays. No wheel for Python"
        f" {platform.python_version()}? Name another one: PYTHON=python3.12"
    )


def find(tests: bool = False) -> str:
    """The Python to use: the one that runs this where its packages serve, else that of .venv, made and filled.

    Raises:
        EnvironmentProblem: neither is to be had.
    """
    lacking = lacking_here(tests)
    if not lacking:
        return sys.executable
    venv = Venv(KIT / ".venv", tests)
    if (venv.folder / "bin").exists() and not venv.lacking():
        return venv.python
    if not SUPPORTED[0] <= sys.version_info[:2] <= SUPPORTED[1]:
        (first, last) = (".".join(map(str, version)) for version in SUPPORTED)
        raise EnvironmentProblem(
            f"Python {platform.python_version()} is active; torch has wheels for {first} to {last}. Put another one"
            " first on PATH, or name it: PYTHON=python3.12"
        )
    with one_at_a_time(venv.folder):
        if (venv.folder / "bin").exists() and not venv.lacking():
            return venv.python
        if not venv.is_whole():
            broken = " again: it is not whole" if venv.folder.exists() else ""
            print(f"the active environment lacks: {'; '.join(lacking)}", file=sys.stderr)
            print(f"making {venv.folder}{broken}", file=sys.stderr, flush=True)
            venv.make()
        install(venv)
        still = venv.lacking()
        if still:
            raise EnvironmentProblem(f"after installing, .venv still lacks: {'; '.join(still)}")
    return venv.python


def main() -> int:
    """Print the Python to use, or what the active one lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", action="store_true", help="also what the tests need")
    parser.add_argument("--lacking", action="store_true", help="only say what the active environment lacks")
    arguments = parser.parse_args()
    if arguments.lacking:
        lacking = lacking_here(arguments.tests)
        print("\n".join(lacking), end="\n" if lacking else "")
        return 1 if lacking else 0
    try:
        print(find(arguments.tests))
    except EnvironmentProblem as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the next start goes on with the environment", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
