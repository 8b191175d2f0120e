"""Logins and names are checked before a run begins, not told after it."""

import importlib.util

import pytest

from sana_kit.training import accounts, trackers
from sana_kit.training.config import parse_args
from sana_kit.training.settings import TRACKERS


def texts(problems):
    return [problem.text(lambda field: f"--{field}") for problem in problems]


def test_an_upload_needs_a_login_and_a_name(monkeypatch, tmp_path):
    monkeypatch.setattr(accounts, "get_token", lambda: None)
    told = texts(accounts.upload_problems(True, "not a name", None, str(tmp_path)))
    assert len(told) == 2 and told[0].startswith("--hub_model_id=not a name: cannot be the name of a repository")
    assert "--push_to_hub: there is no login for the upload. Run `hf auth login`" in told[1]
    assert accounts.upload_problems(True, "me/name", "hf_x", str(tmp_path)) == []
    assert accounts.upload_problems(False, "not a name", None, str(tmp_path)) == []
    monkeypatch.setattr(accounts, "get_token", lambda: "hf_stored")
    (problem,) = accounts.upload_problems(True, None, None, str(tmp_path / "my run"))
    assert problem.field == "output_dir" and problem.value == "my run"


def test_every_tracker_can_be_asked_for_and_is_accelerates():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert {*trackers.TRACKERS, "all", "none"} == set(TRACKERS)
    assert set(trackers.TRACKERS) <= set(LOGGER_TYPE_TO_CLASS)


@pytest.mark.parametrize("report_to", ["wandb", "comet_ml", "all"])
def test_a_token_is_not_given_to_trackers_that_publish(monkeypatch, report_to):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("WANDB_API_KEY", "x")
    (told,) = texts(trackers.tracker_problems(report_to, "hf_secret"))
    assert f"must not be given with --report_to={report_to}" in told and "hf_secret" not in told
    assert trackers.tracker_problems(report_to, None) == []


def test_wandb_needs_a_login_unless_it_stays_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert "no login for wandb" in texts(trackers.tracker_problems("wandb", None))[0]
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert trackers.tracker_problems("wandb", None) == []


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = parse_args(["--pretrained_model_name_or_path=~/model", "--output_dir=~/out", "--class_data_dir=~/class"])
    assert [args.pretrained_model_name_or_path, args.output_dir, args.class_data_dir] == [
        str(tmp_path / name) for name in ("model", "out", "class")
    ]
