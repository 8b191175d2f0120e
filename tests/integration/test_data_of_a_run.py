"""What a run draws of its data by position, through main(): held against runs without a choice, resumed to the bit."""

import pytest
import tiny
from helpers import adapter_weights, events, run_trainer, same
from helpers.runs import as_it_was_at

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
