"""Encoding on several ranks: the same bits as on one, errors told on all, kills at random moments.

One worker process imports the libraries once and forks the groups of ranks (workers/encode_groups.py).
"""

import json
import sys

import pytest
import tiny
from helpers import KIT, run, script_environment

LEFT = ["latents", "prompts", "runs"]  # no marks of ranks that have ended


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, tiny_model):
    """The results of all scenarios with several ranks; one process imports torch for all of them."""
    return run_ranks(tmp_path_factory.mktemp("ranks"), tiny_model, kills=6)


def run_ranks(work, tiny_model, kills, scenarios="all"):
    tiny.write_image_folder(work / "images", count=7)
    tiny.write_image_folder(work / "single", count=1)
    (tiny.write_image_folder(work / "lacking", count=7) / "image_05.png").unlink()
    tiny.write_image_folder(work / "many", count=20 + 6 * kills)
    corrupt = tiny.write_image_folder(work / "corrupt", count=5)
    tiny.make_images(1, size=300)[0][0].save(corrupt / "cut.jpg")
    data = (corrupt / "cut.jpg").read_bytes()
    (corrupt / "cut.jpg").write_bytes(data[: len(data) * 3 // 4])
    script = KIT / "tests" / "distributed" / "workers" / "encode_groups.py"
    command = [sys.executable, script, tiny_model, work, kills, scenarios]
    done = run(command, env={**script_environment(), "CUDA_VISIBLE_DEVICES": ""})
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(lines[-1][7:])


def test_shares_of_any_number_of_ranks_give_the_same_bits(ranks):
    assert all(len({r["digest"] for r in ranks[k]}) == 1 for k in ("one rank", "two ranks", "three ranks"))
    assert ranks["one rank"][0]["digest"] == ranks["two ranks"][0]["digest"] == ranks["three ranks"][0]["digest"]
    for name in ("one rank", "two ranks", "three ranks"):
        assert all((r["images"], r["prompts"]) == (7, 7) for r in ranks[name])
    assert all((r["images"], r["prompts"]) == (0, 0) for r in ranks["again on two"])
    assert ranks["again on two"][0]["digest"] == ranks["one rank"][0]["digest"]


def test_ranks_without_a_share_finish(ranks):
    assert [r["images"] for r in ranks["idle ranks"]] == [1, 1, 1]
    assert ranks["idle left"] == ["latents", "plans", "prompts", "runs"]


def test_corrupt_image_on_one_share_ends_all_ranks_with_its_name(ranks):
    for result in ranks["corrupt"]:
        assert result["error"].startswith("UserError") and "cut.jpg" in result["error"]
    assert ranks["corrupt left"] == LEFT
    assert all(r["samples"] == 5 and r["images"] == 5 for r in ranks["skipped"])


def test_machines_with_folders_of_their_own_each_encode_all(ranks):
    assert [r["samples"] for r in ranks["separate"]] == [7, 7]
    assert {r["digest"] for r in ranks["separate"]} == {ranks["one rank"][0]["digest"]}


def test_failure_of_one_rank_ends_all_with_its_text(ranks):
    for rank, result in enumerate(ranks["failure"]):
        assert "the device caught fire" in result["error"] and (rank == 1 or "rank 1 failed" in result["error"])
    assert ranks["failure left"] == LEFT
    for result in ranks["flag error on one rank"]:
        assert (
            result["error"].startswith("UserError: The images cannot be encoded:")
            and "resolution=63" in result["error"]
        )


def test_other_images_on_one_machine_are_told_on_all(ranks):
    for result in ranks["other images on one rank"]:
        assert result["error"].startswith("UserError: the data set differs between the ranks: rank 0 on ")
        assert "has 6 samples: it lacks 1 of rank 0's images" in result["error"]
    assert not ranks["other images left"]


def test_killed_encoding_goes_on_and_ends_with_the_same_bits(ranks):
    assert sorted(ranks["kills"]) == ranks["kills"]  # nothing that was written is lost
    assert ranks["after kills"][0]["digest"] == ranks["undisturbed"][0]["digest"]
    # The first kill waits for a shard; how far the others let it come is the machine's.
    assert 0 < ranks["kills"][0] <= ranks["kills"][-1] <= 56
    assert ranks["after kills"][0]["images"] == 56 - ranks["kills"][-1]


def test_concurrent_runs_in_one_store(ranks):
    assert [r["digest"] for r in ranks["concurrent"]] == [ranks["undisturbed"][0]["digest"]] * 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_forty_kills_at_random_moments(tmp_path, tiny_model):
    results = run_ranks(tmp_path, tiny_model, kills=40, scenarios="kills")
    assert len(results["kills"]) == 40 and results["after kills"][0]["digest"] == results["undisturbed"][0]["digest"]
    print("encoded at each kill:", results["kills"])
