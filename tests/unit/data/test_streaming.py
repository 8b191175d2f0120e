"""Shards that are read without listing rows, and the windows that a run takes of them."""

import json
import socket

import pytest
from helpers.shards import reader, wanted, windows, write_parquet, write_shards, write_tar

from sana_kit.data.discover import load_images
from sana_kit.data.streaming import HubShards, find_shards
from sana_kit.data.windows import LANES
from sana_kit.errors import EncodingStopped, UserError

COLUMN = {"tar": "txt", "parquet": "text"}


def problem(name, **more):
    with pytest.raises(UserError) as error:
        find_shards(wanted(name, **more))
    return str(error.value)


@pytest.fixture(params=["tar", "parquet"])
def kind(request):
    return request.param


def test_every_row_comes_once_an_epoch_and_every_epoch_in_another_order(kind, tmp_path):
    shards = find_shards(wanted(write_shards(tmp_path / "d", [4] * 6, kind), COLUMN[kind]))
    assert len(shards) == 6 and abs(shards.rows - 24) <= (3 if kind == "tar" else 0)
    found = windows(reader(shards, size=12), tmp_path / "spool", 4)
    first, second = (sorted(found[k] + found[k + 1]) for k in (0, 2))
    assert first == second == sorted(f"drawing {n}" for n in range(24))
    assert found[0] + found[1] != found[2] + found[3]


def test_shards_of_other_lengths_all_come_as_often(tmp_path):
    shards = find_shards(wanted(write_shards(tmp_path / "d", [1, 9, 2, 5, 3])))
    found = [text for window in windows(reader(shards, size=10), tmp_path / "spool", 20) for text in window]
    counts = [found.count(f"drawing {n}") for n in range(20)]
    assert sum(counts) == 200 and max(counts) - min(counts) <= 3  # those of shards that are open just now


def test_the_images_are_those_of_their_captions_and_named_by_shard(kind, tmp_path):
    source = find_shards(wanted(write_shards(tmp_path / "d", [3, 3], kind), COLUMN[kind]))
    images = reader(source, size=6).read(tmp_path / "spool", 10**9, lambda: False)
    for i in range(len(images)):
        number = int(images.captions[i].split()[1])
        assert images.load(i).getpixel((0, 0)) == (number * 37 % 256, number * 91 % 256, number)
        assert images.name(i) == f"train-{number // 3:04d}.{kind}[{number % 3}]"


def test_a_reader_goes_on_exactly_from_a_place_that_went_through_json(kind, tmp_path):
    shards = find_shards(wanted(write_shards(tmp_path / "d", [5, 2, 7], kind), COLUMN[kind]))
    whole = reader(shards)
    found, places = [], []
    for _ in range(5):
        places.append(json.loads(json.dumps(whole.place())))
        found += windows(whole, tmp_path / "spool", 1)
    for k, place in enumerate(places):
        again = reader(shards)
        again.go_to(place)
        assert windows(again, tmp_path / "other", 5 - k) == found[k:]


def test_shards_of_a_folder_ask_nothing_of_the_network(kind, tmp_path, monkeypatch):
    """A request for each shard that is opened waits five seconds where no name server answers."""
    import datasets

    asked = []
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setattr(datasets.config, name, False, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: asked.append(host) or [])
    folder = write_shards(tmp_path / "d", [2, 2], kind)
    windows(reader(find_shards(wanted(folder, COLUMN[kind]))), tmp_path / "spool", 2)
    assert len(load_images(dataset_name=str(folder), caption_column=COLUMN[kind])) == 4
    assert asked == []


def test_a_stop_leaves_the_reader_where_it_stood(tmp_path):
    source = reader(find_shards(wanted(write_shards(tmp_path / "d", [6, 6]))))
    before = source.place()
    with pytest.raises(EncodingStopped):
        source.read(tmp_path / "spool", 10**9, lambda: True)
    assert source.place() == before
    fresh = reader(source.shards)
    assert windows(source, tmp_path / "spool", 3) == windows(fresh, tmp_path / "other", 3)


def test_so_many_shards_are_open_at_once_and_no_more(tmp_path):
    source = reader(find_shards(wanted(write_shards(tmp_path / "d", [2] * 20))), size=40)
    assert source.lanes == LANES == 16 and source.size == 32
    assert len(windows(source, tmp_path / "spool", 1)[0]) == 32 and len(source._open) == 16


def test_bad_images_end_the_run_by_name_or_are_left_out(tmp_path):
    folder = write_shards(tmp_path / "d", [4, 4], "parquet")
    bad = [{"bytes": b"no image", "path": None}, {"bytes": None, "path": None}]
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "train-0001.parquet"
    table = pq.read_table(path).to_pydict()
    pq.write_table(pa.table({**table, "image": [*bad, *table["image"][2:]]}), path)
    shards = find_shards(wanted(folder, "text"))
    with pytest.raises(UserError) as error:
        reader(shards).read(tmp_path / "spool", 10**9, lambda: False)
    assert "train-0001.parquet[0]" in str(error.value) and "train-0001.parquet[1]" in str(error.value)
    images = reader(shards, skip_bad=True).read(tmp_path / "spool", 10**9, lambda: False)
    assert len(images) == 6 and "train-0001.parquet[0]" in " ".join(images.notes)


def test_a_window_that_needs_more_room_than_is_left_is_refused(tmp_path):
    source = reader(find_shards(wanted(write_shards(tmp_path / "d", [8]))))
    with pytest.raises(UserError, match="encodings_disk_gb.*lower stream_window"):
        source.read(tmp_path / "spool", 200, lambda: False)
    assert sum(path.stat().st_size for path in (tmp_path / "spool").iterdir()) <= 200


def test_shards_are_named_by_folder_file_pattern_or_range(kind, tmp_path):
    folder, caption = write_shards(tmp_path / "d", [1] * 3, kind), COLUMN[kind]
    for name, count in ((folder, 3), (folder / f"train-0001.{kind}", 1), (f"{folder}/*-000[12].{kind}", 2)):
        assert len(find_shards(wanted(name, caption))) == count
    assert find_shards(wanted(f"{folder}/train-{{0000..0002}}.{kind}", caption)).names[2] == f"train-0002.{kind}"
    told = problem(f"{folder}/train-{{0001..0004}}.{kind}", caption=caption)
    assert f"train-0003.{kind} is missing" in told and f"train-0004.{kind} is missing" in told


def test_all_shards_that_are_broken_empty_or_missing_are_told_by_name_at_the_start(tmp_path):
    folder = write_shards(tmp_path / "d", [2] * 6)
    (folder / "train-0001.tar").write_bytes(b"")
    (folder / "train-0002.tar").write_bytes(b"no archive" * 200)
    (folder / "train-0003.tar").write_bytes(bytes(10240))
    whole = (folder / "train-0004.tar").read_bytes()
    (folder / "train-0004.tar").write_bytes(whole[:700])
    (folder / "train-0005.tar").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    told = problem(folder)
    for number, reason in enumerate(("file is empty", "not a tar", "archive is empty", "cut off", "LFS pointer"), 1):
        assert any(f"train-{number:04d}.tar" in line and reason in line for line in told.split("\n")), told
    parquet = tmp_path / "p"
    parquet.mkdir()
    write_parquet(parquet / "train-00000-of-00004.parquet", range(2))
    write_parquet(parquet / "train-00001-of-00004.parquet", range(0))
    (parquet / "train-00003-of-00004.parquet").write_bytes(b"PAR1")
    told = problem(parquet, caption="text")
    assert "train-00002-of-00004.parquet is missing" in told
    assert "train-00001-of-00004.parquet: it has no rows" in told
    assert "train-00003-of-00004.parquet: it is not a readable parquet file" in told


def test_a_shard_that_goes_or_breaks_while_the_run_reads_is_told_by_name(tmp_path):
    folder = write_shards(tmp_path / "d", [2, 2])
    shards = find_shards(wanted(folder))
    whole = (folder / "train-0001.tar").read_bytes()
    (folder / "train-0001.tar").write_bytes(whole[:1536])
    with pytest.raises(UserError, match=r"shard train-0001.tar cannot be read \(ReadError"):
        windows(reader(shards), tmp_path / "spool", 1)
    (folder / "train-0001.tar").unlink()
    with pytest.raises(UserError, match=r"shard train-0001.tar cannot be read .*is gone"):
        windows(reader(shards), tmp_path / "spool", 1)


def test_columns_are_checked_by_shard_and_of_several_captions_all_are_there(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    write_parquet(folder / "a.parquet", range(2), short=["one", "two"])
    assert "caption_column=caption: no such column in shard a.parquet" in problem(folder, caption="caption")
    write_parquet(folder / "b.parquet", range(2))
    with pytest.raises(UserError, match="caption_column=short: no such column in shard b.parquet"):
        windows(reader(find_shards(wanted(folder, "short"))), tmp_path / "spool", 1)
    (folder / "b.parquet").unlink()
    tars = write_shards(tmp_path / "tars", [2])
    told = problem(tars, caption="text", image_column="photo")
    assert "caption_column=text: no such column in shard train-0000.tar; columns present: png, txt" in told
    images = reader(find_shards(wanted(folder, "text:3,short:1")), size=2).read(tmp_path / "s", 10**9, lambda: False)
    assert list(images.all_captions) == ["drawing 0", "one", "drawing 1", "two"]
    assert images.choices.weights.tolist() == [3, 1, 3, 1]


def test_what_is_no_data_set_of_shards_is_refused(tmp_path):
    assert "no such folder" in problem(tmp_path / "none")
    (tmp_path / "images").mkdir()
    assert "no .tar or .parquet shards there" in problem(tmp_path / "images")
    import tarfile

    with tarfile.open(tmp_path / "other.tar", "w") as archive:
        archive.add(tmp_path / "images", "folder")
    assert "other.tar: it holds no files" in problem(tmp_path / "other.tar")
    assert "no such split" in problem(write_shards(tmp_path / "d", [1]), split="test")
    assert write_tar(tmp_path / "x.tar", range(1)).exists()
    write_parquet(tmp_path / "x.parquet", range(1))
    assert "files of several kinds: .parquet, .tar" in problem(f"{tmp_path}/x.*")


def test_shards_that_datasets_itself_resolves_are_read_as_files_are(tmp_path):
    """As a name on the hub is: no hub is at hand, so the name is a folder's."""
    folder = write_shards(tmp_path / "d", [3, 4], "parquet")
    shards = HubShards(wanted(folder, "text"))
    assert shards.names == ["train shard 1 of 2", "train shard 2 of 2"]
    found = windows(reader(shards, size=14), tmp_path / "spool", 1)[0]
    assert set(found) == {f"drawing {n}" for n in range(7)}
    row = next(shards.read(1, 2))
    assert row.name == "train shard 2 of 2[2]" and row.caption == "drawing 5" and row.image.startswith(b"\x89PNG")
