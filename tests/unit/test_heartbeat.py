"""Signs of life through a real TCPStore; the ranks are threads of this process."""

import time

import pytest

from sana_kit.errors import RankFailed
from sana_kit.heartbeat import Heartbeat, open_store


@pytest.fixture
def hearts():
    """A function that starts the heartbeats of `world_size` ranks, quick ones; all are ended after the test."""
    made = []

    def start(world_size, silent=0.5, grace=0.2, ranks=None):
        server = open_store("127.0.0.1", 0, world_size, True)
        stores = [server] + [open_store("127.0.0.1", server.port, world_size, False) for _ in range(1, world_size)]
        ended = {}
        for rank in range(world_size) if ranks is None else ranks:
            how = {"beat": 0.02, "silent": silent, "grace": grace}
            made.append(Heartbeat(stores[rank], rank, world_size, end=lambda m, r=rank: ended.update({r: m}), **how))
        return made[-world_size:], ended

    yield start
    for heart in made:
        heart._ended.set()


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_well_ranks_stay_well_and_leave_together(hearts):
    three, ended = hearts(3)
    time.sleep(0.8)
    for heart in three:
        heart.check()
    for heart in reversed(three):
        heart.close()
    time.sleep(0.8)
    assert not ended and all(heart.lost is None for heart in three)


def test_a_rank_that_left_is_not_missed(hearts):
    three, ended = hearts(3)
    three[1].close()
    time.sleep(1.0)
    assert not ended and three[0].lost is None and three[2].lost is None


def test_a_silent_rank_ends_all_others(hearts):
    three, ended = hearts(3)
    time.sleep(0.1)
    three[2]._ended.set()  # as if its machine had lost its power
    wait_until(lambda: set(ended) == {0, 1})
    assert ended[0] == ended[1] and ended[0].startswith("rank 2 on ") and "no sign of life for 0.5 s" in ended[0]
    with pytest.raises(RankFailed, match="rank 2"):
        three[1].check()


def test_a_rank_that_never_came_counts_as_silent(hearts):
    _, ended = hearts(3, ranks=[0, 1])
    wait_until(lambda: set(ended) == {0, 1})
    assert "rank 2 on a machine that never answered gave no sign of life" in ended[0]


@pytest.mark.parametrize("failing", [0, 2])
def test_a_failing_rank_tells_why(hearts, failing):
    three, ended = hearts(3, silent=30)
    three[failing].tell_failure("disk full")
    others = {0, 1, 2} - {failing}
    wait_until(lambda: set(ended) == others)
    assert {heart.lost for heart in three} == {None, ended[1]}
    assert ended[1].startswith(f"rank {failing} on ") and ended[1].endswith(" failed: disk full")


def test_a_main_thread_that_looks_is_not_ended(hearts):
    two, ended = hearts(2, silent=30, grace=30)
    two[1].tell_failure("x")
    assert two[0].why(5).endswith("failed: x")
    assert not ended


def test_a_rank_0_that_does_not_answer_is_gone(hearts):
    class Frozen:
        """A store whose machine takes calls no more."""

        def set(self, *_):
            time.sleep(60)

    ended = []
    Heartbeat(Frozen(), 1, 2, beat=0.02, silent=0.3, grace=0.1, end=ended.append)
    wait_until(lambda: ended)
    assert "rank 0 on " in ended[0] and "gave no answer for 0.3 s" in ended[0]
