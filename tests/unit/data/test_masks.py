"""Loss masks: which files are masks, what is wrong with one, and that it follows its image's crop and flip."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from PIL import Image

from sana_kit.data import headers, memory
from sana_kit.data.discover import load_class_images, load_images
from sana_kit.data.image_set import concat
from sana_kit.data.masks import decode_mask, mask_of_sample
from sana_kit.data.transform import apply_transform, plan_transform


def masked_folder(folder, count=4, masked=(0, 2)):
    """Images, some with a mask whose left half is white."""
    tiny.write_image_folder(folder, count=count)
    for k in masked:
        size = Image.open(folder / f"image_{k:02d}.png").size
        half_mask(size).save(folder / f"image_{k:02d}.mask.png")
    return folder


def half_mask(size, value=255):
    mask = Image.new("L", size, 0)
    mask.paste(value, (0, 0, size[0] // 2, size[1]))
    return mask


def encoded(image):
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def table_of(folder, masks, count=3):
    images = [encoded(image) for image, _ in tiny.make_images(count)]
    cells = [{"bytes": data, "path": None} for data in images]
    folder.mkdir(parents=True)
    found = [None if mask is None else {"bytes": encoded(mask), "path": None} for mask in masks]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": pa.array(cells, kind), "mask": pa.array(found, kind), "text": ["a"] * count}
    pq.write_table(pa.table(columns), folder / "train.parquet")
    return str(folder)


def test_a_mask_beside_an_image_is_no_image_and_what_has_none_is_counted(tmp_path):
    folder = masked_folder(tmp_path / "set")
    Image.new("L", (8, 8), 255).save(folder / "nobody.mask.png")
    images = load_images(instance_data_dir=str(folder))
    assert images.names == [f"image_{k:02d}.png" for k in range(4)]
    assert images.has_mask().tolist() == [True, False, True, False]
    assert images.report["images with a mask"] == 2
    told = "2 image(s) have a loss mask; without one, so that all of it counts: 2"
    assert any(told in note for note in images.notes)
    assert any("1 other file(s) skipped by name: nobody.mask.png" in note for note in images.notes)
    assert np.array_equal(np.asarray(images.load_mask(2)), np.asarray(half_mask(images.size(2))))
    assert load_class_images(str(folder), "x", None).names == images.names


def test_a_set_without_masks_has_the_digest_that_it_had_and_another_mask_another(tmp_path):
    folder = masked_folder(tmp_path / "set", masked=())
    images = load_images(instance_data_dir=str(folder))
    plain, size = images.digest(), images.size(0)
    assert images.masks is None and not images.has_mask().any()
    half_mask(size).save(folder / "image_00.mask.png")
    half = load_images(instance_data_dir=str(folder)).digest()
    half_mask(size, 200).save(folder / "image_00.mask.png")
    assert len({plain, half, load_images(instance_data_dir=str(folder)).digest()}) == 3


def test_everything_that_is_wrong_with_masks_is_told_at_once(tmp_path):
    folder = masked_folder(tmp_path / "set", count=5, masked=(0,))
    Image.new("L", (9, 9), 255).save(folder / "image_01.mask.png")
    Image.new("L", Image.open(folder / "image_02.png").size, 0).save(folder / "image_02.mask.png")
    half_mask(Image.open(folder / "image_03.png").size, 1).save(folder / "image_03.mask.png")
    (folder / "image_04.mask.png").write_bytes(b"no image")
    with pytest.raises(ValueError) as caught:
        load_images(instance_data_dir=str(folder))
    told = str(caught.value)
    assert "4 mask(s) cannot be used" in told
    assert "image_01.mask.png: it is 9 x 9, its image 88 x 80" in told
    assert "image_02.mask.png: the mask is black all over" in told
    assert "image_03.mask.png: the mask's brightest pixel is 1 of 255" in told
    assert "image_04.mask.png: not an image" in told


def test_a_column_of_masks_may_hold_nulls(tmp_path):
    sizes = [image.size for image, _ in tiny.make_images(3)]
    name = table_of(tmp_path / "set", [half_mask(sizes[0]), None, half_mask(sizes[2])])
    words = {"dataset_name": name, "caption_column": "text", "mask_column": "mask"}
    images = load_images(**words)
    assert images.has_mask().tolist() == [True, False, True] and images.load_mask(2).size == sizes[2]
    assert not load_images(**{**words, "mask_column": None}).has_mask().any()
    with pytest.raises(ValueError, match="mask_column=absent: no such column .*columns present: image, mask, text"):
        load_images(**{**words, "mask_column": "absent"})
    with pytest.raises(ValueError, match="mask_column=text: it holds .*not images"):
        load_images(**{**words, "mask_column": "text"})
    with pytest.raises(ValueError, match="mask_column=mask: only tables have columns"):
        load_images(instance_data_dir=str(tmp_path), instance_prompt="x", mask_column="mask")


def test_a_table_of_files_names_masks_or_has_them_beside(tmp_path):
    folder = masked_folder(tmp_path / "set", count=2, masked=(1,))
    (folder / "image_01.mask.png").rename(folder / "m.png")
    rows = [{"file_name": "image_00.png", "m": None}, {"file_name": "image_01.png", "m": "m.png"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = {"dataset_name": str(folder), "instance_prompt": "x"}
    images = load_images(**words, mask_column="m")
    assert images.has_mask().tolist() == [False, True] and not any("left out" in note for note in images.notes)
    assert not load_images(**words).has_mask().any()
    (folder / "m.png").rename(folder / "image_01.mask.png")
    assert load_images(**words).has_mask().tolist() == [False, True]
    with pytest.raises(ValueError, match="mask_column=m: metadata.jsonl, row 2: 'm.png' is no file"):
        load_images(**words, mask_column="m")


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("size", "target"), [((300, 200), (128, 128)), ((200, 330), (96, 160)), ((50, 64), (64, 64))])
def test_a_mask_follows_the_crop_and_the_flip_of_its_image(size, target, flip):
    """An image that is its own mask: the mean of each place's pixels is the mask's value there."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 2, (5, 6), np.uint8) * 255)
    mask = coarse.resize(size, Image.Resampling.BILINEAR)
    for index in range(20):
        plan = plan_transform(size, target=target, center_crop=False, random_flip=flip, seed=1, index=index)
        pixels = apply_transform(mask.convert("RGB"), plan)[..., 0].astype(float)
        height, width = target[1] // 32, target[0] // 32
        means = pixels.reshape(height, 32, width, 32).mean(axis=(1, 3))
        found = mask_of_sample(mask, plan, (width, height))
        assert found.shape == (height, width)
        assert np.abs(found - means).max() < 4  # of 255; one filter averages in one go, the other in two


def test_transparent_turned_and_one_bit_masks():
    clear = Image.new("RGBA", (4, 2), (255, 255, 255, 0))
    clear.putpixel((0, 0), (255, 255, 255, 255))
    assert np.asarray(decode_mask(encoded(clear), "m")).sum() == 255
    assert np.asarray(decode_mask(encoded(Image.new("1", (4, 2), 1)), "m")).min() == 255
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    half_mask((8, 4)).save(turned, "PNG", exif=exif)
    mask = decode_mask(turned.getvalue(), "m")
    assert mask.size == (4, 8) and np.asarray(mask)[:4].min() == 255 and np.asarray(mask)[4:].max() == 0


def test_a_second_start_reads_no_mask(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "SETTLED_NS", 0)
    folder = masked_folder(tmp_path / "set")
    words = {"instance_data_dir": str(folder), "remember_in": tmp_path / "kept"}
    first = load_images(**words)
    monkeypatch.setattr(headers, "_look", lambda source, rows, inspect: pytest.fail("it was read again"))
    again = load_images(**words)
    assert again.digest() == first.digest() and (again.has_mask() == first.has_mask()).all()


def test_sets_with_and_without_masks_are_joined(tmp_path):
    plain = load_images(instance_data_dir=str(masked_folder(tmp_path / "plain", count=2, masked=())))
    masked = load_images(instance_data_dir=str(masked_folder(tmp_path / "masked", count=2, masked=(1,))))
    both = concat(plain, masked)
    assert both.has_mask().tolist() == [False, False, False, True]
    assert both.load_mask(3).size == both.size(3) and both.without([0]).has_mask().tolist() == [False, False, True]


def test_a_mask_that_changes_while_it_is_used_is_noticed(tmp_path):
    folder = masked_folder(tmp_path / "set", masked=(0,))
    images = load_images(instance_data_dir=str(folder))
    half_mask(images.size(0), 200).save(folder / "image_00.mask.png")
    with pytest.raises(ValueError, match="the mask changed"):
        images.load_mask(0)
