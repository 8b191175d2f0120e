"""What a LoRA file says of its training.

python -m pytest tests/unit/models/test_about.py
"""

import json

import pytest

from sana_kit import __version__
from sana_kit.models.about import LoraAbout, about_metadata, read_about, shared_words

CAPTIONS = ["a red square in sks style", "a dog in sks style", "two cats, in sks style"]


def metadata(captions=CAPTIONS, **changes):
    told = {"rank": 8, "alpha": 16.0, "base_model": "owner/model", "base_sha256": "ab" * 32, "resolution": 512}
    told |= {"instruction": ("Enhance:", "User Prompt: "), "trigger": shared_words(captions), "steps": 30}
    return about_metadata(LoraAbout(**{**told, "images": len(captions), **changes}))


def test_every_fact_is_in_our_key_and_in_those_of_other_tools():
    found = metadata()
    assert all(isinstance(value, str) for value in found.values())
    assert read_about(found) == {
        "rank": 8,
        "alpha": 16.0,
        "base_model": "owner/model",
        "base_sha256": "ab" * 32,
        "instruction": ["Enhance:", "User Prompt: "],
        "trigger": "in sks style",
        "resolution": 512,
        "steps": 30,
        "images": 3,
        "kit_version": __version__,
    }
    shown = ("ss_network_dim", "ss_network_alpha", "ss_steps", "ss_num_train_images", "ss_resolution")
    assert [found[key] for key in shown] == ["8", "16.0", "30", "3", "(512, 512)"]
    assert found["ss_sd_model_hash"] == "ab" * 32 and found["ss_sd_model_name"] == "owner/model"
    assert json.loads(found["ss_tag_frequency"]) == {"captions": {"in sks style": 3}}
    assert found["modelspec.title"] == "LoRA of owner/model: in sks style"
    assert found["modelspec.trigger_phrase"] == "in sks style" and found["modelspec.resolution"] == "512x512"
    assert found["modelspec.usage_hint"].endswith("Enhance:\nUser Prompt: ")


def test_what_is_not_known_is_not_told():
    found = metadata(captions=["a dog", "one cat"], instruction=None, base_model="", base_sha256=None)
    assert not {key for key in found if "trigger" in key or "tag" in key or "hint" in key or "hash" in key}
    assert read_about(found)["instruction"] is None and "trigger" not in read_about(found)
    assert found["modelspec.title"] == "LoRA of SANA" and metadata() == metadata()
    assert read_about(metadata(images=7))["images"] == 7


@pytest.mark.parametrize(
    ("captions", "trigger"),
    [
        ([], None),
        (["a photo of sks dog"] * 3, "a photo of sks dog"),
        (["sks dog, in grass", "sks dog, at home"], "sks dog"),
        (["a . ", "b . "], None),
        (["red fox", "blue fish"], None),
    ],
)
def test_the_trigger_is_what_the_captions_share(captions, trigger):
    assert shared_words(captions) == trigger
