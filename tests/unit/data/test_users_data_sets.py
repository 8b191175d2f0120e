"""Data sets as their users bring them: unquoted commas, every Arrow spelling, odd folders, tables of every kind."""

import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from PIL import Image

from sana_kit.data.discover import load_class_images, load_images
from sana_kit.data.folders import free_class_names, image_files


def png(color="red", size=(32, 32)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def folder_of(path, *names, **captions):
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        (path / name).write_bytes(png())
    for name, text in captions.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Text tables


@pytest.mark.parametrize(
    ("suffix", "row", "told"),
    [
        ("csv", "a.png,a red square, on white ground", "line 2 has 3"),
        ("csv", "a.png", "line 2 has 1"),
        ("tsv", "a.png\ta red\tsquare", "line 2 has 3"),
    ],
)
def test_a_row_with_other_cells_than_columns_names_file_and_line(tmp_path, suffix, row, told):
    separator = "\t" if suffix == "tsv" else ","
    folder_of(tmp_path, "a.png", **{f"metadata__{suffix}": f"file_name{separator}text\n{row}\n"})
    with pytest.raises(ValueError, match=rf"metadata.{suffix}: the header has 2 cells, but {told}.*double quotes"):
        load_images(dataset_name=str(tmp_path), caption_column="text")


def test_a_quoted_comma_and_a_quoted_line_break_belong_to_the_caption(tmp_path):
    text = 'file_name,text\na.png,"a red square, on white"\nb.png,"two\nlines"\n'
    folder_of(tmp_path, "a.png", "b.png", metadata__csv=text)
    images = load_images(dataset_name=str(tmp_path), caption_column="text")
    assert images.captions == ["a red square, on white", "two\nlines"]


def test_a_json_list_is_a_table(tmp_path):
    rows = [{"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "text": "two"}]
    folder_of(tmp_path, "a.png", "b.png", metadata__json=json.dumps(rows))
    assert load_images(dataset_name=str(tmp_path), caption_column="text").captions == ["one", "two"]
    (tmp_path / "metadata.json").rename(tmp_path / "metadata.jsonl")
    assert load_images(dataset_name=str(tmp_path), caption_column="text").captions == ["one", "two"]


def test_absolute_paths_in_a_table_of_a_folder_named_relatively(tmp_path, monkeypatch):
    folder_of(tmp_path / "set", "a.png")
    line = {"file_name": str(tmp_path / "set" / "a.png"), "text": "one"}
    (tmp_path / "set" / "metadata.jsonl").write_text(json.dumps(line))
    monkeypatch.chdir(tmp_path)
    assert load_images(dataset_name="set", caption_column="text").names == ["a.png"]
    (tmp_path / "set" / "metadata.jsonl").write_text(json.dumps({"file_name": "../outside.png", "text": "x"}))
    with pytest.raises(ValueError, match=r"\.\./outside\.png leads out of the folder"):
        load_images(dataset_name="set", caption_column="text")


def test_images_that_no_row_names_are_told(tmp_path):
    folder_of(tmp_path, "a.png", "left.png", "over.png", metadata__csv="file_name,text\na.png,one\n")
    (note,) = load_images(dataset_name=str(tmp_path), caption_column="text").notes
    assert "2 image(s) that no row of the table names are left out: left.png, over.png" in note


# ---------------------------------------------------------------------------------------------------------------------
# Arrow

TEXTS = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "list": pa.list_(pa.string()),
    "large_list": pa.large_list(pa.large_string()),
    "fixed list": pa.list_(pa.string(), 1),
}
BYTES = {"binary": pa.binary(), "large_binary": pa.large_binary()}
if hasattr(pa, "string_view"):
    TEXTS["string_view"], BYTES["binary_view"] = pa.string_view(), pa.binary_view()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("image", BYTES)
def test_every_arrow_spelling_of_text_and_bytes(tmp_path, text, image):
    lists = "list" in text
    captions = pa.array([["one"], ["two"]] if lists else ["one", "two"])
    columns = {"image": pa.array([png("red"), png("blue")], BYTES[image]), "text": captions.cast(TEXTS[text])}
    try:
        pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    except pa.ArrowNotImplementedError:
        pytest.skip("this pyarrow writes no such column")
    images = load_images(dataset_name=str(tmp_path), caption_column="text")
    assert images.captions == ["one", "two"]
    assert [tuple(np.asarray(images.load(i))[0, 0]) for i in range(2)] == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_a_column_of_paths_in_any_spelling(tmp_path, kind):
    folder_of(tmp_path, "a.png")
    table = {"image": pa.array(["a.png"], kind), "text": pa.array(["one"], kind)}
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    images = load_images(dataset_name=str(tmp_path), caption_column="text")
    assert images.captions == ["one"] and images.load(0).size == (32, 32)


def test_conversations_are_named_as_such(tmp_path):
    cell = [[{"role": "user", "content": "draw"}]]
    pq.write_table(pa.table({"image": pa.array([png()]), "text": pa.array(cell)}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"caption_column=text: it holds conversations or other records"):
        load_images(dataset_name=str(tmp_path), caption_column="text")


def test_class_labels_become_their_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    images = [Image.new("RGB", (32, 32))] * 2
    datasets.Dataset.from_dict({"image": images, "label": [1, 0]}, features=features).save_to_disk(tmp_path / "set")
    assert load_images(dataset_name=str(tmp_path / "set"), caption_column="label").captions == ["dog", "cat"]


def test_a_split_is_chosen_by_name_and_others_are_listed(tmp_path):
    for split in ("validation", "test"):
        table = pa.table({"image": pa.array([png()]), "text": pa.array([split])})
        pq.write_table(table, tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match=r"several splits and none is 'train': .*Choose a split"):
        load_images(dataset_name=str(tmp_path), caption_column="text")
    assert load_images(dataset_name=str(tmp_path), dataset_split="test", caption_column="text").captions == ["test"]
    with pytest.raises(ValueError, match=r"dataset_split=trian: no such split in .*; present: test, validation"):
        load_images(dataset_name=str(tmp_path), dataset_split="trian", caption_column="text")


def test_tar_shards_of_a_webdataset(tmp_path):
    with tarfile.open(tmp_path / "shard-000.tar", "w") as shard:
        for name, data in (("a.png", png("red")), ("a.txt", b"one"), ("b.png", png("blue")), ("b.txt", b"two")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            shard.addfile(entry, io.BytesIO(data))
    images = load_images(dataset_name=str(tmp_path), caption_column="txt", cache_dir=str(tmp_path / "cache"))
    assert images.captions == ["one", "two"] and images.load(1).getpixel((0, 0)) == (0, 0, 255)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def test_caption_files_of_both_endings_and_everything_else_told(tmp_path):
    folder = folder_of(tmp_path, "a.png", "b.png", a__caption="one", b__txt="two", notes__md="x")
    (folder / "deeper").mkdir()
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    images = load_images(instance_data_dir=str(folder))
    assert images.captions == ["one", "two"]
    told = "\n".join(images.notes)
    for part in ("1 other file(s) skipped by name: notes.md", "1 subfolder(s) are not searched: deeper"):
        assert part in told
    assert "1 broken link(s): gone.png" in told
    (folder / "a.txt").write_text("another")
    with pytest.raises(ValueError, match=r"a\.caption and a\.txt are captions of the same image"):
        load_images(instance_data_dir=str(folder))


def test_the_empty_text_is_a_caption_and_nothing_is_none(tmp_path):
    folder_of(tmp_path, "a.png")
    assert load_images(instance_data_dir=str(tmp_path), instance_prompt="").captions == [""]
    with pytest.raises(ValueError, match="instance_prompt: .* has no captions"):
        load_images(instance_data_dir=str(tmp_path))


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder_of(tmp_path / "mine", "a.png", a__txt="one")
    assert load_images(instance_data_dir="~/mine").captions == ["one"]
    assert len(load_class_images("~/mine", "a thing", None)) == 1


def test_class_images_are_counted_by_one_rule_and_gaps_are_filled(tmp_path):
    folder_of(tmp_path, "class-00000.png", "class-00002.png", "mine.tiff", "mine.avif")
    assert len(image_files(tmp_path)) == 4
    assert free_class_names(tmp_path, 3) == ["class-00001.png", "class-00003.png", "class-00004.png"]
    assert len(load_class_images(str(tmp_path), "x", 2)) == 2


@pytest.mark.parametrize("cut", ["whole chunk", "inside"])
def test_a_png_without_its_last_chunk_is_used_with_a_note(tmp_path, cut):
    data = png()
    (tmp_path / "a.png").write_bytes(data[:-12] if cut == "whole chunk" else data[:-5])
    images = load_images(instance_data_dir=str(tmp_path), instance_prompt="x")
    assert images.load(0).size == (32, 32)
    assert any("1 PNG file(s) lack their last chunk but are whole: a.png" in note for note in images.notes)


def test_a_png_with_a_wrong_checksum_or_cut_pixels_stays_an_error(tmp_path):
    data = bytearray(png(size=(64, 64)))
    place = data.index(b"IDAT") + 6
    data[place] ^= 1
    (tmp_path / "a.png").write_bytes(data)
    noise = io.BytesIO()
    Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3)).save(noise, "PNG")
    (tmp_path / "b.png").write_bytes(noise.getvalue()[:-400])
    with pytest.raises(ValueError, match="2 image"):
        load_images(instance_data_dir=str(tmp_path), instance_prompt="x")


# ---------------------------------------------------------------------------------------------------------------------
# Identity


def test_the_digest_tells_images_captions_and_order(tmp_path):
    folder = folder_of(tmp_path / "set", "a.png", "b.png", a__txt="one", b__txt="two")
    first = load_images(instance_data_dir=str(folder)).digest()
    assert load_images(instance_data_dir=str(folder)).digest() == first
    (folder / "a.txt").write_text("changed")
    changed = load_images(instance_data_dir=str(folder)).digest()
    (folder / "a.txt").write_text("one")
    (folder / "a.png").write_bytes(png("green"))
    assert len({first, changed, load_images(instance_data_dir=str(folder)).digest()}) == 3


def test_a_file_name_that_is_no_text_is_named(tmp_path):
    folder = tiny.write_image_folder(tmp_path / "set", count=2)
    os.rename(folder / "image_00.png", os.fsencode(folder / "b") + b"\xff.png")
    (folder / "note").write_text("")
    os.rename(folder / "note", os.fsencode(folder / "c") + b"\xff")
    with pytest.raises(ValueError, match=r"names of 1 file\(s\) in it are not UTF-8: b\\xff\.png"):
        load_images(instance_data_dir=str(folder), instance_prompt="x")
    os.rename(os.fsencode(folder / "b") + b"\xff.png", folder / "ü.png")
    assert "c\\xff" in " ".join(load_images(instance_data_dir=str(folder), instance_prompt="x").notes)
