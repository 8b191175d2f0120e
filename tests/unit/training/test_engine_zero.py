"""DeepSpeed behind the engine: its config, and the private names that the kit relies on."""

import importlib
import types

import pytest

from sana_kit.errors import UserError
from sana_kit.training import zero

deepspeed = pytest.importorskip("deepspeed")


def settings(**more):
    found = {
        "mixed_precision": "bf16",
        "train_mode": "lora",
        "train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 1.0,
    }
    return types.SimpleNamespace(**{**found, **more})


@pytest.mark.parametrize("where, names", zero.PRIVATE_NAMES.items())
def test_the_private_names_are_still_there(where, names):
    module, _, name = where.partition(":")
    found = getattr(importlib.import_module(module), name)
    gone = [name for name in names if not hasattr(found, name)]
    assert not gone, f"deepspeed {deepspeed.__version__}: {where} has no {gone}; see sana_kit/training/zero.py"


def test_the_public_calls_are_still_there():
    from deepspeed.utils import (  # noqa: F401
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
    )

    for name in ("set_gradient_accumulation_boundary", "backward", "step", "get_global_grad_norm"):
        assert hasattr(deepspeed.DeepSpeedEngine, name), name


def test_this_deepspeed_looks_for_gradients_that_are_not_finite_in_bf16():
    """The tested stack does; `engine_step` asks itself where an older one does not."""
    assert zero.checks_bf16_gradients()
    config = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True, "check_grad_overflow": False}}
    zero.fill_config(config, settings(), 2)
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": True}


def test_the_loss_scale_is_saved_and_restored(monkeypatch):
    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)  # it asks in order to log

    def scaler():
        return loss_scaler.DynamicLossScaler(
            init_scale=2.0**16,
            scale_window=3,
            min_scale=1,
            delayed_shift=2,
            consecutive_hysteresis=False,
            raise_error_at_min_scale=False,
        )

    first, second = (types.SimpleNamespace(loss_scaler=scaler()) for _ in range(2))
    for overflow in (True, False, True, False, False):
        first.loss_scaler.update_scale(overflow)
    saved = zero.loss_scale(first)
    assert saved["cur_scale"] == 2.0**15 and saved != zero.loss_scale(second)
    zero.restore_loss_scale(second, saved)
    for _ in range(6):
        first.loss_scaler.update_scale(False)
        second.loss_scaler.update_scale(False)
    assert zero.loss_scale(first) == zero.loss_scale(second)
    assert zero.loss_scale(types.SimpleNamespace()) is None


@pytest.mark.parametrize(
    "config, more, message",
    [
        ({"gradient_clipping": 0.5}, {"max_grad_norm": 2.0}, "max_grad_norm=2.0: the DeepSpeed config says gradient_"),
        ({"train_micro_batch_size_per_gpu": 16}, {}, "train_batch_size=4: .* train_micro_batch_size_per_gpu: 16"),
        ({"train_batch_size": 8}, {}, "train_batch_size: 8, which makes 16 images an update on all 2 devices"),
    ],
)
def test_settings_and_deepspeed_config_must_agree(config, more, message):
    with pytest.raises(UserError, match=message):
        zero.fill_config({"zero_optimization": {"stage": 2}, **config}, settings(**more), 2)


def test_settings_reach_the_deepspeed_config():
    config = {"zero_optimization": {"stage": 2}, "gradient_clipping": "auto"}
    zero.fill_config(config, settings(max_grad_norm=0.3, train_batch_size=6, gradient_accumulation_steps=1), 2)
    assert config["gradient_clipping"] == 0.3 and config["train_micro_batch_size_per_gpu"] == 6
    assert config["train_batch_size"] == 12 and config["data_types"]["grad_accum_dtype"] == "fp32"
    zero.fit_buckets(config, 1000)
    assert config["zero_optimization"]["reduce_bucket_size"] >= 1000
