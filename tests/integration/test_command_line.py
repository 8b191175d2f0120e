"""The trainer's command line: every flag of diffusers' trainer, help, corrections."""

import pytest

from sana_kit.flags import make_parser
from sana_kit.training.config import TrainConfig, parse_args

# Name and default of every flag of diffusers' examples/dreambooth/train_dreambooth_lora_sana.py, August 2026.
UPSTREAM_FLAGS = {
    "pretrained_model_name_or_path": None,
    "revision": None,
    "variant": None,
    "dataset_name": None,
    "dataset_config_name": None,
    "instance_data_dir": None,
    "cache_dir": None,
    "image_column": "image",
    "caption_column": None,
    "repeats": 1,
    "class_data_dir": None,
    "instance_prompt": None,
    "class_prompt": None,
    "max_sequence_length": 300,
    "complex_human_instruction": None,
    "validation_prompt": None,
    "num_validation_images": 4,
    "validation_epochs": 50,
    "rank": 4,
    "lora_alpha": 4,
    "lora_dropout": 0.0,
    "with_prior_preservation": False,
    "prior_loss_weight": 1.0,
    "num_class_images": 100,
    "output_dir": "sana-dreambooth-lora",
    "seed": None,
    "resolution": 512,
    "center_crop": False,
    "random_flip": False,
    "train_batch_size": 4,
    "sample_batch_size": 4,
    "num_train_epochs": 1,
    "max_train_steps": None,
    "checkpointing_steps": 500,
    "checkpoints_total_limit": None,
    "resume_from_checkpoint": None,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "learning_rate": 0.0001,
    "scale_lr": False,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "lr_num_cycles": 1,
    "lr_power": 1.0,
    "dataloader_num_workers": 0,
    "weighting_scheme": "none",
    "logit_mean": 0.0,
    "logit_std": 1.0,
    "mode_scale": 1.29,
    "optimizer": "AdamW",
    "use_8bit_adam": False,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "prodigy_beta3": None,
    "prodigy_decouple": True,
    "adam_weight_decay": 0.0001,
    "adam_weight_decay_text_encoder": 0.001,
    "lora_layers": None,
    "adam_epsilon": 1e-08,
    "prodigy_use_bias_correction": True,
    "prodigy_safeguard_warmup": True,
    "max_grad_norm": 1.0,
    "push_to_hub": False,
    "hub_token": None,
    "hub_model_id": None,
    "logging_dir": "logs",
    "allow_tf32": False,
    "cache_latents": False,
    "report_to": "tensorboard",
    "mixed_precision": None,
    "upcast_before_saving": False,
    "offload": False,
    "local_rank": -1,
    "enable_vae_tiling": False,
    "enable_npu_flash_attention": False,
}
# README.md says why these differ.
OTHER_DEFAULTS = {"lora_alpha": None, "complex_human_instruction": "default"}


def test_every_upstream_flag_is_there_with_its_default():
    ours = {action.dest: action.default for action in make_parser(TrainConfig, "")._actions}
    assert len(UPSTREAM_FLAGS) == 75
    for name, default in {**UPSTREAM_FLAGS, **OTHER_DEFAULTS}.items():
        assert name in ours, name
        assert ours[name] == default, (name, ours[name], default)


def test_help_groups_the_flags_and_a_misspelt_one_is_corrected(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = capsys.readouterr().out
    for heading in ("model:", "data:", "flow matching:", "optimizer:", "checkpoints and output:", "validation:"):
        assert f"\n{heading}\n" in text
    with pytest.raises(SystemExit) as stop:
        parse_args(["--pretrained_model_name_or_path=x", "--train_batchsize=3"])
    assert stop.value.code == 2
    assert "--train_batchsize=3 Did you mean --train_batch_size?" in capsys.readouterr().err


def test_false_is_false_for_prodigys_switches():
    args = parse_args(["--pretrained_model_name_or_path=x", "--prodigy_decouple=False"])
    assert args.prodigy_decouple is False and args.prodigy_safeguard_warmup is True
