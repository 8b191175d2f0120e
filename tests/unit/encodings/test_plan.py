"""What a run needs is remembered, so that a warm start reads arrays; and forgotten when anything changes."""

import tiny
from stores import equal, shards

from sana_kit.data.discover import load_images
from sana_kit.encodings import plan as plan_module


def test_a_warm_start_makes_no_key_and_reads_no_header(run, image_folder, monkeypatch):
    images = load_images(instance_data_dir=str(image_folder), repeats=3)
    first = run(images, random_flip=True, extra_prompts=[("", None)])

    def refuse(*_, **__):
        raise AssertionError("keys were made again")

    monkeypatch.setattr(plan_module, "latents_keys", refuse)
    monkeypatch.setattr(plan_module, "scan_store", refuse)
    again = run(images, random_flip=True, extra_prompts=[("", None)])
    assert equal(first, again) and (again.prompt("") == first.prompt("")).all()
    assert (again.facts.reused_images, again.facts.reused_prompts) == (first.facts.encoded_images, 7)
    assert first.facts.encoded_images > 6
    assert (first.prompt_tokens() == again.prompt_tokens()).all()


def test_a_plan_is_not_believed_when_a_shard_is_gone_or_anything_changed(run, tmp_path):
    folder = tiny.write_image_folder(tmp_path / "set", count=3)

    def now(**changes):
        facts = run(load_images(instance_data_dir=str(folder)), **changes).facts
        return facts.encoded_images, facts.encoded_prompts

    assert now() == (3, 3)
    (path,) = shards(tmp_path / "store", "prompts")
    path.unlink()
    assert now() == (0, 3) and now() == (0, 0)
    (folder / "image_00.txt").write_text("other words")
    assert now() == (0, 1) and now() == (0, 0)
    assert now(extra_prompts=[("new", None)]) == (0, 1)
    assert now(seed=3)[0] > 0
    (plan,) = sorted((tmp_path / "store" / "plans").iterdir())[:1]
    plan.write_bytes(plan.read_bytes()[:100])  # damaged: made again
    assert now() == (0, 0)
