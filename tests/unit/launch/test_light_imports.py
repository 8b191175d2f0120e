"""The launcher's checks import no library that takes seconds; read from the source, nothing is started.

python -m pytest tests/unit/launch/test_light_imports.py
"""

import ast

import pytest
from helpers import KIT

HEAVY = {"peft", "diffusers", "transformers", "datasets", "deepspeed"}


def imported_at_once(name):
    """Modules that a module of the kit imports when it is imported: not those of functions or for types only."""
    path = KIT.joinpath(*name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [one for one in inner if is_module(one)] or [node.module]
    return found


def is_module(name):
    path = KIT.joinpath(*name.split("."))
    return name.startswith("sana_kit") and (path.with_suffix(".py").is_file() or path.is_dir())


def reached_from(name):
    """{third-party package: the module of the kit that imports it} of all that follows from importing `name`."""
    seen, open_names, packages = set(), [name], {}
    while open_names:
        one = open_names.pop()
        if one in seen:
            continue
        seen.add(one)
        for other in imported_at_once(one):
            if other.split(".")[0] == "sana_kit":
                open_names.append(other)
            else:
                packages.setdefault(other.split(".")[0], one)
    return packages


@pytest.mark.parametrize("name", ["sana_kit.training.check", "sana_kit.launch.ranks", "sana_kit.doctor"])
def test_the_launchers_checks_import_nothing_heavy(name):
    found = reached_from(name)
    assert not {package: by for package, by in found.items() if package in HEAVY}
    assert "torch" in found or name == "sana_kit.doctor"  # it was followed at all; the doctor looks first


def test_the_training_itself_is_seen_to_import_them():
    assert {"peft", "diffusers"} <= set(reached_from("sana_kit.training.transformer"))
