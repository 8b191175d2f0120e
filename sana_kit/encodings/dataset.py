"""The encoded data set: latents and prompt embeddings by sample, read from disk."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from sana_kit.data.image_set import ImageSet
from sana_kit.distributed import Ranks
from sana_kit.encodings.masks import LossMasks, make_loss_masks
from sana_kit.encodings.plan import EncodingPlan
from sana_kit.encodings.settings import Transform
from sana_kit.encodings.usage import Claim


@dataclasses.dataclass(frozen=True)
class EncodingFacts:
    """What an encoding did and gave.

    Attributes:
        seconds: wall-clock time of the whole `encode` call on this rank.
        encoded_images, encoded_prompts: newly encoded by all ranks.
        reused_images, reused_prompts: distinct ones found on disk.
        image_seconds, prompt_seconds: of this rank, model loading included.
        bytes: {"latents", "prompts"} on disk for this data set.
        scaling_factor, vae_factor, latent_channels: of the VAE. The latents are already multiplied by scaling_factor.
        messages: warnings for the log (damaged shards, skipped images).
        store: how large the store is and how much of it was not used lately, one sentence; "" on other ranks than the
            first.
    """

    seconds: float
    encoded_images: int
    encoded_prompts: int
    reused_images: int
    reused_prompts: int
    image_seconds: float
    prompt_seconds: float
    bytes: dict[str, int]
    scaling_factor: float
    vae_factor: int
    latent_channels: int
    messages: tuple[str, ...]
    store: str = ""


class EncodedDataset(torch.utils.data.Dataset):
    """Latents and prompt embeddings of an ImageSet, read from disk per sample; safe with forked and spawned workers.

    Memory holds about 50 bytes per sample beside the ImageSet; the tensors stay on disk.

    Attributes:
        images: the ImageSet after bad images were skipped; sample i here is sample i there.
        facts: what the encoding did.
        masks: weights of the loss by place, after `add_masks`; None where no image has a mask.
        controls: the encodings of the control images, sample by sample, where a ControlNet is trained.
    """

    def __init__(self, plan: EncodingPlan, facts: EncodingFacts, claim: Claim | None = None):
        self.images, self.facts = plan.images, facts
        self._plan, self._claim = plan, claim
        self.masks: LossMasks | None = None
        self.controls: EncodedDataset | None = None

    @property
    def control_images(self) -> ImageSet | None:
        """The control images, where a ControlNet is trained."""
        return None if self.controls is None else self.controls.images

    def close(self) -> None:
        """Let go of the shards: from now on a pruning may remove them. The end of the process does the same."""
        for own in (self._claim, self.controls):
            if own is not None:
                own.close()

    def __len__(self) -> int:
        return len(self._plan.latent_rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """{"latents": (C, h, w), "prompt_embeds": (T, D)} of sample i on the CPU.

        With masks also "loss_weights" (1, h, w), with controls "control" (C, h, w).
        """
        item = {"latents": self.latents(i), "prompt_embeds": self.prompt_embeds(i)}
        if self.masks is not None:
            item["loss_weights"] = self.masks.weights(i)
        if self.controls is not None:
            item["control"] = self.controls.latents(i)
        return item

    def add_masks(self, outside: float, ranks: Ranks) -> None:
        """Weigh the loss by the images' masks, `outside` where they are black; a collective call, see `masks.py`."""
        where = (self.transform, self.latent_shapes(), self._plan.store, self._plan.path.stem)
        self.masks = make_loss_masks(self.images, *where, outside=outside, ranks=ranks)

    def latents(self, i: int) -> torch.Tensor:
        """(C, h, w) in the VAE's dtype, multiplied by the VAE's scaling factor."""
        if self._claim is not None:
            self._claim.renew()
        return self._plan.latents.read(int(self._plan.latent_rows[i]))

    def prompt_embeds(self, i: int) -> torch.Tensor:
        """(T, D) of sample i's caption."""
        return self._plan.texts.read(int(self._plan.caption_rows[i]))

    @property
    def several_captions(self) -> bool:
        """Whether some samples have several captions."""
        return self._plan.choice_rows is not None

    def drawn_prompt_embeds(self, i: int, u: float) -> torch.Tensor:
        """(T, D) of the caption that sample i takes for a number u in [0, 1), by the captions' weights."""
        return self._plan.texts.read(int(self._plan.choice_rows[self.images.choices.draw(i, u)]))

    @property
    def transform(self) -> Transform:
        """The decision of scale, crop and flip for each sample."""
        return Transform(self._plan.images, self._plan.settings, self._plan.seed)

    def latent_shapes(self) -> np.ndarray:
        """(N, 2) int64: height and width of each sample's latents; nothing is read."""
        latents = self._plan.latents
        sides = np.array([shape[-2:] for shape in latents.shapes], np.int64).reshape(-1, 2)
        return sides[latents.shape[self._plan.latent_rows]]

    def prompt_tokens(self) -> np.ndarray:
        """(N,) int32: valid tokens of each sample's caption, of several the first's, for statistics."""
        return self._plan.texts.tokens(self._plan.caption_rows)

    def prompt(self, prompt: str, instruction: list[str] | None = None) -> torch.Tensor:
        """(T, D) of a prompt that was among the captions or `extra_prompts`. Raises KeyError for any other."""
        row = self._plan.find_prompt(prompt, instruction)
        if row is None:
            raise KeyError(f"this prompt was not encoded with this instruction: {prompt[:80]!r}")
        return self._plan.texts.read(row)
