"""What the three infer_sana_text2img_*.py scripts run."""

from __future__ import annotations

from collections.abc import Sequence

from sana_kit.errors import run_as_script
from sana_kit.inference.config import parse_config


def main(description: str, argv: Sequence[str] | None = None, lora_default: str | None = None) -> int:
    """Run a script: 0 when every image is there, 1 for an error or when some failed, 2 for a wrong command line."""

    def draw() -> int:
        config = parse_config(description, argv, lora_default)
        from sana_kit.inference.run import run, tell_failures  # torch and diffusers: after the command line

        return tell_failures(run(config))

    return run_as_script(draw, interrupted="interrupted; the same command goes on where it was")
