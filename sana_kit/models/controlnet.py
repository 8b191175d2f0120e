"""A ControlNet that is trained: begun from the transformer that it guides, and called with it as one model.

It begins as NVlabs' do: the first blocks are copied, and what they add to the transformer goes through linear layers
that begin at zero, so that the first step computes what the transformer alone computes. The embeddings of latents,
caption and time step are the transformer's own and stay as they are. It is wired as diffusers' SanaControlNetModel,
which holds a copy of them (docs/formats.md tells the difference).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import SanaControlNetModel

EMBEDDINGS = ("patch_embed", "time_embed", "caption_projection", "caption_norm")


def controlnet_config(transformer_config: Mapping, layers: int) -> dict[str, Any]:
    """Arguments of the SanaControlNetModel that fits a transformer."""
    known = set(inspect.signature(SanaControlNetModel.__init__).parameters) - {"self"}
    return {**{name: transformer_config[name] for name in known if name in transformer_config}, "num_layers": layers}


def begin_controlnet(transformer: torch.nn.Module, layers: int) -> SanaControlNetModel:
    """A ControlNet whose blocks are copies of the transformer's first, on its device and in its dtype; all frozen.

    Args:
        transformer: a SanaTransformer2DModel without norms of queries and keys, which a SanaControlNetModel lacks.
    """
    with transformer.device:
        controlnet = SanaControlNetModel(**controlnet_config(transformer.config, layers))
    for name in EMBEDDINGS:
        getattr(controlnet, name).load_state_dict(getattr(transformer, name).state_dict())
    for own, theirs in zip(controlnet.transformer_blocks, transformer.transformer_blocks, strict=False):
        own.load_state_dict(theirs.state_dict())
    # not by its own `to`, which warns of parts to be kept in float32, of which there are none
    return torch.nn.Module.to(controlnet, transformer.dtype).requires_grad_(False)


class ControlledTransformer(torch.nn.Module):
    """A frozen transformer with the ControlNet that is trained beside it.

    Attributes:
        transformer: SanaTransformer2DModel; controlnet: SanaControlNetModel.
    """

    def __init__(self, transformer: torch.nn.Module, controlnet: torch.nn.Module, autocast: torch.dtype | None = None):
        """`autocast`: what the ControlNet computes in where its weights are float32 masters; None: as they are."""
        super().__init__()
        self.transformer, self.controlnet, self._autocast = transformer, controlnet, autocast

    @property
    def config(self) -> Any:
        """The transformer's."""
        return self.transformer.config

    @property
    def dtype(self) -> torch.dtype:
        """The transformer's."""
        return self.transformer.dtype

    def trained_parts(self) -> tuple[torch.nn.Module, ...]:
        """The modules whose weights are trained."""
        return self.controlnet.input_block, self.controlnet.transformer_blocks, self.controlnet.controlnet_blocks

    def residuals(self, hidden_states: torch.Tensor, **arguments: Any) -> tuple[list[torch.Tensor]]:
        """What `controlnet(hidden_states, **arguments)` gives, in the dtype of the run; see SanaControlNetModel."""
        kind, dtype = hidden_states.device.type, self._autocast
        if dtype is None:
            return self.controlnet(hidden_states, **arguments)
        with torch.autocast(kind, dtype=dtype):
            return self.controlnet(hidden_states, **arguments)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        timestep: torch.Tensor,
        control: torch.Tensor,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor]:
        """(velocity (B, C, h, w),); hidden_states and control (B, C, h, w), the rest as SanaTransformer2DModel's."""
        assert not return_dict
        prompt = {"encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_attention_mask}
        prompt |= {"timestep": timestep, "return_dict": False}
        added = self.residuals(hidden_states, controlnet_cond=control, **prompt)[0]
        return self.transformer(hidden_states, **prompt, controlnet_block_samples=tuple(added))
