"""Files of the tests that are named anywhere in the kit are there: a test that moves takes its mentions along."""

import re

from helpers import KIT

NAMED = re.compile(r"(?<![\w/.-])tests/[\w/-]+\.(?:py|sh|txt|md|yaml)\b")
TEXTS = (".py", ".sh", ".md", ".yaml", ".yml", ".toml", ".ini", ".txt", ".cfg")
INVENTED = {"test_overlay.py"}  # names files of a stand-in


def texts():
    """(path, text) of the kit's own files."""
    folders = ("sana_kit", "tests", "docs", ".github", ".ci")
    paths = [*KIT.iterdir(), *(path for folder in folders for path in (KIT / folder).rglob("*"))]
    for path in paths:
        if path.is_file() and (path.suffix in TEXTS or path.name == "run") and path.name not in INVENTED:
            yield path, path.read_text(encoding="utf-8")


def test_every_file_of_the_tests_that_is_named_is_there():
    named = {(name, path.relative_to(KIT).as_posix()) for path, text in texts() for name in NAMED.findall(text)}
    assert len(named) > 100
    assert not sorted(pair for pair in named if not (KIT / pair[0]).exists())
