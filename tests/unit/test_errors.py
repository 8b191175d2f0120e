"""How a script ends: exit codes, which rank speaks, the error file; what of a launcher's variables is believed."""

import ast
import re

import pytest
from helpers import KIT

from sana_kit import errors
from sana_kit.errors import CheckpointError, Problem, RankFailed, UserError, did_you_mean, run_as_script, setting
from sana_kit.launchers import announced_wait, settle_launcher


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SANA_ERROR_FILE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def fail(error):
    def main():
        raise error

    return main


def test_exit_codes_and_texts(capsys):
    assert run_as_script(lambda: 3) == 3 and run_as_script(lambda: None) == 0
    assert run_as_script(fail(UserError(Problem("rank", 0, "must be above 0", "Take 4.")))) == 1
    assert capsys.readouterr().err == "\nerror: --rank=0: must be above 0. Take 4.\n"
    assert run_as_script(fail(KeyboardInterrupt()), interrupted="stopped; start again") == 130
    assert capsys.readouterr().err == "\nstopped; start again\n"


def test_settings_within_a_message_are_written_as_its_reader_types_them():
    remedy = f"Use {setting('batch')}=2, or leave {setting('side')} out."
    error = UserError(Problem("side", 3, f"does not go with {setting('batch')}", remedy))
    assert str(error) == "side=3: does not go with batch. Use batch=2, or leave side out."
    told = "--side=3: does not go with --batch. Use --batch=2, or leave --side out."
    assert str(error.as_flags()) == str(error.as_flags().as_flags()) == told
    assert "Use <BATCH>=2, or leave <SIDE> out." in str(error.as_flags(lambda field: f"<{field.upper()}>"))


def flags_of_problems(path):
    """Lines of a file that write a flag into the reason or remedy of a Problem."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        named = isinstance(node, (ast.Assign, ast.AugAssign)) and {"reason", "remedy"} & {
            name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
        }
        if named or (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Problem"):
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and re.search(r"--[a-z]\w", str(part.value)):
                    yield f"{path.name}:{part.lineno}"


def test_libraries_name_settings_and_no_flags():
    """Those below name a flag of another script, a whole command, and a flag of their own command line."""
    others = {"adapters.py", "usage.py", "overlay.py"}
    found = [line for path in (KIT / "sana_kit").rglob("*.py") for line in flags_of_problems(path)]
    assert {line.split(":")[0] for line in found} == others, found


def test_under_the_launcher_errors_of_all_ranks_wait_in_a_file_for_the_end(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SANA_ERROR_FILE", str(tmp_path / "error"))
    run_as_script(fail(UserError(Problem("rank", 0, "must be above 0", "Take 4."))))
    run_as_script(fail(CheckpointError("the disk is full")))
    assert (tmp_path / "error").read_text() == ("error: --rank=0: must be above 0. Take 4.\nerror: the disk is full\n")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("SANA_ERROR_FILE", str(tmp_path / "gone" / "error"))
    run_as_script(fail(CheckpointError("the disk is full")))
    assert capsys.readouterr().err == "\nerror: the disk is full\n"


def test_an_unexpected_error_keeps_its_traceback_and_an_expected_one_has_none(capsys):
    assert run_as_script(fail(KeyError("x"))) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "raise error" in shown and shown.endswith("\nerror: KeyError: 'x'\n")
    assert run_as_script(fail(ValueError("x is wrong")), expected=(ValueError,)) == 1
    assert capsys.readouterr().err == "\nerror: x is wrong\n"


@pytest.mark.parametrize(
    ("local_rank", "met", "error", "speaks"),
    [
        (0, False, CheckpointError("x"), True),
        (0, True, RankFailed("x"), True),
        (3, False, CheckpointError("x"), False),  # all of this machine check the same before they have met
        (3, False, RuntimeError("no device 3"), True),
        (3, True, CheckpointError("x"), True),
        (3, True, RankFailed("x"), False),
        (3, True, KeyError("x"), True),
    ],
)
def test_the_first_rank_of_a_machine_speaks_and_others_of_what_is_theirs(
    capsys, monkeypatch, local_rank, met, error, speaks
):
    told = []
    monkeypatch.setattr(errors, "_AT_FAILURE", [told.append] if met else [])
    environment = {"RANK": "8", "LOCAL_RANK": str(local_rank), "WORLD_SIZE": "16", "TORCHELASTIC_RUN_ID": "none"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run_as_script(fail(error)) == 1
    assert ("error:" in capsys.readouterr().err) == speaks
    assert len(told) == (met and not isinstance(error, RankFailed))


def test_an_error_that_all_ranks_share_is_told_once_a_machine(capsys, monkeypatch):
    monkeypatch.setattr(errors, "_AT_FAILURE", [lambda message: None])
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    error = UserError(Problem("rank", 0, "is none"))
    error.shared = True
    assert run_as_script(fail(error)) == 1
    assert capsys.readouterr().err == ""


def test_rank_1_left_in_the_shell_does_not_silence_an_error(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run_as_script(fail(UserError(Problem("model", "x", "is not there")))) == 1
    shown = capsys.readouterr().err
    assert "RANK in the environment: ignored" in shown and "error: --model=x: is not there." in shown


AGENT = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
OMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
OWN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "names", "kept"),
    [
        ({}, [], {}),
        ({"RANK": "1"}, ["bash"], {}),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a"}, ["bash"], {"MASTER_ADDR": "a"}),
        (AGENT, ["bash"], {"MASTER_ADDR": "a", "MASTER_PORT": "1"}),
        ({**AGENT, "TORCHELASTIC_RUN_ID": "x"}, [], {**AGENT, "TORCHELASTIC_RUN_ID": "x"}),
        ({**AGENT, "CROSS_RANK": "0"}, [], {**AGENT, "CROSS_RANK": "0"}),
        ({**AGENT, "SANA_LAUNCHED": "1"}, ["bash"], {**AGENT, "SANA_LAUNCHED": "1"}),
        ({"RANK": "1", "TORCHELASTIC_RUN_ID": "x"}, [], {"TORCHELASTIC_RUN_ID": "x"}),
        (OMPI, ["bash", "sshd"], {}),
        (OMPI, ["orted"], {**OMPI, **OWN, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}),
        (SLURM, ["slurmstepd"], {**SLURM, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "RANK": "1"}, ["slurmstepd"], {**SLURM, "SLURM_STEP_NUM_TASKS": "1"}),
    ],
)
def test_a_launchers_variables_count_only_where_a_launcher_is(environment, names, kept):
    said, environment = [], dict(environment)
    before = dict(environment)
    settle_launcher(environment, names, said.append)
    assert environment == kept
    removed = [name for name in before if name not in kept]
    assert len(said) == bool(removed) and all(name in said[0] for name in removed)


def test_a_wait_is_announced_with_its_reason(monkeypatch):
    said = []
    for name, value in {**AGENT, "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with announced_wait(after=0.02, again=100, say=said.append):
        import time

        time.sleep(0.2)
    assert said == [
        "rank 1 waits for the other processes of 2 at a:1, since WORLD_SIZE=2 was set by the launcher. Start the other"
        " machines, or check that they reach it."
    ]
    with announced_wait(after=5, say=said.append):
        pass
    assert len(said) == 1


def test_the_nearest_word_is_offered():
    assert did_you_mean("--resolutoin", ["--resolution", "--rank"]) == " Did you mean --resolution?"
    assert did_you_mean("--x", ["--resolution"]) == ""


def test_a_package_that_is_not_installed_is_no_traceback(capsys):
    assert run_as_script(fail(ModuleNotFoundError("No module named 'nowhere_x'", name="nowhere_x"))) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("\nerror: the package nowhere_x is not installed for ") and "Traceback" not in shown
    assert run_as_script(fail(ModuleNotFoundError("No module named 'json.x'", name="json.x"))) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_connection_that_another_rank_has_dropped_is_no_traceback(capsys):
    lost = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:53893. Check the logs of the worker"
    assert run_as_script(fail(RuntimeError(lost))) == 1
    told = "error: another rank ended while this one waited for it (Connection closed by peer)"
    assert capsys.readouterr().err == f"\n{told}\n"
    assert run_as_script(fail(RuntimeError("shapes differ"))) == 1
    assert "Traceback" in capsys.readouterr().err
