"""Sizes that keep the house readable: a file in one sitting, a function on one screen. The lists below only shrink."""

import ast

from helpers import KIT

FILE_LINES = 480
FUNCTION_LINES = 60
# What is longer, and why. A new entry is a change of plan, not a way out; an entry that is no longer needed fails.
LONG_FILES = {
    "sana_kit/make_quickstart_model.py": "the quick start's model from drawing to training: the script that made it",
    "patch_sana.py": "stands alone beside diffusers' trainer: adapter file, fingerprint, hooks for every engine",
}
LONG_FUNCTIONS = {
    "sana_kit/arithmetic.py": ["transformer_ops"],  # one table of a transformer's operators, row by row
    "sana_kit/generation/denoise.py": ["denoise"],  # half of it is signature and docstring
    "sana_kit/generation/generate.py": ["generate"],  # half of it is signature and docstring
    "sana_kit/make_quickstart_model.py": ["train_transformer"],  # the script that made the model
    "sana_kit/model_card.py": ["write_model_card"],  # half of it is signature and docstring
}
SOURCES = sorted([*KIT.glob("*.py"), *(KIT / "sana_kit").rglob("*.py")])


def name_of(path):
    return path.relative_to(KIT).as_posix()


def long_functions(path):
    """Names of the functions of a file that are too long."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    functions = (node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    return {node.name for node in functions if node.end_lineno - node.lineno >= FUNCTION_LINES}


def test_the_kit_is_found():
    assert len(SOURCES) > 100


def test_no_file_is_longer_than_one_sitting():
    long = {name_of(path) for path in SOURCES if len(path.read_text(encoding="utf-8").splitlines()) > FILE_LINES}
    assert long == set(LONG_FILES)


def test_no_function_is_longer_than_a_screen():
    found = {name_of(path): long_functions(path) for path in SOURCES}
    assert {name: sorted(functions) for name, functions in found.items() if functions} == LONG_FUNCTIONS
