"""An update that is not finite on one rank is left out on all, under every engine: weights, moments and count stay."""

import json

import pytest
from helpers import KIT, launch

WORKER = "tests/distributed/workers/bad_gradient.py"
# engine: ZeRO stage (None: DDP), flags
CASES = {
    "ddp": (None, ["--mixed_precision=bf16"]),
    "zero1": (1, []),
    "zero2": (2, ["--gradient_accumulation_steps=2"]),
    "zero2 in float32": (2, ["--mixed_precision=no"]),
    "zero3": (3, ["--train_mode=full"]),
}


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_leave_out_an_update_that_is_not_finite_on_one(case, tiny_model, tmp_path):
    stage, flags = CASES[case]
    config, engine = None, "ddp"
    if stage is not None:
        text = (KIT / "bf16_accelerate_config.yaml").read_text()
        assert "zero_stage: 2" in text and "mixed_precision: bf16" in text
        text = text.replace("zero_stage: 2", f"zero_stage: {stage}")
        if "--mixed_precision=no" in flags:
            text = text.replace("mixed_precision: bf16", "mixed_precision: 'no'")
        config, engine = tmp_path / "config.yaml", "zero"
        config.write_text(text)
    output = tmp_path / "found.json"
    flags = ["--train_batch_size=1", "--learning_rate=1e-3", f"--output_dir={tmp_path / 'out'}", *flags]
    done = launch(WORKER, tiny_model, output, *flags, processes=2, engine=engine, config=config)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(output.read_text())
    assert found.pop("tensors") > 50
    assert found == {
        "kind": "ddp" if stage is None else f"zero{stage}",
        "left_out": [[False, True, False]] * 2,
        "unchanged": [True, False],
        "finite": True,
        "step": 2,
    }
