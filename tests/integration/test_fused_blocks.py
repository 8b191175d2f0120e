"""The trainer with the fused blocks: it learns as with the others, and resumes to the bit."""

import shutil

import pytest
from helpers import adapter_weights, events, run_trainer, same


@pytest.fixture(scope="module")
def flags(tiny_model, image_folder):
    flags = [f"--pretrained_model_name_or_path={tiny_model}", f"--instance_data_dir={image_folder}"]
    flags += ["--resolution=64", "--train_batch_size=2", "--logging_steps=1", "--seed=0", "--mixed_precision=bf16"]
    flags += ["--report_to=none", "--learning_rate=1e-2", "--complex_human_instruction=none", "--max_train_steps=4"]
    return [*flags, "--checkpointing_steps=2"]


def test_fused_blocks_train_and_resume_to_the_bit(flags, tmp_path):
    """bf16 rounds otherwise in another order of sums, so the curves agree, and only the resumed one to the bit."""
    plain, fused = tmp_path / "plain", tmp_path / "fused"
    assert run_trainer(*flags, f"--output_dir={plain}") == 0
    assert run_trainer(*flags, f"--output_dir={fused}", "--fused_blocks=auto") == 0
    curves = [[event["loss"] for event in events(output, "step")] for output in (plain, fused)]
    assert curves[1] == pytest.approx(curves[0], rel=2e-2) and curves[1] != curves[0]
    assert adapter_weights(plain).keys() == adapter_weights(fused).keys()
    shutil.copytree(fused, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-4")
    (tmp_path / "again" / "summary.json").unlink()  # as if it had been killed before its end
    more = ["--fused_blocks=auto", "--resume_from_checkpoint=latest"]
    assert run_trainer(*flags, f"--output_dir={tmp_path / 'again'}", *more) == 0
    assert same(adapter_weights(fused), adapter_weights(tmp_path / "again"))
