"""The encoded data set: latents and prompt embeddings by sample, read from disk."""

from __future__ import annotations

import numpy as np
import torch


class EncodedImages(torch.utils.data.Dataset):
    """Latents and prompt embeddings of a ImageSet, read from disk per sample; safe with forked and spawned workers.

    Memory holds the captions' keys and a few dozen bytes per sample; the tensors stay on disk.

    Attributes:
        images: the ImageSet after bad images were skipped; sample i here is sample i there.
        seconds: wall-clock time of the whole `encode` call on this rank.
        encoded_images, encoded_prompts: newly encoded by all ranks.
        reused_images, reused_prompts: distinct ones found on disk.
        image_seconds, prompt_seconds: of this rank, model loading included.
        bytes: {"latents", "prompts"} on disk for this data set.
        scaling_factor, vae_factor, latent_channels: of the VAE. The latents are already multiplied by scaling_factor.
        messages: warnings for the log (damaged shards, skipped images).
    """

    def __init__(self, plan, make_key, facts):
        self.images = plan.images
        self._latents, self._prompts = plan.latents, plan.texts
        self._latent_rows, self._caption_rows = plan.latent_rows, plan.caption_rows
        self._prompt_rows, self._make_key = plan.prompt_keys, make_key
        self.__dict__.update(facts)

    def __len__(self) -> int:
        return len(self._latent_rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """{"latents": (C, h, w), "prompt_embeds": (T, D)} of sample i, on the CPU."""
        return {"latents": self.latents(i), "prompt_embeds": self.prompt_embeds(i)}

    def latents(self, i: int) -> torch.Tensor:
        """(C, h, w) in the VAE's dtype, multiplied by the VAE's scaling factor."""
        return self._latents.read(int(self._latent_rows[i]))

    def prompt_embeds(self, i: int) -> torch.Tensor:
        """(T, D) of sample i's caption."""
        return self._prompts.read(int(self._caption_rows[i]))

    def prompt_tokens(self) -> np.ndarray:
        """(N,) int32: valid tokens of each sample's caption, for statistics and length-aware batches."""
        return self._prompts.tokens[self._caption_rows]

    def prompt(self, prompt: str, instruction: list[str] | None = None) -> torch.Tensor:
        """(T, D) of a prompt that was among the captions or `extra_prompts`. Raises KeyError for any other."""
        row = self._prompt_rows.get(self._make_key(prompt, instruction))
        if row is None:
            raise KeyError(f"this prompt was not encoded with this instruction: {prompt[:80]!r}")
        return self._prompts.read(row)
