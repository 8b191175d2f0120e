"""The command line of the playground; nothing heavy is imported here, so that `--help` answers at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sana_kit import flags
from sana_kit.flags import flag, section
from sana_kit.inference.config import InferConfig, ModelSettings

DEFAULT_PORT = 7860


@dataclasses.dataclass(frozen=True)
class AdapterSettings:
    """Which adapter the page offers; how strong it is, is set on the page."""

    lora_weights: str | None = flag(
        None,
        "adapter: a safetensors file, or a folder that holds pytorch_lora_weights.safetensors; several are separated"
        " by commas, PATH:0.8 gives one a strength",
        path=True,
    )


@dataclasses.dataclass(frozen=True)
class PageSettings:
    """Where the page is, what it shows, where its images go."""

    port: int = flag(
        DEFAULT_PORT,
        "port on this machine (127.0.0.1, which no other machine reaches); 0: a free one",
        low=0,
        high=65535,
    )
    runs: tuple[str, ...] = flag(
        (".",), "folders of trainings that the page lists: each itself, and those directly in it", path=True
    )
    output_path: str = flag("./playground", "folder for the images and their manifest", path=True)


@dataclasses.dataclass(frozen=True)
class PlaygroundConfig:
    """All settings of the playground."""

    model: ModelSettings = section("model")
    lora: AdapterSettings = section("LoRA")
    page: PageSettings = section("page")

    def inference(self) -> InferConfig:
        """The same as the drawing scripts' settings; what the page asks for is put into its `images` and `lora`."""
        usual, _ = flags.parse(InferConfig, "", [])
        adapter = self.lora.lora_weights
        return dataclasses.replace(
            usual,
            model=self.model,
            lora=dataclasses.replace(usual.lora, lora_weights=() if adapter is None else (adapter,)),
            run=dataclasses.replace(usual.run, output_path=self.page.output_path),
        )


def parse_config(argv: Sequence[str] | None = None) -> PlaygroundConfig:
    """The configuration of a command line; SystemExit 2 for what is no flag of it."""
    return flags.parse(PlaygroundConfig, "A local web page that draws, and shows trainings.", argv)[0]
