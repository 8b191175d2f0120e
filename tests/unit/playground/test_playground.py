"""The playground: images are the scripts', the page in a browser, what it refuses to serve."""

import json
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
import uvicorn
from helpers.drawing import write_lora
from helpers.inferring import images, infer

from sana_kit.errors import UserError
from sana_kit.playground import __main__ as command
from sana_kit.playground.config import parse_config
from sana_kit.playground.runs import describe_run, find_runs, served_file
from sana_kit.playground.server import make_app
from sana_kit.playground.studio import Studio

ASKED = {"prompt": "a dog", "seeds": [8], "steps": 2, "width": 96, "height": 64, "guidance": 2.0, "lora_scale": 0.5}


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    return write_lora(tiny_model, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def studio(tiny_model, adapter, tmp_path_factory):
    """A loaded studio with an adapter; its images go to a folder of its own."""
    folder = tmp_path_factory.mktemp("drawn")
    flags = ["--model_path", tiny_model, "--lora_weights", adapter, "--output_path", folder, "--device", "cpu"]
    made = Studio(parse_config([str(word) for word in flags]).inference())
    made.load()
    yield made
    made.close()


def write_run(folder, *, ended=True):
    """The log and the page of a training."""
    folder.mkdir(parents=True)
    now = time.time()
    lines = [{"event": "start", "time": now, "world_size": 2, "config": {"max_train_steps": 20}}]
    lines += [{"event": "step", "step": step, "time": now + step, "loss": 1 / step} for step in (5, 10)]
    lines += [{"event": "end", "time": now + 11, "summary": {"duration_seconds": 11.0}}] if ended else []
    (folder / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "report.html").write_text("<h1>the report</h1>")
    return folder


@pytest.fixture(scope="module")
def address(studio, tmp_path_factory):
    """Address of a server with the studio and one training."""
    places = tmp_path_factory.mktemp("places")
    write_run(places / "my run", ended=False)
    listener = command.listen(0)
    server = uvicorn.Server(uvicorn.Config(make_app(studio, [str(places)]), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=30)
    assert not thread.is_alive()
    listener.close()


def kinds(events):
    return [event["kind"] for event in events]


def test_images_are_those_of_the_scripts(studio, tiny_model, adapter, tmp_path):
    drawing = studio.check({**ASKED, "side": "both"})
    events = list(studio.draw(drawing))
    assert kinds(events) == ["step", "step", "image", "step", "step", "image", "done"]
    assert [event["done"] for event in events if event["kind"] == "step"] == [1, 2, 3, 4]
    # the adapter of `write_lora` does not say how it was trained: the usual instruction
    flags = ("--prompt", "a dog", "--seeds", 8, "--complex_human_instruction", "default")
    assert infer(tiny_model, tmp_path, *flags) == 0
    assert infer(tiny_model, tmp_path, *flags, "--lora_weights", adapter, "--lora_scale", 0.5) == 0
    drawn = images(studio.folder.path)
    assert images(tmp_path).items() <= drawn.items()
    by_side = {event["side"]: event["file"] for event in events if event["kind"] == "image"}
    assert drawn[by_side["base"]] != drawn[by_side["lora"]]


def test_what_is_there_is_not_drawn_again_and_scales_leave_no_trace(studio):
    first = list(studio.draw(studio.check({**ASKED, "seeds": [5], "side": "both"})))
    scaled = list(studio.draw(studio.check({**ASKED, "seeds": [5], "side": "both", "lora_scale": 1.5})))
    assert kinds(scaled) == ["image", "step", "step", "image", "done"]  # the base image was there
    files = [event["file"] for event in first if event["kind"] == "image"]
    before = [(studio.folder.path / file).read_bytes() for file in files]
    for file in files:
        (studio.folder.path / file).unlink()
    again = list(studio.draw(studio.check({**ASKED, "seeds": [5], "side": "both"})))
    assert kinds(again).count("step") == 4
    assert [(studio.folder.path / file).read_bytes() for file in files] == before


def test_closing_a_drawing_ends_it_and_the_next_one_runs(studio):
    drawing = studio.draw(studio.check({**ASKED, "seeds": [77], "steps": 500, "side": "base"}))
    assert next(drawing)["kind"] == "step"
    drawing.close()
    following = list(studio.draw(studio.check({**ASKED, "seeds": [78], "side": "base"})))
    assert kinds(following)[-2:] == ["image", "done"]


def test_all_problems_of_a_request_are_told_at_once(studio):
    wrong = {"prompt": " ", "seeds": ["x"], "steps": 0, "width": 1.5, "height": True, "guidance": "2", "side": "up"}
    with pytest.raises(UserError) as told:
        studio.check(wrong)
    fields = [problem.field for problem in told.value.problems]
    assert fields == ["prompt", "steps", "width", "height", "guidance", "seeds", "side"]
    with pytest.raises(UserError, match="multiples of"):
        studio.check({**ASKED, "width": 97})
    with pytest.raises(UserError):
        studio.check({**ASKED, "guidance": float("nan")})


def test_a_page_without_an_adapter_draws_the_base_only(tiny_model, tmp_path):
    alone = Studio(parse_config(["--model_path", str(tiny_model), "--output_path", str(tmp_path)]).inference())
    assert alone.check({**ASKED, "lora_scale": 1.0, "side": "base"}).images == 1
    with pytest.raises(UserError, match="without an adapter"):
        alone.check({**ASKED, "side": "both"})


def test_weights_that_an_adapter_cannot_leave_again_are_refused(tiny_model, adapter, tmp_path):
    flags = ["--model_path", tiny_model, "--output_path", tmp_path, "--fused_blocks", "auto"]
    alone = Studio(parse_config([str(word) for word in flags]).inference())
    alone.load()
    assert kinds(alone.draw(alone.check({**ASKED, "side": "base"})))[-2:] == ["image", "done"]
    alone.close()
    with pytest.raises(UserError, match="fused_blocks=auto: the page takes the adapter in and out"):
        Studio(parse_config([str(word) for word in [*flags, "--lora_weights", adapter]]).inference())


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


def status(url, headers=None, data=None):
    request = urllib.request.Request(url, headers=headers or {}, data=data)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_other_hosts_forms_and_paths_are_refused(address, studio):
    assert status(address) == 200
    assert status(address, {"Host": "elsewhere.example"}) == 400
    body = json.dumps(ASKED).encode()
    assert status(address + "/api/draw", {"Content-Type": "text/plain"}, body) == 415
    assert status(address + "/api/draw", {"Content-Type": "application/json"}, b"{") == 422
    assert status(address + "/api/draw", {"Content-Type": "application/json"}, b" " * 200_000) == 413
    for path in ("/images/..%2F..%2Fetc%2Fpasswd", "/images/manifest.jsonl", "/runs/99/report.html"):
        assert status(address + path) == 404, path


@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_in_a_browser(address, browser, width):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme="dark")
    page = context.new_page()
    problems, requested = [], []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requested.append(request.url))
    page.goto(address)
    page.fill("#prompt", f"a dog <b>{width}</b>")
    page.fill("#seeds", "3 4")
    page.fill("#steps", "2")
    page.fill("#width", "97")
    page.click("#draw")
    page.wait_for_selector("html[data-drawn='1']")
    assert "multiples of" in page.inner_text("#problems")
    page.fill("#width", "64")
    page.fill("#height", "64")
    page.click("#draw")
    page.wait_for_selector("html[data-drawn='2']")
    assert page.inner_text("#status").startswith("4 images in") and not page.is_visible("#problems")
    assert page.locator(".seed").count() == 2 and page.locator("figure[data-side=lora]").count() == 2
    page.evaluate("Promise.all([...document.images].map(image => image.decode()))")  # they may still be loading
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth === 64)")
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") == 0
    page.wait_for_selector(".run")
    assert "my run" in page.inner_text(".run h3") and "running" in page.inner_text(".run h3")
    with context.expect_page() as opened:
        page.click(".run a")
    assert opened.value.inner_text("h1") == "the report"
    assert problems == [] and {url.split("/")[2] for url in requested} == {address.split("/")[2]}
    context.close()


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
