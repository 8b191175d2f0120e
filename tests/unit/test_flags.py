"""A setting's flag, help, default and range come from its dataclass field alone.

python -m pytest tests/unit/test_flags.py
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from sana_kit.flags import REQUIRED, config_from, flag, make_parser, parse, range_problems, section, settings_of
from sana_kit.inference.config import InferConfig
from sana_kit.playground.config import PlaygroundConfig
from sana_kit.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Things:
    name: str = flag(REQUIRED, "Its name.")
    folder: str | None = flag(None, "A folder.", path=True)
    steps: int = flag(28, "Steps of 100 %.", low=1, high=1000)
    rate: float = flag(0.5, "A rate.", above=0, below=1)
    optional: float | None = flag(None, "Perhaps.", low=0)


@dataclasses.dataclass(frozen=True)
class Lists:
    seeds: tuple[int, ...] = flag((8, 23), "Seeds.", low=0)
    prompt: tuple[str, ...] = flag((), "A prompt.", repeat=True)
    words: str = flag("a", "One of a few.", choices=("a", "b"))
    quick: bool = flag(False, "A switch.")
    careful: bool = flag(True, "Takes a value.")
    fuse: bool = flag(True, "Switched off by another name.", off="no_fuse")


@dataclasses.dataclass(frozen=True)
class Config:
    things: Things = section("things")
    lists: Lists = section("lists and switches")


PROMPTS = ("--prompt", "a", "--prompt", "b")


def of(*words: str):
    return parse(Config, "A test.", ["--name", "x", *words])


def test_values_have_the_types_of_the_fields_and_defaults_stand_in():
    config, given = of()
    assert config == Config(Things(name="x"), Lists()) and given == {"name"}
    assert (config.things.steps, config.lists.seeds, config.lists.prompt) == (28, (8, 23), ())
    config, given = of(
        "--steps=3", "--seeds", "1", "2", "--prompt", "a", "--prompt", "b", "--quick", "--careful=false"
    )
    assert (config.things.steps, config.lists.seeds, config.lists.prompt) == (3, (1, 2), ("a", "b"))
    assert config.lists.quick and not config.lists.careful and config.lists.fuse
    assert given == {"name", "steps", "seeds", "prompt", "quick", "careful"}
    assert not of("--no_fuse")[0].lists.fuse
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.things.steps = 4


def test_a_flag_that_repeats_its_default_counts_as_given():
    assert "steps" in of("--steps=28")[1] and "quick" in of("--quick")[1]


def test_paths_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert of("--folder=~/out")[0].things.folder == "/home/somebody/out"
    assert of("--folder=out/~")[0].things.folder == str(Path("out/~"))


def test_every_number_out_of_its_range_is_named():
    config, _ = of("--steps=0", "--rate=1", "--optional=-1", "--seeds", "3", "-4")
    assert [problem.text("--{}".format) for problem in range_problems(config)] == [
        "--steps=0: must be at least 1.",
        "--rate=1.0: must be below 1.",
        "--optional=-1.0: must be at least 0.",
        "--seeds=-4: must be at least 0.",
    ]
    assert "finite" in str(range_problems(of("--rate=nan")[0])[0])
    assert "at most 1000" in str(range_problems(of("--steps=1001")[0])[0])
    assert range_problems(of()[0]) == []


def test_a_value_that_is_none_of_the_choices_is_named_with_the_rest():
    told = [problem.text("--{}".format) for problem in range_problems(of("--words=aa", "--steps=0")[0])]
    assert told == ["--steps=0: must be at least 1.", "--words=aa: unknown. Use one of a, b. Did you mean a?"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--stepz=3"], "--stepz=3 Did you mean --steps?"),
        (["--careful=maybe"], "'maybe' is neither true nor false"),
        (["--step=3"], "--step=3"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_what_is_no_flag_ends_with_its_name(words, told, capsys):
    with pytest.raises(SystemExit) as stop:
        of(*words)
    assert stop.value.code == 2 and told in capsys.readouterr().err


def test_a_required_flag_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        parse(Config, "A test.", [])
    assert "--name" in capsys.readouterr().err


def test_help_shows_groups_and_defaults():
    text = make_parser(Config, "A test.", defaults={"folder": "./here"}).format_help()
    assert "lists and switches:" in text and "(default: 28)" in text and "(default: 8 23)" in text
    assert "100 %" in text and "(default: ./here)" in text and "None" not in text and "--no_fuse" in text
    assert "Perhaps (default: none)" in text and "A switch (default: off)" in text and "Its name (required)" in text


@pytest.mark.parametrize("config_class", [TrainConfig, InferConfig, PlaygroundConfig])
def test_every_flag_of_the_scripts_tells_its_default_and_every_group_fits_a_screen(config_class, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = make_parser(config_class, "A test.").format_help()
    _, *groups = text.split("\n\n")
    for group in groups[2:]:
        title, *flags = re.split(r"\n  (?=--)", group)
        assert len(group.splitlines()) <= 40, title
        silent = [flag.split()[0] for flag in flags if not re.search(r"[Dd]efault\b|required", flag)]
        assert silent == [], title


def test_settings_go_to_a_dictionary_and_back():
    config, _ = of("--steps=3", "--prompt", "a")
    assert config_from(Config, settings_of(config)) == config
