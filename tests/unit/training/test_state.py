"""What a resumed run is held against: every flag says for itself whether another value is told or refused."""

import dataclasses
import json

import pytest

from sana_kit.training.config import parse_args
from sana_kit.training.state import DECISIVE, IDENTITY, OF_LORA, TrainState, differences, run_identity

NEEDED = ["--pretrained_model_name_or_path=x", "--dataset_name=y"]


def identity(*flags):
    """As a checkpoint's file gives it back."""
    return json.loads(json.dumps(run_identity(parse_args([*NEEDED, *flags]), 6, 1)))


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--adam_beta1=0.5", "adam_beta1 was 0.9 when the checkpoint was written and is 0.5 now"),
        ("--logit_std=2", "logit_std was 1.0 when the checkpoint was written and is 2.0 now"),
        ("--lr_warmup_steps=3", "lr_warmup_steps was 500 when the checkpoint was written and is 3 now"),
        ("--random_flip", "random_flip was False when the checkpoint was written and is True now"),
        ("--rank=8", "rank was 4 when the checkpoint was written and is 8 now"),
    ],
)
def test_a_setting_that_changes_the_training_is_told(flag, told):
    assert differences(identity(), identity()) == []
    assert told in differences(identity(), identity(flag))


@pytest.mark.parametrize("flag", ["--logging_steps=3", "--checkpointing_steps=7", "--validation_prompt=a"])
def test_what_changes_no_weight_may_change(flag):
    assert differences(identity(), identity(flag)) == []


def test_a_setting_of_an_older_checkpoint_that_had_no_such_name_is_no_difference():
    before = identity()
    del before["adam_beta1"]
    assert differences(before, identity("--adam_beta1=0.5")) == []


def test_a_resumed_run_stands_where_its_checkpoint_stands():
    old = TrainState(
        3, {"rank": 4}, global_step=7, samples_seen=14, sequence=2, best_loss=0.5, best_step=4, since_best=1
    )
    old.advance(2, 6, 1e-3)
    saved = json.loads(json.dumps(dataclasses.asdict(old)))
    new = TrainState(3, {"rank": 8}, sequence=5)
    new.go_on_from(saved)
    assert new == dataclasses.replace(old, run={"rank": 8}, sequence=5)
    del saved["best_loss"]  # of a kit that did not know it
    other = TrainState(9, {})
    other.go_on_from(saved)
    assert (other.best_loss, other.best_step, other.seed, other.sequence) == (None, 4, 9, 2)


def test_what_is_fixed_is_part_of_the_identity():
    assert set(DECISIVE) < set(IDENTITY) and set(OF_LORA) < set(DECISIVE) and len(set(IDENTITY)) == len(IDENTITY)
