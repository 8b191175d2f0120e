"""The two pages in a real browser, and the result block from a shell.

The browser tests need Debian's chromium (or CHROMIUM=path) and the playwright package; else they are skipped.
"""

import io
import json
import sys

import pytest
from helpers import WITHOUT_TORCH, run
from helpers.report_runs import SUMMARY, make_images, make_run
from PIL import Image

from sana_kit.reports.gallery import write_gallery
from sana_kit.reports.report import write_report


def test_result_block_from_the_command_line_without_torch(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    done = run([sys.executable, WITHOUT_TORCH, "sana_kit.reports", "--result-block", tmp_path], fresh=True)
    assert done.returncode == 0, done.stderr
    saved = (tmp_path / "Sana_lora_bs8_8p_npu.log").read_text()
    assert done.stdout == saved
    for line in (
        "Average it/s: 0.4484",
        "Final Performance images/sec: 28.700",
        "Final Train Loss: 0.123456",
        "E2E Training Duration sec: 1234.6",
        "CaseName: Sana_lora_bs8_8p_npu",
    ):
        assert line in saved.splitlines()


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


def test_a_logarithmic_axis_ends_next_to_the_losses(tmp_path, open_page):
    """From 1 down to 1/60: the axis is from 0.01 to 1, not to 10, and its ticks begin at a number of one digit."""
    make_run(tmp_path)
    page = open_page(write_report(tmp_path))
    low, high = map(float, page.locator("#chart-loss").get_attribute("data-range").split(","))
    assert (low, high) == (0.01, 1)


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
