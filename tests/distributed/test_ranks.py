"""The agreement between ranks, on two real processes."""

import os
import signal
import time

import pytest
from helpers.ranks import run_ranks

from sana_kit import heartbeat
from sana_kit.distributed import StopSignal
from sana_kit.errors import CheckpointError, Problem, StoreError, UserError


def exchange(ranks):
    ranks.barrier()
    same = ranks.agree({"from": ranks.rank}, from_rank=1)
    return ranks.gather(ranks.rank * 10), same, ranks.largest(ranks.rank + 5), ranks.is_main, ranks.is_local_main


def test_values_travel_in_rank_order():
    assert run_ranks(exchange) == [
        (True, ([0, 10], {"from": 1}, 6, True, True)),
        (True, ([0, 10], {"from": 1}, 6, False, False)),
    ]


def meet_failures(ranks):
    told = []

    def fail(*failures):
        def action():
            failure = failures[ranks.rank]
            if failure is not None:
                raise failure
            return "well"

        try:
            told.append(ranks.run_on_all(action))
        except Exception as error:
            told.append((type(error).__name__, str(error), getattr(error, "shared", False)))

    fail(None, None)
    same = Problem("resolution", 7, "is odd", "Take 8")
    fail(UserError(same), UserError([same, Problem("rank", 0, "is none")]))
    fail(None, StoreError("full"))
    fail(KeyError("a"), CheckpointError("cut"))
    fail(None, ZeroDivisionError("x"))
    return told


def test_an_error_of_one_rank_is_raised_on_all_and_problems_are_merged():
    first, second = run_ranks(meet_failures)
    assert first[0] and second[0]
    problems = ("UserError", "resolution=7: is odd. Take 8\n  rank=0: is none.", True)
    assert first[1][:3] == second[1][:3] == ["well", problems, ("StoreError", "full", True)]
    assert first[1][3] == ("KeyError", "'a'", False)
    assert second[1][3] == ("RankFailed", "rank 0 failed: KeyError: 'a'", False)
    assert first[1][4] == ("RankFailed", "rank 1 failed: ZeroDivisionError: x", False)
    assert second[1][4][0] == "ZeroDivisionError"


def killed(ranks):
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    try:
        ranks.barrier()
    finally:
        assert time.monotonic() - begin < 600  # long before the half hour of a collective
        assert ranks._heartbeat._ended.is_set()  # the end of the interpreter does not wait for the one that is gone


def test_a_killed_rank_ends_the_others_at_once():
    first, second = run_ranks(killed)
    assert second is None
    assert not first[0] and first[1].startswith("RankFailed: another rank ended while this one waited for it")


FROZEN = 1


def frozen(ranks):
    if ranks.rank == FROZEN:
        os.kill(os.getpid(), signal.SIGSTOP)  # as a machine without power: its sockets stay open, nothing answers
    ranks.barrier()


@pytest.mark.parametrize(("rank", "told"), [(1, "rank 1 on "), (0, "rank 0 on 127.0.0.1 gave no answer")])
def test_a_machine_that_is_gone_ends_the_others(monkeypatch, capfd, rank, told):
    """Also a main thread inside a collective; the seconds are a thirtieth of the real ones."""
    monkeypatch.setitem(globals(), "FROZEN", rank)
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 3.0)
    monkeypatch.setattr(heartbeat, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(heartbeat, "local_rank", lambda: 0)  # each rank is the first of its machine
    assert run_ranks(frozen) == [None, None]
    shown = capfd.readouterr().err
    assert f"error: {told}" in shown and "it is gone or frozen" in shown


def tells(ranks):
    if ranks.rank == 1:
        ranks._heartbeat.tell_failure("CheckpointError: disk full")
        return
    ranks.barrier()


@pytest.mark.parametrize("failing", [1])
def test_a_failing_ranks_reason_reaches_the_others(failing):
    first, _ = run_ranks(tells)
    assert not first[0] and first[1].startswith("RankFailed: rank 1 on ") and "disk full" in first[1]


def stop_after_three(ranks):
    stop = StopSignal(ranks)
    for step in range(1, 10):
        if step == 3 and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if stop.agreed():
            return step, stop.exit_code
    return None


def test_a_stop_falls_after_the_current_update_on_all_ranks():
    assert run_ranks(stop_after_three) == [(True, (3, 143)), (True, (3, 143))]
