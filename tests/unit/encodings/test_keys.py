"""Keys of encodings: what they were in every release, whichever way they are put together."""

import hashlib
import json
import types

import numpy as np
import pytest

from sana_kit.data.transform import plan_transform
from sana_kit.encodings.keys import PromptKeys, distinct, latents_keys
from sana_kit.encodings.settings import EncodingSettings, Transform

PARTS = {"max_sequence_length": 300, "tokenizer": "t" * 64, "text_encoder": 'e"\\', "dtype": "bf16"}


def by_json(**parts):
    """A key as the first release made it: the SHA-256 of JSON with sorted names."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).digest()


def test_keys_of_latents_are_those_of_sorted_json():
    sources = np.random.default_rng(0).integers(0, 256, (50, 32)).astype(np.uint8)
    sizes = np.random.default_rng(1).integers(1, 3000, (50, 2))
    transform = {"center_crop": False, "random_flip": True, "seed": 2**63 + 5}
    targets = [(512, 512) if i % 2 else (640, 384) for i in range(len(sizes))]
    plans = [
        plan_transform(tuple(map(int, size)), index=i, target=target, **transform)
        for i, (size, target) in enumerate(zip(sizes, targets, strict=True))
    ]
    keys = latents_keys(plans, sources, vae='v"é', vae_dtype="bf16")
    for plan, source, key in zip(plans, sources, keys, strict=True):
        expected = by_json(
            format=1,
            kind="latents",
            source=source.tobytes().hex(),
            scaled=plan.scaled,
            crop=plan.crop,
            flip=plan.flip,
            resolution=512 if plan.size == (512, 512) else [640, 384],
            vae='v"é',
            dtype="bf16",
        )
        assert key.tobytes() == expected
    assert len({plan.flip for plan in plans}) == 2


@pytest.mark.parametrize("instruction", [None, ["Given é:", 'User "Prompt": ', "\0"]])
def test_keys_of_prompts_are_those_of_sorted_json(instruction):
    prompts = ["a red dog", "  A Photo of a CAT 😀 ", "", "שלום\u2028", 'a "quoted" \\ one\n', "text"]
    make = PromptKeys(**PARTS)
    many = make.many(prompts, instruction)
    for prompt, key in zip(prompts, many, strict=True):
        text = prompt.lower().strip()
        expected = by_json(format=1, kind="prompt", text=text, instruction=instruction, **PARTS)
        assert key.tobytes() == expected == make(prompt, instruction)
    assert make("x", []) == make("x", None)


def test_distinct_keeps_the_order_of_first_occurrence():
    keys = np.array([[3] * 32, [1] * 32, [3] * 32, [0] * 32, [1] * 32], np.uint8)
    first, rows = distinct(keys)
    assert first.tolist() == [0, 1, 3] and rows.tolist() == [0, 1, 0, 2, 1]


def image_set(names, seed=0):
    """A set of images of the same names' bytes, without any pixel."""
    digests = np.stack([np.frombuffer(hashlib.sha256(name.encode()).digest(), np.uint8) for name in names])
    return types.SimpleNamespace(
        follows=None,
        source_digests=lambda: digests,
        positions=lambda: np.arange(len(names)),
        size=lambda i: (640, 480),
        __len__=lambda: len(names),
    )


def test_a_crop_belongs_to_the_image_wherever_it_stands_and_whatever_the_seed():
    settings = EncodingSettings(encodings_dir="", resolution=64, random_flip=True)
    names = [f"image {k}" for k in range(40)]
    here, there = Transform(image_set(names), settings), Transform(image_set(names[::-1]), settings)
    assert [here(k) for k in range(40)] == [there(39 - k) for k in range(40)]
    assert len({here(k).crop for k in range(40)}) > 10 and len({here(k).flip for k in range(40)}) == 2


def test_each_repeat_of_an_image_has_its_own_crop_and_every_run_the_same():
    settings = EncodingSettings(encodings_dir="", resolution=64, random_flip=True)
    repeated = Transform(image_set(["a", "a", "b", "a"]), settings)
    other = Transform(image_set(["b", "a", "a", "a"]), settings)
    crops = [repeated(k) for k in (0, 1, 3)]
    assert len(set(crops)) == 3 and [other(k) for k in (1, 2, 3)] == crops and other(0) == repeated(2)


def test_crops_that_a_seed_decides_follow_the_position():
    settings = EncodingSettings(encodings_dir="", resolution=64)
    one, two = (Transform(image_set(["a", "b", "c"]), settings, seed) for seed in (1, 2))
    shared = {"target": (64, 64), "center_crop": False, "random_flip": False}
    assert [one(k) for k in range(3)] == [plan_transform((640, 480), seed=1, index=k, **shared) for k in range(3)]
    assert [one(k) for k in range(3)] != [two(k) for k in range(3)]
