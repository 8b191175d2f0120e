"""Settings of a script: flag, default, help and range of each stand once, in a field of a frozen dataclass.

    @dataclasses.dataclass(frozen=True)
    class Sampling:
        num_inference_steps: int = flag(28, "Denoising steps.", low=1)
        prompt: tuple[str, ...] = flag((), "A prompt; may be given several times.", repeat=True)

    @dataclasses.dataclass(frozen=True)
    class Config:
        sampling: Sampling = section("sampling")

    config, given = parse(Config, "Draws images.", argv)     # config.sampling.num_inference_steps
    problems = range_problems(config)                        # a list of errors.Problem, empty if all is well

A configuration that derives from `Sections` also answers by a setting's name alone (config.num_inference_steps) and
gives copies with other values. With `file_flag` a YAML file of settings may stand behind the command line.

Nothing heavy is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sana_kit.errors import Problem, did_you_mean
from sana_kit.files import expand

T = TypeVar("T")

REQUIRED: Any = dataclasses.MISSING
Resume = typing.Literal["told", "fixed"]
_SECRET = re.compile(r"(^|_)(token|secret|password|passwd|api_?key|access_?key)$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Flag:
    """What a field's metadata holds under "flag"."""

    help: str
    choices: tuple[str, ...] | None
    low: float | None
    high: float | None
    above: float | None
    below: float | None
    repeat: bool
    many: bool
    off: str | None
    path: bool
    metavar: str | None
    convert: Callable[[str], Any] | None
    resume: Resume | None
    heading: str | None


def flag(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    repeat: bool = False,
    many: bool = False,
    off: str | None = None,
    path: bool = False,
    metavar: str | None = None,
    convert: Callable[[str], Any] | None = None,
    resume: Resume | None = None,
    heading: str | None = None,
) -> Any:
    """A dataclass field that is a setting; its flag is `--` and the field's name, its type the field's annotation.

    A `bool` that is False is a switch; one that is True takes true or false, or is switched off by the flag `off`. A
    `tuple[X, ...]` takes one or more values, or with `repeat` one value each time that the flag is given. Another type
    is with `repeat` one value where the flag is given once, and a tuple where it is given several times.

    Args:
        default: its value without the flag; REQUIRED where there is none.
        help: one or two sentences.
        choices: the texts that are allowed; another one is found by `range_problems`, with all other problems.
        low, high: the smallest and largest value; above, below: bounds that are not allowed themselves.
        many: with `repeat`: one or more values each time that the flag is given.
        path: the value names a file or folder; ~ is expanded.
        convert: makes the value from the text, instead of the annotation's type; ArgumentTypeError where it cannot.
        resume: of a run that goes on from a checkpoint with another value: "told" where it trains on differently,
            "fixed" where the checkpoint's tensors do not fit and it is refused; None where it may change freely.
        heading: in `--help` this flag and those after it stand under a heading of their own, behind the section's.
    """
    settings = Flag(
        help,
        None if choices is None else tuple(choices),
        low,
        high,
        above,
        below,
        repeat,
        many,
        off,
        path,
        metavar,
        convert,
        resume,
        heading,
    )
    if default is REQUIRED:
        return dataclasses.field(metadata={"flag": settings}, kw_only=True)
    return dataclasses.field(default=default, metadata={"flag": settings}, kw_only=True)


def section(title: str) -> Any:
    """A field that holds a dataclass of settings, shown in `--help` below `title`."""
    return dataclasses.field(metadata={"title": title})


def _program() -> str | None:
    """`python -m sana_kit.playground` where that is what was typed; None: the script's name."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or not spec.name.startswith("sana_kit.") or spec.origin != os.path.abspath(sys.argv[0]):
        return None
    return f"python -m {spec.name.removesuffix('.__main__')}"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations, which names the nearest flag for a misspelt one."""

    def __init__(self, **kwargs: Any):
        kwargs.setdefault("formatter_class", Help)
        kwargs.setdefault("prog", _program())
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; every unknown word is named, flags with the one that is nearest."""
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            said = [
                word + (did_you_mean(word.split("=")[0], flags) if word.startswith("-") else "") for word in unknown
            ]
            self.error("unrecognized arguments: " + "; ".join(said))
        return known

    def error(self, message: str) -> typing.NoReturn:
        """Say what is wrong in two lines; argparse would print all flags before it."""
        self.exit(2, f"{self.prog}: error: {message}\n(--help lists all flags)\n")


_TELLS_DEFAULT = re.compile(r"(?<!')\bdefault\b", re.IGNORECASE)  # 'default' in quotes is a value


class Help(argparse.HelpFormatter):
    """Each flag's default behind its help, where that does not tell it; a short word for its value."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown, told = action.default, action.help or ""
        if not told or not action.option_strings or shown == argparse.SUPPRESS or _TELLS_DEFAULT.search(told):
            return told.replace("%", "%%")
        if isinstance(shown, bool) and action.nargs == 0:  # a switch: not given
            shown = "off"
        elif isinstance(shown, (tuple, list)):
            shown = " ".join(map(str, shown))
        behind = "required" if action.required else f"default: {'none' if shown in (None, '') else shown}"
        told = told if told.endswith("...") else told.removesuffix(".")
        return f"{told} ({behind})".replace("%", "%%")

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if action.type in (int, float):
            return "N" if action.type is int else "X"
        return super()._get_default_metavar_for_optional(action).rpartition("_")[2]


class PlainHelp(Help, argparse.RawDescriptionHelpFormatter):
    """The same below a description that keeps its lines."""


def _boolean(text: str) -> bool:
    """'true' or 'false' as a flag's value; `type=bool` would read 'False' as True."""
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")


def _value_type(annotation: Any) -> tuple[Any, bool]:
    """(type of one value, whether the setting holds several) of a field's annotation."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        inner = [part for part in typing.get_args(annotation) if part is not type(None)]
        return _value_type(inner[0])
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0], True
    return annotation, False


def _expanded(text: str) -> str:
    return str(expand(text)) if text.startswith("~") else text


def _add(group: argparse._ArgumentGroup, field: dataclasses.Field, annotation: Any, default: Any) -> None:
    """Give a setting's flag to argparse."""
    settings: Flag = field.metadata["flag"]
    kind, several = _value_type(annotation)
    name, words = f"--{field.name}", {"help": settings.help, "default": default}
    if kind is bool and not several:
        if settings.off is not None:
            group.add_argument(f"--{settings.off}", dest=field.name, action="store_false", **words)
            return
        if default is False:
            group.add_argument(name, action="store_true", **words)
            return
        kind = _boolean
    if default is REQUIRED:
        words = {"help": settings.help, "required": True}
    convert = settings.convert or (_expanded if settings.path or kind is Path else kind)
    metavar = "{" + ",".join(settings.choices) + "}" if settings.choices else settings.metavar
    words |= {"type": convert, "metavar": metavar}
    if several or settings.repeat:
        many = {"action": "extend", "nargs": "+"} if settings.many else {"action": "append"}
        words |= many if settings.repeat else {"nargs": "+"}
        if settings.repeat and "default" in words:  # argparse would append to the default
            words["default"] = None
    group.add_argument(name, **words)


def _sections(config_class: type) -> list[tuple[str, str, type[Any]]]:
    """(field name, title, dataclass) of a configuration's sections."""
    hints, fields = typing.get_type_hints(config_class), dataclasses.fields(config_class)
    return [(f.name, f.metadata["title"], hints[f.name]) for f in fields if "title" in f.metadata]


class Sections:
    """A frozen configuration whose settings are also reached by their names alone, whatever their section."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            for part_name, _, part_class in _sections(type(self)):
                if name in part_class.__dataclass_fields__ or isinstance(vars(part_class).get(name), property):
                    return getattr(getattr(self, part_name), name)
        raise AttributeError(f"there is no setting '{name}'")

    def replaced(self: T, **values: Any) -> T:
        """A copy in which these settings have other values."""
        parts, left = {}, set(values)
        for part_name, _, part_class in _sections(type(self)):
            own = {name: values[name] for name in values if name in part_class.__dataclass_fields__}
            parts[part_name] = dataclasses.replace(getattr(self, part_name), **own)
            left -= set(own)
        if left:
            raise AttributeError(f"there is no setting '{min(left)}'")
        return dataclasses.replace(self, **parts)  # type: ignore[type-var]


def make_parser(
    config_class: type, description: str, defaults: dict[str, Any] | None = None, epilog: str | None = None
) -> Parser:
    """A parser of all settings of a configuration, a group for each section.

    Args:
        config_class: a dataclass whose fields are made by `section`.
        defaults: field name -> default, for scripts that differ in some.
    """
    parser = Parser(description=description, epilog=epilog, usage="%(prog)s [flags]")
    defaults = defaults or {}
    for _, title, section_class in _sections(config_class):
        group, hints = parser.add_argument_group(title), typing.get_type_hints(section_class)
        for field in dataclasses.fields(section_class):
            if "flag" in field.metadata:
                if heading := field.metadata["flag"].heading:
                    group = parser.add_argument_group(f"{title}: {heading}")
                _add(group, field, hints[field.name], defaults.get(field.name, field.default))
    return parser


def config_from(config_class: type[T], values: dict[str, Any]) -> T:
    """The configuration whose settings have these values, by field name; one left out has its default."""

    def build(section_class: type) -> Any:
        fields = {field.name: field for field in dataclasses.fields(section_class) if "flag" in field.metadata}
        taken = {name: values[name] for name in fields if name in values}
        for name, value in taken.items():
            if isinstance(value, list):
                single = len(value) == 1 and not isinstance(fields[name].default, tuple)
                taken[name] = value[0] if single else tuple(value)
            elif value is None and isinstance(fields[name].default, tuple):
                taken[name] = fields[name].default
        return section_class(**taken)

    return config_class(**{name: build(section_class) for name, _, section_class in _sections(config_class)})


def parse(
    config_class: type[T],
    description: str,
    argv: Sequence[str] | None = None,
    defaults: dict[str, Any] | None = None,
    epilog: str | None = None,
    file_flag: str | None = None,
) -> tuple[T, frozenset[str]]:
    """(configuration, names of the settings that were given); SystemExit 2 for what is no flag of it.

    Args:
        file_flag: a setting that names a YAML file of settings; the command line overrides what stands there.
    """
    parser = make_parser(config_class, description, defaults, epilog)
    argv = list(sys.argv[1:] if argv is None else argv)
    if file_flag is not None:
        argv = [*_file_words(parser, argv, file_flag), *argv]
    values = vars(parser.parse_args(argv))
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    given = vars(parser.parse_args(argv))
    return config_from(config_class, values), frozenset(given)


def _file_words(parser: Parser, argv: list[str], file_flag: str) -> list[str]:
    """The settings of the file that `argv` names as words of a command line; none where it names no file."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument(f"--{file_flag}")
    path = getattr(finder.parse_known_args(argv)[0], file_flag)
    if path is None:
        return []
    import yaml

    try:
        settings = yaml.safe_load(expand(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"--{file_flag}={path}: cannot be read ({' '.join(str(error).split())})")
    if not isinstance(settings, dict):
        parser.error(f"--{file_flag}={path}: holds no settings; it needs lines such as 'resolution: 1024'")
    actions = {action.dest: action for action in parser._actions}
    words = []
    for name, value in settings.items():
        action = actions.get(str(name))
        if action is None or name == file_flag:
            parser.error(f"--{file_flag}={path}: there is no setting '{name}'.{did_you_mean(str(name), actions)}")
        # one that may be repeated would add up with the command line's
        repeated = isinstance(action, argparse._AppendAction)
        if value is None or (repeated and any(word.split("=")[0] in action.option_strings for word in argv)):
            continue
        words += _words_of(action, value)
    return words


def _words_of(action: argparse.Action, value: Any) -> list[str]:
    """One setting of a file as words of a command line."""
    flag = action.option_strings[0]
    if action.const is not None:  # a switch
        return [flag] if value is action.const else []
    several = value if isinstance(value, list) else [value]
    if action.type is str:  # YAML reads an unquoted no as false
        several = [{True: "yes", False: "no"}.get(item, item) if isinstance(item, bool) else item for item in several]
    if action.nargs == "+":
        return [flag, *map(str, several)]
    return [f"{flag}={json.dumps(item) if isinstance(item, dict) else item}" for item in several]


def settings_of(config: Any) -> dict[str, Any]:
    """Field name -> value of all settings of a configuration, in the order of its flags."""
    return {
        field.name: getattr(part, field.name)
        for part in (getattr(config, name) for name, _, _ in _sections(type(config)))
        for field in dataclasses.fields(part)
        if "flag" in field.metadata
    }


def is_secret(name: str) -> bool:
    """Whether a setting of this name must reach no log, page, card, tracker or settings file."""
    return _SECRET.search(name) is not None


def names_where(config_class: type, wanted: Callable[[Flag], bool]) -> tuple[str, ...]:
    """The settings of a configuration, or of one section, whose flag is as `wanted`, in their order."""
    parts = [part for _, _, part in _sections(config_class)] or [config_class]
    fields = [field for part in parts for field in dataclasses.fields(part) if "flag" in field.metadata]
    return tuple(field.name for field in fields if wanted(field.metadata["flag"]))


def _range_fault(settings: Flag, value: float) -> str | None:
    """What is wrong with a number, a sentence without its full stop."""
    bounds = [
        (settings.low, value < (settings.low or 0), "must be at least"),
        (settings.high, value > (settings.high or 0), "must be at most"),
        (settings.above, value <= (settings.above or 0), "must be above"),
        (settings.below, value >= (settings.below or 0), "must be below"),
    ]
    if not math.isfinite(value):
        return "must be a finite number"
    return next((f"{text} {bound:g}" for bound, crossed, text in bounds if bound is not None and crossed), None)


def range_problems(config: Any) -> list[Problem]:
    """Every setting whose value is out of its range or none of its choices."""
    problems = []
    for part in (getattr(config, name) for name, _, _ in _sections(type(config))):
        for field in dataclasses.fields(part):
            values = getattr(part, field.name)
            for value in values if isinstance(values, tuple) else (values,):
                if "flag" in field.metadata and value is not None:
                    problems += _value_problems(field, value)
    return problems


def _value_problems(field: dataclasses.Field, value: Any) -> list[Problem]:
    settings: Flag = field.metadata["flag"]
    if settings.choices is not None and value not in settings.choices:
        remedy = f"Use one of {', '.join(settings.choices)}.{did_you_mean(str(value), settings.choices)}"
        return [Problem(field.name, value, "unknown", remedy)]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return []
    fault = _range_fault(settings, value)
    return [] if fault is None else [Problem(field.name, value, fault)]
