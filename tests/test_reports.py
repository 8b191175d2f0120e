"""Throughput meter, JSON-lines log, progress bars, contact sheets, result block, and the two pages in a real browser.

Run: pytest tests/test_reports.py. The browser tests need Debian's chromium (or CHROMIUM=path) and the playwright
package; without them they are skipped, saying so.
"""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sana_kit.reports.__main__ import main
from sana_kit.reports.charts import smooth, thin
from sana_kit.reports.contact_sheet import contact_sheet, font_for, wrap_text
from sana_kit.reports.gallery import write_gallery
from sana_kit.reports.report import figures, refresh_report, write_report
from sana_kit.reports.result_block import case_name, format_result_block
from sana_kit.runlog import JsonLinesLog, PhaseClock, ThroughputMeter, console_bar, load_run, read_log

ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------------------------------------------------------------
# Throughput


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


# ---------------------------------------------------------------------------------------------------------------------
# Contact sheets


def test_contact_sheet_places_every_image(tmp_path):
    colors = ["red", "lime", "blue", "yellow", "aqua"]
    images = [Image.new("RGB", (120, 120), color) for color in colors[:4]]
    images[1].save(tmp_path / "lime.png")
    images[1] = tmp_path / "lime.png"
    images.append(Image.new("L", (60, 120), 128))  # another size and mode
    labels = [
        "short",
        "a long label that needs several lines " * 3,
        "",
        "ein Häuschen",
        "averylongwordwithoutspaces" * 3,
    ]
    path = contact_sheet(
        images, labels, tmp_path / "sheets" / "sheet.png", 3, title="Title", row_labels=["first", "second"]
    )
    sheet = Image.open(path)
    found = {color: count for count, color in sheet.getcolors(100_000)}
    for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)):
        assert found[color] == 120 * 120
    assert found[(128, 128, 128)] >= 60 * 120
    assert [entry.name for entry in path.parent.iterdir()] == ["sheet.png"]  # no temporary file stays


def test_contact_sheet_labels_stay_in_their_column():

    for text in ("a word " * 40, "w" * 300, "一只小狗" * 30, "", "one"):
        font = font_for([text], 14)
        lines = wrap_text(text, font, 150, 3)
        assert 1 <= len(lines) <= 3 and all(font.getlength(line) <= 150 for line in lines)
        assert lines[-1].endswith("…") == (len(text) > 20)


def test_contact_sheet_names_every_problem(tmp_path):
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="3 labels for 2 images; 1 row labels for 2 rows"):
        contact_sheet([image, image], ["a"] * 3, tmp_path / "a.png", 1, row_labels=["x"])
    with pytest.raises(ValueError, match="no image"):
        contact_sheet([], None, tmp_path / "a.png", 1)
    with pytest.raises(ValueError, match="a.gif"):
        contact_sheet([image], None, tmp_path / "a.gif", 1)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Result block

SUMMARY = {
    "images_per_second": 28.7,
    "iterations_per_second": 0.4484,
    "final_loss": 0.123456,
    "duration_seconds": 1234.56,
    "batch_size": 8,
    "world_size": 8,
    "device": "Ascend910B3",
    "device_type": "npu",
}


def test_result_block_from_the_command_line_without_torch(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    code = (
        "import runpy, sys; sys.argv = ['reports', '--result-block', sys.argv[1]]\n"
        "try: runpy.run_module('sana_kit.reports', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'torch', 'numpy', 'PIL', 'jinja2', 'tqdm'} & set(sys.modules); assert not heavy, heavy"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    saved = (tmp_path / "Sana_lora_bs8_8p_npu.log").read_text()
    assert run.stdout == saved
    for line in (
        "Average it/s: 0.4484",
        "Final Performance images/sec: 28.700",
        "Final Train Loss: 0.123456",
        "E2E Training Duration sec: 1234.6",
        "CaseName: Sana_lora_bs8_8p_npu",
    ):
        assert line in saved.splitlines()


def test_result_block_of_a_run_too_short_or_unfinished(tmp_path, capsys):
    short = {**SUMMARY, "images_per_second": None, "iterations_per_second": None, "steady_state_note": "too short"}
    block = format_result_block({**short, "final_loss": float("nan")}, "Name")
    assert "Final Performance images/sec: n/a (too short)" in block and "Final Train Loss: n/a" in block
    assert case_name({**SUMMARY, "train_mode": "full", "device_type": "cuda"}) == "Sana_full_bs8_8p_cuda"
    assert main(["--result-block", str(tmp_path)]) == 2
    assert "summary.json: not there" in capsys.readouterr().err
    (tmp_path / "summary.json").write_text('{"final_loss": 1}')
    assert main(["--result-block", str(tmp_path)]) == 2
    assert "lacks batch_size, world_size, device_type" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# A run to report on


def make_run(folder, steps=60, resume_at=None, validations=(0, 30, 60), finish=True, **step_fields):
    """A training's output folder, written with the kit's own log; loss is 1 / step, of the resumed run 2 / step."""
    prompts = ["a red <b>square</b> & more", "a blue circle, with a rather long description that goes on and on"]
    config = {
        "pretrained_model_name_or_path": "Some/Model",
        "dataset_name": "images",
        "rank": 4,
        "learning_rate": 1e-4,
        "max_train_steps": steps,
        "hub_token": "hf_verysecret",
        "revision": None,
        "validation_prompt": prompts,
    }
    log = JsonLinesLog(folder / "train_log.jsonl")

    def validate(step):
        files = []
        for index, color in enumerate(("red", "blue")):
            path = folder / "validation" / f"step-{step:06d}" / f"{index:02d}-seed8.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), color if step else "gray").save(path)
            files.append(str(path.relative_to(folder)))
        log.write("validation", step=step, files=files, prompts=prompts, seeds=[8, 8])

    def train(first, last, factor):
        for step in range(first, last + 1):
            fields = {
                "loss": factor / step,
                "learning_rate": 1e-4,
                "images_per_second": 20.0,
                "peak_memory_bytes": 2**30,
                "mfu": None,
                "grad_norm": None,
                **step_fields,
            }
            log.write("step", step=step, epoch=0, **fields)
            if step in validations:
                validate(step)

    log.write("start", step=0, world_size=2, config=config)
    if 0 in validations:
        validate(0)
    train(1, steps, 1)
    log.write("checkpoint", step=steps // 2, path=f"checkpoint-{steps // 2}", seconds=0.5)
    log.write("warning", step=steps // 3, message="a caption was cut </script><script>alert(1)</script>")
    if resume_at is not None:
        log.write("resume", step=resume_at, world_size=4, config={**config, "learning_rate": 5e-5})
        train(resume_at + 1, steps, 2)
    if finish:
        log.write("end", step=steps, summary={**SUMMARY, "images_per_second": 19.5})
    log.close()
    return folder


def page_data(path):
    text = path.read_text(encoding="utf-8")
    return text, json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def test_a_resumed_run_counts_where_steps_overlap(tmp_path):
    make_run(tmp_path, resume_at=40)
    run = load_run(tmp_path / "train_log.jsonl")
    assert [line["step"] for line in run.steps] == list(range(1, 61))
    assert run.steps[39]["loss"] == pytest.approx(1 / 40) and run.steps[40]["loss"] == pytest.approx(2 / 41)
    assert run.repeated_steps == 20 and len(run.resumes) == 1 and run.world_size == 4
    assert [line["step"] for line in run.validations] == [0, 30, 60]  # the first run's step 60 was taken back
    text, data = page_data(write_report(tmp_path))
    marks = {(mark["step"], mark["text"].split(":")[0]) for mark in data["marks"]}
    assert {(40, "resume"), (20, "warning"), (30, "checkpoint"), (0, "validation")} <= marks
    assert "before: 0.0001" in text and "20 logged step(s) were made again" in text


def test_steps_after_the_resumed_one_are_taken_back_until_made_again(tmp_path):
    make_run(tmp_path, finish=False)
    with JsonLinesLog(tmp_path / "train_log.jsonl") as log:
        log.write("resume", step=20, world_size=1, config={})
        log.write("step", step=21, loss=7.0)
    run = load_run(tmp_path / "train_log.jsonl")
    assert [line["step"] for line in run.steps] == list(range(1, 22)) and run.steps[-1]["loss"] == 7.0
    assert [line["step"] for line in run.validations] == [0] and run.checkpoints == []
    assert run.repeated_steps == 40


def test_a_new_start_forgets_the_run_before(tmp_path):
    make_run(tmp_path, steps=60)
    make_run(tmp_path, steps=10, validations=(), finish=False)
    run = load_run(tmp_path / "train_log.jsonl")
    assert len(run.steps) == 10 and not run.validations and run.end is None and len(run.warnings) == 1


def test_page_keeps_secrets_and_markup_out(tmp_path):
    make_run(tmp_path)
    text, data = page_data(write_report(tmp_path))
    assert "verysecret" not in text and "(removed)" in text and "Not set: revision." in text
    assert "<b>square" not in text and "alert(1)</script>" not in text
    assert not re.findall(r'(?:src|<link[^>]*href)="(?!data:|#)[^"]*"', text)  # nothing is loaded from anywhere
    assert [chart["id"] for chart in data["charts"]] == [
        "loss",
        "learning_rate",
        "images_per_second",
        "peak_memory_bytes",
    ]
    assert "utilisation is not shown" in text


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), None])
def test_page_of_a_run_whose_loss_is_never_finite(tmp_path, loss):
    make_run(tmp_path, steps=5, validations=(), loss=loss)
    text, data = page_data(write_report(tmp_path))
    assert "not finite in 5 of 5" in text and "No validation images" in text
    assert "loss" not in [chart["id"] for chart in data["charts"]]


def test_page_with_bare_nan_tokens_and_damaged_lines(tmp_path):
    lines = [f'{{"event":"step","step":{n},"loss":{"NaN" if n == 3 else 0.5}}}' for n in range(1, 6)]
    (tmp_path / "train_log.jsonl").write_text("\n".join([*lines, "\0\0\0", '{"event":"st']))
    text, data = page_data(write_report(tmp_path))
    assert data["charts"][0]["series"][0]["y"] == [0.5, 0.5, None, 0.5, 0.5]
    assert "2 line(s) of the log cannot be read" in text and "no configuration" in text


def test_page_of_a_run_that_has_not_begun(tmp_path):
    with pytest.raises(ValueError, match="train_log.jsonl: not there"):
        write_report(tmp_path)
    with JsonLinesLog(tmp_path / "train_log.jsonl") as log:
        log.write("start", step=0, world_size=1, config={})
    assert "No step has been logged yet" in write_report(tmp_path).read_text()


def test_a_long_log_is_thinned_quickly_and_keeps_its_spikes(tmp_path):
    import time

    log = "".join(
        json.dumps({"event": "step", "step": n, "loss": 99.0 if n == 12_345 else 1.0 + n % 7 / 10, "time": n}) + "\n"
        for n in range(1, 20_001)
    )
    (tmp_path / "train_log.jsonl").write_text(log)
    write_report(tmp_path)  # imports
    begin = time.process_time()
    _, data = page_data(write_report(tmp_path))
    assert time.process_time() - begin < 1.0
    chart = data["charts"][0]
    assert len(chart["x"]) <= 1700 and chart["x"][0] == 1 and chart["x"][-1] == 20_000
    assert 12_345 in chart["x"] and max(chart["series"][0]["y"]) == 99.0


def test_the_smoothed_line_follows_a_falling_loss():
    losses = [1.0 / (1 + n / 5) for n in range(40)]
    smoothed = smooth(losses)
    assert all(min(losses) - 1e-9 <= value <= max(losses) + 1e-9 for value in smoothed)
    assert smoothed[-1] == pytest.approx(losses[-1]) and sum(a > b for a, b in zip(smoothed, losses, strict=True)) < 40
    assert max(abs(a - b) for a, b in zip(smoothed, losses, strict=True)) < 0.05


def test_smooth_and_thin():
    assert smooth([2.0] * 5, 10) == pytest.approx([2.0] * 5)  # no pull towards zero at the start
    assert smooth([1.0, None, 3.0], 1) == [1.0, None, 3.0]
    assert thin([None] * 100, 10) == [0, 20, 40, 60, 80, 99]
    assert thin([0.0, 1.0], 10) == [0, 1]


def test_images_shrink_until_the_page_is_small_enough(tmp_path, monkeypatch):
    import random

    monkeypatch.setattr("sana_kit.reports.thumbnails._IMAGE_BUDGET_BYTES", 600_000)  # of 6 MB, so that a few images do
    noise = random.Random(0)
    prompts = [f"prompt {n}" for n in range(3)]
    log = JsonLinesLog(tmp_path / "train_log.jsonl")
    for step in range(0, 140, 10):
        files = []
        for n in range(3):
            path = tmp_path / "validation" / f"{step}-{n}.png"
            path.parent.mkdir(exist_ok=True)
            pixels = noise.randbytes(128 * 128 * 3)
            Image.frombytes("RGB", (128, 128), pixels).resize((400, 400)).save(path, compress_level=1)
            files.append(f"validation/{path.name}")
        log.write("validation", step=step, files=files, prompts=prompts, seeds=[1] * 3)
    log.close()
    page = write_report(tmp_path)
    assert 200_000 < page.stat().st_size - 70_000 < 800_000  # base64 of at most 600 kB, and the page itself
    assert "12 steps of each" in page.read_text()
    cached = {file.name: file.stat().st_mtime_ns for file in (tmp_path / ".report_cache").iterdir()}
    assert len(cached) == 3 * 12
    write_report(tmp_path)
    again = {file.name: file.stat().st_mtime_ns for file in (tmp_path / ".report_cache").iterdir()}
    assert cached == again  # thumbnails are made once


def test_a_broken_image_is_told_not_fatal(tmp_path):
    make_run(tmp_path)
    (tmp_path / "validation" / "step-000030" / "00-seed8.png").write_bytes(b"not an image")
    assert "1 image(s) cannot be read: 00-seed8.png" in write_report(tmp_path).read_text()
    shutil.rmtree(tmp_path / "validation")
    assert "none of them is in its folder" in write_report(tmp_path).read_text()


def test_before_and_after_folders_come_first(tmp_path):
    make_run(tmp_path)
    for name, color in (("before", "gray"), ("after", "red")):
        folder = tmp_path / name
        folder.mkdir()
        with open(folder / "manifest.jsonl", "w") as manifest:
            for seed in (1, 2):
                Image.new("RGB", (32, 32), color).save(folder / f"{name}-{seed}.png")
                line = {"file": f"{name}-{seed}.png", "prompt": "an owl", "seed": seed}
                manifest.write(json.dumps(line) + "\n")
    text = write_report(tmp_path).read_text()
    assert text.count('<figure class="compare">') == 2 and "Before and after: an owl" in text
    (tmp_path / "before" / "manifest.jsonl").unlink()  # other names: nothing to pair, so the validation serves
    (tmp_path / "after" / "manifest.jsonl").unlink()
    text = write_report(tmp_path).read_text()
    assert text.count('<figure class="compare">') == 2 and "an owl" not in text


def test_small_images_are_embedded_as_they_are(tmp_path):
    make_run(tmp_path)
    text = write_report(tmp_path).read_text()
    raw = (tmp_path / "validation" / "step-000060" / "00-seed8.png").read_bytes()
    assert "data:image/png;base64," + base64.b64encode(raw).decode() in text
    assert 'class="small" style="width: 128px"' in text  # twice its size, pixel by pixel


def test_page_links_to_what_is_there_and_shows_training_images(tmp_path):
    make_run(tmp_path)
    (tmp_path / "README.md").write_text("card")
    samples = tmp_path / "training_images"
    samples.mkdir()
    Image.new("RGB", (64, 64), "red").save(samples / "0.png")
    (samples / "manifest.jsonl").write_text(
        json.dumps({"file": "0.png", "prompt": "a red field", "seed": None}) + "\n"
    )
    text = write_report(tmp_path).read_text()
    assert 'href="README.md">model card' in text and 'href="train_log.jsonl">log' in text
    assert "LoRA weights</a>" not in text  # not written in this run
    assert "<h2>Training images</h2>" in text and "a red field</figcaption>" in text


def test_settings_left_at_their_default_are_folded(tmp_path):
    with JsonLinesLog(tmp_path / "train_log.jsonl") as log:
        log.write("start", step=0, world_size=1, config={"rank": 8, "seed": 0, "given": ["rank"]})
    text = write_report(tmp_path).read_text()
    assert "1 settings left at their default" in text
    assert text.index("<dt>rank</dt>") < text.index("left at their default") < text.index("<dt>seed</dt>")


def test_figures_agree_with_log_and_summary(tmp_path):
    steps = [{"event": "step", "step": n, "loss": 1.0 / n, "time": 100.0 + 2 * n} for n in range(1, 11)]
    start = {"event": "start", "step": 0, "time": 100.0, "config": {"max_train_steps": 30}}
    path = tmp_path / "train_log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [start, *steps]))
    running = {row["name"]: row for row in figures(load_run(path), {"max_train_steps": 30})}
    assert running["Time left"]["value"] == "40 s" and running["Duration"]["value"] == "20 s"
    assert running["Loss"]["value"] == "0.1"
    end = {"event": "end", "step": 10, "time": 121.0, "summary": {"duration_seconds": 70.2}}
    path.write_text(path.read_text() + json.dumps(end) + "\n")
    ended = {row["name"]: row for row in figures(load_run(path), {"max_train_steps": 30})}
    assert ended["Duration"]["value"] == "1 min 10 s" and "Time left" not in ended


def test_two_runs_side_by_side(tmp_path, capsys):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", steps=30, resume_at=20)
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    page = tmp_path / "b" / "comparison.html"
    assert capsys.readouterr().out.strip() == str(page)
    text, data = page_data(page)
    loss = next(chart for chart in data["charts"] if chart["id"] == "loss")
    assert [series["label"] for series in loss["series"]] == ["a", "b"] and loss["x"][-1] == 60
    assert loss["series"][1]["y"][loss["x"].index(60)] is None  # b ended before
    assert "<th>max_train_steps</th><td>60</td><td>30</td>" in text and "<th>rank</th>" not in text
    assert main([str(tmp_path / "a"), str(tmp_path / "nowhere")]) == 2


def test_refresh_never_breaks_a_training_and_never_hides(tmp_path, capsys):
    blocked = tmp_path / "report.html"
    make_run(tmp_path, finish=False)
    blocked.mkdir()  # the page cannot be replaced
    log = JsonLinesLog(tmp_path / "train_log.jsonl")
    assert refresh_report(tmp_path, log, step=60) is None
    assert refresh_report(tmp_path, log, step=61) is None
    log.close()
    assert capsys.readouterr().err.count("report.html could not be written") == 1
    warnings = [line for line in read_log(log.path)[0] if line["event"] == "warning"]
    assert len(warnings) == 2 and warnings[-1]["step"] == 60
    blocked.rmdir()
    assert refresh_report(tmp_path) == blocked
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


# ---------------------------------------------------------------------------------------------------------------------
# Gallery


def make_images(folder, prompts, seeds, lora=None, skip=()):
    folder.mkdir(parents=True)
    with open(folder / "manifest.jsonl", "w") as manifest:
        for index, prompt in enumerate(prompts):
            for seed in seeds:
                if (prompt, seed) in skip:
                    continue
                name = f"{index:02d} {'lora' if lora else 'base'} #{seed}.png"
                Image.new("RGB", (96, 64), (200, 40 * index, seed)).save(folder / name)
                line = {
                    "file": name,
                    "prompt": prompt,
                    "negative_prompt": "",
                    "seed": seed,
                    "height": 64,
                    "width": 96,
                    "num_inference_steps": 28,
                    "guidance_scale": 2.0,
                    "seconds": 1.25,
                    "model": "Some/Model",
                    "lora_weights": lora,
                }
                manifest.write(json.dumps(line) + "\n")
    return folder


def test_gallery_pairs_by_prompt_and_seed(tmp_path):
    prompts = ["a red rose", "a cat with a hat", "an <i>owl</i>"]
    base = make_images(tmp_path / "base", prompts, [8, 23], skip={("a cat with a hat", 23)})
    lora = make_images(tmp_path / "lora", prompts, [8, 23], lora="x.safetensors")
    text = write_gallery(lora).read_text()
    assert {path.suffix for path in lora.iterdir()} == {".png", ".jsonl", ".html"}  # nothing else is left there
    assert text.count("<article") == 6 and "<i>owl" not in text and 'class="pair"' not in text
    assert "seed 23 · 96 × 64 · 28 steps · guidance 2 · 1.2 s" in text
    assert 'href="00%20lora%20%238.png"' in text
    text = write_gallery(lora, base).read_text()
    assert text.count('class="pair"') == 6 and text.count("no base image with this prompt") == 1
    (lora / "00 lora #8.png").unlink()
    assert "1 image(s) of the manifest are not in the folder" in write_gallery(lora).read_text()
    with pytest.raises(ValueError, match="manifest.jsonl: not there"):
        write_gallery(tmp_path)
    with pytest.raises(ValueError, match="base_dir"):
        write_gallery(lora, tmp_path)


def test_command_line_writes_pages_and_names_mistakes(tmp_path, capsys):
    make_run(tmp_path / "run")
    assert main([str(tmp_path / "run")]) == 0 and (tmp_path / "run" / "report.html").is_file()
    make_images(tmp_path / "images", ["x"], [1])
    assert main([str(tmp_path / "images"), "--gallery"]) == 0
    assert (tmp_path / "images" / "gallery.html").is_file()
    assert main([str(tmp_path / "nowhere")]) == 2
    for wrong in (["x", "--base", "y"], ["x", "--gallery", "--base", "nowhere"], ["x", "--gallery", "--before", "y"]):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2
    assert "--base=nowhere: no such folder" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture
def open_page(browser):
    """open_page(file, width, color_scheme): the page, offline; every console message and request is collected."""
    pages = []

    def open_file(file, width=1400, color_scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=color_scheme, offline=True
        )
        page = context.new_page()
        page.problems, page.requested = [], []
        page.on("console", lambda message: page.problems.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("request", lambda request: page.requested.append(request.url))
        page.goto(file.resolve().as_uri())
        page.wait_for_load_state("load")
        pages.append((context, page))
        return page

    yield open_file
    for context, page in pages:
        assert page.problems == []
        assert [url for url in page.requested if not url.startswith(("data:", "file:"))] == []
        assert len([url for url in page.requested if url.startswith("file:")]) == 1, "the page is not self-contained"
        context.close()


def overflow(page):
    """(pixels by which the page is wider than the window, elements that stick out of it)."""
    return page.evaluate(
        """() => {
          const out = [...document.querySelectorAll("main *, header *, footer *")].filter(e =>
            !e.closest(".strip") && !e.closest(".uplot") && e.getBoundingClientRect().right > innerWidth + 0.5);
          return [document.documentElement.scrollWidth - innerWidth, out.map(e => e.outerHTML.slice(0, 80))];
        }"""
    )


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_report_in_a_browser(tmp_path, open_page, width, color_scheme):
    make_run(tmp_path, resume_at=40)
    page = open_page(write_report(tmp_path), width, color_scheme)
    assert overflow(page) == [0, []]
    assert page.evaluate("document.documentElement.dataset.charts") == "4"
    for canvas in page.locator(".chart canvas").all():  # each chart is drawn, and within its card
        assert canvas.evaluate(
            "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((v, i) => i % 4 == 3 && v)"
        )
        assert canvas.bounding_box()["width"] <= width - 28
    assert all(page.evaluate("[...document.images].filter(i => i.src).map(i => i.complete && i.naturalWidth > 0)"))


def test_report_slider_shows_before_on_the_left_and_after_on_the_right(tmp_path, open_page):
    make_run(tmp_path)
    page = open_page(write_report(tmp_path))
    stage = page.locator(".compare .stage").first
    stage.scroll_into_view_if_needed()

    def colors():
        image = Image.open(io.BytesIO(stage.screenshot())).convert("RGB")
        y = image.height * 3 // 4
        return [image.getpixel((int(image.width * x), y)) for x in (0.1, 0.4, 0.6, 0.9)]

    def is_red(color):
        return color[0] > 200 and color[1] < 60

    assert [is_red(color) for color in colors()] == [False, False, True, True]
    box = stage.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 40, steps=4)
    page.mouse.up()
    assert float(page.locator(".compare input").first.input_value()) == pytest.approx(25, abs=2)
    assert [is_red(color) for color in colors()] == [False, True, True, True]
    page.keyboard.press("End")
    assert [is_red(color) for color in colors()] == [False, False, False, False]


def test_report_filter_marks_zoom_and_enlarged_images(tmp_path, open_page):
    make_run(tmp_path, resume_at=40, finish=False)
    page = open_page(write_report(tmp_path), 1000)
    assert page.locator(".badge").inner_text() == "not finished"
    page.fill("#filter", "RANK")
    assert (
        page.locator("[data-filter]:visible").count() == 1 and page.locator("#filter-count").inner_text() == "1 of 7"
    )
    page.fill("#filter", "")
    assert page.locator("[data-filter]:visible").count() == 7
    area = page.locator("#chart-loss .u-over")
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    page.mouse.move(box["x"] + box["width"] * (40 - 1) / 59, box["y"] + 60)
    page.wait_for_function("document.getElementById('mark-note').textContent.includes('Step 40: resume')")
    assert page.locator("#chart-loss .u-value").first.inner_text() == "40"
    page.locator(".strip img").first.click()
    assert page.locator("dialog").is_visible()
    page.locator("dialog img").click()
    assert not page.locator("dialog").is_visible()
    page.check("#reload")
    assert page.url.endswith("#reload")


@pytest.mark.parametrize("width", [400, 1400])
def test_gallery_in_a_browser(tmp_path, open_page, width):
    prompts = ["a red rose", "a cat with a hat", "a red cat", "averylongwordwithoutanyspaces" * 6]
    base = make_images(tmp_path / "base", prompts, [8, 23], skip={("a red rose", 8)})
    lora = make_images(tmp_path / "lora", prompts, [8, 23], lora="x.safetensors")
    page = open_page(write_gallery(lora, base), width, "dark" if width == 400 else "light")
    assert overflow(page) == [0, []]
    assert page.locator("article:visible").count() == 8
    page.fill("#filter", "Red cat")
    assert page.locator("article:visible").count() == 2
    assert set(page.locator("article:visible .prompt").all_inner_texts()) == {"a red cat"}
    page.fill("#filter", "zebra")
    assert page.locator("article:visible").count() == 0 and page.locator("#filter-count").inner_text() == "0 of 8"
    page.fill("#filter", "")
    pair = page.locator(".pair").nth(2)
    left, right = (image.bounding_box() for image in pair.locator("img").all())
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
