"""What CUDA graphs of a training step ask of the other settings."""

from __future__ import annotations

from sana_kit.data.sets import size_rule
from sana_kit.errors import Problem, setting
from sana_kit.models.graphs import FIELD, device_problems
from sana_kit.training.config import TrainConfig
from sana_kit.training.launch_config import LaunchConfig


def graph_problems(config: TrainConfig, device_type: str, launch: LaunchConfig) -> list[Problem]:
    """Why the steps of this run cannot be recorded; `config` is settled with the accelerate config."""
    if not config.cuda_graphs:
        return []
    buckets = setting("aspect_ratio_buckets")
    problems, several = device_problems(device_type), len(size_rule(config).sides) > 1
    for wrong, reason in (
        (launch.zero_stage == 3, "ZeRO-3 gathers weights between the layers, which no graph of the whole step holds"),
        (config.aspect_ratio_buckets, f"a graph is of one shape, and with {buckets} batches have several"),
        (several, "a graph is of one shape, and with several resolutions batches have several"),
        (config.size_rules, "a graph is of one shape, and data sets with sizes of their own may have others"),
        (config.gradient_checkpointing or config.memory_budget, "recomputed blocks were not tried inside a graph"),
        (
            (config.gradient_accumulation_steps or 1) > 1,
            f"with {setting('gradient_accumulation_steps')} gradients would outlive the pass whose memory they lie in",
        ),
        (config.compile, f"it compiles the whole transformer, so {setting('compile')} has nothing left to do"),
        (config.train_mode == "controlnet", "it was not tried with a ControlNet"),
        (config.base_quantization, "it was not tried with a base in few bits"),
    ):
        if wrong:
            problems.append(Problem(FIELD, None, reason, "Leave one of them out."))
    return problems
