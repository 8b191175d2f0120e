"""The fused block's operations as torch's compiler takes them: nothing is written into a part of a tensor.

The counterparts of sana_kit.models.fused_ops for frozen base weights, with the same arguments and results. What stands
between two products is left to the compiler, which makes one pass of it; so the depthwise convolution is a sum of nine
shifted products, whose ends, silu and gate, need no passes of their own. Never called without the compiler: eagerly
they would make more passes than diffusers' block.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from sana_kit.models.fused_ops import DENOMINATOR_EPSILON, Part

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

# Of torch._inductor.config (read in torch 2.13): how many reads and operators the compiler takes into a kernel before
# it writes an intermediate result. Nine taps of a convolution and two activations are more than it does unasked.
COMPILER_OPTIONS = {
    "realize_reads_threshold": 64,
    "realize_acc_reads_threshold": 64,
    "realize_opcount_threshold": 400,
}


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: at least float32."""
    return torch.promote_types(dtype, torch.float32)


class ModulatedNorm(torch.autograd.Function):
    """layer_norm(x) * factor + shift: x (B, N, D), factor and shift (B or 1, 1, D) -> (B, N, D)."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: torch.Tensor, factor: torch.Tensor, shift: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        variance, mean = torch.var_mean(x.to(_wide(x.dtype)), -1, keepdim=True, correction=0)
        rstd = torch.rsqrt(variance + epsilon)
        ctx.save_for_backward(x, factor, mean, rstd)
        return ((x - mean) * rstd * factor + shift).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, factor, mean, rstd = ctx.saved_tensors
        normed = (x - mean) * rstd
        ahead = (grad * factor).to(normed.dtype)
        grad_x = ahead - ahead.mean(-1, keepdim=True) - normed * (ahead * normed).mean(-1, keepdim=True)
        grad_factor = grad_shift = None
        if ctx.needs_input_grad[1]:
            grad_factor = (grad * normed).sum(1, keepdim=True).sum_to_size(factor.shape).to(factor.dtype)
        if ctx.needs_input_grad[2]:
            grad_shift = grad.sum(1, keepdim=True).sum_to_size(factor.shape).to(factor.dtype)
        return (rstd * grad_x).to(x.dtype), grad_factor, grad_shift, None


class GatedResidual(torch.autograd.Function):
    """x + gate * y: x and y (B, N, D), gate (B or 1, 1, D)."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, y if ctx.needs_input_grad[1] else None)
        return x + gate * y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, y = ctx.saved_tensors
        grad_gate = None
        if y is not None:
            grad_gate = (grad * y).sum(1, keepdim=True).sum_to_size(gate.shape)
        return grad.view_as(grad), grad_gate, grad * gate


class LoraProjection(torch.autograd.Function):
    """x W^T + b with LoRA updates for a frozen W; arguments and results as fused_ops.LoraProjection has them.

    All updates are one product with a block-diagonal matrix (O, R).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: torch.Tensor,
        low: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        parts: Sequence[Part],
        passes: bool,
        *matrices: torch.Tensor,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        ups = matrices[-len(parts) :]
        down = None
        if low is None:
            down = torch.cat(matrices[: len(parts)]).to(x.dtype)
            low = x @ down.t()
        blocks = [
            F.pad(up * part.scale, (0, 0, part.start, len(weight) - part.stop))
            for part, up in zip(parts, ups, strict=True)
        ]
        up = torch.cat(blocks, 1).to(x.dtype)
        y = torch.addmm(F.linear(x, weight, bias), low, up.t())
        ctx.save_for_backward(x if down is not None else None, weight, down, low, up)
        ctx.parts, ctx.ranks = parts, [one.shape[1] for one in ups]
        ctx.dtypes = [matrix.dtype for matrix in matrices]
        return (y, x.view_as(x)) if passes else y

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad: torch.Tensor, passed: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, ...]:
        x, weight, down, low, up = ctx.saved_tensors
        grad_low = grad @ up
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight if passed is None else torch.addmm(passed, grad, weight)
            if down is not None:
                grad_x = torch.addmm(grad_x, grad_low, down)
        columns = (grad.t() @ low).split(ctx.ranks, 1)
        grads = [one[part.start : part.stop] * part.scale for one, part in zip(columns, ctx.parts, strict=True)]
        if down is not None:
            grads = [*(grad_low.t() @ x).split(ctx.ranks), *grads]
        grads = [one.to(dtype) for one, dtype in zip(grads, ctx.dtypes, strict=True)]
        return (grad_x, grad_low if down is None else None, None, None, None, None, *grads)


class LinearAttention(torch.autograd.Function):
    """relu(Q) (relu(K)^T V) / (relu(Q) sum(relu(K))); arguments and results as fused_ops.LinearAttention has them."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, heads: int, qkv: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None
    ) -> torch.Tensor:
        parts = qkv.chunk(3, -1) if key is None else (qkv, key, value)
        query, keys, values = (_by_head(part, heads) for part in parts)
        query, keys = F.relu(query), F.relu(keys)
        state = torch.bmm(keys.transpose(1, 2), values)
        sums = keys.sum(1, keepdim=True, dtype=_wide(keys.dtype))
        total = (query * sums).sum(-1, keepdim=True) + DENOMINATOR_EPSILON
        ctx.heads, ctx.packed = heads, key is None
        ctx.save_for_backward(query, keys, values, state, sums, total)
        return _by_token((torch.bmm(query, state) / total).to(qkv.dtype), heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, keys, values, state, sums, total = ctx.saved_tensors
        ahead = (_by_head(grad, ctx.heads) / total).to(query.dtype)
        grad_query = torch.bmm(ahead, state.transpose(1, 2))
        of_total = -(query * grad_query).sum(-1, keepdim=True, dtype=total.dtype) / total
        grad_state = torch.bmm(query.transpose(1, 2), ahead)
        grad_sums = (query * of_total).sum(1, keepdim=True)
        grads = (
            torch.where(query > 0, grad_query + of_total * sums, 0),
            torch.where(keys > 0, torch.bmm(values, grad_state.transpose(1, 2)) + grad_sums, 0),
            torch.bmm(keys, grad_state),
        )
        of_parts = [_by_token(one.to(query.dtype), ctx.heads) for one in grads]
        return (None, torch.cat(of_parts, -1), None, None) if ctx.packed else (None, *of_parts)


def _by_head(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, N, H d) -> (B H, N, d): laid out once, so that no product lays it out again."""
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1)


def _by_token(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """(B H, N, d) -> (B, N, H d)."""
    return tensor.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)


class GatedConvolution(torch.autograd.Function):
    """a * silu(gate), where (a, gate) are the halves of conv3x3(silu(x)), depthwise, for a frozen convolution.

    x (B, N, 2 h); weight (2 h, 1, 3, 3), bias (2 h) or None; size: height and width of the N tokens -> (B, N, h).
    """

    @staticmethod
    def _taps(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, size: Sequence[int], channels: slice
    ) -> torch.Tensor:
        """Those channels of the convolution of x (B, N, C) with padding 1: (B, N, their number)."""
        height, width = size
        image = F.pad(x.unflatten(1, (height, width)), (0, 0, 1, 1, 1, 1))
        products = (
            image[:, row : row + height, column : column + width, channels] * weight[channels, 0, row, column]
            for row in range(3)
            for column in range(3)
        )
        out = functools.reduce(torch.add, products).flatten(1, 2)
        # last, in the tokens' shape: so the compiler takes it and what follows into the same loop
        return out if bias is None else out + bias[channels]

    @staticmethod
    def _halves(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, size: Sequence[int]
    ) -> list[torch.Tensor]:
        """a and gate, each with taps of its own: a tensor of both would be written down."""
        half = x.shape[-1] // 2
        activated = F.silu(x)
        return [
            GatedConvolution._taps(activated, weight, bias, size, channels)
            for channels in (slice(0, half), slice(half, 2 * half))
        ]

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        size: Sequence[int],
        channels_last: bool,
    ) -> torch.Tensor:
        ctx.size = size
        ctx.save_for_backward(x, weight, bias)
        a, gate = GatedConvolution._halves(x, weight, bias, size)
        return a * F.silu(gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        a, gate = GatedConvolution._halves(x, weight, bias, ctx.size)
        grad_y = torch.cat([grad * F.silu(gate), grad * a * _slope(gate)], -1)
        # of a 3 x 3 convolution with padding 1: the same with the kernel turned by 180 degrees
        grad_s = GatedConvolution._taps(grad_y, weight.flip(2, 3), None, ctx.size, slice(None))
        return grad_s * _slope(x), None, None, None, None


def _slope(x: torch.Tensor) -> torch.Tensor:
    """The derivative of silu."""
    sigmoid = torch.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))
