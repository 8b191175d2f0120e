"""The playground with a model and a server: images are the scripts', the page in a browser, what is refused."""

import json
import threading
import urllib.error
import urllib.request

import pytest
import uvicorn
from helpers.drawing import write_lora
from helpers.inferring import images, infer
from helpers.playground import ASKED, write_run

from sana_kit.errors import UserError
from sana_kit.playground import __main__ as command
from sana_kit.playground.config import parse_config
from sana_kit.playground.server import make_app
from sana_kit.playground.studio import Studio


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


def test_weights_that_an_adapter_cannot_leave_again_are_refused(tiny_model, adapter, tmp_path):
    flags = ["--model_path", tiny_model, "--output_path", tmp_path, "--fused_blocks", "auto"]
    alone = Studio(parse_config([str(word) for word in flags]).inference())
    alone.load()
    assert kinds(alone.draw(alone.check({**ASKED, "side": "base"})))[-2:] == ["image", "done"]
    alone.close()
    with pytest.raises(UserError, match="fused_blocks=auto: the page takes the adapter in and out"):
        Studio(parse_config([str(word) for word in [*flags, "--lora_weights", adapter]]).inference())


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
