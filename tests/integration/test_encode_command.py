"""`python -m sana_kit.encode`: one encoding for many runs."""

import pytest
from helpers import run_trainer

from sana_kit import encode

DATA = ["--instance_prompt=a drawing", "--resolution=64", "--complex_human_instruction=none"]


@pytest.fixture
def flags(tiny_model, image_folder, tmp_path):
    model, images = f"--pretrained_model_name_or_path={tiny_model}", f"--instance_data_dir={image_folder}"
    return [model, images, f"--encodings_dir={tmp_path / 'store'}", *DATA]


def test_a_training_finds_everything_encoded(flags, tmp_path, capfd):
    nothing_new = "0 images, 0 captions new; 6, 6 reused"
    assert encode.main(flags) == 0
    told = capfd.readouterr()
    assert f"encoded: 6 samples in {tmp_path / 'store'}" in told.out and "6 images, 6 captions new" in told.err
    assert encode.main(flags) == 0
    assert nothing_new in capfd.readouterr().err
    more = [f"--output_dir={tmp_path / 'out'}", "--max_train_steps=1", "--mixed_precision=no", "--report_to=none"]
    assert run_trainer(*flags, *more, "--train_batch_size=2") == 0
    assert nothing_new in capfd.readouterr().err
    assert not list((tmp_path / "store").glob("*.json*")) and not (tmp_path / "out" / "encodings").exists()


def test_problems_are_told_together_before_a_weight_is_loaded(flags, monkeypatch):
    with pytest.raises(ValueError, match="encodings_dir.*needed: it says where the encodings go"):
        encode.main([flag for flag in flags if "encodings_dir" not in flag])
    monkeypatch.setattr("sana_kit.encodings.encoders.load_vae", None)
    with pytest.raises(ValueError, match="(?s)2 problem.*no such folder.*resolution=65"):
        encode.main([*flags, "--resolution=65", "--instance_data_dir=/nowhere"])
