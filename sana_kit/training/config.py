"""The configuration of a run: the sections of training/settings.py together, from the command line, to run.yaml.

`parse_args` gives a TrainConfig; nothing changes it afterwards. What holds for a run beside it (the precision of the
accelerate config, the drawn seed, ...) is a copy made by `replaced`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from sana_kit.data.sets import absolute
from sana_kit.files import write_atomic
from sana_kit.flags import Flag, Sections, is_secret, parse, section, settings_of
from sana_kit.training.settings import (
    AdapterConfig,
    CheckpointConfig,
    ControlConfig,
    DataConfig,
    EncodingConfig,
    FlowConfig,
    LengthConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    PriorConfig,
    RunConfig,
    SpeedConfig,
    ValidationConfig,
)

RUN_FILE = "run.yaml"
# What belongs to one start of a run and not to the run.
_OF_ONE_START: tuple[str, ...] = ("config", "dry_run", "dry_run_processes", "local_rank", "resume_from_checkpoint")
_OF_ONE_START += ("overwrite_output_dir",)


@dataclasses.dataclass(frozen=True)
class TrainConfig(Sections):
    """All settings of a run, by section; each is also reached by its name alone: `config.resolution`.

    Attributes:
        given: names of the settings that the command line or a file gave, so that they can be told from defaults.
    """

    run: RunConfig = section("run")
    model: ModelConfig = section("model")
    adapter: AdapterConfig = section("LoRA")
    data: DataConfig = section("data")
    control: ControlConfig = section("ControlNet (--train_mode controlnet)")
    encoding: EncodingConfig = section("encoding (once, before the first step)")
    prior: PriorConfig = section("prior preservation")
    length: LengthConfig = section("training")
    speed: SpeedConfig = section("precision and speed")
    flow: FlowConfig = section("flow matching")
    optimization: OptimizerConfig = section("optimizer")
    checkpoints: CheckpointConfig = section("checkpoints and output")
    validation: ValidationConfig = section("validation")
    logging: LoggingConfig = section("logging")
    given: frozenset[str] = frozenset()

    def public(self) -> dict[str, object]:
        """All settings by name without secrets: for logs, trackers, the report and the model card."""
        return {name: value for name, value in settings_of(self).items() if not is_secret(name)}

    def save(self, folder: Path) -> Path:
        """Write run.yaml, which `--config` starts the same run from, into `folder`; paths in it are absolute."""
        lines = [
            "# The settings of this run. The same run again, in another folder:",
            f"#   accelerate launch train_dreambooth_lora_sana.py --config={RUN_FILE} --output_dir=ANOTHER_FOLDER",
        ]
        for field in dataclasses.fields(self):
            if "title" not in field.metadata:
                continue
            part, values = getattr(self, field.name), {}
            for setting in dataclasses.fields(part):
                value = getattr(part, setting.name)
                if is_secret(setting.name) or setting.name in _OF_ONE_START or value is None:
                    continue
                values[setting.name] = _as_written(value, setting.metadata["flag"])
            if values:
                text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)
                lines.append(f"\n# {field.metadata['title']}\n{text.rstrip()}")
        text = "\n".join(lines) + "\n"
        return write_atomic(Path(folder) / RUN_FILE, lambda file: file.write(text.encode()))


def _as_written(value: object, settings: Flag) -> object:
    """A setting as its file has it, with absolute paths."""
    if isinstance(value, tuple) and settings.convert and not settings.repeat:
        return ",".join(map(str, value))
    if isinstance(value, tuple):
        return [_as_written(item, settings) for item in value]
    if isinstance(value, dict):
        return absolute(value)
    return os.path.abspath(str(value)) if settings.path and os.path.exists(str(value)) else value


def parse_args(
    argv: Sequence[str] | None = None, description: str = "Fine-tune SANA: LoRA, all weights, or a ControlNet."
) -> TrainConfig:
    """The settings of the command line, and of the file that its --config names."""
    config, given = parse(
        TrainConfig,
        description,
        argv,
        epilog="Start it with `accelerate launch`; the launcher finetune_sana_dreambooth_lora_deepspeed_bf16.sh does.",
        file_flag="config",
    )
    config = dataclasses.replace(config, given=given)
    return config.replaced(attention="npu_fusion") if config.speed.enable_npu_flash_attention else config
