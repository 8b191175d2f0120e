"""The data sets of a run, one or several: what each is, read from the run's settings. Nothing heavy is imported."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from sana_kit.errors import Problem, did_you_mean, setting
from sana_kit.files import expand

# What says where images are; a data set has one of them.
SOURCES = ("dataset_name", "instance_data_dir")
# What a folder of images has no use for.
_OF_TABLES = ("dataset_config_name", "dataset_split", "image_column", "caption_column", "mask_column")
_LEAST_WEIGHT = 0.001


@dataclasses.dataclass(frozen=True)
class _Sizes:
    resolution: int | tuple[int, ...] = 512
    aspect_ratio_buckets: bool = False
    bucket_no_upscale: bool = False
    center_crop: bool = False
    random_flip: bool = False


_RULE = tuple(field.name for field in dataclasses.fields(_Sizes))


@dataclasses.dataclass(frozen=True)
class SizeRule(_Sizes):
    """At which size images are trained, and how they are cut; the names are those of the run's settings."""

    @property
    def sides(self) -> tuple[int, ...]:
        """All resolutions."""
        return self.resolution if isinstance(self.resolution, tuple) else (self.resolution,)

    def __str__(self) -> str:
        shape = " in buckets" if self.aspect_ratio_buckets else ""
        more = {"not enlarged": self.bucket_no_upscale, "centre": self.center_crop, "flips": self.random_flip}
        words = [f"{', '.join(map(str, self.sides))} px{shape}", *(word for word, on in more.items() if on)]
        return ", ".join(words)

    def problems(self, field: str | None = None, value: object = None) -> list[Problem]:
        """What does not go together; `field` and `value` of what holds the rule, None for the run's own settings."""
        problems = []
        if len(self.sides) > 1 and not self.aspect_ratio_buckets:
            reason = "several resolutions are trained in buckets"
            remedy = f"Add {setting('aspect_ratio_buckets')}, or give one."
            problems.append(Problem(field or "resolution", value or self.resolution, reason, remedy))
        if self.bucket_no_upscale and not self.aspect_ratio_buckets:
            what = "" if field is None else f"{setting('bucket_no_upscale')} "
            reason = f"{what}has no effect without {setting('aspect_ratio_buckets')}"
            problems.append(Problem(field or "bucket_no_upscale", value, reason))
        return problems


@dataclasses.dataclass(frozen=True)
class DataSet(_Sizes):
    """One data set; the names are those of the run's settings.

    Attributes:
        weight: samples of an epoch for each image and repeat: 2 shows every image twice an epoch, 0.25 every fourth
            epoch.
    """

    dataset_name: str | None = None
    instance_data_dir: str | None = None
    dataset_config_name: str | None = None
    dataset_split: str | None = None
    image_column: str = "image"
    caption_column: str | None = None
    mask_column: str | None = None
    instance_prompt: str | None = None
    caption_prefix: str = ""
    caption_suffix: str = ""
    repeats: int = 1
    weight: float = 1.0

    @property
    def field(self) -> str:
        """The setting that names it."""
        return SOURCES[0] if self.dataset_name is not None else SOURCES[1]

    @property
    def name(self) -> str:
        """Its name or folder."""
        return getattr(self, self.field) or ""

    @property
    def share(self) -> Fraction:
        """The weight as a fraction, so that epochs are counted without rounding."""
        return Fraction(self.weight).limit_denominator(10**6)

    @property
    def rule(self) -> SizeRule:
        """At which size its images are trained."""
        return size_rule(self)

    def source(self) -> dict[str, Any]:
        """Where its images are, as `find_images` and `load_images` take it; without `repeats`."""
        return {name: getattr(self, name) for name in (*SOURCES, *_OF_TABLES)}

    def problems(self) -> list[Problem]:
        """What is wrong with it that no file tells."""
        problems = []
        if (self.dataset_name is None) == (self.instance_data_dir is None):
            what = "both" if self.dataset_name is not None else "neither"
            reason = f"a data set has dataset_name or instance_data_dir, this one {what}"
            problems.append(Problem("data_sets", self.name or None, reason))
        if not (self.weight >= _LEAST_WEIGHT and math.isfinite(self.weight)):
            reason = f"the weight is {self.weight:g}; it must be at least {_LEAST_WEIGHT:g}"
            problems.append(Problem("data_sets", self.name, reason, "Leave the set out, or weigh it more."))
        if self.repeats < 1:
            problems.append(Problem("data_sets", self.name, f"repeats is {self.repeats}; it must be at least 1"))
        columns = {"caption_column": "captions in a folder are .txt files"}
        columns["mask_column"] = "masks in a folder are files NAME.mask.png"
        for name, instead in columns.items():
            value = getattr(self, name)
            if self.instance_data_dir is not None and value is not None:
                problems.append(Problem(name, value, f"columns belong to {setting('dataset_name')}; {instead}"))
        if self.dataset_name is not None and self.caption_column is None and self.instance_prompt is None:
            reason = f"needed, since no {setting('caption_column')} is given; every image gets it as caption"
            problems.append(Problem("instance_prompt", None, reason))
        return problems


def data_set_of(text: str) -> dict[str, Any]:
    """A JSON mapping of a data set's settings.

    Raises:
        argparse.ArgumentTypeError: it is none, or a setting is unknown or of another kind.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not a JSON mapping ({error})") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'\'{text}\' is not a mapping such as {{"instance_data_dir": "my_images"}}')
    fields = {field.name: field for field in dataclasses.fields(DataSet)}
    kinds: dict[str, tuple[Any, str]] = {"repeats": (int, "a whole number"), "weight": ((int, float), "a number")}
    for name, value in found.items():
        if name in _RULE:
            found[name] = _of_rule(name, value)
            continue
        if name not in fields:
            raise argparse.ArgumentTypeError(f"a data set has no setting '{name}'.{did_you_mean(name, fields)}")
        kind, told = kinds.get(name, (str, "a text"))
        if isinstance(value, bool) or not (
            isinstance(value, kind) or (value is None and fields[name].default is None)
        ):
            raise argparse.ArgumentTypeError(f"{name} of a data set is {told}, not {value!r}")
        if name in SOURCES and value and value.startswith("~"):
            found[name] = str(expand(value))
    return found


def resolutions_of(text: str) -> int | tuple[int, ...]:
    """1024, or 512,1024."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number of pixels nor several, such as 512,1024")
    numbers = tuple(dict.fromkeys(map(int, parts)))
    return numbers[0] if len(numbers) == 1 else numbers


def _of_rule(name: str, value: Any) -> Any:
    """A setting of a SizeRule as a mapping has it."""
    if name != "resolution":
        if not isinstance(value, bool):
            raise argparse.ArgumentTypeError(f"{name} of a data set is true or false, not {value!r}")
        return value
    numbers = value if isinstance(value, list) else [value]
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
        told = f"{name} of a data set is a number of pixels, or a list of them, not {value!r}"
        raise argparse.ArgumentTypeError(told)
    return value if isinstance(value, int) else list(dict.fromkeys(value))


def size_rule(settings: Any) -> SizeRule:
    """The rule in anything that has its names: a run's settings, a DataSet."""
    return SizeRule(**{name: getattr(settings, name) for name in _RULE})


def several(value: Any) -> tuple:
    """The values of a setting that may be given once or several times, each once."""
    values = value if isinstance(value, (tuple, list)) else (() if value is None else (value,))
    return tuple(dict.fromkeys(values))


def data_sets(settings: Mapping[str, Any]) -> tuple[DataSet, ...]:
    """The data sets that a run's settings name: dataset_name's, instance_data_dir's, then those of data_sets.

    What a mapping leaves out is the run's own setting, but for what a folder has no use for.
    """
    names = [field.name for field in dataclasses.fields(DataSet) if field.name not in SOURCES]
    shared = {name: settings[name] for name in names if name in settings}
    of_folder = {name: value for name, value in shared.items() if name not in _OF_TABLES}
    found = [DataSet(dataset_name=name, **shared) for name in several(settings.get("dataset_name"))]
    found += [DataSet(instance_data_dir=name, **of_folder) for name in several(settings.get("instance_data_dir"))]
    for mapping in settings.get("data_sets") or ():
        found.append(DataSet(**{**(of_folder if mapping.get("instance_data_dir") else shared), **mapping}))
    # a list in JSON and YAML is a tuple here, where it is compared
    found = [dataclasses.replace(one, resolution=_one_or_several(one.resolution)) for one in found]
    return tuple(dict.fromkeys(found))


def _one_or_several(resolution: Any) -> Any:
    if not isinstance(resolution, (list, tuple)):
        return resolution
    return resolution[0] if len(resolution) == 1 else tuple(resolution)


def absolute(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A data set's settings with absolute paths, where they are there."""
    return {
        name: os.path.abspath(value) if name in SOURCES and value and os.path.exists(str(value)) else value
        for name, value in mapping.items()
    }
