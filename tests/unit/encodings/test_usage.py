"""A store's size, what in it was not used lately, and pruning that never takes what a live run uses."""

import os
import pickle
import shutil
import time

import pytest
from stores import all_of, shards

from sana_kit.data.discover import load_images
from sana_kit.encodings import usage
from sana_kit.encodings.__main__ import main
from sana_kit.errors import UserError

DAY = 86400


def age(store, days):
    """Make all shards of a store look unused for so long."""
    for part in ("latents", "prompts"):
        for path in shards(store, part):
            os.utime(path, (time.time() - days * DAY,) * 2)


@pytest.fixture
def used(run, image_folder, tmp_path):
    """(store, the data set of a run that is live)."""
    return tmp_path / "store", run(load_images(instance_data_dir=str(image_folder)))


def test_a_live_run_keeps_its_shards_and_they_go_when_it_is_over(used, capsys):
    store, encoded = used
    age(store, 40)
    assert usage.prune(store) == []
    assert len(all_of(encoded)) == 6
    before = sum(path.stat().st_size for part in ("latents", "prompts") for path in shards(store, part))
    encoded.close()
    assert main([str(store), "--prune", "--dry_run"]) == 0
    assert "would go" in capsys.readouterr().out and shards(store, "latents")
    assert main([str(store), "--prune"]) == 0
    told = capsys.readouterr().out
    assert f"removed: {usage.size_text(before)} in 2 files" in told and not shards(store, "latents")
    assert not list((store / "plans").iterdir())  # a remembered plan that names a removed shard is of no use


def test_what_was_used_lately_stays(used):
    store, encoded = used
    age(store, 29)
    path = shards(store, "prompts")[0]
    os.utime(path, (time.time() - 31 * DAY,) * 2)
    encoded.close()
    assert [shard.path for shard in usage.prune(store, 30)] == [path]
    assert len(shards(store, "latents")) == 1 and not path.exists()


def test_a_run_that_starts_renews_what_it_uses(used, run, image_folder):
    store, encoded = used
    encoded.close()
    age(store, 40)
    again = run(load_images(instance_data_dir=str(image_folder)))
    assert again.facts.encoded_images == 0
    assert all(shard.unused_days < 1 for shard in usage.shards_of(store))


def test_pruning_is_refused_while_a_run_encodes(used):
    store, _ = used
    claim = usage.Claim(store)
    with pytest.raises(UserError, match="is encoding into it"):
        usage.prune(store, 0)
    claim.close()


def test_a_claim_of_a_dead_run_holds_nothing(used):
    store, encoded = used
    (claim,) = (store / "runs").glob("*.json")
    kept = claim.read_text()
    encoded.close()
    assert not claim.exists()
    claim.write_text(kept)  # as a killed run leaves it
    age(store, 40)
    (store / "images").mkdir()
    for name, days in (("old.arrow", 40), ("new.arrow", 1)):  # as `sana_kit.data.memory` leaves them
        (store / "images" / name).touch()
        os.utime(store / "images" / name, (time.time() - days * DAY,) * 2)
    assert len(usage.prune(store)) == 2 and not claim.exists()
    assert [path.name for path in (store / "images").iterdir()] == ["new.arrow"]


def test_copies_of_the_data_set_in_workers_do_not_give_the_claim_up(used):
    store, encoded = used
    copy = pickle.loads(pickle.dumps(encoded))
    del copy
    age(store, 40)
    assert usage.prune(store) == []


def test_the_store_tells_its_size_and_what_is_old(used, run, image_folder, capsys):
    store, encoded = used
    assert "all used within 30 days" in encoded.facts.store and "store of encodings" in encoded.facts.store
    shutil.copy(shards(store, "latents")[0], store / "latents" / "latents-old.safetensors")
    os.utime(store / "latents" / "latents-old.safetensors", (time.time() - 50 * DAY,) * 2)
    again = run(load_images(instance_data_dir=str(image_folder)))
    assert f"not used for 30 days (python -m sana_kit.encodings {store} --prune" in again.facts.store
    assert main([str(store)]) == 0
    told = capsys.readouterr().out
    assert "latents: " in told and "in 1 of them not used for 30 days" in told


def test_wrong_words_of_the_command_are_told(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        main([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="holds no encodings"):
        main([str(tmp_path), "--prune"])
    with pytest.raises(UserError, match="unused_days=-1"):
        main([str(tmp_path), "--unused_days=-1"])
