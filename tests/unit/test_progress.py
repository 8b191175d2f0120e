"""Progress bars, on a terminal and without one."""

import io
import re

from sana_kit.progress import console_bar


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


def test_a_phase_that_is_over_before_its_time_leaves_no_line(monkeypatch):
    now, shown = [100.0], {}
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    for seconds in (1.0, 3.0):
        file = io.StringIO()
        with console_bar(2, "Reading images", unit="image", file=file, after=2.0) as bar:
            bar.update()
            now[0] += seconds
            bar.update()
        shown[seconds] = file.getvalue()
    assert shown[1.0] == "" and shown[3.0].startswith("Reading images: 2/2 images ")
