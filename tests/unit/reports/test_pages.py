"""The report and gallery pages and the result block, as text; integration/test_report_pages.py has the browser."""

import base64
import json
import re
import shutil

import pytest
from helpers.report_runs import SUMMARY, make_images, make_run, page_data
from PIL import Image

from sana_kit.playground.runs import describe_run
from sana_kit.reports.__main__ import main
from sana_kit.reports.charts import smooth, thin
from sana_kit.reports.gallery import write_gallery
from sana_kit.reports.report import figures, refresh_report, write_report
from sana_kit.reports.result_block import case_name, format_result_block
from sana_kit.runlog import JsonLinesLog, load_run, read_log


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


def test_what_a_run_made_stands_behind_its_result_block(tmp_path, capsys):
    made = ["LoRA: out/pytorch_lora_weights.safetensors", "draw with it: python infer.py --prompt '猫'"]
    for summary, last in (({**SUMMARY, "made": made}, made[-1]), (SUMMARY, "CaseName: Sana_lora_bs8_8p_npu")):
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        assert main(["--result-block", str(tmp_path)]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == last
        assert main(["--result-block", "--block-only", str(tmp_path)]) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith("CaseName: ")


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

    monkeypatch.setattr("sana_kit.reports.thumbnails._IMAGE_BUDGET_BYTES", 400_000)  # of 6 MB, so that a few images do
    noise = random.Random(0)
    prompts = [f"prompt {n}" for n in range(2)]
    log = JsonLinesLog(tmp_path / "train_log.jsonl")
    for step in range(0, 140, 10):
        files = []
        for n in range(2):
            path = tmp_path / "validation" / f"{step}-{n}.png"
            path.parent.mkdir(exist_ok=True)
            pixels = noise.randbytes(128 * 128 * 3)
            Image.frombytes("RGB", (128, 128), pixels).resize((400, 400)).save(path, compress_level=1)
            files.append(f"validation/{path.name}")
        log.write("validation", step=step, files=files, prompts=prompts, seeds=[1] * 2)
    log.close()
    page = write_report(tmp_path)
    assert 130_000 < page.stat().st_size - 70_000 < 535_000  # base64 of at most 400 kB, and the page itself
    assert "12 steps of each" in page.read_text()
    cached = {file.name: file.stat().st_mtime_ns for file in (tmp_path / ".report_cache").iterdir()}
    assert len(cached) == 2 * 12
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


def test_a_run_that_was_stopped_is_not_called_finished(tmp_path):
    make_run(tmp_path)
    assert '<span class="badge done">finished</span>' in write_report(tmp_path).read_text()
    log = tmp_path / "train_log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[-1].setdefault("summary", {})["interrupted_by_signal"] = 2
    log.write_text("\n".join(map(json.dumps, lines)))
    assert '<span class="badge running">stopped</span>' in write_report(tmp_path).read_text()
    assert describe_run(tmp_path)["state"] == "stopped"
