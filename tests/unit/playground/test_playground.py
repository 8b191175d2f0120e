"""The playground without a page: what it refuses, which trainings it finds, which of their files it serves."""

import sys

import pytest
from helpers.playground import ASKED, write_run

from sana_kit.errors import UserError
from sana_kit.playground import __main__ as command
from sana_kit.playground.config import parse_config
from sana_kit.playground.runs import describe_run, find_runs, served_file
from sana_kit.playground.studio import Studio


def test_all_problems_of_a_request_are_told_at_once(tiny_model, tmp_path):
    studio = Studio(parse_config(["--model_path", str(tiny_model), "--output_path", str(tmp_path)]).inference())
    wrong = {"prompt": " ", "seeds": ["x"], "steps": 0, "width": 1.5, "height": True, "guidance": "2", "side": "up"}
    with pytest.raises(UserError) as told:
        studio.check(wrong)
    fields = [problem.field for problem in told.value.problems]
    assert fields == ["prompt", "steps", "width", "height", "guidance", "seeds", "side"]
    with pytest.raises(UserError, match="multiples of"):
        studio.check({**ASKED, "side": "base", "width": 97})
    with pytest.raises(UserError, match="guidance_scale=nan"):
        studio.check({**ASKED, "side": "base", "guidance": float("nan")})


def test_a_page_without_an_adapter_draws_the_base_only(tiny_model, tmp_path):
    alone = Studio(parse_config(["--model_path", str(tiny_model), "--output_path", str(tmp_path)]).inference())
    assert alone.check({**ASKED, "lora_scale": 1.0, "side": "base"}).images == 1
    with pytest.raises(UserError, match="without an adapter"):
        alone.check({**ASKED, "side": "both"})


def test_runs_are_found_and_described(tmp_path):
    done, going = write_run(tmp_path / "done"), write_run(tmp_path / "going", ended=False)
    (tmp_path / "other").mkdir()
    assert set(find_runs([str(tmp_path), str(done), str(tmp_path / "nowhere")])) == {done, going}
    assert describe_run(done)["state"] == "done" and describe_run(going)["state"] == "running"
    figures = {figure["name"]: figure for figure in describe_run(going)["figures"]}
    assert figures["Step"]["value"] == "10" and figures["Step"]["note"] == "of 20" and "Time left" in figures
    (going / "train_log.jsonl").write_text("")
    assert "holds no event" in describe_run(going)["problem"]


def test_only_files_of_a_report_are_served(tmp_path):
    folder = write_run(tmp_path / "run")
    (tmp_path / "secret.html").write_text("x")
    (folder / ".hidden.html").write_text("x")
    (folder / "optimizer.bin").write_text("x")
    (folder / "link.html").symlink_to(tmp_path / "secret.html")
    assert served_file(folder, "report.html") == folder / "report.html"
    for name in ("../secret.html", str(tmp_path / "secret.html"), ".hidden.html", "optimizer.bin", "link.html", ""):
        assert served_file(folder, name) is None, name


def test_missing_packages_and_a_taken_port_are_one_line(monkeypatch):
    taken = command.listen(0)
    with pytest.raises(UserError, match="port="):
        command.listen(taken.getsockname()[1])
    taken.close()
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    for name in command.PACKAGES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(UserError) as told:
        command.check_packages()
    assert str(told.value) == "the playground needs starlette and uvicorn. pip install starlette uvicorn"
