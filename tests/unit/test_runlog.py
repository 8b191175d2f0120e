"""Throughput meter, phases, JSON-lines log, progress bars."""

import io
import json
import re

import pytest

from sana_kit.runlog import JsonLinesLog, PhaseClock, ThroughputMeter, console_bar, read_log


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_phases_of_a_start_add_up():
    now = [10.0]
    phases = PhaseClock(started=8.0, clock=lambda: now[0])
    phases.mark("imports")
    now[0] = 13.5
    phases.mark("model")
    now[0] = 14.0
    phases.mark("imports")
    assert phases.seconds == {"imports": 2.5, "model": 3.5}
    assert str(phases) == "6.0 s: imports 2.5, model 3.5"


def test_meter_leaves_out_pauses_and_the_first_lap():
    clock = Clock()
    meter = ThroughputMeter(images_per_step=16, clock=clock)
    meter.start()
    clock.now += 50  # warm-up: the first step takes 50 s
    meter.step()
    assert meter.lap() == pytest.approx(16 / 50)
    for _ in range(4):
        clock.now += 2
        meter.step()
        with meter.paused():
            clock.now += 1000  # a validation ...
            with meter.paused():
                clock.now += 500  # ... that saves a checkpoint
    assert meter.lap() == pytest.approx(8.0)
    assert meter.lap() is None  # no step in between
    clock.now += 4
    meter.step(2)
    assert meter.lap() == pytest.approx(8.0)
    assert meter.steady_reason is None
    assert meter.steady_images_per_second() == pytest.approx(8.0)
    assert meter.steady_steps_per_second() == pytest.approx(0.5)
    assert meter.steps == 7
    assert meter.steps_per_second == pytest.approx(7 / 62)
    assert meter.images_per_second == pytest.approx(16 * 7 / 62)


def test_meter_says_why_a_short_run_has_no_steady_state():
    clock = Clock()
    meter = ThroughputMeter(images_per_step=2, clock=clock)
    assert meter.steps_per_second is None
    with pytest.raises(RuntimeError, match="start"):
        meter.step()
    meter.start()
    assert meter.steady_images_per_second() is None and "too short" in meter.steady_reason
    clock.now += 1
    meter.step(3)
    meter.lap()
    assert meter.steady_images_per_second() is None and "3 step(s) in 1 lap(s)" in meter.steady_reason
    assert meter.images_per_second == pytest.approx(6.0)
    with pytest.raises(ValueError, match="images_per_step=0"):
        ThroughputMeter(0)


def test_a_failing_pause_still_ends():
    clock = Clock()
    meter = ThroughputMeter(1, clock)
    meter.start()
    with pytest.raises(KeyError), meter.paused():
        clock.now += 9
        raise KeyError
    clock.now += 1
    assert meter.active_seconds == pytest.approx(1.0)


# ---------------------------------------------------------------------------------------------------------------------
# JSON lines


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


# ---------------------------------------------------------------------------------------------------------------------
# Console


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bar_writes_plain_whole_lines_without_a_terminal():
    file = io.StringIO()
    with console_bar(4, "Training", images_per_unit=16, initial=1, file=file, plain_interval=0.0, leave=False) as bar:
        for _ in range(3):
            bar.update()
            bar.set_postfix(loss="0.5", refresh=False)
    text = file.getvalue()
    assert "\r" not in text and "\x1b" not in text and text.endswith("\n")
    last = text.splitlines()[-1]
    assert re.match(
        r"Training: 4/4 steps \[\d\d:\d\d<\d\d:\d\d, [\d.e+]+ steps/s, [\d.e+]+ images/s, loss=0.5\]$", last
    ), last


def test_plain_bar_keeps_its_interval_and_always_tells_the_end():
    file = io.StringIO()
    with console_bar(1000, "Encoding", unit="image", file=file, plain_interval=3600) as bar:
        for _ in range(1000):
            bar.update()
    assert len(file.getvalue().splitlines()) == 1 and "1000/1000 images" in file.getvalue()
    assert "images/s]" in file.getvalue()


def test_postfix_writes_no_lines_of_its_own_and_inner_bars_move_no_cursor():
    file = io.StringIO()
    with console_bar(9, "Training", file=file, plain_interval=3600) as bar:
        for _ in range(9):
            bar.update()
            bar.set_postfix(loss=0.5)
            with console_bar(2, "Validation", unit="image", file=file, plain_interval=3600) as inner:
                inner.update(2)
    lines = file.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines] == ["Validation"] * 9 + ["Training"]
    assert "\x1b" not in file.getvalue() and "\r" not in file.getvalue() and "" not in lines


def test_a_pause_counts_neither_in_the_rate_nor_in_the_time_left(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    file = io.StringIO()
    with console_bar(100, "Training", file=file, plain_interval=0.0) as bar:
        for _ in range(50):
            now[0] += 2.0
            bar.update()
            with bar.paused():
                now[0] += 30.0
    assert file.getvalue().splitlines()[-1].startswith("Training: 50/100 steps [01:40<01:40, 2 s/step]")


def test_bar_redraws_on_a_terminal_and_is_silent_elsewhere():
    terminal, other = Terminal(), Terminal()
    with console_bar(2, "Training", images_per_unit=4, file=terminal) as bar:
        bar.update(2)
    assert "\r" in terminal.getvalue() and "100%" in terminal.getvalue() and "images/s" in terminal.getvalue()
    with console_bar(2, "Training", file=other, main_process=False) as bar:
        with bar.paused():
            bar.update(2)
        bar.set_postfix(loss=1)
    assert other.getvalue() == ""
