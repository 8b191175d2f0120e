"""What several files of runs in this process share: flags of a short run, and one run of six steps."""

import pytest
from helpers import run_trainer as run


@pytest.fixture
def base_flags(tiny_model):
    """Flags of a short run; a data source and --output_dir are still needed."""
    return [
        f"--pretrained_model_name_or_path={tiny_model}",
        "--instance_prompt=a drawing",
        "--resolution=64",
        "--train_batch_size=2",
        "--logging_steps=2",
        "--seed=0",
        "--mixed_precision=bf16",
        "--report_to=none",
        "--learning_rate=1e-2",
        "--complex_human_instruction=none",
    ]


@pytest.fixture(scope="session")
def six_steps(tiny_model, parquet_dataset, tmp_path_factory):
    """A run of 6 steps with everything random switched on, and its flags; checkpoints at 3 and 6."""
    output = tmp_path_factory.mktemp("six") / "out"
    flags = [
        f"--pretrained_model_name_or_path={tiny_model}",
        f"--dataset_name={parquet_dataset}",
        "--caption_column=text",
        "--instance_prompt=x",
        "--resolution=64",
        "--train_batch_size=2",
        "--gradient_accumulation_steps=2",
        "--lora_dropout=0.2",
        "--random_flip",
        "--max_train_steps=6",
        "--checkpointing_steps=3",
        "--logging_steps=1",
        "--lr_scheduler=cosine",
        "--lr_warmup_steps=2",
        "--seed=5",
        "--mixed_precision=bf16",
        "--learning_rate=1e-2",
        "--complex_human_instruction=none",
        "--validation_prompt=a red square",
        "--validation_prompt=a blue square",
        "--num_validation_images=1",
        "--validation_inference_steps=2",
        "--validation_steps=3",
        "--hub_token=hf_secretsecretsecret",
    ]
    assert run(*flags, f"--output_dir={output}") == 0
    return output, flags
