"""The environment that launcher and tests run in: one that was half-made is made again, or leaves nothing."""

import subprocess
import sys

import pytest

from sana_kit import environment


@pytest.fixture
def half_made(tmp_path):
    """What `python -m venv` leaves on a Debian without python3-venv: a Python, but no pip."""
    venv = tmp_path / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    return venv


def test_a_half_made_environment_is_not_whole(half_made, tmp_path):
    assert not environment.is_whole(str(half_made / "bin" / "python"))
    assert not environment.is_whole(str(tmp_path / "nowhere" / "python"))
    assert environment.is_whole(sys.executable)


def test_a_half_made_environment_is_made_again(half_made, capfd):
    assert environment.make_venv(half_made)
    assert environment.is_whole(str(half_made / "bin" / "python"))
    assert "it is made again" in capfd.readouterr().err


def test_where_none_can_be_made_nothing_is_left(half_made, monkeypatch, capfd):
    real = subprocess.run

    def no_ensurepip(command, **more):
        if "venv" in command:
            return real([sys.executable, "-c", "raise SystemExit(1)"], **more)
        return real(command, **more)

    monkeypatch.setattr(environment.subprocess, "run", no_ensurepip)
    assert not environment.make_venv(half_made)
    assert not half_made.exists() and "apt-get install python3-venv" in capfd.readouterr().err
