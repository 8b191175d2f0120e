"""Three updates of the trainer's engine, of which the second has a loss that is not a number on the last rank alone.

    accelerate launch ... tests/distributed/workers/bad_gradient.py MODEL OUTPUT.json [flags of the trainer]

Rank 0 writes which updates were left out on each rank, whether the second changed anything, and the optimizer's count.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch

from sana_kit import devices
from sana_kit.training.config import parse_args
from sana_kit.training.engine import Engine
from sana_kit.training.launch_config import LaunchConfig, settle
from sana_kit.training.optim import build_optimizer
from sana_kit.training.transformer import prepare_transformer


def main() -> None:
    """See the top of this file."""
    from sana_kit.models.folder import find_model

    model_folder, output, *flags = sys.argv[1:]
    config = parse_args([f"--pretrained_model_name_or_path={model_folder}", "--report_to=none", *flags])
    settled, problems = settle(LaunchConfig.read(), config, config.given, devices.accelerator_type())
    assert not problems, problems
    config = config.replaced(**dataclasses.asdict(settled))
    engine = Engine.create(config)
    devices.seed_everything(0)
    base, problems = find_model(model_folder)
    assert not problems, problems
    transformer = prepare_transformer(config, engine, base)
    named = [(name, p) for name, p in transformer.named_parameters() if p.requires_grad]
    model, _ = engine.prepare(transformer, build_optimizer(config, named, engine.device))

    def everything() -> dict[str, torch.Tensor]:
        return {entry.key: entry.fetch(True).clone() for entry in engine.optimizer_entries()}

    generator = torch.Generator().manual_seed(engine.ranks.rank)
    dtype, seen = engine.compute_dtype, []
    for update in range(3):
        for _ in range(config.gradient_accumulation_steps):
            with engine.accumulate():
                batch = {
                    "hidden_states": torch.randn(1, 4, 8, 8, generator=generator).to(dtype),
                    "encoder_hidden_states": torch.randn(1, 5, 32, generator=generator).to(dtype),
                    "encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool),
                    "timestep": torch.tensor([500.0]),
                }
                loss = model(**batch, return_dict=False)[0].float().square().mean()
                if update == 1 and engine.ranks.rank == engine.ranks.world_size - 1:
                    loss = loss * float("nan")
                engine.backward(loss)
                engine.step()
        seen.append(everything())
    flags_of_ranks = engine.ranks.gather(engine.guard.read())
    if engine.ranks.is_main:
        pairs = zip(seen, seen[1:], strict=False)
        equal = [all(torch.equal(first[key], second[key]) for key in first) for first, second in pairs]
        step = engine.optimizer_numbers()["numbers"]["step"]
        found = {
            "kind": engine.kind,
            "left_out": flags_of_ranks,
            "unchanged": equal,
            "finite": all(torch.isfinite(tensor).all().item() for tensor in seen[-1].values()),
            "tensors": len(seen[-1]),
            "step": step["value"] if isinstance(step, dict) else step,
        }
        Path(output).write_text(json.dumps(found))
    engine.ranks.close()


if __name__ == "__main__":
    main()
