"""Work that ranks share without a training: windows of a stream, the comparison with the training images."""

import pytest
import tiny
from helpers.memorised import NoStop, as_trained, drawn, fields
from helpers.ranks import ALONE, run_ranks
from helpers.shards import reader, wanted, windows, write_shards

from sana_kit.data.streaming import find_shards
from sana_kit.training.memorisation import compare_with_training_images


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_processes_reads_the_same_windows_each_its_own_shards(world_size, tmp_path):
    """With two shards and three processes, one reads nothing."""
    shards = find_shards(wanted(write_shards(tmp_path / "d", [5, 9])))

    def job(ranks):
        source = reader(shards, ranks=ranks)
        read = []
        way = shards.read
        shards.read = lambda number, first=0: read.append(number) or way(number, first)
        return windows(source, tmp_path / f"spool-{world_size}", 4), read, reader(shards, ranks=ranks).split()

    found = run_ranks(job, world_size)
    alone = windows(reader(shards), tmp_path / "spool", 4)
    assert all(ok and value[0] == alone for ok, value in found), found
    told = found[0][1][2]
    if world_size == 2:
        assert {found[0][1][1][0], found[1][1][1][0]} == {0, 1}
        assert sum("begins with train-" in line for line in told) == 2
    else:
        assert found[2][1][1] == [] and "processes 2 to 2 read none" in told[-1]


def test_two_ranks_find_the_copies_that_one_finds(tmp_path):
    encoded = fields(tmp_path / "images")
    entries = drawn(tmp_path, as_trained(encoded, 5), tiny.make_images(1)[0][0])
    alone = compare_with_training_images(encoded, 8, entries, tmp_path, ALONE, NoStop())

    def job(ranks):
        found = compare_with_training_images(encoded, 8, entries, tmp_path, ranks, NoStop())
        return None if found is None else found.figures()

    (_, first), (_, second) = run_ranks(job)
    assert first == alone.figures() and second is None
