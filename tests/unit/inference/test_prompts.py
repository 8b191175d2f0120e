"""Prompt files: lines, JSON, tables, and what is wrong with them.

python -m pytest tests/unit/inference/test_prompts.py
"""

import pytest

from sana_kit.inference.prompts import read_prompts


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("a.txt", "\ufeffone\n\n  two \n", [("one", None), ("two", None)]),
        ("a.jsonl", '{"prompt": "one", "negative_prompt": "n"}\n"two"\n', [("one", "n"), ("two", None)]),
    ],
)
def test_prompt_files(tmp_path, name, text, prompts):
    (tmp_path / name).write_text(text, encoding="utf-8")
    found, problems = read_prompts(str(tmp_path / name))
    assert problems == [] and [(p.prompt, p.negative_prompt) for p in found] == prompts


@pytest.mark.parametrize(
    "line", ['{"prompt": 3}', '["a"]', '{"prompt": "a", "seeds": ["8"]}', '{"prompt": "a", "height": "64"}', "{}"]
)
def test_bad_lines_of_a_prompt_file_are_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(f'"good"\n{line}\n', encoding="utf-8")
    assert "line 2" in read_prompts(str(tmp_path / "a.jsonl"))[1][0].reason
    (tmp_path / "empty.txt").write_text("\n\n")
    assert "holds no prompt" in read_prompts(str(tmp_path / "empty.txt"))[1][0].reason
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    assert "not UTF-8" in read_prompts(str(tmp_path / "latin.txt"))[1][0].reason


@pytest.mark.parametrize("letter", ["\u2028", "\u0085", "\x0b", "\x1c"])
def test_a_line_ends_with_a_line_feed_alone(tmp_path, letter):
    """str.splitlines would break a prompt at each of these."""
    for name, text in (("a.jsonl", f'{{"prompt": "one{letter}two"}}\r\n"three"'), ("a.txt", f"one{letter}two\nthree")):
        if name == "a.jsonl" and letter < " ":
            continue  # JSON has no control characters in texts
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        found, problems = read_prompts(str(tmp_path / name))
        assert problems == [] and [prompt.prompt for prompt in found] == [f"one{letter}two", "three"]


def test_comments_and_empty_lines_of_a_text_are_no_prompts(tmp_path):
    (tmp_path / "a.txt").write_text("# cats\n\na cat #1\n   # indented\n\t\na dog\n", encoding="utf-8")
    assert [prompt.prompt for prompt in read_prompts(str(tmp_path / "a.txt"))[0]] == ["a cat #1", "a dog"]


def test_tables(tmp_path):
    (tmp_path / "a.csv").write_text(
        'prompt,seeds,width,height,negative_prompt\n"a cat, asleep","8, 23",96,64,\n\na dog,,,,blue\n',
        encoding="utf-8",
    )
    found, problems = read_prompts(str(tmp_path / "a.csv"))
    assert problems == []
    assert (found[0].prompt, found[0].seeds, found[0].width, found[0].height) == ("a cat, asleep", (8, 23), 96, 64)
    assert (found[0].negative_prompt, found[1].negative_prompt, found[1].seeds) == (None, "blue", None)
    (tmp_path / "a.tsv").write_text("prompt\theight\na cat, asleep\t64\n", encoding="utf-8")
    assert read_prompts(str(tmp_path / "a.tsv"))[0][0].prompt == "a cat, asleep"


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.csv", "prompt\na cat, asleep\n", "line 2: 2 cells, and the header has 1"),
        ("a.csv", "a cat\na dog\n", "first line must name columns"),
        ("a.csv", "promt\na cat\n", "Did you mean prompt?"),
        ("a.csv", "prompt,seeds\na cat,eight\n", "line 2: seeds must be whole numbers, not 'eight'"),
        ("a.csv", "prompt,width\na cat,6.5\n", "line 2: width must be a whole number of pixels"),
        ("a.csv", "prompt,width\n,64\n", "line 2: prompt must be a text that is not empty"),
        ("a.xlsx", "a cat", "files ending in .xlsx are not read"),
        ("a.md", "a cat", "files ending in .md are not read"),
        ("a.csv", "", "first line must name columns"),
        ("a.csv", "prompt\n", "holds no prompt"),
    ],
)
def test_what_is_wrong_with_a_table_or_an_ending(tmp_path, name, text, told):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert told in str(read_prompts(str(tmp_path / name))[1][0])


def test_a_json_list_and_a_file_without_an_ending(tmp_path):
    (tmp_path / "a.json").write_text('["one",\n {"prompt": "two"}]')
    assert [prompt.prompt for prompt in read_prompts(str(tmp_path / "a.json"))[0]] == ["one", "two"]
    (tmp_path / "prompts").write_text("one\n")
    assert [prompt.prompt for prompt in read_prompts(str(tmp_path / "prompts"))[0]] == ["one"]
