"""Attention of SANA's blocks: the kernel of the cross-attention, its mask, and the linear self-attention."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sana_kit.devices import kind_of
from sana_kit.errors import Problem, UserError

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

ATTENTION_CHOICES = ("auto", "sdpa", "npu_fusion")


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, kernel: str
) -> torch.Tensor:
    """Softmax attention by one fused kernel: query (B, H, N, d), key and value (B, H, S, d) -> (B, H, N, d).

    Args:
        mask: boolean, (B, 1, 1 or N, S); for "sdpa" True = use, for "npu_fusion" True = leave out.
        kernel: "sdpa" or "npu_fusion".
    """
    if kernel == "sdpa":
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    import torch_npu

    heads, scale = query.shape[1], query.shape[-1] ** -0.5
    query, key, value = (part.contiguous() for part in (query, key, value))
    return torch_npu.npu_fusion_attention(query, key, value, heads, input_layout="BNSD", atten_mask=mask, scale=scale)[
        0
    ]


class CrossAttentionProcessor:
    """Cross-attention of a Sana block with a boolean mask that was built once per forward pass.

    diffusers' own processor turns an additive (B, 1, S) bias into (B * heads, 1, S) in every layer, and an additive
    mask keeps torch_npu from its fused kernel; its NPU processor drops the query and key norms of SANA-1.5 and Sprint.

    Args:
        kernel: "sdpa" (torch.nn.functional.scaled_dot_product_attention) or "npu_fusion"
            (torch_npu.npu_fusion_attention, whose mask is True where a token is left out).
    """

    def __init__(self, kernel: str = "sdpa"):
        assert kernel in ("sdpa", "npu_fusion"), kernel
        self.kernel = kernel

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *args: object,
        **kwargs: object,
    ) -> torch.Tensor:
        """hidden_states (B, N, D), encoder_hidden_states (B, S, D), attention_mask bool (B, 1, 1 or N, S)."""
        batch, length, _ = hidden_states.shape
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        if attn.norm_q is not None:  # before the split into heads: the norm runs across all heads
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        query, key, value = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (query, key, value))
        # now query is (B, heads, N, d), key and value are (B, heads, S, d)
        out = attend(query, key, value, attention_mask, self.kernel)
        out = out.transpose(1, 2).reshape(batch, length, -1).to(query.dtype)
        out = attn.to_out[1](attn.to_out[0](out))
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Keep autocast from choosing dtypes; tensors without data know none."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class LinearAttentionProcessor:
    """Sana's linear self-attention, relu(Q) (relu(K)^T V) / relu(Q) sum(relu(K)), with each tensor laid out once.

    The arithmetic is that of diffusers' SanaLinearAttnProcessor2_0, float32 included (Sana, arXiv 2410.10629, section
    3.2). That one puts features first, (heads, d, N): each product then copies its float32 operands once more, the
    relu and its gradient walk over strided memory, and V is padded with a row of ones for the denominator. Here one
    copy both casts and lays out as the products read, forward and backward, and the denominator's sum is one more
    column of the small K^T V. The order of summation differs, so results agree to float32 rounding.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *args: object,
        **kwargs: object,
    ) -> torch.Tensor:
        """hidden_states (B, N, D) -> (B, N, D) in the same dtype."""
        dtype, (batch, length, _) = hidden_states.dtype, hidden_states.shape
        query, key, value = (project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)

        def heads(
            tensor: torch.Tensor, *order: int
        ) -> torch.Tensor:  # (B, N, D) as (B, N, heads, d) permuted, float32, contiguous
            split = tensor.unflatten(-1, (attn.heads, -1)).permute(0, *order)
            return split.to(torch.float32, memory_format=torch.contiguous_format)

        # In fp16 the sums would overflow, and 1e-15 be 0 where relu(Q) is: autocast must not choose the dtype here.
        with _no_autocast(query.device):
            # relu after the cast: nothing but the copies is kept for the backward pass
            query, value = heads(query, 2, 1, 3).relu(), heads(value, 2, 1, 3)  # (B, heads, N, d)
            key = heads(key, 2, 3, 1).relu()  # (B, heads, d, N)
            context = torch.cat([key @ value, key.sum(-1, keepdim=True)], dim=-1)  # (B, heads, d, d + 1)
            out, total = (query @ context).split([value.shape[-1], 1], dim=-1)
            out = out / (total + 1e-15)
        out = out.to(dtype).transpose(1, 2).reshape(batch, length, -1)
        out = attn.to_out[1](attn.to_out[0](out))
        return out.clip(-65504, 65504) if out.dtype == torch.float16 else out


class PerturbedAttentionProcessor:
    """Self-attention whose last part of the batch attends to nothing: each token keeps its own value.

    That is the perturbation of perturbed attention guidance (arXiv 2403.17377). The rest of the batch goes through the
    layer's own processor, so that the query and key norms of SANA-1.5 stay (diffusers' processors for it drop them).

    Args:
        own: the layer's processor.
        copies: the batch is that many equal parts, the last of which is perturbed.
    """

    def __init__(self, own: Any, copies: int):
        self.own, self.copies = own, copies

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """hidden_states (B, N, D) -> (B, N, D)."""
        kept = len(hidden_states) // self.copies * (self.copies - 1)
        attended = self.own(attn, hidden_states[:kept], *args, **kwargs)
        value = attn.to_out[1](attn.to_out[0](attn.to_v(hidden_states[kept:])))
        if hidden_states.dtype == torch.float16:
            value = value.clip(-65504, 65504)
        return torch.cat([attended, value])


@contextlib.contextmanager
def perturbed_attention(transformer: torch.nn.Module, layers: Sequence[int], copies: int) -> Iterator[None]:
    """Within it, the self-attention of the blocks `layers` perturbs the last of the `copies` parts of a batch."""
    attentions = [transformer.transformer_blocks[layer].attn1 for layer in layers]
    processors = [attention.processor for attention in attentions]
    try:
        for attention, own in zip(attentions, processors, strict=True):
            attention.processor = PerturbedAttentionProcessor(own, copies)
        yield
    finally:
        for attention, own in zip(attentions, processors, strict=True):
            attention.processor = own


class _CrossAttentionMask:
    """Forward pre-hook of the transformer: a (B, S) mask of 0 and 1 becomes the boolean mask of the chosen kernel.

    The model's forward would otherwise turn the (B, S) mask into an additive bias; a 4-dimensional one passes through.
    """

    def __init__(self, kernel: str, materialize: bool):
        self.kernel, self.materialize = kernel, materialize

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        mask = kwargs.get("encoder_attention_mask")
        if mask is None or mask.ndim != 2:
            return None
        mask = mask.to(torch.bool)[:, None, None, :]  # (B, 1, 1, S)
        if self.materialize:
            # The Ascend kernels broadcast over heads only, so the query axis is written out, once for all layers.
            hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            patch = module.config.patch_size
            queries = (hidden_states.shape[-2] // patch) * (hidden_states.shape[-1] // patch)
            mask = mask.expand(-1, -1, queries, -1).contiguous()  # (B, 1, N, S)
        if self.kernel == "npu_fusion":
            mask = ~mask
        return args, {**kwargs, "encoder_attention_mask": mask}


def resolve_attention(attention: str, device: torch.device) -> str:
    """The kernel for the setting `attention`: 'auto' is 'sdpa' everywhere.

    torch_npu's scaled_dot_product_attention reaches the same fused kernel as npu_fusion_attention when the mask is
    boolean, so one code path serves every device; 'npu_fusion' calls the Ascend operator by name.

    Raises:
        UserError: 'npu_fusion' without an NPU, or an unknown name.
    """
    if attention not in ATTENTION_CHOICES:
        raise UserError(Problem("attention", attention, "unknown", f"Use one of {', '.join(ATTENTION_CHOICES)}."))
    if attention == "npu_fusion" and attention not in kind_of(device).fused_attention:
        reason = f"it needs an Ascend NPU with torch_npu, and this run is on '{device.type}'"
        raise UserError(Problem("attention", attention, reason, "Use auto."))
    return "sdpa" if attention == "auto" else attention


def set_attention(transformer: torch.nn.Module, attention: str, device: torch.device) -> str:
    """Give a SanaTransformer2DModel or SanaControlNetModel the kit's processors; returns the cross-attention's kernel.

    The kernel is chosen for the cross-attention `attn2` only: `attn1` is Sana's linear attention, which no softmax
    kernel may replace. Calling it again replaces the former choice.
    """
    kernel = resolve_attention(attention, device)
    for block in transformer.transformer_blocks:
        block.attn1.set_processor(LinearAttentionProcessor())
        if block.attn2 is not None:
            block.attn2.set_processor(CrossAttentionProcessor(kernel))
    previous = getattr(transformer, "_sana_kit_mask_hook", None)
    if previous is not None:
        previous.remove()
    mask = _CrossAttentionMask(kernel, materialize=kind_of(device).whole_masks)
    transformer._sana_kit_mask_hook = transformer.register_forward_pre_hook(mask, with_kwargs=True)
    return kernel
