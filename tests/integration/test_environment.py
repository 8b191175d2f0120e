"""The environment that launcher and tests run in: what serves, and that one that was half-made is made again."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from sana_kit import doctor, environment
from sana_kit.environment import EnvironmentProblem, Venv

# A Python of an environment whose pip says 200 lines and ends with a code.
STAND_IN = """#!/bin/sh
case "$*" in
  *"-m pip install"*)
    for i in $(seq 200); do echo "Collecting package-$i"; done
    echo "ERROR: no wheel"
    exit {code} ;;
esac
exit 0
"""


@pytest.fixture
def half_made(tmp_path):
    """What `python -m venv` leaves on a Debian without python3-venv: a Python, but no pip."""
    venv = tmp_path / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    return venv


@pytest.fixture
def filled(tmp_path, monkeypatch):
    """filled(code): an environment whose pip ends with this code, without uv."""
    monkeypatch.setattr(environment, "find_uv", lambda: None)

    def make(code):
        python = tmp_path / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(STAND_IN.format(code=code))
        python.chmod(0o755)
        return Venv(tmp_path / ".venv", tests=False)

    return make


@pytest.fixture
def uv_on_path(tmp_path, monkeypatch):
    """A program called uv, the only one on PATH beside the system's."""
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text("#!/bin/sh\nexit 0\n")
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", f"{uv.parent}:/usr/bin:/bin")
    monkeypatch.delenv("UV_INDEX_URL", raising=False)
    return str(uv)


@pytest.mark.parametrize(
    ("line", "installed", "lacks"),
    [
        ("torch>=2.1", "2.13.0+cpu", None),
        ("torch>=2.1", "2.1.0rc1", "torch is 2.1.0rc1, >=2.1 is needed"),
        ("torch>=2.1", "2.2.0.dev20260101", None),
        ("numpy>=1.23,<3,!=2.0.*", "2.0.1", "numpy is 2.0.1, !=2.0.*,<3,>=1.23 is needed"),
        ("tqdm~=4.64", "5.0", "tqdm is 5.0, ~=4.64 is needed"),
        ('tomli>=2; python_version < "3.0"', None, None),
        ("peft", None, "peft is missing"),
    ],
)
def test_versions_are_compared_as_pip_compares_them(line, installed, lacks):
    def version_of(name):
        if installed is None:
            raise environment.importlib.metadata.PackageNotFoundError(name)
        return installed

    assert environment.unmet([line], version_of) == ([lacks] if lacks else [])


def test_every_line_of_the_kits_requirements_is_read(tmp_path):
    lines = environment.read_requirements(environment.KIT / "requirements_sana.txt")
    assert "torch>=2.1" in lines and not [line for line in lines if "#" in line or line.startswith("-")]
    path = tmp_path / "requirements.txt"
    path.write_text("# a comment\n-c other.txt\n\ntorch>=2  # why\n")
    assert environment.read_requirements(path) == ["torch>=2"]


def test_without_packaging_an_environment_does_not_serve(monkeypatch):
    monkeypatch.setitem(sys.modules, "packaging", None)
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    assert environment.unmet(["torch"]) == ["packaging is missing"]


def test_a_half_made_environment_is_made_again(half_made):
    venv = Venv(half_made, tests=False)
    (half_made / "left.txt").write_text("of an earlier attempt")
    assert not venv.is_whole()
    venv.make()
    assert venv.is_whole() and not (half_made / "left.txt").exists()
    assert venv.lacking() and not venv.lacking()[0].endswith("does not run")


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path):
    folder = tmp_path / ".venv"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(EnvironmentProblem, match=r"not a Python environment \(it holds thesis.txt\)"):
        Venv(folder, tests=False).make()
    assert (folder / "thesis.txt").read_text() == "years of work"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(folder)
    with pytest.raises(EnvironmentProblem, match="Move it away"):
        Venv(elsewhere, tests=False).make()


def test_where_none_can_be_made_nothing_is_left(half_made, monkeypatch):
    real = subprocess.run

    def no_ensurepip(command, **more):
        failing = [sys.executable, "-c", "raise SystemExit(1)"]
        return real(failing if "venv" in command else command, **more)

    monkeypatch.setattr(environment, "find_uv", lambda: None)
    monkeypatch.setattr(environment.subprocess, "run", no_ensurepip)
    with pytest.raises(EnvironmentProblem, match=r"apt-get install python3\.\d+-venv"):
        Venv(half_made, tests=False).make()
    assert not half_made.exists()


def test_pips_lines_go_to_a_log(filled, capfd):
    venv = filled(0)
    environment.install(venv)
    shown = capfd.readouterr().err.splitlines()
    assert len(shown) == 2 and str(venv.folder / "install.log") in shown[0] and shown[1].startswith("installed in")
    log = (venv.folder / "install.log").read_text()
    assert log.count("Collecting package-") == 400 and f"-c {environment.CONSTRAINTS} torch==" in log


def test_a_failed_installation_says_why_and_where_the_rest_is(filled):
    venv = filled(3)
    with pytest.raises(EnvironmentProblem) as failed:
        environment.install(venv)
    text = str(failed.value)
    assert text.startswith("pip could not install the environment (exit code 3):\n  ERROR: no wheel\n")
    assert str(venv.folder / "install.log") in text and text.count("\n") == 2


def test_on_a_terminal_the_progress_is_one_line():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    progress = environment.Progress(screen)
    for line in ("Collecting torch", "  Using cached torch", "Installing collected packages: torch, numpy"):
        progress.show(line)
    progress.end()
    assert "\n" not in screen.getvalue() and screen.getvalue().count("\r") == 3
    assert "Installing torch, numpy" in screen.getvalue() and "Using cached" not in screen.getvalue()


def test_uv_is_taken_unless_pip_alone_knows_the_mirror(uv_on_path, monkeypatch):
    settings = {"stdout": "global.timeout='60'\n"}

    def pip_config(command, **more):
        return subprocess.CompletedProcess(command, 0, settings["stdout"], "")

    monkeypatch.setattr(environment.subprocess, "run", pip_config)
    assert environment.find_uv() == uv_on_path
    settings["stdout"] = "global.index-url='https://mirror.example/simple'\n"
    assert environment.find_uv() is None
    monkeypatch.setenv("UV_INDEX_URL", "https://mirror.example/simple")
    assert environment.find_uv() == uv_on_path


def test_an_unsupported_python_is_named_before_anything_is_made(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "KIT", tmp_path)
    monkeypatch.setattr(environment, "lacking_here", lambda tests: ["torch is missing"])
    monkeypatch.setattr(environment.sys, "version_info", (3, 9, 2))
    with pytest.raises(EnvironmentProblem, match=r"has wheels for 3\.10 to 3\.14.*PYTHON=python3\.12"):
        environment.find()
    assert not (tmp_path / ".venv").exists()


def test_the_constraints_are_for_every_python_that_is_accepted():
    """Each constrained package has one version per Python; those without a marker hold for all."""
    from packaging.requirements import Requirement

    (major, first), (_, last) = environment.SUPPORTED
    constraints = [Requirement(line) for line in environment.read_requirements(Path(environment.CONSTRAINTS))]
    for minor in range(first, last + 1):
        python = {"python_version": f"{major}.{minor}"}
        names = [c.name for c in constraints if c.marker is None or c.marker.evaluate(python)]
        assert sorted(names) == sorted({c.name for c in constraints}), python


@pytest.mark.parametrize(("first_on_path", "typed"), [("same", "python"), ("link", None), ("none", None)])
def test_a_command_that_is_pasted_starts_the_same_python(first_on_path, typed, tmp_path, monkeypatch):
    """A link elsewhere to the same file, as every venv's python is, is another environment."""
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").symlink_to(sys.executable)
    other = tmp_path / "bin"
    other.mkdir()
    (other / "python").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", {"same": f"{folder}:{other}", "link": str(other), "none": ""}[first_on_path])
    monkeypatch.chdir(tmp_path)
    assert environment.python_word() == (typed or ".venv/bin/python")
    monkeypatch.chdir(other)
    assert environment.python_word() == (typed or str(folder / "python"))


def test_a_missing_package_is_named_with_the_environment_that_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "KIT", tmp_path)
    monkeypatch.chdir(tmp_path)
    gone = ModuleNotFoundError("No module named 'nowhere_to_be_found'", name="nowhere_to_be_found.part")
    assert "launcher installs what is needed into .venv by itself" in environment.missing_package(gone)
    assert environment.missing_package(ModuleNotFoundError("a part of one", name="json.nothing")) is None
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    told = environment.missing_package(gone)
    assert told == (
        f"the package nowhere_to_be_found is not installed for {sys.executable}."
        " The launcher has made an environment: source .venv/bin/activate"
    )


def test_the_doctor_names_the_launchers_environment_where_another_python_lacks_things(tmp_path, monkeypatch, capsys):
    found = doctor.Findings(fatal=["torch is missing"])
    monkeypatch.setattr(doctor, "examine", lambda: found)
    monkeypatch.setattr(environment, "KIT", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert doctor.main([]) == 1 and "note" not in capsys.readouterr().out
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    assert doctor.main([]) == 1
    assert capsys.readouterr().out.splitlines()[-2].endswith("has made an environment: source .venv/bin/activate")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert doctor.main([]) == 1 and "note" not in capsys.readouterr().out
