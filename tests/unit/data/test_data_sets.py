"""Finding, checking, decoding and transforming images; `python -m pytest tests/unit/data/test_data_sets.py`."""

import hashlib
import io
import json
import os
import pickle
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from PIL import Image

from sana_kit.data.decode import IMAGE_SUFFIXES, decode_image, inspect_image
from sana_kit.data.discover import load_class_images, load_images
from sana_kit.data.image_set import check_images, concat, prefetch
from sana_kit.data.transform import apply_transform, plan_transform, transform
from sana_kit.errors import ImageError


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(width=48, height=32, seed=0):
    """A smooth random RGB image: JPEG keeps it nearly as it is."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def write_parquet(folder, columns, name="data/train-001.parquet", row_group_size=None):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return folder


def image_cells(images):
    return [None if i is None else {"bytes": encoded(i), "path": None} for i in images]


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb(side=50_000):
    """A PNG of a few hundred bytes whose header promises 2.5 gigapixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


# ---------------------------------------------------------------------------------------------------------------------
# Sources


def test_image_folder_gives_each_image_its_caption_and_tells_other_files_once(tmp_path):
    folder = tiny.write_image_folder(tmp_path / "with spaces und Umlaut ü 图", count=3)
    (folder / "notes.md").write_text("x")
    (folder / ".hidden.png").write_bytes(b"x")
    (folder / "orphan.txt").write_text("no image of this name")
    (folder / "sub").mkdir()
    images = load_images(instance_data_dir=str(folder))
    assert images.names == ["image_00.png", "image_01.png", "image_02.png"]
    assert images.captions == [caption for _, caption in tiny.make_images(3)]
    assert [np.array_equal(images.load(i), p) for i, (p, _) in enumerate(tiny.make_images(3))] == [True] * 3
    assert images.source_hash(1) == hashlib.sha256((folder / "image_01.png").read_bytes()).hexdigest()
    assert images.report["other files skipped"] == 2
    told = [n for n in images.notes if "notes.md" in n and "orphan.txt" in n]
    assert len(told) == 1 and len(images.notes) == 2 and "not searched: sub" in images.notes[1]


def test_parquet_folder_with_and_without_the_extra_files(tmp_path):
    with_extras = tiny.write_parquet_dataset(tmp_path / "a", extras=True)
    without = tiny.write_parquet_dataset(tmp_path / "b", extras=False)
    captions = [caption for _, caption in tiny.make_images(6)]
    for folder in (with_extras, without, without / "data" / "train-001.parquet"):
        images = load_images(dataset_name=str(folder), caption_column="text")
        assert images.captions == captions
        assert images.names == [f"train[{i}]" for i in range(6)]
        assert np.array_equal(images.load(4), tiny.make_images(6)[4][0])
    # The extra files may hold anything: they are never parsed.
    (with_extras / "dataset_infos.json").write_text("{broken")
    (with_extras / "README.MD").write_text("---\nconfigs: [\n")
    assert load_images(dataset_name=str(with_extras), caption_column="text").captions == captions


def test_parquet_at_the_top_in_several_files_and_row_groups(tmp_path):
    photos = [photo(seed=k) for k in range(10)]
    for number, part in enumerate((photos[:4], photos[4:])):
        columns = {"image": image_cells(part), "text": [f"image {number} {k}" for k in range(len(part))]}
        write_parquet(tmp_path, columns, f"train-{number:05d}-of-00002.parquet", row_group_size=3)
    write_parquet(tmp_path, {"image": image_cells(photos[:1]), "text": ["t"]}, "test-00000-of-00001.parquet")
    images = load_images(dataset_name=str(tmp_path), caption_column="text")
    assert images.captions[3:5] == ["image 0 3", "image 1 0"]
    order = [9, 0, 5, 3, 4, 8, 1]
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(images.load, order))
    assert all(np.array_equal(a, photos[k]) for a, k in zip(loaded, order, strict=True))


def test_binary_column_and_first_image_column(tmp_path):
    write_parquet(tmp_path, {"id": [1, 2], "jpg": [encoded(photo(seed=k), "JPEG") for k in (0, 1)]})
    assert load_images(dataset_name=str(tmp_path), image_column=None, instance_prompt="x").size(0) == (48, 32)
    assert load_images(dataset_name=str(tmp_path), image_column="jpg", instance_prompt="x").captions == ["x", "x"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_imagefolder_with_metadata(tmp_path, kind):
    tiny.write_image_folder(tmp_path / "train" / "images", count=2, captions=False)
    rows = [
        {"file_name": f"images/image_{k:02d}.png", "text": t}
        for k, t in enumerate(['a "quoted", caption', "b\u2028c"])
    ]
    path = tmp_path / "train" / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n", encoding="utf-8-sig")
    elif kind == "csv":
        path.write_text(
            'file_name,text\nimages/image_00.png,"a ""quoted"", caption"\n"images/image_01.png",b\u2028c\n'
        )
    else:
        pq.write_table(pa.table({k: [r[k] for r in rows] for k in rows[0]}), path)
    for folder in (tmp_path, tmp_path / "train"):
        images = load_images(dataset_name=str(folder), caption_column="text")
        assert images.captions == ['a "quoted", caption', "b\u2028c"]
        assert images.names == ["images/image_00.png", "images/image_01.png"]


def test_table_that_names_files_and_may_not_lead_out(tmp_path):
    tiny.write_image_folder(tmp_path / "set", count=2, captions=False)
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    table = tmp_path / "set" / "images.jsonl"
    table.write_text('{"image": "image_00.png", "caption": "one"}\n{"image": "image_01.png", "caption": "two"}\n')
    assert load_images(dataset_name=str(tmp_path / "set"), caption_column="caption").captions == ["one", "two"]
    for bad in ("../outside.png", str(tmp_path / "outside.png")):
        table.write_text(json.dumps({"image": bad, "caption": "x"}) + "\n")
        with pytest.raises(ValueError, match="row 1.*leads out"):
            load_images(dataset_name=str(tmp_path / "set"), caption_column="caption")
    table.write_text(
        '{"image": "image_00.png", "caption": "one"}\n{"image": broken\n{"image": null, "caption": "x"}\n'
    )
    with pytest.raises(ValueError, match="images.jsonl, line 2: not JSON"):
        load_images(dataset_name=str(tmp_path / "set"), caption_column="caption")
    table.write_text('{"image": "absent.png", "caption": "one"}\n')
    with pytest.raises(ValueError, match="absent.png: cannot be read"):
        load_images(dataset_name=str(tmp_path / "set"), caption_column="caption")


def test_arrow_rows_are_read_by_offset_and_nulls_are_named(tmp_path):
    import datasets

    cells = [{"bytes": encoded(photo(seed=k)), "path": None} for k in range(7)]
    cells[3] = None
    cells[5] = {"bytes": None, "path": None}
    dataset = datasets.Dataset(pa.table({"text": list("abcdefg"), "image": cells}))
    dataset.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    images = load_images(dataset_name=str(tmp_path / "saved"), caption_column="text", skip_bad_images=True)
    assert images.captions == list("abceg") and images.report["bad images skipped"] == 2
    assert images._source.spans is not None
    assert [images.read(i) for i in range(5)] == [cells[k]["bytes"] for k in (0, 1, 2, 4, 6)]
    with pytest.raises(ValueError, match=r"train\[3\]: the image is null(.*\n)*.*train\[5\]: the image is null"):
        load_images(dataset_name=str(tmp_path / "saved"), caption_column="text")
    shuffled = load_images_of(dataset.select([6, 0]), tmp_path / "chosen")
    assert [shuffled.read(i) for i in range(2)] == [cells[6]["bytes"], cells[0]["bytes"]]


def load_images_of(dataset, folder):
    dataset.save_to_disk(str(folder))
    return load_images(dataset_name=str(folder), caption_column="text")


@pytest.mark.parametrize("form", ["dataset", "dict"])
def test_save_to_disk_folder(tmp_path, form):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    data = {"image": [photo(seed=k) for k in range(3)], "text": ["a", "b", "c"]}
    dataset = datasets.Dataset.from_dict(data, features=features)
    (datasets.DatasetDict({"validation": dataset}) if form == "dict" else dataset).save_to_disk(
        str(tmp_path / "saved")
    )
    images = load_images(dataset_name=str(tmp_path / "saved"), caption_column="text", repeats=2)
    assert images.captions == ["a", "a", "b", "b", "c", "c"]
    again = pickle.loads(pickle.dumps(images))
    assert np.array_equal(again.load(5), photo(seed=2)) and again.source_hash(5) == images.source_hash(4)
    assert again.name(5) == ("validation[2]" if form == "dict" else "train[2]")


def test_hub_data_set_runs_no_script_and_takes_the_right_split(monkeypatch):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    one = datasets.Dataset.from_dict({"image": [photo()], "text": ["one"]}, features=features)
    two = datasets.Dataset.from_dict({"image": [photo(), photo(seed=1)], "text": ["1", "2"]}, features=features)
    answers = {}

    def load_dataset(path, name=None, cache_dir=None, trust_remote_code=None):
        answers["flag"] = trust_remote_code
        return answers["splits"]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for splits, expected in (({"test": one, "train": two}, 2), ({"test": one}, 1)):
        answers["splits"] = datasets.DatasetDict(splits)
        assert len(load_images(dataset_name="someone/set", caption_column="text")) == expected
        assert answers["flag"] is False
    answers["splits"] = datasets.DatasetDict({"test": one, "validation": two})
    with pytest.raises(ValueError, match="none is 'train': test, validation"):
        load_images(dataset_name="someone/set", caption_column="text")


def test_local_splits(tmp_path):
    for split in ("test", "validation"):
        write_parquet(tmp_path, {"image": image_cells([photo()]), "text": ["x"]}, f"data/{split}-0.parquet")
    with pytest.raises(ValueError, match="none is 'train': test, validation"):
        load_images(dataset_name=str(tmp_path), caption_column="text")
    (tmp_path / "data" / "validation-0.parquet").unlink()
    assert load_images(dataset_name=str(tmp_path), caption_column="text").names == ["test[0]"]


def test_config_is_a_subfolder(tmp_path):
    write_parquet(tmp_path, {"image": image_cells([photo()]), "text": ["x"]}, "small/train-0.parquet")
    assert len(load_images(dataset_name=str(tmp_path), dataset_config_name="small", caption_column="text")) == 1
    with pytest.raises(ValueError, match="dataset_config_name=large: no such subfolder.*present: small"):
        load_images(dataset_name=str(tmp_path), dataset_config_name="large", caption_column="text")


def test_class_images(tmp_path):
    folder = tiny.write_image_folder(tmp_path / "class", count=5)
    assert load_class_images(str(folder), "a dog", 3).captions == ["a dog"] * 3
    assert len(load_class_images(str(folder), "a dog", 9)) == len(load_class_images(str(folder), "a dog", None)) == 5
    with pytest.raises(ValueError, match="class_data_dir=.*no such folder"):
        load_class_images(str(tmp_path / "absent"), "a dog", 3)


# ---------------------------------------------------------------------------------------------------------------------
# Captions


def test_empty_captions_take_the_instance_prompt_and_are_counted(tmp_path):
    texts = ["a cat", None, "", "  \n\t ", "a dog"]
    write_parquet(tmp_path, {"image": image_cells([photo(seed=k) for k in range(5)]), "text": texts})
    arguments = {"dataset_name": str(tmp_path), "caption_column": "text"}
    images = load_images(**arguments, instance_prompt="sks")
    assert images.captions == ["a cat", "sks", "sks", "sks", "a dog"]
    assert images.report["captions from instance_prompt"] == 3
    with pytest.raises(ValueError, match=r"3 image\(s\) of .* have no caption.*train\[1\], train\[2\], train\[3\]"):
        load_images(**arguments)


def test_no_caption_column_means_the_instance_prompt(parquet_dataset):
    images = load_images(dataset_name=str(parquet_dataset), instance_prompt="a sks dog")
    assert images.captions == ["a sks dog"] * 6 and any("instance prompt" in n for n in images.notes)
    with pytest.raises(ValueError, match="instance_prompt: .* has no captions.*name a table's caption column"):
        load_images(dataset_name=str(parquet_dataset))


def test_unusual_captions_arrive_unchanged(tmp_path):
    texts = ["ab " * 3334, "smile 😀👩‍👩‍👧 flag 🇩🇪", "\u202bשלום עולם\u202c", "  spaces around  ", "a\u2028b\tc"]
    folder = tmp_path / "set"
    folder.mkdir()
    for k, text in enumerate(texts):
        photo(seed=k).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(text, encoding="utf-8-sig" if k == 3 else "utf-8")
    expected = [t.strip() for t in texts]
    assert load_images(instance_data_dir=str(folder)).captions == expected and len(expected[0]) > 10_000
    write_parquet(tmp_path / "table", {"image": image_cells([photo()] * len(texts)), "text": texts})
    assert load_images(dataset_name=str(tmp_path / "table"), caption_column="text").captions == expected


def test_caption_that_is_not_utf8_is_named(tmp_path):
    photo().save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("Füchse".encode("latin-1"))
    with pytest.raises(ValueError, match="caption a.txt cannot be read as UTF-8"):
        load_images(instance_data_dir=str(tmp_path))


def test_all_captions_of_a_cell_are_kept_for_each_repeat(tmp_path):
    texts = [["a", " ", "b"], ["c"], [], ["d", "e", "f"]]
    write_parquet(tmp_path, {"image": image_cells([photo(seed=k) for k in range(4)]), "text": texts})
    arguments = {"dataset_name": str(tmp_path), "caption_column": "text", "instance_prompt": "x"}
    images = load_images(**arguments)
    assert images.captions == ["a", "c", "x", "d"]
    assert images.all_captions == ["a", "b", "c", "x", "d", "e", "f"]
    assert images.choices.starts.tolist() == [0, 2, 3, 4, 7]
    assert load_images(**arguments, repeats=2).all_captions == [*"abab", *"ccxx", *"defdef"]
    assert images.report["images with several captions"] == 2
    assert any("2 image(s) have several captions" in note for note in images.notes)


def test_two_images_of_one_name_share_the_caption_file(tmp_path):
    photo(seed=0).save(tmp_path / "a.png")
    photo(seed=1).save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("both")
    images = load_images(instance_data_dir=str(tmp_path))
    assert (images.names, images.captions) == (["a.jpg", "a.png"], ["both", "both"])
    assert images.report["captions shared by images of one name"] == 1
    assert images.source_hash(0) != images.source_hash(1)


# ---------------------------------------------------------------------------------------------------------------------
# Errors name flag, value and what is there


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "neither given. Give exactly one"),
        ({"dataset_name": "a", "instance_data_dir": "b"}, "both given"),
        ({"instance_data_dir": "/absent/folder"}, "instance_data_dir=/absent/folder: no such folder"),
        ({"dataset_name": "/absent/set"}, "dataset_name=/absent/set: no such folder or file"),
        ({"dataset_name": "./absent"}, "no such folder or file"),
        ({"instance_data_dir": "b", "caption_column": "text"}, "caption_column=text: only tables"),
        ({"instance_data_dir": "b", "repeats": 0}, "repeats=0"),
    ],
)
def test_wrong_flags(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_images(**arguments)


def test_all_problems_come_at_once():
    with pytest.raises(ValueError) as caught:
        load_images(repeats=0)
    assert "repeats=0" in str(caught.value) and "dataset_name and instance_data_dir" in str(caught.value)


def test_unknown_hub_name_offline(monkeypatch):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub (offline)\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        ValueError, match=r"neither a folder here .* nor to be had from the hub \(ConnectionError: Couldn't"
    ):
        load_images(dataset_name="nobody/nothing", instance_prompt="x")


def test_column_errors_list_the_columns(parquet_dataset, tmp_path):
    with pytest.raises(ValueError) as caught:
        load_images(dataset_name=str(parquet_dataset), image_column="photo", caption_column="caption")
    text = str(caught.value)
    assert "image_column=photo: no such column" in text and "caption_column=caption: no such column" in text
    assert text.count("columns present: image, text") == 2
    write_parquet(tmp_path, {"image": [1, 2], "text": [1.5, 2.5]})
    with pytest.raises(ValueError) as caught:
        load_images(dataset_name=str(tmp_path), caption_column="text")
    assert "it holds int64, not images" in str(caught.value) and "it holds double, not text" in str(caught.value)


def test_empty_sources(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in it"):
        load_images(instance_data_dir=str(tmp_path / "empty"), instance_prompt="x")
    with pytest.raises(ValueError, match="no data set recognised.*Present: nothing"):
        load_images(dataset_name=str(tmp_path / "empty"), instance_prompt="x")
    schema = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "text": pa.string()})
    pq.write_table(schema.empty_table(), tmp_path / "empty" / "train.parquet")
    with pytest.raises(ValueError, match="the data set has no images"):
        load_images(dataset_name=str(tmp_path / "empty"), caption_column="text")


def test_damaged_tables(tmp_path):
    path = tmp_path / "train.parquet"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match="train.parquet is a Git LFS pointer. Run `git lfs pull`"):
        load_images(dataset_name=str(tmp_path), caption_column="text")
    write_parquet(tmp_path, {"image": image_cells([photo()]), "text": ["x"]}, "train.parquet")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="train.parquet is not a readable parquet file"):
        load_images(dataset_name=str(tmp_path), caption_column="text")


def test_null_images_are_named_or_skipped(tmp_path):
    write_parquet(
        tmp_path,
        {"image": image_cells([photo(), None, photo(seed=1)]) + [{"bytes": None, "path": None}], "text": list("abcd")},
    )
    with pytest.raises(ValueError) as caught:
        load_images(dataset_name=str(tmp_path), caption_column="text")
    assert "train[1]: the image is null" in str(caught.value) and "train[3]: the image is null" in str(caught.value)
    images = load_images(dataset_name=str(tmp_path), caption_column="text", skip_bad_images=True)
    assert images.captions == ["a", "c"] and images.report["bad images skipped"] == 2


# ---------------------------------------------------------------------------------------------------------------------
# Bad files

GOOD = encoded(photo(200, 200))
BAD_FILES = {
    "zero-byte.png": b"",
    "text.jpg": b"this is not an image, whatever its name says",
    "program.png": b"\x7fELF" + bytes(200),
    "script.eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
    "vector.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "archive.png": b"PK\x03\x04" + bytes(100),
    "lfs.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "bomb.png": bomb(),
    "truncated.png": GOOD[: len(GOOD) // 2],
    "bit-flipped.png": GOOD[:200] + bytes([GOOD[200] ^ 255]) + GOOD[201:],
    "truncated.jpg": encoded(photo(200, 200), "JPEG")[:1500],
    "truncated.webp": encoded(photo(200, 200), "WEBP")[:300],
    "truncated.bmp": encoded(photo(200, 200), "BMP")[:300],
    "truncated.gif": encoded(photo(200, 200), "GIF")[:900],
    "float.tif": encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_named_before_any_model_loads_or_skipped_and_counted(tmp_path, name):
    folder = tiny.write_image_folder(tmp_path / "set", count=2)
    (folder / name).write_bytes(BAD_FILES[name])
    try:
        images = load_images(instance_data_dir=str(folder), instance_prompt="x")
        message = dict(check_images(images, num_workers=2))[images.names.index(name)]  # what `encode` raises
        left = images.without([images.names.index(name)])
    except ValueError as error:
        message = str(error)
        assert "instance_data_dir=" in message and "(skip_bad_images)" in message and "--" not in message
        left = load_images(instance_data_dir=str(folder), instance_prompt="x", skip_bad_images=True)
    assert f"{name}:" in message
    assert left.names == ["image_00.png", "image_01.png"] and left.report["bad images skipped"] == 1
    assert check_images(left) == []


def test_all_bad(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="all 1 images are bad"):
        load_images(instance_data_dir=str(tmp_path), instance_prompt="x", skip_bad_images=True)


def test_many_bad_files_are_counted_not_all_listed(tmp_path):
    for k in range(50):
        (tmp_path / f"{k:02d}.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"50 image\(s\) cannot be used.*\n.*00.png.*(\n.*)*and 30 more"):
        load_images(instance_data_dir=str(tmp_path), instance_prompt="x")


def test_check_is_shared_out_and_finds_what_headers_do_not_show(tmp_path):
    folder = tiny.write_image_folder(tmp_path, count=5)
    data = encoded(photo(300, 300), "JPEG")
    (folder / "cut.jpg").write_bytes(data[:-400])
    images = load_images(instance_data_dir=str(folder), instance_prompt="x", repeats=2)
    shares = [check_images(images, rank=r, world_size=3) for r in range(3)]
    assert sorted(len(s) for s in shares) == [0, 0, 1]
    ((index, message),) = [told for share in shares for told in share]
    assert images.name(index) == "cut.jpg" and "truncated" in message
    left = images.without([index])
    assert "cut.jpg" not in left.names and len(left) == 10
    assert [left.position(i) for i in range(10)] == list(range(2, 12))  # as if nothing had been skipped


def test_image_that_changes_under_the_run(tmp_path):
    folder = tiny.write_image_folder(tmp_path, count=2)
    images = load_images(instance_data_dir=str(folder))
    photo().save(folder / "image_01.png")
    images.load(0)
    with pytest.raises(ImageError, match="image_01.png: the image changed"):
        images.load(1)
    (folder / "image_01.png").unlink()
    with pytest.raises(ImageError, match="image_01.png: cannot be read"):
        images.load(1)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def test_mislabelled_image_is_read_by_its_content(tmp_path):
    (tmp_path / "really_a_jpeg.png").write_bytes(encoded(photo(), "JPEG"))
    images = load_images(instance_data_dir=str(tmp_path), instance_prompt="x")
    assert images.load(0).mode == "RGB" and check_images(images) == []


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("value", range(1, 9))
def test_exif_orientation(kind, value):
    image = photo(48, 32)
    turned = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 1),
    }[value](np.array(image).astype(int))
    exif = Image.Exif()
    exif[0x0112] = value
    options = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encoded(image, kind, exif=exif, **options)
    upright = decode_image(data, "x")
    assert np.abs(np.array(upright).astype(int) - turned).mean() < 2
    facts = inspect_image(data, "x")
    width, height = facts.width, facts.height
    assert (width, height) == upright.size == (turned.shape[1], turned.shape[0])


def test_broken_exif_is_ignored():
    data = encoded(photo(), "JPEG", exif=b"Exif\x00\x00garbage that is no TIFF header")
    assert decode_image(data, "x").size == (48, 32)


def test_colour_modes():
    grey = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    expected = np.stack([grey] * 3, -1)
    assert np.array_equal(decode_image(encoded(Image.fromarray(grey)), "L"), expected)
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(decode_image(encoded(sixteen, kind), "I;16"), expected), kind
    palette = photo().quantize(16)
    assert np.array_equal(decode_image(encoded(palette), "P"), palette.convert("RGB"))
    one_bit = Image.fromarray((grey > 127).astype(np.uint8) * 255).convert("1")
    assert set(np.unique(decode_image(encoded(one_bit), "1"))) == {0, 255}
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(np.array(decode_image(encoded(cmyk, "JPEG", quality=98), "CMYK"))[0, 0] - (255.0, 0, 0)).max() < 6


def test_alpha_is_laid_over_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0], rgba[0, :, 3] = 255, (0, 128, 255)
    result = np.array(decode_image(encoded(Image.fromarray(rgba)), "RGBA"))
    assert result.tolist() == [[[255, 255, 255], [255, 127, 127], [255, 0, 0]]]
    la = np.array([[[0, 0], [0, 255]]], np.uint8)
    assert np.array(decode_image(encoded(Image.fromarray(la)), "LA"))[0, :, 0].tolist() == [255, 0]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putdata([0, 1])
    assert np.array(decode_image(encoded(palette, transparency=0), "P")).tolist() == [[[255] * 3, [10, 20, 30]]]
    keyed = Image.new("RGB", (2, 1), (1, 2, 3))
    keyed.putpixel((1, 0), (9, 9, 9))
    assert np.array(decode_image(encoded(keyed, transparency=(1, 2, 3)), "RGB")).tolist() == [[[255] * 3, [9] * 3]]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame(tmp_path, kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = encoded(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    (tmp_path / f"moving.{kind.lower()}").write_bytes(data)
    images = load_images(instance_data_dir=str(tmp_path), instance_prompt="x")
    assert np.array(images.load(0))[0, 0].tolist() == [255, 0, 0]
    assert images.report["animations, first frame taken"] == 1


def test_every_listed_ending_is_offered_to_a_decoder():
    assert {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"} <= set(IMAGE_SUFFIXES)


# ---------------------------------------------------------------------------------------------------------------------
# The transform

CENTRE = {"center_crop": True, "random_flip": False, "seed": 0, "index": 0}


def test_transform_scales_the_short_side_and_crops_like_resize_then_crop():
    image = photo(301, 200)
    for seed in range(5):
        plan = plan_transform(image.size, target=(64, 64), center_crop=False, random_flip=True, seed=seed, index=3)
        assert plan.scaled == (96, 64) and 0 <= plan.crop[0] <= 32 and plan.crop[1] == 0
        whole = image.resize(plan.scaled, Image.Resampling.BILINEAR)
        whole = whole.crop((*plan.crop, plan.crop[0] + 64, plan.crop[1] + 64))
        whole = np.array(whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if plan.flip else whole)
        difference = np.abs(apply_transform(image, plan).astype(int) - whole.astype(int))
        assert difference.max() <= 1 and difference.mean() < 0.01
    tensor = transform(image, resolution=64, **CENTRE)
    assert tensor.shape == (3, 64, 64) and tensor.dtype == torch.float32
    assert plan_transform(image.size, target=(64, 64), **CENTRE).crop == (16, 0)


def test_transform_values():
    image = Image.fromarray(np.array([[[0, 128, 255]] * 4] * 4, np.uint8))
    tensor = transform(image, resolution=4, **CENTRE)
    assert tensor[0].unique().item() == -1.0 and tensor[2].unique().item() == 1.0
    assert tensor[1].unique().item() == pytest.approx(128 / 127.5 - 1, abs=1e-6)


def test_random_decisions_follow_seed_and_index_alone():
    def plans(seed):
        return [
            plan_transform((200, 100), target=(50, 50), center_crop=False, random_flip=True, seed=seed, index=i)
            for i in range(400)
        ]

    assert plans(1) == plans(1)
    assert plans(1) != plans(2)
    lefts = [p.crop[0] for p in plans(1)]
    assert min(lefts) == 0 and max(lefts) == 50 and 20 < np.mean(lefts) < 30
    assert 150 < sum(p.flip for p in plans(1)) < 250
    state = torch.get_rng_state()
    plans(1)
    assert torch.equal(state, torch.get_rng_state())
    assert {p.flip for p in (plan_transform((9, 9), target=(9, 9), **CENTRE | {"index": i}) for i in range(99))} == {
        False
    }


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1), (31, 32), (32, 32), (64, 3)])
def test_tiny_and_extreme_sizes(size):
    image = Image.new("RGB", size, (10, 20, 30))
    for center in (True, False):
        tensor = transform(image, resolution=32, center_crop=center, random_flip=True, seed=1, index=2)
        assert tensor.shape == (3, 32, 32)
        assert torch.equal(tensor, transform(Image.new("RGB", (32, 32), (10, 20, 30)), resolution=32, **CENTRE))


# ---------------------------------------------------------------------------------------------------------------------
# The set


def test_concat_keeps_each_sets_captions_images_and_decisions(tmp_path):
    first = load_images(instance_data_dir=str(tiny.write_image_folder(tmp_path / "a", count=3)), repeats=2)
    second = load_class_images(str(tiny.write_image_folder(tmp_path / "b", count=2, size=90)), "class", 2)
    both = pickle.loads(pickle.dumps(concat(first, second)))
    assert both.captions == first.captions + ["class"] * 2 and len(both) == 8
    assert both.size(7) == second.size(1) and both.source_hash(6) == second.source_hash(0)
    assert np.array_equal(both.load(7), second.load(1)) and both.position(7) == 1
    assert both.without([0, 7]).names == first.names[2:] + second.names[:1]


def test_prefetch_keeps_order_bounds_what_waits_and_passes_errors_on():
    assert list(prefetch(lambda k: k * k, range(50), 4, 8)) == [k * k for k in range(50)]
    assert list(prefetch(lambda k: k, [], 4, 8)) == list(prefetch(lambda k: k, [], 0, 1)) == []
    started = []
    stream = prefetch(lambda k: started.append(k) or k, range(100), 2, 5)
    assert next(stream) == 0
    stream.close()
    assert len(started) <= 5
    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda k: 1 // (3 - k), range(10), 2, 4))


def test_memory_of_a_set_is_hashes_sizes_names_and_captions(tmp_path):
    write_parquet(
        tmp_path,
        {"image": image_cells([photo(300, 300, k) for k in range(20)]), "text": ["x"] * 20},
        row_group_size=10,
    )
    images = load_images(dataset_name=str(tmp_path), caption_column="text")
    assert os.path.getsize(tmp_path / "data" / "train-001.parquet") > 20 * 10_000
    assert len(pickle.dumps(images)) < 20 * 150 + 1000
