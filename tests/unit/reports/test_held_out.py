"""The held-out loss on the report page: its curves, and the sentence where it rises."""

import json

import pytest

from sana_kit.reports.charts import chart_series, over_fitting
from sana_kit.runlog import load_run


def run_of(tmp_path, losses, half_width=0.05, ema=False):
    lines = [{"event": "start", "step": 0, "time": 0, "config": {}}]
    for number, loss in enumerate(losses):
        measured = {"loss": loss, "half_width": half_width, "bands": [loss, loss, loss, loss]}
        line = {"event": "held_out", "step": 10 * number, "time": number, "raw": measured}
        lines.append({**line, "ema": measured} if ema else line)
    (tmp_path / "train_log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return load_run(tmp_path / "train_log.jsonl")


def test_the_held_out_loss_has_its_curves(tmp_path):
    headings, charts, _ = chart_series(run_of(tmp_path, [3.0, 2.0, 1.0], ema=True))
    assert [heading["id"] for heading in headings] == ["held_out", "held_out_bands"]
    assert [line["label"] for line in charts[0]["series"]] == ["weights", "their average"]
    assert charts[0]["series"][0]["y"] == [3.0, 2.0, 1.0] and charts[0]["x"] == [0, 10, 20]
    assert len(charts[1]["series"]) == 4


@pytest.mark.parametrize(
    ("losses", "told"), [([3.0, 1.0, 1.2], True), ([3.0, 1.0, 1.02], False), ([3.0, 2.0, 1.0], False), ([1, 2], False)]
)
def test_over_fitting_is_told_where_the_loss_rises_beyond_chance(tmp_path, losses, told):
    sentence = over_fitting(run_of(tmp_path, losses))
    assert (sentence is not None) == told
    assert not told or ("lowest at step 10" in sentence and "best/" in sentence)


def test_a_resume_takes_back_what_was_measured_after_it(tmp_path):
    run_of(tmp_path, [3.0, 2.0, 1.0])
    with open(tmp_path / "train_log.jsonl", "a") as log:
        log.write("\n" + json.dumps({"event": "resume", "step": 10, "time": 9}))
    assert [line["step"] for line in load_run(tmp_path / "train_log.jsonl").held_out] == [0, 10]
