"""What a start remembers of images and captions, and when it looks again."""

import os
import pickle
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from sana_kit.data import folders, headers, memory, tables
from sana_kit.data.assemble import WHITESPACE
from sana_kit.data.discover import load_images
from sana_kit.data.texts import Texts
from sana_kit.distributed import Ranks


@pytest.fixture
def looked(monkeypatch):
    """Names of the images that were read, in the order of reading; files count as settled at once."""
    names, real = [], headers.inspect_image

    def look(data, name):
        names.append(name)
        return real(data, name)

    monkeypatch.setattr(headers, "inspect_image", look)
    monkeypatch.setattr(memory, "SETTLED_NS", 0)
    return names


def same(first, second):
    return (
        first.digest() == second.digest()
        and first.captions == second.captions
        and first.names == second.names
        and first.report == second.report
        and first.notes == second.notes
        and (first.sizes() == second.sizes()).all()
    )


def test_a_second_start_reads_no_caption_of_a_folder_and_sees_every_change(tmp_path, looked, monkeypatch):
    folder = tiny.write_image_folder(tmp_path / "set", count=4)
    words = {"instance_data_dir": str(folder), "instance_prompt": "x", "remember_in": tmp_path / "kept"}
    read, real = [], folders.CaptionFiles.read
    monkeypatch.setattr(folders.CaptionFiles, "read", lambda self: read.append(self) or real(self))
    first = load_images(**words)
    assert same(load_images(**words), first) and len(read) == 1
    caption = folder / "image_01.txt"
    caption.write_text("changed")
    assert load_images(**words).captions[1] == "changed" and len(read) == 2
    caption.rename(folder / "image_01.caption")
    assert load_images(**words).captions[1] == "changed" and len(read) == 3
    (folder / "image_01.caption").unlink()
    assert load_images(**words).captions[1] == "x" and len(read) == 4
    assert load_images(**{**words, "instance_prompt": "y"}).captions[1] == "y" and len(read) == 5
    monkeypatch.setattr(memory, "SETTLED_NS", 3600 * 10**9)  # all of them changed a moment ago: read again
    load_images(**{**words, "instance_prompt": "y"})
    assert len(read) == 6


def test_a_second_start_reads_no_image_of_a_folder_and_a_changed_one_alone(tmp_path, looked):
    folder, kept = tiny.write_image_folder(tmp_path / "set", count=5), tmp_path / "kept"
    frames = [image for image, _ in tiny.make_images(2)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    (folder / "bad.png").write_bytes(b"x")
    words = {"instance_data_dir": str(folder), "instance_prompt": "x", "skip_bad_images": True, "remember_in": kept}
    first = load_images(**words)
    assert len(looked) == 7
    looked.clear()
    assert same(load_images(**words), first) and looked == ["bad.png"]
    assert "1 animation(s)" in str(first.notes)
    looked.clear()
    tiny.make_images(9)[8][0].save(folder / "image_02.png")
    (folder / "image_00.png").unlink()
    tiny.make_images(9)[7][0].save(folder / "image_09.png")
    third = load_images(**words)
    assert sorted(looked) == ["bad.png", "image_02.png", "image_09.png"]
    del words["remember_in"]
    assert same(third, load_images(**words))


def test_a_file_that_changed_a_moment_ago_is_looked_at_again(tmp_path, looked, monkeypatch):
    monkeypatch.setattr(memory, "SETTLED_NS", 3600 * 10**9)
    words = {
        "instance_data_dir": str(tiny.write_image_folder(tmp_path / "set", count=2)),
        "remember_in": tmp_path / "k",
    }
    load_images(**words, instance_prompt="x")
    load_images(**words, instance_prompt="x")
    assert len(looked) == 4


def test_a_file_put_in_place_with_old_times_is_noticed(tmp_path, looked):
    folder = tiny.write_image_folder(tmp_path / "set", count=2)
    words = {"instance_data_dir": str(folder), "instance_prompt": "x", "remember_in": tmp_path / "kept"}
    first, path = load_images(**words), folder / "image_00.png"
    before = path.stat()
    data = path.read_bytes()
    path.write_bytes(data[:-12] + data[-12:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    looked.clear()
    assert same(load_images(**words), first) and looked == ["image_00.png"]


def write_table(folder, captions, count=5):
    """A parquet file of `count` images with these captions."""
    rows = tiny.make_images(count)
    encoded = []
    for index, (image, _) in enumerate(rows):
        path = folder.parent / f"{index}.png"
        image.save(path)
        encoded.append({"bytes": path.read_bytes(), "path": None})
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"image": encoded, "text": captions}), folder / "train.parquet")
    return str(folder)


def test_a_second_start_reads_neither_images_nor_captions_of_a_table(tmp_path, looked, monkeypatch):
    name = write_table(tmp_path / "set", [" a ", None, "", "\u2028b\x1f", "c"])
    words = {"dataset_name": name, "caption_column": "text", "instance_prompt": "p", "remember_in": tmp_path / "kept"}
    first = load_images(**words)
    assert first.captions == ["a", "p", "p", "b", "c"] and len(looked) == 5
    with monkeypatch.context() as patch:
        patch.setattr(tables, "_parquet_column", None)
        assert same(load_images(**words), first) and len(looked) == 5
    twice = load_images(**words, repeats=2)
    assert len(twice) == 10 and twice.captions[:4] == ["a", "a", "p", "p"] and len(looked) == 5
    assert load_images(**{**words, "instance_prompt": "q"}).captions == ["a", "q", "q", "b", "c"]
    time.sleep(0.01)
    write_table(tmp_path / "set", ["other", "words", "x", "y", "z"])
    assert load_images(**words).captions[0] == "other" and len(looked) == 10


def test_several_captions_a_cell_are_remembered_too(tmp_path, looked, monkeypatch):
    name = write_table(tmp_path / "set", [["a", "b"], [], ["c"], None, [" "]])
    words = {"dataset_name": name, "caption_column": "text", "instance_prompt": "p", "repeats": 2}
    words["remember_in"] = tmp_path / "kept"
    first = load_images(**words)
    assert first.captions == ["a", "a", "p", "p", "c", "c", "p", "p", "p", "p"]
    assert first.all_captions == ["a", "b", "a", "b", "p", "p", "c", "c", "p", "p", "p", "p"]
    monkeypatch.setattr(tables, "_parquet_column", None)
    again = load_images(**words)
    assert same(again, first) and first.report["images with several captions"] == 1
    assert again.all_captions == first.all_captions and (again.choices.weights == first.choices.weights).all()


def test_half_a_character_is_a_problem_that_names_the_image(tmp_path):
    folder = tiny.write_image_folder(tmp_path / "set", count=1)
    (folder / "metadata.jsonl").write_text('{"file_name": "image_00.png", "text": "\\ud800"}')
    with pytest.raises(ValueError, match="caption of image_00.png: it holds half a character"):
        load_images(dataset_name=str(folder), caption_column="text", instance_prompt="x")


def test_damaged_or_foreign_memory_is_made_again_and_none_is_no_error(tmp_path, looked):
    folder = tiny.write_image_folder(tmp_path / "set", count=2)
    words = {"instance_data_dir": str(folder), "instance_prompt": "x", "remember_in": tmp_path / "kept"}
    first = load_images(**words)
    files = list((tmp_path / "kept").iterdir())
    assert len(files) == 2  # of images, of captions
    for damage in (lambda content: b"", lambda content: b"x" * 100, lambda content: content[:-40]):
        for file in files:
            content = file.read_bytes()
            file.unlink()
            file.write_bytes(damage(content))
        looked.clear()
        assert same(load_images(**words), first) and len(looked) == 2
    (tmp_path / "taken").write_text("")
    assert same(load_images(**{**words, "remember_in": tmp_path / "taken" / "kept"}), first)


def test_captions_are_trimmed_as_by_str_strip():
    assert "".join(filter(str.isspace, map(chr, range(sys.maxunicode + 1)))) == "".join(sorted(WHITESPACE))


def test_texts_are_a_sequence():
    words = ["a", "", "ü😀", "b"] * 3000
    texts = Texts(words)
    assert texts == words and list(texts) == words and texts[2:5] == words[2:5] and texts[-1] == "b"
    assert texts != words[:-1] and texts != [*words[:-1], "c"] and texts + ["c"] == [*words, "c"]
    assert pickle.loads(pickle.dumps(texts)) == words and "ü😀" in texts
    assert texts.where(np.arange(len(words)) % 4 == 3) == ["b"] * 3000
    with pytest.raises(IndexError):
        texts[len(words)]


def test_ranks_of_one_machine_read_each_image_once(tmp_path, looked):
    """Two ranks, one after the other: what each contributes, and that both end with the same set."""
    folder = str(tiny.write_image_folder(tmp_path / "set", count=5))

    class Half(Ranks):
        """A rank of two whose `gather` takes the other's word from `others`."""

        def gather(self, value):
            said.append(value)
            other = others[len(said) - 1] if others else value
            return [value, other] if self.rank == 0 else [other, value]

        def run_on_all(self, action, checks_input=False):
            return action()

    def load(rank, other):
        said.clear()
        others[:] = other
        ranks = Half(rank, 1, None)
        ranks.world_size = 2
        images = load_images(instance_data_dir=folder, instance_prompt="x", ranks=ranks)
        return images, list(said)

    said, others = [], []
    _, first = load(0, [])
    _, second = load(1, first)
    assert sorted(looked) == [f"image_{k:02d}.png" for k in range(5)]
    looked.clear()
    images, _ = load(0, second)
    assert len(looked) == 3 and same(images, load_images(instance_data_dir=folder, instance_prompt="x"))
