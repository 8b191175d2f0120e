"""The measure of copies: what an eye takes for one image, and what it does not."""

import io
import json

import numpy as np
import pyarrow.parquet as parquet
import pytest
from helpers import KIT
from PIL import Image, ImageEnhance, ImageFilter

from sana_kit.reports.memorisation import COPY, copies_told, nearest_images, small_copy
from sana_kit.reports.report import write_report


@pytest.fixture(scope="module")
def drawings():
    """60 line drawings of one style, 128 px: many alike in ground and colours."""
    table = parquet.read_table(KIT / "sana_kit/quickstart_assets/style_dataset/data/train-001.parquet")
    return [Image.open(io.BytesIO(row["bytes"])).convert("RGB") for row in table["image"].to_pylist()]


def zoomed(image, share):
    width, height = image.size
    x, y = width * share / 2, height * share / 2
    return image.resize(image.size, Image.Resampling.BILINEAR, box=(x, y, width - x, height - y))


def moved(image, share):
    pixels = np.roll(np.asarray(image), (round(image.height * share / 2), round(image.width * share)), (0, 1))
    return Image.fromarray(pixels)


def noisy(image):
    noise = np.random.default_rng(0).normal(0, 15, (*image.size[::-1], 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def bad_jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=20)
    return Image.open(file)


CHANGES = {
    "the image itself": lambda image: image,
    "other size": lambda image: image.resize((200, 64)).resize((64, 64)),
    "moved by 4 %": lambda image: moved(image, 0.04),
    "zoomed by 10 %": lambda image: zoomed(image, 0.1),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.88),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.8),
    "paler": lambda image: ImageEnhance.Color(image).enhance(0.6),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(2)),
    "noisy": noisy,
    "JPEG of quality 20": bad_jpeg,
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_found(drawings, change):
    """All but two of 20 among 60, and the image that it is a copy of is named."""
    trained = np.stack([small_copy(image) for image in drawings])
    chosen = range(0, 60, 3)
    copies = np.stack([small_copy(CHANGES[change](drawings[number])) for number in chosen])
    found = nearest_images(copies, trained, range(60))
    assert sum(near.is_copy and near.index == number for number, near in zip(chosen, found, strict=True)) >= 18
    assert all(near.mirrored for near in found) or change != "mirrored"
    if change == "the image itself":
        assert max(near.ratio for near in found) < 0.01


def test_another_drawing_of_the_style_is_no_copy(drawings):
    """Each held against all others: two hearts, which differ in their shade alone, are the only ones taken."""
    trained = np.stack([small_copy(image) for image in drawings])
    ratios = []
    for number in range(60):
        others = [other for other in range(60) if other != number]
        (near,) = nearest_images(trained[number : number + 1], trained[others], others)
        ratios.append(near.ratio)
    assert sum(ratio < COPY for ratio in ratios) == 2
    assert np.median(ratios) > 0.9


def test_crops_and_repeats_of_an_image_are_no_scale_for_it(drawings):
    """Eight near copies of one image would make every copy look far away."""
    trained = np.stack([small_copy(image) for image in drawings[:10]])
    crops = np.stack([small_copy(zoomed(drawings[0], share)) for share in np.linspace(0.01, 0.05, 8)])
    whole, image_of = np.concatenate([trained, crops]), [*range(10), *[0] * 8]
    generated = np.stack([small_copy(moved(drawings[0], 0.03)), small_copy(drawings[20])])
    copy, other = nearest_images(generated, whole, image_of)
    assert copy.is_copy and image_of[copy.index] == 0
    assert not other.is_copy


def test_one_image_flat_images_and_noise(drawings):
    one = small_copy(drawings[0])[None]
    flat = np.full_like(one, 128)
    noise = np.random.default_rng(1).integers(0, 256, one.shape, dtype=np.uint8)
    found = nearest_images(np.concatenate([one, small_copy(drawings[5])[None], flat, noise]), one, [0])
    assert [near.is_copy for near in found] == [True, False, False, False]
    assert not nearest_images(one, flat, [0])[0].is_copy
    assert all(np.isfinite(near.ratio) for near in found)


def test_the_page_shows_each_image_beside_its_training_image_and_marks_copies(tmp_path):
    rows = []
    for number, copy in enumerate([True, False, False]):
        for name in (f"drawn{number}.png", f"nearest{number}.png"):
            Image.new("RGB", (64, 64), (number, 0, 0)).save(tmp_path / name)
        row = {"file": f"drawn{number}.png", "prompt": f"<prompt {number}>", "seed": 3, "ratio": 0.25 + number / 2}
        row |= {"copy": copy, "mirrored": number == 1, "training_image": f"cat{number}.jpg", "caption": "a cat"}
        rows.append({**row, "nearest": f"nearest{number}.png" if number < 2 else None})
    found = {"copies": 1, "images": 3, "training_crops": 7, "only_some_of_them": False, "copy_below": 0.5}
    lines = [{"event": "start", "step": 0, "time": 0, "config": {}}, {"event": "step", "step": 1, "loss": 1.0}]
    lines.append({"event": "memorisation", "step": 1, **found, "rows": rows})
    (tmp_path / "train_log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = write_report(tmp_path).read_text()
    shown = page.split("<h2>Nearest training images</h2>")[1].split("<h2>")[0]
    assert shown.count('<figure class="card copy">') == 1 and shown.count('<figure class="card">') == 1
    assert "<strong>0.25 copy</strong> &lt;prompt 0&gt;" in shown and "<strong>0.75</strong> &lt;prompt 1&gt;" in shown
    assert "cat1.jpg, mirrored: a cat" in shown and "out of 7 crops." in shown
    assert "1 of 3 validation images is a copy of a training image. So the run has" in page.split("<h2>")[0]
    rows[0]["expected"] = True
    lines[-1] |= {"expected_copies": 1, "rows": rows}
    (tmp_path / "train_log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = write_report(tmp_path).read_text()
    shown = page.split("<h2>Nearest training images</h2>")[1].split("<h2>")[0]
    assert '<figure class="card copy">' not in shown and "0.25 copy, expected" in shown
    assert "so this is expected" in shown and "is a copy" not in page.split("<h2>")[0]
    with open(tmp_path / "train_log.jsonl", "a") as log:  # a resumed run has not been compared yet
        log.write("\n" + json.dumps({"event": "resume", "step": 1}))
    assert "Nearest training images" not in write_report(tmp_path).read_text()


@pytest.mark.parametrize("copies, expected", [(1, 0), (3, 0), (1, 1), (2, 2), (3, 1), (3, 2)])
def test_copies_are_told_in_whole_sentences(copies, expected):
    told = copies_told(copies, expected, 4)
    verb = "is a copy of a training image" if copies == 1 else "are copies of training images"
    assert told.startswith(f"{copies} of 4 validation images {verb}. ")
    assert ("by heart" in told) == (copies > expected)
    assert ("expected" in told) == (expected > 0)
