"""Jobs: names, order, groups.

python -m pytest tests/unit/generation/test_jobs.py
"""

import unicodedata

import pytest
import torch
from helpers.drawing import CPU, plan

from sana_kit.generation.jobs import Prompt, group_jobs, resolve_batch_size, slug

HOSTILE = [
    "../../etc/passwd",
    "/absolute/path",
    "a\x00b\nc",
    "🦊" * 50,
    "红狐狸",
    "…",
    "CON",
    "x" * 10_000,
    "é" * 300,
    ".",
]


@pytest.mark.parametrize("prompt", HOSTILE)
def test_file_names_are_short_safe_and_stay_in_the_folder(prompt, tmp_path):
    name = plan([prompt], [8])[0].file_name
    assert name.endswith(".png") and name.count(".") == 1 and not set(name) & set('/\\:*?"<>|%# \x00\n')
    assert len(name.encode()) < 160 and name == unicodedata.normalize("NFC", name)
    assert (tmp_path / name).resolve().parent == tmp_path.resolve()
    (tmp_path / name).touch()
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("一只小猫", "一只小猫"),
        ("Ein Kätzchen, süß!", "ein-kätzchen-süß"),
        ("Ka\u0308tzchen", "kätzchen"),  # a letter and its mark become one
        ("हिन्दी में बिल्ली", "हिन्दी-में-बिल्ली"),
        ("котёнок в лесу", "котёнок-в-лесу"),
        ("عربي قط", "عربي-قط"),
        ("a\u202e\u200b cat\u2028", "a-cat"),  # what reverses or hides text does not pass
        ("\u0301\u0301", "image"),  # a mark without a letter
        ("../..", "image"),
        ("bad \ud800 text", "bad-text"),
    ],
)
def test_names_keep_the_letters_of_every_script(prompt, shown):
    assert slug(prompt) == shown


def test_names_are_counted_in_characters_and_bytes():
    assert slug("x" * 100) == "x" * 40 and slug("猫" * 100) == "猫" * 32 and len(("猫" * 32).encode()) == 96


def test_file_names_are_distinct_and_stable():
    jobs = plan(HOSTILE, [8, -8, 1334]) + plan(HOSTILE[:1], [8], fingerprint="another model")
    jobs += plan(HOSTILE[:1], [8], steps=4) + plan(HOSTILE[:1], [8], negative_prompt="x") + plan(HOSTILE[:1], [8], 32)
    assert len({job.file_name for job in jobs}) == len(jobs)
    assert jobs[0].file_name == plan(["../../etc/passwd"], [8])[0].file_name
    assert plan(["A red Fox, at dawn!"], [8])[0].file_name.startswith("a-red-fox-at-dawn-")


def test_plan_is_prompts_times_seeds_with_each_image_once():
    listed = [Prompt("one", negative_prompt="own"), "two", Prompt("three", seeds=(1,), height=32, width=64), "two"]
    jobs = plan(listed, [8, 23])
    assert [(j.prompt, j.seed) for j in jobs] == [("one", 8), ("one", 23), ("two", 8), ("two", 23), ("three", 1)]
    assert [j.index for j in jobs] == list(range(5))
    assert [j.negative_prompt for j in jobs[::2]] == ["own", "", ""]
    assert (jobs[4].height, jobs[4].width, jobs[0].height) == (32, 64, 64)
    assert {j.negative_prompt for j in plan(listed, [8], negative_prompt="for all")} == {"for all"}


def test_groups_hold_neighbours_of_one_size():
    jobs = plan(["one", Prompt("two", height=32), "three"], [1, 2, 3])
    groups = group_jobs(jobs, 2, device=CPU, pixels_per_token=64)
    assert [[job.index for job in group] for group in groups] == [[0, 1], [2], [3, 4], [5], [6, 7], [8]]


def test_auto_batch_depends_on_size_and_device_kind_only():
    def auto(size, kind):
        return resolve_batch_size("auto", size, size, device=torch.device(kind), pixels_per_token=32**2)

    assert [auto(size, "cuda") for size in (512, 1024, 2048, 4096)] == [8, 8, 2, 1]
    assert auto(512, "cpu") == auto(4096, "cpu") == 1
    assert resolve_batch_size("5", 64, 64, device=CPU, pixels_per_token=64) == 5
