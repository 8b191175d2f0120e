"""The encoder as an engine's map function: what it writes is what a training looks for."""

import pytest
from helpers.shards import image_bytes, write_parquet

from sana_kit.data.discover import load_images
from sana_kit.encodings.batches import BatchEncoder
from sana_kit.errors import UserError


def test_batches_of_several_writers_are_the_store_that_a_training_reuses(run, no_models, tiny_model, tmp_path):
    store = str(tmp_path / "store")
    rows = {"image": [{"bytes": image_bytes(n), "path": None} for n in range(7)]}
    rows["text"] = [f"drawing {n}" for n in range(7)]
    for first, last in ((0, 4), (4, 7)):  # a writer each, as on two machines
        encoder = BatchEncoder(str(tiny_model), store, 64, complex_human_instruction="none", device="cpu")
        counts = encoder({name: cells[first:last] for name, cells in rows.items()})
        assert counts["samples"].tolist() == [last - first] and counts["latent_bytes"][0] == 512 * (last - first)
    assert not list((tmp_path / "store").glob(".batch-*"))
    write_parquet(tmp_path / "train.parquet", range(7))
    images = load_images(dataset_name=str(tmp_path / "train.parquet"), caption_column="text")
    with no_models():
        encoded = run(images, encodings_dir=store)
    assert (encoded.facts.reused_images, encoded.facts.reused_prompts) == (7, 7)


def test_bad_images_are_counted_or_end_the_job(tiny_model, tmp_path):
    batch = {"image": [image_bytes(0), b"none", None], "text": ["a", "b", "c"]}
    kept = {"model": str(tiny_model), "store": str(tmp_path), "resolution": 64, "device": "cpu"}
    kept["complex_human_instruction"] = "none"
    assert BatchEncoder(**kept)(batch)["skipped"].tolist() == [2]
    with pytest.raises(UserError, match="row 1 of the batch"):
        BatchEncoder(**kept, skip_bad_images=False)(batch)
