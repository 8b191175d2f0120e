"""The log of JSON lines, as it is written and read back."""

import json

import pytest

from sana_kit.runlog import JsonLinesLog, read_log


def test_log_writes_whole_strict_lines_on_the_main_process_only(tmp_path):
    path = tmp_path / "out" / "train_log.jsonl"
    with JsonLinesLog(path, main_process=False) as log:
        log.write("start", step=0)
    assert not path.exists()
    with JsonLinesLog(path) as log:
        log.write("step", step=1, loss=float("nan"), learning_rate=1e-4, nested={"values": [1.0, float("inf")]})
        line = path.read_text()  # there at once, not at close
    assert line.endswith("\n")

    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    read = json.loads(line, parse_constant=refuse)
    assert read["loss"] is None and read["nested"] == {"values": [1.0, None]} and read["learning_rate"] == 1e-4
    assert read["non_finite"] == {"loss": "nan", "nested.values[1]": "inf"}


@pytest.mark.parametrize(
    ("tail", "cut"),
    [('{"event":"step","st', True), ('{"event":"step","step":3}', False), ("17", True), ("", False)],
)
def test_log_survives_a_kill_in_the_middle_of_a_line(tmp_path, tail, cut):
    path = tmp_path / "train_log.jsonl"
    whole = '{"event":"step","step":1}\n{"event":"step","step":2}\n'
    path.write_text(whole + tail)
    with JsonLinesLog(path) as log:
        log.write("resume", step=2)
    lines, damaged = read_log(path)
    assert damaged == 0
    assert path.read_text().startswith(whole)
    events = [line["event"] for line in lines]
    assert events == ["step", "step"] + (["warning"] if cut else ["step"] if tail else []) + ["resume"]
    if cut:
        assert lines[2]["step"] == 2 and tail in lines[2]["message"].replace("\\", "")


def test_log_cuts_a_half_line_longer_than_a_block(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"event":"step","step":5}\n{"x": "' + "y" * 200_000)
    JsonLinesLog(path).close()
    lines, damaged = read_log(path)
    assert damaged == 0 and [line["event"] for line in lines] == ["step", "warning"]
    assert lines[1]["step"] == 5 and len(lines[1]["message"]) < 400


def test_log_that_is_one_half_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"event":"sta')
    JsonLinesLog(path).close()
    assert [line["event"] for line in read_log(path)[0]] == ["warning"]
