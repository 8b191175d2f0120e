"""Several data sets of a run: read from flags, files and mappings, each with what it leaves out filled in."""

import json

import pytest

from sana_kit.data.sets import DataSet, data_set_of, data_sets, several
from sana_kit.training.config import parse_args

MODEL = "--pretrained_model_name_or_path=m"


def test_flags_name_one_set_or_several():
    assert parse_args([MODEL, "--dataset_name=a"]).dataset_name == "a"
    config = parse_args([MODEL, "--dataset_name=a", "--instance_data_dir=b", "--instance_data_dir=c", "--repeats=2"])
    assert config.instance_data_dir == ("b", "c")
    assert [(found.field, found.name, found.repeats) for found in config.sets] == [
        ("dataset_name", "a", 2),
        ("instance_data_dir", "b", 2),
        ("instance_data_dir", "c", 2),
    ]
    assert config.set_weights is None
    twice = parse_args([MODEL, "--instance_data_dir=b", "--instance_data_dir=b"])
    assert len(twice.sets) == 1  # the launcher hands a folder on twice


def test_a_mapping_overrides_the_run_and_a_folder_has_no_columns():
    own = {"instance_data_dir": "d", "weight": 0.25, "caption_prefix": "P "}
    words = [MODEL, "--dataset_name=a", "--caption_column=text", "--caption_prefix=R ", "--instance_prompt=x"]
    config = parse_args([*words, f"--data_sets={json.dumps(own)}", '--data_sets={"dataset_name": "e"}'])
    table, folder, other = config.sets
    assert (table.caption_column, table.caption_prefix, table.weight) == ("text", "R ", 1)
    assert (folder.caption_column, folder.caption_prefix, folder.instance_prompt) == (None, "P ", "x")
    assert (other.caption_column, other.caption_prefix) == ("text", "R ")
    assert config.set_weights == (1, 0.25, 1) and folder.share.as_integer_ratio() == (1, 4)


def test_a_file_lists_sets_and_a_run_writes_them_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").mkdir()
    text = "pretrained_model_name_or_path: m\ninstance_data_dir: [one, two]\n"
    text += "data_sets:\n- instance_data_dir: one\n  weight: 2\n- {dataset_name: hub/set, caption_column: 'a:2,b'}\n"
    (tmp_path / "mine.yaml").write_text(text)
    config = parse_args(["--config=mine.yaml"])
    assert [found.name for found in config.sets] == ["one", "two", "one", "hub/set"]
    again = parse_args([f"--config={config.save(tmp_path / 'out')}"])
    names = [str(tmp_path / "one"), "two", str(tmp_path / "one"), "hub/set"]
    assert [found.name for found in again.sets] == names and again.set_weights == config.set_weights
    other = parse_args(["--config=mine.yaml", "--instance_data_dir=x"])
    assert [found.name for found in other.sets] == ["x", "one", "hub/set"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x", "is not a JSON mapping"),
        ("[1]", "is not a mapping such as"),
        ('{"weigh": 1}', "no setting 'weigh'. Did you mean weight?"),
        ('{"weight": "2"}', "weight of a data set is a number, not '2'"),
        ('{"resolution": "512"}', "resolution of a data set is a number of pixels, or a list of them, not '512'"),
        ('{"resolution": [512, true]}', "or a list of them, not [512, True]"),
        ('{"resolution": []}', "or a list of them, not []"),
        ('{"center_crop": 1}', "center_crop of a data set is true or false, not 1"),
        ('{"repeats": 1.5}', "repeats of a data set is a whole number, not 1.5"),
        ('{"repeats": true}', "repeats of a data set is a whole number"),
        ('{"caption_prefix": 3}', "caption_prefix of a data set is a text, not 3"),
    ],
)
def test_a_mapping_that_cannot_be_meant_ends_with_its_setting(text, told, capsys):
    with pytest.raises(SystemExit):
        parse_args([MODEL, f"--data_sets={text}"])
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({}, "this one neither"),
        ({"dataset_name": "a", "instance_data_dir": "b", "instance_prompt": "x"}, "this one both"),
        ({"instance_data_dir": "a", "weight": 0}, "data_sets=a: the weight is 0; it must be at least 0.001"),
        ({"instance_data_dir": "a", "weight": -1.5}, "the weight is -1.5"),
        ({"instance_data_dir": "a", "weight": float("inf")}, "the weight is inf"),
        ({"instance_data_dir": "a", "repeats": 0}, "repeats is 0"),
        ({"instance_data_dir": "a", "caption_column": "c"}, "caption_column=c: columns belong to"),
        ({"instance_data_dir": "a", "mask_column": "c"}, "mask_column=c: columns belong to"),
        ({"dataset_name": "a"}, "instance_prompt: needed"),
    ],
)
def test_what_is_wrong_with_a_set_is_named(words, told):
    (problem,) = DataSet(**words).problems()
    assert told in str(problem)


def test_settings_of_older_logs_are_read():
    assert data_sets({}) == () and [found.name for found in data_sets({"dataset_name": "a"})] == ["a"]
    assert [found.name for found in data_sets({"dataset_name": None, "instance_data_dir": ["b", "c"]})] == ["b", "c"]
    assert several(None) == () and several("a") == ("a",) and several(["a", "b", "a"]) == ("a", "b")
    assert data_set_of('{"instance_data_dir": "a", "weight": 2}') == {"instance_data_dir": "a", "weight": 2}


def test_a_set_has_sizes_and_crops_of_its_own(tmp_path):
    wide = {"instance_data_dir": "w", "resolution": [64, 128], "aspect_ratio_buckets": True, "random_flip": False}
    flags = [MODEL, "--instance_data_dir=a", "--resolution=96", "--random_flip", f"--data_sets={json.dumps(wide)}"]
    config = parse_args(flags)
    assert [str(rule) for rule in config.size_rules] == ["96 px, flips", "64, 128 px in buckets"]
    assert config.side == 128
    again = parse_args([f"--config={config.save(tmp_path / 'out')}"])
    assert again.size_rules == config.size_rules
    shown = json.loads(json.dumps(config.public()))  # what a log holds of it
    assert [found.rule for found in data_sets(shown)] == list(config.size_rules)
    same = {"instance_data_dir": "w", "resolution": [96], "center_crop": False}
    plain = parse_args([*flags[:-1], f"--data_sets={json.dumps(same)}"])
    assert plain.size_rules == () and plain.side == 96


def test_what_of_a_sets_sizes_does_not_go_together():
    rule = DataSet(instance_data_dir="w", resolution=(64, 128), bucket_no_upscale=True).rule
    told = [str(problem) for problem in rule.problems("data_sets", "w")]
    assert "data_sets=w: several resolutions are trained in buckets" in told[0]
    assert "data_sets=w: bucket_no_upscale has no effect without aspect_ratio_buckets" in told[1]
