"""What a run draws of its data by position, through main(): held against runs without a choice, resumed to the bit."""

import json
import shutil

import pytest
import tiny
import yaml
from helpers import adapter_weights, events, run_trainer, same
from helpers.runs import as_it_was_at
from PIL import Image

from sana_kit.errors import UserError

CAPTIONS = ("a red square", "something blue on white")


@pytest.fixture(scope="module")
def flags(tiny_model, tmp_path_factory):
    """One image a step, so that a loss is a sample's; every caption is encoded once for all runs here."""
    return [
        f"--pretrained_model_name_or_path={tiny_model}", "--resolution=64", "--train_batch_size=1",
        "--report_to=none", "--learning_rate=0", "--complex_human_instruction=none", "--max_train_steps=8",
        "--checkpointing_steps=4", "--seed=2", "--logging_steps=1",
        f"--encodings_dir={tmp_path_factory.mktemp('encodings')}",
    ]  # fmt: skip


def losses(output, flags, *more):
    assert run_trainer(*flags, *more, f"--output_dir={output}") == 0
    return [line["loss"] for line in events(output, "step")]


def resumes_to_the_bit(output, flags, tmp_path):
    """Whether a run that went on after its fourth update is the whole one."""
    half = as_it_was_at(output, 4, tmp_path)
    assert run_trainer(*flags, f"--output_dir={half}", "--resume_from_checkpoint=latest") == 0
    moved = same(adapter_weights(output / "checkpoint-4"), adapter_weights(output))
    return same(adapter_weights(output), adapter_weights(half)) and not moved


def captioned(folder, *captions):
    for path in tiny.write_image_folder(folder, count=4, captions=False).glob("*.png"):
        path.with_suffix(".txt").write_text("\n".join(captions))
    return f"--instance_data_dir={folder}"


def test_each_position_takes_one_of_its_captions_and_a_resume_the_same(flags, tmp_path):
    both = captioned(tmp_path / "both", *CAPTIONS)
    drawn = losses(tmp_path / "drawn", flags, both)
    alone = [
        losses(tmp_path / str(k), flags, captioned(tmp_path / f"only-{k}", text)) for k, text in enumerate(CAPTIONS)
    ]
    taken = [
        [loss == first, loss == second] for loss, first, second in zip(drawn, *alone, strict=True) if first != second
    ]
    assert len(taken) > 5 and all(sum(row) == 1 for row in taken) and {row.index(True) for row in taken} == {0, 1}
    (start,) = [event for event in events(tmp_path / "drawn", "warning") if "several captions" in str(event)]
    assert "4 image(s) have several captions" in str(start)
    more = [*flags, both, "--learning_rate=1e-2", "--caption_dropout=0.2"]
    losses(tmp_path / "o", more)
    assert resumes_to_the_bit(tmp_path / "o", more, tmp_path)


def masked(folder, box, count=4):
    """Images with a mask each, white in a box of shares of width and height."""
    for path in sorted(tiny.write_image_folder(folder, count=count).glob("*.png")):
        width, height = Image.open(path).size
        mask = Image.new("L", (width, height))
        mask.paste(255, (int(box[0] * width), int(box[1] * height), int(box[2] * width), int(box[3] * height)))
        mask.save(path.with_suffix(".mask.png"))
    return f"--instance_data_dir={folder}"


def test_masks_change_what_is_learnt_white_ones_nothing_and_a_resume_is_the_run(flags, tmp_path):
    more = [*flags, "--learning_rate=1e-2", "--validation_split=1", "--validation_steps=4"]
    plain = tiny.write_image_folder(tmp_path / "plain", count=4)
    without = losses(tmp_path / "without", more, f"--instance_data_dir={plain}")
    white = losses(tmp_path / "white", more, masked(tmp_path / "masked-white", (0, 0, 1, 1)))
    half = masked(tmp_path / "masked-half", (0, 0, 0.5, 1))
    assert white == without and same(adapter_weights(tmp_path / "white"), adapter_weights(tmp_path / "without"))
    inside = losses(tmp_path / "half", more, half)
    assert all(a != b for a, b in zip(inside, without, strict=True))
    measured = [events(tmp_path / name, "held_out")[0]["raw"]["loss"] for name in ("without", "white", "half")]
    assert measured[0] == measured[1] != measured[2]  # before the first update
    assert resumes_to_the_bit(tmp_path / "half", [*more, half], tmp_path)
    # the mean of both halves is the whole, image by image
    other = masked(tmp_path / "masked-other", (0.5, 0, 1, 1))
    still = [*flags, "--center_crop", "--max_train_steps=4"]
    folders = [half, other, f"--instance_data_dir={plain}"]
    found = [losses(tmp_path / str(k), still, words) for k, words in enumerate(folders)]
    assert [(a + b) / 2 for a, b in zip(*found[:2], strict=True)] == pytest.approx(found[2], rel=0.02)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--mask_outside=0.1"], "--mask_outside=0.1: has no effect without masks"),
        (["--mask_column=m"], "--mask_column=m: columns belong to --dataset_name"),
        (["--mask_outside=2"], "--mask_outside=2.0: must be at most 1"),
    ],
)
def test_masks_that_cannot_be_meant_are_told_before_a_model_is_loaded(flags, image_folder, tmp_path, more, told):
    with pytest.raises(UserError) as caught:
        run_trainer(*flags, f"--instance_data_dir={image_folder}", *more, f"--output_dir={tmp_path}")
    assert told in str(caught.value.as_flags())


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(six images in one folder, the same two and four of them in two, in the same order)."""
    root = tmp_path_factory.mktemp("parts")
    whole = tiny.write_image_folder(root / "whole")
    for name, numbers in (("few", (0, 1)), ("many", (2, 3, 4, 5))):
        (root / name).mkdir()
        for number in numbers:
            for suffix in ("png", "txt"):
                shutil.copy(whole / f"image_{number:02d}.{suffix}", root / name)
    return whole, root / "few", root / "many"


def test_several_folders_are_the_run_of_one_that_holds_them_all(flags, parts, tmp_path):
    whole, few, many = parts
    more = [*flags, "--learning_rate=1e-2", "--caption_dropout=0.2", "--validation_split=1"]
    one = losses(tmp_path / "one", more, f"--instance_data_dir={whole}")
    two = losses(tmp_path / "two", more, f"--instance_data_dir={few}", f"--instance_data_dir={many}")
    assert one == two and same(adapter_weights(tmp_path / "one"), adapter_weights(tmp_path / "two"))
    (start,) = events(tmp_path / "two", "start")
    told = [line for line in start["plan"] if line.startswith("data set ")]
    assert len(told) == 2 and str(few) in told[0] and str(many) in told[1]
    report = (tmp_path / "two" / "report.html").read_text()
    assert str(few) in report and str(many) in report


@pytest.mark.parametrize("kind", ["prior preservation", "buckets"])
def test_sets_of_other_weights_share_an_epoch_and_resume_to_the_bit(flags, parts, tmp_path, kind):
    """Four samples of two images and two of four are an epoch, with captions, masks and a prefix of their own."""
    _, few, many = parts
    masked_set = masked(tmp_path / "masked", (0, 0, 0.5, 1), count=2).partition("=")[2]
    for path in tmp_path.glob("masked/*.txt"):
        path.write_text("one\ntwo")
    sets = [{"instance_data_dir": masked_set, "weight": 2, "caption_prefix": "TOK, "}]
    sets += [{"instance_data_dir": str(many), "weight": 0.5}]
    run_file = tmp_path / "mine.yaml"
    run_file.write_text(yaml.safe_dump({"data_sets": sets}))
    more = [flag for flag in flags if "max_train_steps" not in flag]
    more += ["--learning_rate=1e-2", "--caption_dropout=0.2", "--num_train_epochs=2", f"--config={run_file}"]
    if kind == "buckets":
        more += ["--aspect_ratio_buckets"]
    else:
        more += ["--with_prior_preservation", f"--class_data_dir={few}", "--class_prompt=x", "--num_class_images=2"]
    found = losses(tmp_path / "o", more)
    assert len(found) >= 12 and events(tmp_path / "o", "step")[5]["epoch"] == 1
    (start,) = events(tmp_path / "o", "start")
    told = [line for line in start["plan"] if line.startswith("data set ")]
    assert "2 images x weight 2 = 4 samples an epoch, 67 %" in told[0]
    assert "4 images x weight 0.5 = 2 samples an epoch, 33 %" in told[1]
    assert resumes_to_the_bit(tmp_path / "o", more, tmp_path)
    if kind == "buckets":
        return
    run_file.write_text(yaml.safe_dump({"data_sets": [sets[0], {**sets[1], "weight": 1}]}))
    half = as_it_was_at(tmp_path / "o", 4, tmp_path / "other")
    run_trainer(*more, "--max_train_steps=5", f"--output_dir={half}", "--resume_from_checkpoint=latest")
    assert any("set_weights was [2, 0.5]" in event["message"] for event in events(half, "warning"))


def test_the_plan_of_several_sets_is_told_without_a_run(flags, parts, tmp_path, capsys):
    _, few, many = parts
    own = json.dumps({"instance_data_dir": str(many), "weight": 0.25, "repeats": 3})
    words = [flag for flag in flags if "max_train_steps" not in flag]
    words += ["--dry_run", f"--output_dir={tmp_path / 'o'}", f"--instance_data_dir={few}", f"--data_sets={own}"]
    assert run_trainer(*words) == 0
    told = capsys.readouterr().out
    assert f"data set {many}: 12 images (repeats 3) x weight 0.25 = 3 samples an epoch, 60 %" in told
    assert "updates: 5 of 1 images" in told and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("mapping", "told"),
    [
        ({"instance_data_dir": "/not/there"}, "--instance_data_dir=/not/there: no such folder"),
        ({"dataset_name": "@few", "caption_column": "text"}, "--caption_column=text: @few is a folder of images"),
        ({"instance_data_dir": "@few", "weight": -1}, "--data_sets=@few: the weight is -1"),
        ({"weight": 1}, "--data_sets: a data set has dataset_name or instance_data_dir, this one neither"),
    ],
)
def test_a_set_that_cannot_be_used_is_told_before_a_model_is_loaded(flags, parts, tmp_path, mapping, told):
    whole, few, _ = parts
    mapping = {name: str(few) if value == "@few" else value for name, value in mapping.items()}
    words = [f"--instance_data_dir={whole}", f"--data_sets={json.dumps(mapping)}", f"--output_dir={tmp_path}"]
    with pytest.raises(UserError) as caught:
        run_trainer(*flags, *words)
    assert told.replace("@few", str(few)) in str(caught.value.as_flags())
