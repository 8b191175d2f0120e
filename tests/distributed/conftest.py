"""Runs under ZeRO-2 that the tests of this folder compare with, made once per session."""

import pytest
from helpers.runs import train


@pytest.fixture(scope="session")
def flags(tiny_model, parquet_dataset):
    """Two images per process, everything random on; a global batch of 4 on two processes."""
    return [
        f"--pretrained_model_name_or_path={tiny_model}",
        f"--dataset_name={parquet_dataset}",
        "--caption_column=text",
        "--instance_prompt=x",
        "--resolution=64",
        "--gradient_accumulation_steps=2",
        "--random_flip",
        "--max_train_steps=6",
        "--checkpointing_steps=3",
        "--logging_steps=1",
        "--lr_scheduler=linear",
        "--lr_warmup_steps=0",
        "--seed=5",
        "--mixed_precision=bf16",
        "--learning_rate=1e-2",
        "--complex_human_instruction=none",
        "--report_to=none",
        "--ema_decay=0.9",
        "--caption_dropout=0.3",
        "--validation_split=1",
        "--validation_steps=3",
    ]


@pytest.fixture(scope="session")
def zero2(flags, tmp_path_factory):
    """ZeRO-2 on two processes, 6 steps, dropout on, fused blocks: in new interpreters, as a user starts them."""
    output = tmp_path_factory.mktemp("zero2") / "out"
    more = ["--lora_dropout=0.2", "--fused_blocks=auto", "--train_batch_size=1"]
    train(output, flags, *more, processes=2, engine="zero", fresh=True)
    return output


@pytest.fixture(scope="session")
def zero2_no_dropout(flags, tmp_path_factory):
    """The same without dropout, whose masks depend on the rank."""
    output = tmp_path_factory.mktemp("zero2n") / "out"
    train(output, flags, "--train_batch_size=1", processes=2, engine="zero")
    return output
