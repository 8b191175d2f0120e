"""How a run's settings say that its images and captions are encoded."""

from __future__ import annotations

from collections.abc import Sequence

from sana_kit import devices
from sana_kit.data.sets import size_rule
from sana_kit.encodings.plan import ExtraPrompts
from sana_kit.encodings.settings import EncodingSettings
from sana_kit.models.folder import Model
from sana_kit.training.config import TrainConfig


def encodings_dir(config: TrainConfig) -> str:
    """The store of encodings."""
    return config.encodings_dir or f"{config.output_dir}/encodings"


def encoding_settings(config: TrainConfig, base_model: Model, instruction: Sequence[str] | None) -> EncodingSettings:
    """What `encode` takes; `instruction` are the lines before each caption."""
    return EncodingSettings(
        encodings_dir=encodings_dir(config),
        resolution=config.side,
        resolutions=size_rule(config).sides if config.aspect_ratio_buckets else (),
        set_rules=(*config.size_rules, size_rule(config)) if config.size_rules else (),
        bucket_no_upscale=config.bucket_no_upscale,
        pixel_multiple=base_model.pixel_multiple,
        center_crop=config.center_crop,
        random_flip=config.random_flip,
        max_sequence_length=config.max_sequence_length,
        complex_human_instruction=None if instruction is None else tuple(instruction),
        vae_dtype=devices.DTYPES[config.vae_dtype],
        vae_batch_size=config.vae_batch_size,
        skip_bad_images=config.skip_bad_images,
    )


def extra_prompts(config: TrainConfig, instruction: list[str] | None) -> ExtraPrompts:
    """The prompts that are no captions: those of the validation, and the empty one where it is needed."""
    prompts: list[tuple[str, list[str] | None]] = [(prompt, instruction) for prompt in config.validation.prompts]
    return prompts + ([("", None)] if prompts or config.caption_dropout else [])
