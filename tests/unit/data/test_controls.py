"""Control images of a ControlNet's training: found by name or column, and transformed as their images are."""

import numpy as np
import pytest
import tiny
from PIL import Image, ImageOps

from sana_kit.data.controls import ControlKind, find_controls, load_controls
from sana_kit.data.discover import find_images, load_images
from sana_kit.data.image_set import concat
from sana_kit.data.outlines import main, outlines
from sana_kit.encodings.settings import EncodingSettings, Transform
from sana_kit.errors import UserError

EDGES = ControlKind(edges=True)


def source_of(**given):
    names = (
        "dataset_name",
        "dataset_config_name",
        "dataset_split",
        "instance_data_dir",
        "caption_column",
        "cache_dir",
    )
    return {**dict.fromkeys(names), "image_column": "image", "repeats": 1, **given}


@pytest.fixture
def images(tmp_path):
    """Six images of 96 x 80 px, and controls of half their size: each the image's grey, so that it can be told."""
    folder = tiny.write_image_folder(tmp_path / "images")
    controls = tmp_path / "controls"
    controls.mkdir()
    for file in sorted(folder.glob("*.png")):
        grey = ImageOps.grayscale(Image.open(file))
        grey.resize((grey.width // 2, grey.height // 2)).convert("RGB").save(controls / f"{file.stem}.webp")
    return folder, controls


def load(folder, kind, **given):
    source = source_of(instance_data_dir=str(folder), **given)
    found = load_images(**source, instance_prompt="a drawing")
    return found, load_controls([kind], [source], found)


def rows_of(images):
    return [images.row(i) for i in range(len(images))]


def test_controls_of_equal_names_take_their_images_crop_and_flip(images):
    folder, controls = images
    found, known = load(folder, ControlKind(folder=str(controls)), repeats=2)
    own = known.of(found, rows_of(found))
    settings = EncodingSettings("nowhere", resolution=64, random_flip=True)
    for seed in (None, 7):
        plans, followed = Transform(found, settings, seed), Transform(own, settings, seed)
        assert [followed(i) for i in range(12)] == [plans(i) for i in range(12)]
        assert len({(plan.crop, plan.flip) for plan in map(plans, range(12))}) > 4
        for i in range(12):
            grey = found.pixels(i, plans(i)).astype(int) @ [299, 587, 114] // 1000
            seen = own.pixels(i, followed(i))[..., 0].astype(int)
            assert np.corrcoef(grey.ravel(), seen.ravel())[0, 1] > 0.9
            mirrored = seen[:, ::-1] if plans(i).flip else seen
            assert own.name(i) == found.name(i).replace(".png", ".webp") and mirrored.shape == (64, 64)


def test_buckets_of_controls_are_those_of_their_images(images):
    folder, controls = images
    found, known = load(folder, ControlKind(folder=str(controls)))
    own = known.of(found, rows_of(found))
    settings = EncodingSettings("nowhere", resolution=64, resolutions=(512,))
    assert [Transform(own, settings)(i) for i in range(6)] == [Transform(found, settings)(i) for i in range(6)]


def test_several_data_sets_have_their_control_images_one_behind_the_other(images, tmp_path):
    """A folder for each, the names alike; in one folder for both they could not be told apart."""
    folder, controls = images
    other = tiny.write_image_folder(tmp_path / "other", 3)
    inverted = tmp_path / "inverted"
    inverted.mkdir()
    for file in other.glob("*.png"):
        ImageOps.invert(Image.open(file)).save(inverted / file.name)
    sources = [source_of(instance_data_dir=str(place)) for place in (folder, other)]
    both = concat(*(load_images(**source, instance_prompt="a drawing") for source in sources))
    kept, held = both.without([0, 7]), both.without([i for i in range(9) if i not in (0, 7)])
    kinds = [ControlKind(folder=str(place)) for place in (controls, inverted)]
    own = load_controls(kinds, sources, kept, held).of(held, rows_of(held))
    assert own.name(0) == "image_00.webp" and own.name(1) == "image_01.png"
    assert np.array_equal(np.array(own.load(1)), 255 - np.array(held.load(1)))
    with pytest.raises(UserError, match="images of two data sets have one name there: image_00, image_01, image_02"):
        load_controls(kinds[:1] * 2, sources, both)
    (inverted / "image_01.png").unlink()
    (controls / "image_04.webp").unlink()
    with pytest.raises(UserError) as caught:
        load_controls(kinds, sources, both)
    assert [problem.value for problem in caught.value.problems] == [str(controls), str(inverted)]


def test_a_missing_and_a_double_control_image_are_named(images):
    folder, controls = images
    (controls / "image_02.webp").unlink()
    (controls / "image_04.webp").unlink()
    Image.new("RGB", (8, 8)).save(controls / "image_03.png")
    source = source_of(instance_data_dir=str(folder))
    with pytest.raises(UserError) as caught:
        find_controls(ControlKind(folder=str(controls)), find_images(**source)[0], source)
    missing, double = caught.value.problems
    assert "2 of 6 images have no control image of their name: image_02.png, image_04.png" in missing.reason
    assert "image_03.png and image_03.webp" in double.reason
    assert missing.field == double.field == "control_data_dir"


def test_controls_of_another_shape_or_that_cannot_be_read_are_named(images):
    folder, controls = images
    Image.new("RGB", (40, 48)).save(controls / "image_01.webp")
    with pytest.raises(UserError) as caught:
        load(folder, ControlKind(folder=str(controls)))
    (problem,) = caught.value.problems
    size = Image.open(folder / "image_01.png").size
    assert f"image_01.webp is 40x48 px, its image {size[0]}x{size[1]}" in problem.reason
    (controls / "image_01.webp").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"image_01\.webp"):
        load(folder, ControlKind(folder=str(controls)))


def test_a_column_of_control_images_goes_row_by_row(tmp_path):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    pairs = tiny.make_images(4)
    rows = {"image": [p for p, _ in pairs], "seen": [ImageOps.invert(p) for p, _ in pairs], "text": ["a"] * 4}
    features = Features({"image": ImageFeature(), "seen": ImageFeature(), "text": Value("string")})
    (tmp_path / "data").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "data" / "train.parquet"))
    source = source_of(dataset_name=str(tmp_path), caption_column="text")
    found = load_images(**source)
    held = found.without([0, 2])
    own = load_controls([ControlKind(column="seen")], [source], held).of(held, rows_of(held))
    for i in range(2):
        assert np.array_equal(np.array(own.load(i)), 255 - np.array(held.load(i)))
    with pytest.raises(UserError) as caught:
        load_controls([ControlKind(column="depth")], [source], found)
    assert caught.value.problems[0].field == "control_column"
    with pytest.raises(UserError, match="have no file names"):
        load_controls([ControlKind(folder=str(tmp_path))], [source], found)


def test_outlines_are_computed_at_the_size_that_is_trained_at(images):
    folder, _ = images
    found, known = load(folder, EDGES)
    both = concat(found, found)
    own = known.of(both, rows_of(found) * 2)
    settings = EncodingSettings("nowhere", resolution=64, random_flip=True)
    plans = Transform(both, settings)
    for i in range(12):
        expected = outlines(Image.fromarray(found.pixels(i % 6, plans(i))))
        assert np.array_equal(own.pixels(i, plans(i)), np.array(expected))
    assert not (own.source_digests() == both.source_digests()).all(1).any()  # other latents than the image's own
    assert own.digest() != both.digest()


def test_outlines_are_where_colours_change_and_nowhere_else(tmp_path):
    image = Image.new("RGB", (64, 48), (200, 30, 30))
    image.paste((30, 200, 30), (20, 10, 44, 38))  # as bright in grey as not to be told by it alone
    lines = np.array(outlines(image)).astype(int)
    assert lines.shape == (48, 64, 3) and (lines.std(-1) == 0).all()
    assert (lines[10:38, 18:22].max(1) > 150).all()
    assert lines[:6].max() == lines[:, :15].max() == lines[16:32, 27:37].max() == 0
    mirrored = np.array(outlines(ImageOps.mirror(image))).astype(int)
    assert np.array_equal(mirrored, lines[:, ::-1])
    image.save(tmp_path / "image.png")
    assert main([str(tmp_path / "image.png"), str(tmp_path / "lines.png"), "--width", "32", "--height", "32"]) == 0
    assert Image.open(tmp_path / "lines.png").size == (32, 32)
