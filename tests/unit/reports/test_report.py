"""What the report says of a run beside its curves."""

import json

from sana_kit.reports.report import PagePace, _choose, circumstances, config_items, figures, write_report
from sana_kit.runlog import load_run


def write_log(folder, losses, **config):
    lines = [{"event": "start", "time": 0.0, "world_size": 2, "config": config}]
    lines += [{"event": "step", "step": step, "time": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    (folder / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load_run(folder / "train_log.jsonl")


def test_how_it_was_run_stands_apart_from_the_settings(tmp_path):
    config = {"rank": 4, "command": "python x.py", "host": "box", "versions": {"python": "3.11", "torch": "2.13"}}
    run = write_log(tmp_path, [1.0], given=["rank"], **config)
    told = {row["name"]: row["value"] for row in circumstances(run.configs[-1])}
    assert told == {"command": "python x.py", "host": "box", "versions": "python 3.11, torch 2.13"}
    assert [row["name"] for part in config_items(run.configs) for row in part] == ["rank"]
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "python 3.11, torch 2.13" in page and "0 settings left" not in page
    assert circumstances({}) == []


def test_the_loss_is_shown_with_the_mean_of_the_latest(tmp_path):
    run = write_log(tmp_path, [9.0, *[1.0, 3.0] * 5])
    (loss,) = [row for row in figures(run, {}) if row["name"] == "Loss"]
    assert (loss["value"], loss["note"]) == ("3", "2.2 on average of the last 5")
    (tmp_path / "one").mkdir()
    (loss,) = [row for row in figures(write_log(tmp_path / "one", [2.5]), {}) if row["name"] == "Loss"]
    assert loss["note"] == ""


def test_of_many_pairs_each_prompt_is_shown_once():
    pairs = [{"title": f"prompt {number // 2}", "seed": number % 2} for number in range(22)]
    assert [(pair["title"], pair["seed"]) for pair in _choose(pairs)] == [(f"prompt {n}", 0) for n in range(11)]
    assert _choose(pairs[:12]) == pairs[:12]
    assert len(_choose([{"title": str(number)} for number in range(40)])) == 12


def test_the_page_is_written_once_a_minute_and_costs_a_hundredth():
    pace = PagePace()
    assert pace.due(0.0)
    pace.written(10.0, 10.2)
    assert not pace.due(70.1) and pace.due(70.2)
    pace.written(100.0, 103.0)  # a page of many images
    assert not pace.due(402.9) and pace.due(403.0)
