"""Aspect-ratio buckets through main(): batches of one size, every image in an epoch, resume to the bit."""

import json
import shutil

import pytest
from helpers import adapter_weights, events, run_trainer, same
from PIL import Image

from sana_kit.errors import UserError
from sana_kit.training import held_out, stream


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nine images of three shapes, one so small that it would be enlarged."""
    folder = tmp_path_factory.mktemp("shapes")
    sizes = [(160, 80)] * 4 + [(80, 160)] * 3 + [(100, 100), (40, 40)]
    for number, size in enumerate(sizes):
        Image.new("RGB", size, (20 * number, 100, 200 - 20 * number)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def flags(tiny_model, folder):
    return [
        f"--pretrained_model_name_or_path={tiny_model}", f"--instance_data_dir={folder}",
        "--instance_prompt=a drawing", "--resolution=64", "--aspect_ratio_buckets", "--train_batch_size=2",
        "--report_to=none", "--learning_rate=1e-2", "--complex_human_instruction=none", "--seed=1",
        "--logging_steps=1", "--checkpointing_steps=3", "--num_train_epochs=2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    output = tmp_path_factory.mktemp("buckets") / "out"
    assert run_trainer(*flags, f"--output_dir={output}") == 0
    return output


def test_a_run_in_buckets_tells_them_and_resumes_to_the_bit(flags, whole, tmp_path):
    (told,) = events(whole, "buckets")
    rows = {(row["width"], row["height"]): row["images"] for row in told["rows"]}
    assert rows == {(96, 48): 4, (48, 96): 3, (64, 64): 2}
    # two epochs: ceil(8 / 2) + ceil(6 / 2) + ceil(4 / 2)
    assert events(whole, "end")[0]["summary"]["global_step"] == 9
    assert "Buckets" in (whole / "report.html").read_text()
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    for step in (6, 9):
        shutil.rmtree(output / f"checkpoint-{step}", ignore_errors=True)
    (output / "summary.json").unlink()  # as if it had been killed before its end
    assert run_trainer(*flags, f"--output_dir={output}", "--resume_from_checkpoint=latest") == 0
    assert same(adapter_weights(whole), adapter_weights(output))


def test_several_resolutions_and_nothing_enlarged(flags, tmp_path):
    more = ["--resolution=64,96", "--bucket_no_upscale", "--max_train_steps=4", f"--output_dir={tmp_path}"]
    assert run_trainer(*flags, *more) == 0
    (told,) = events(tmp_path, "buckets")
    assert all(row["enlarged"] == 0 for row in told["rows"])
    assert {(row["width"], row["height"]) for row in told["rows"]} >= {(96, 96), (40, 40)}


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--with_prior_preservation", "--class_data_dir=c", "--class_prompt=x"], "class images are square"),
        (["--resolution=64,63"], "--resolution=63: must be a multiple"),
    ],
)
def test_what_does_not_go_with_buckets_is_refused(flags, tmp_path, more, told):
    with pytest.raises(UserError, match=told):
        run_trainer(*flags, *more, f"--output_dir={tmp_path}")


def test_several_resolutions_need_buckets(flags, tmp_path):
    plain = [flag for flag in flags if flag != "--aspect_ratio_buckets"]
    with pytest.raises(UserError, match="several resolutions are trained in buckets"):
        run_trainer(*plain, "--resolution=64,96", f"--output_dir={tmp_path}")


@pytest.fixture(scope="module")
def two_rules(flags, folder, tmp_path_factory):
    """Flags of a run whose first set is trained in buckets, the second as centred squares of another size."""
    own = tmp_path_factory.mktemp("own")
    for number in range(3):
        Image.linear_gradient("L").resize((90, 130)).rotate(90 * number).save(own / f"{number}.png")
    rule = {"instance_data_dir": str(own), "resolution": 96, "aspect_ratio_buckets": False, "center_crop": True}
    return [*flags, f"--data_sets={json.dumps(rule)}", "--validation_split=2"]


def test_a_data_set_has_a_rule_of_its_own(two_rules, tmp_path):
    """Micro-steps of one size, each image at the size of its set, also the held-out ones; a resume is the run."""
    shapes, held = [], []
    collate, measured = stream.collate, held_out.collate

    def seen(samples, into, function, **how):
        batch = function(samples, **how)
        into.append(tuple(batch["latents"].shape[-2:]))
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "collate", lambda samples, **how: seen(samples, shapes, collate, **how))
        patch.setattr(held_out, "collate", lambda samples, **how: seen(samples, held, measured, **how))
        assert run_trainer(*two_rules, f"--output_dir={tmp_path / 'whole'}") == 0
    (told,) = events(tmp_path / "whole", "buckets")
    rows = {(row["width"], row["height"]): row["images"] for row in told["rows"]}
    assert sum(rows.values()) == 12 and rows[96, 96] == 3 and rows[96, 48] + rows[48, 96] == 7
    assert {(12, 12), (6, 12), (12, 6)} <= {*shapes, *held} <= {(12, 12), (6, 12), (12, 6), (8, 8)}
    (start,) = events(tmp_path / "whole", "start")
    assert any("at 64 px in buckets" in line for line in start["plan"])
    assert any("at 96 px, centre" in line for line in start["plan"])
    half = tmp_path / "half"
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", half / "checkpoint-3")
    assert run_trainer(*two_rules, f"--output_dir={half}", "--resume_from_checkpoint=latest") == 0
    assert same(adapter_weights(tmp_path / "whole"), adapter_weights(half))
    other = [flag.replace('"center_crop": true', '"center_crop": false') for flag in two_rules]
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "other" / "checkpoint-3")
    more = [f"--output_dir={tmp_path / 'other'}", "--resume_from_checkpoint=latest", "--max_train_steps=4"]
    assert run_trainer(*other, *more) == 0
    assert any("size_rules was" in line["message"] for line in events(tmp_path / "other", "warning"))


@pytest.mark.parametrize(
    ("rule", "more", "told"),
    [
        ({"resolution": [64, 96], "aspect_ratio_buckets": False}, [], "several resolutions are trained in buckets"),
        ({"resolution": 90}, [], "--data_sets=90: must be a multiple of 8"),
        (
            {"resolution": 96, "aspect_ratio_buckets": False},
            ["--with_prior_preservation", "--class_data_dir=c", "--class_prompt=x"],
            "class images have the run's own size",
        ),
    ],
)
def test_a_rule_that_does_not_fit_is_told(flags, folder, tmp_path, rule, more, told):
    own = json.dumps({"instance_data_dir": str(folder), "repeats": 2, **rule})
    with pytest.raises(UserError) as error:
        run_trainer(*flags, f"--data_sets={own}", *more, f"--output_dir={tmp_path}")
    assert told in str(error.value)


def test_an_image_takes_one_of_its_crops_each_time(tiny_model, tmp_path):
    """Epochs are as long as without, every image comes once in each, and a resume takes the same crops."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        Image.linear_gradient("L").resize((160, 80)).rotate(90 * number).save(folder / f"{number}.png")
    flags = [
        f"--pretrained_model_name_or_path={tiny_model}", f"--instance_data_dir={folder}", "--instance_prompt=x",
        "--resolution=64", "--train_batch_size=2", "--report_to=none", "--learning_rate=0", "--seed=1",
        "--logging_steps=1", "--checkpointing_steps=3", "--num_train_epochs=3", "--crops_per_image=5", "--random_flip",
    ]  # fmt: skip
    assert run_trainer(*flags, f"--output_dir={tmp_path / 'o'}") == 0
    whole = [line["loss"] for line in events(tmp_path / "o", "step")]
    assert len(whole) == 6 and len(set(whole)) == 6
    shutil.rmtree(tmp_path / "o" / "checkpoint-6")
    (tmp_path / "o" / "summary.json").unlink()  # as if it had been killed before its end
    assert run_trainer(*flags, f"--output_dir={tmp_path / 'o'}", "--resume_from_checkpoint=latest") == 0
    assert [line["loss"] for line in events(tmp_path / "o", "step")][6:] == whole[3:]
