"""The fused SANA block's operations: hand-written forward and backward passes in standard torch operators.

Each does what diffusers' block does with fewer passes over memory, and keeps for the backward pass only what a frozen
base needs. They run on NPU, CUDA and CPU alike, differentiate once, and hold for float64, float32 and bfloat16.
Sizes: B images, N tokens, D features, H heads of d = D / H, R the sum of the LoRA ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

aten = torch.ops.aten

# Columns appended to V in linear attention: a column of ones, whose sum is the denominator, and zeros up to a multiple
# of 16 bytes, so that the products stay aligned.
EXTRA_COLUMNS = 8
# What diffusers adds to the denominator.
DENOMINATOR_EPSILON = 1e-15


class ModulatedNorm(torch.autograd.Function):
    """layer_norm(x) * factor + shift: x (B, N, D), factor and shift (B, 1, D) -> (B, N, D).

    Keeps x, which the residual stream keeps anyway, and two numbers a token. Where nothing needs a gradient, and
    factor and shift (1, 1, D) hold for all images, as in a denoising step, norm and modulation are one pass.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: torch.Tensor, factor: torch.Tensor, shift: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        if len(factor) == 1 and not any(ctx.needs_input_grad):
            return F.layer_norm(x, x.shape[-1:], factor.flatten(), shift.flatten(), epsilon)
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, epsilon)
        ctx.save_for_backward(x, factor, mean, rstd)
        return torch.addcmul(shift, normed, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, factor, mean, rstd = ctx.saved_tensors
        grad_x = grad_factor = grad_shift = None
        if ctx.needs_input_grad[0]:
            grad_x = aten.native_layer_norm_backward(
                grad * factor, x, x.shape[-1:], mean, rstd, None, None, [True, False, False]
            )[0]
        if ctx.needs_input_grad[1]:
            normed = ((x - mean) * rstd).to(x.dtype)
            grad_factor = (grad * normed).sum(1, keepdim=True)
        if ctx.needs_input_grad[2]:
            grad_shift = grad.sum(1, keepdim=True)
        return grad_x, grad_factor, grad_shift, None


class GatedResidual(torch.autograd.Function):
    """x + gate * y: x and y (B, N, D), gate (B, 1, D). Keeps y only where the gate is trained."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, y if ctx.needs_input_grad[1] else None)
        return torch.addcmul(x, gate, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, y = ctx.saved_tensors
        grad_gate = (grad * y).sum(1, keepdim=True) if ctx.needs_input_grad[1] else None
        return grad, grad_gate, grad * gate if ctx.needs_input_grad[2] else None


class Part(NamedTuple):
    """Where one LoRA update goes: columns `start` to `stop` of the output, times `scale`."""

    start: int
    stop: int
    scale: float


class LoraProjection(torch.autograd.Function):
    """x W^T + b with LoRA updates added inside: x (M, D) -> (M, O), for a frozen W (O, D) and b (O) or None.

    W may hold several projections of the same input, one below another. Each update has a down matrix (r, D) and an up
    matrix (stop - start, r), in any floating dtype: they are cast to x's. The down products are one product.

    Args:
        low: (M, R), the down products if they were made outside (dropout); None to make them here.
        passes: also return x itself. A residual stream that leaves this way has its gradient added within the product
            that makes x's gradient.
        matrices: the down matrices (none with `low`), then the up matrices.

    Returns:
        (M, O), or a pair of it and x.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: torch.Tensor,
        low: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        parts: Sequence[Part],
        passes: bool,
        *matrices: torch.Tensor,
    ) -> torch.Tensor:
        ups = list(matrices[-len(parts) :])
        down = None
        if low is None:
            downs = matrices[: len(parts)]
            down = (downs[0] if len(downs) == 1 else torch.cat(downs)).to(x.dtype)
            low = x @ down.t()
        y = F.linear(x, weight, bias)
        ctx.alike = _alike(parts, [up.shape[1] for up in ups], y.shape[1])
        if ctx.alike:  # (n, O / n, r): all updates are one batched product
            ups = [torch.stack(ups).to(x.dtype)]
            _per_part(y, parts).baddbmm_(_per_part(low, parts), ups[0].transpose(1, 2), alpha=parts[0].scale)
        else:
            ups = [up.to(x.dtype) for up in ups]
            for part, up, own in zip(parts, ups, low.split([up.shape[1] for up in ups], 1), strict=True):
                y[:, part.start : part.stop].addmm_(own, up.t(), alpha=part.scale)
        ctx.save_for_backward(x if down is not None else None, weight, down, low, *ups)
        ctx.parts, ctx.dtypes = parts, [matrix.dtype for matrix in matrices]
        ctx.set_materialize_grads(False)
        return (y, x) if passes else y

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad: torch.Tensor, passed: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return (passed, *[None] * (5 + len(ctx.dtypes)))
        x, weight, down, low, *ups = ctx.saved_tensors
        ups = ups[0] if ctx.alike else ups
        ranks = [up.shape[1] for up in ups]
        columns = [grad[:, part.start : part.stop] for part in ctx.parts]
        grad_low = LoraProjection._gradient_of_low(ctx.parts, grad, low, ups)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight if passed is None else torch.addmm(passed, grad, weight)
            if down is not None:
                grad_x.addmm_(grad_low, down)
        grad_ups = [
            (own.t() @ one).mul_(part.scale) if part.scale != 1 else own.t() @ one
            for part, own, one in zip(ctx.parts, columns, low.split(ranks, 1), strict=True)
        ]
        grads = [] if down is None else (grad_low.t() @ x).split(ranks)
        grads = [one.to(dtype) for one, dtype in zip([*grads, *grad_ups], ctx.dtypes, strict=True)]
        return (grad_x, grad_low if down is None else None, None, None, None, None, *grads)

    @staticmethod
    def _gradient_of_low(
        parts: Sequence[Part], grad: torch.Tensor, low: torch.Tensor, ups: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """(M, R), from the output's gradient (M, O); ups are one tensor if the updates are alike."""
        grad_low = torch.empty_like(low)
        if isinstance(ups, torch.Tensor):
            torch.bmm(_per_part(grad, parts), ups, out=_per_part(grad_low, parts))
            return grad_low.mul_(parts[0].scale) if parts[0].scale != 1 else grad_low
        for part, up, out in zip(parts, ups, grad_low.split([up.shape[1] for up in ups], 1), strict=True):
            torch.mm(grad[:, part.start : part.stop], up, out=out)
            if part.scale != 1:
                out.mul_(part.scale)
        return grad_low


def _alike(parts: Sequence[Part], ranks: Sequence[int], columns: int) -> bool:
    """Whether several updates of one rank and one scale cut the output into equal shares, in its order."""
    share = columns // len(parts)
    places = [(index * share, (index + 1) * share) for index in range(len(parts))]
    scales = {part.scale for part in parts}
    return (
        len(parts) > 1
        and len(set(ranks)) == len(scales) == 1
        and [(part.start, part.stop) for part in parts] == places
    )


def _per_part(tensor: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
    """(M, n k) as (n, M, k), a view."""
    return tensor.unflatten(1, (len(parts), -1)).transpose(0, 1)


class LinearAttention(torch.autograd.Function):
    """relu(Q) (relu(K)^T V) / (relu(Q) sum(relu(K))), Sana's linear attention (arXiv 2410.10629, section 3.2).

    Args:
        heads: H.
        qkv: Q, K and V side by side, (B, N, 3 D); or Q alone, (B, N, D), with key and value beside.
        key, value: (B, N, D), or None.

    Returns:
        (B, N, D).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, heads: int, qkv: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        ctx.packed = key is None
        query, key, value = LinearAttention._split(heads, qkv, key, value)
        batch, _, length, width = query.shape
        like = {"dtype": query.dtype, "device": query.device}
        relus = torch.empty(2, batch, heads, length, width, **like)
        if ctx.packed:
            both = qkv.view(batch, length, 3, heads, width)[:, :, :2].permute(2, 0, 3, 1, 4)
            torch.clamp_min(both, 0, out=relus)
        else:
            torch.clamp_min(query, 0, out=relus[0])
            torch.clamp_min(key, 0, out=relus[1])
        values = torch.empty(batch, heads, length, width + EXTRA_COLUMNS, **like)
        values[..., :width].copy_(value)
        ones = torch.eye(1, EXTRA_COLUMNS, **like)  # a row of the extra columns: one, then zeros
        values[..., width:].copy_(ones)
        query, key = relus
        state = key.transpose(-1, -2) @ values  # (B, H, d, d + extra): K^T V, then the sum of K
        product = query @ state
        total = product[..., width : width + 1] + DENOMINATOR_EPSILON
        out = torch.empty(batch, length, heads, width, **like)
        torch.div(product[..., :width], total, out=out.transpose(1, 2))
        ctx.save_for_backward(relus, values, state, total, ones)
        return out.view(batch, length, heads * width)

    @staticmethod
    def _split(
        heads: int, qkv: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Views (B, H, N, d) of Q, K and V, or of their gradients."""
        parts = qkv.chunk(3, -1) if key is None else (qkv, key, value)
        return [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        relus, values, state, total, ones = ctx.saved_tensors
        query, key = relus
        batch, heads, length, width = query.shape
        # gradient of product: of its d columns first; of the denominator, -(out . grad) / total, then, with
        # out . grad = relu(Q) . (grad state^T) / total, which needs no output kept
        ahead = torch.empty_like(values)
        torch.div(grad.unflatten(-1, (heads, width)).transpose(1, 2), total, out=ahead[..., :width])
        grad_query = ahead[..., :width] @ state[..., :width].transpose(-1, -2)
        of_total = (query * grad_query).sum(-1, keepdim=True).div_(total).neg_()
        torch.mul(of_total, ones, out=ahead[..., width:])
        grad_state = query.transpose(-1, -2) @ ahead
        grads = torch.empty_like(relus)
        # as a product of a column and a row: a CPU's broadcasting takes four times as long
        product = (tensor.flatten(0, 1) for tensor in (grad_query, of_total, state[..., width].unsqueeze(-2)))
        torch.baddbmm(*product, out=grads[0].flatten(0, 1))
        torch.matmul(values, grad_state.transpose(-1, -2), out=grads[1])
        shape = (batch, length, heads * width)
        if ctx.packed:
            result = grad.new_empty(batch, length, 3, heads, width)
            aten.threshold_backward.grad_input(grads, relus, 0, grad_input=result[:, :, :2].permute(2, 0, 3, 1, 4))
            result[:, :, 2].transpose(1, 2).copy_(key @ grad_state[..., :width])
            return None, result.view(batch, length, 3 * heads * width), None, None
        result = grad.new_empty(2, batch, length, heads, width)
        aten.threshold_backward.grad_input(grads, relus, 0, grad_input=result.transpose(2, 3))
        grad_value = (key @ grad_state[..., :width]).transpose(1, 2).reshape(shape)
        return None, result[0].view(shape), result[1].view(shape), grad_value


class GatedConvolution(torch.autograd.Function):
    """The middle of the mix-FFN: a * silu(gate), where (a, gate) are the halves of conv3x3(silu(x)), depthwise.

    Args:
        x: (B, N, 2 h) with `channels_last`, else (B, 2 h, height, width).
        weight, bias: of the depthwise convolution, (2 h, 1, 3, 3) and (2 h).
        size: height and width of the N tokens.

    Returns:
        (B, N, h) or (B, h, height, width). Keeps its input, and in place of the convolution's output the output's two
        derivatives by it, silu(gate) and a * silu'(gate): as many bytes, and the backward pass is one product.
        Where nothing needs a gradient, x is overwritten.
    """

    @staticmethod
    def _convolve(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, size: tuple[int, int], channels_last: bool
    ) -> torch.Tensor:
        """The depthwise convolution in x's own layout, as an operator on images."""
        image = x.unflatten(1, size).permute(0, 3, 1, 2) if channels_last else x
        out = F.conv2d(image, weight, bias, padding=1, groups=weight.shape[0])
        return out.permute(0, 2, 3, 1).flatten(1, 2) if channels_last else out

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        size: tuple[int, int],
        channels_last: bool,
    ) -> torch.Tensor:
        axis = -1 if channels_last else 1
        needed = any(ctx.needs_input_grad)
        y = GatedConvolution._convolve(F.silu(x, inplace=not needed), weight, bias, size, channels_last)
        a, gate = y.chunk(2, axis)
        if not needed:
            return F.silu(gate, inplace=True) * a
        by_y = torch.empty_like(y)
        by_a, by_gate = by_y.chunk(2, axis)
        aten.silu.out(gate, out=by_a)
        aten.silu_backward.grad_input(a, gate, grad_input=by_gate)
        ctx.size, ctx.channels_last, ctx.axis = size, channels_last, axis
        ctx.save_for_backward(x, weight, by_y)
        return a * by_a

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, by_y = ctx.saved_tensors
        halves = by_y.unflatten(ctx.axis, (2, -1))  # the axis of the halves stands before the one of their channels
        grad_y = (halves * grad.unsqueeze(-2 if ctx.channels_last else 1)).view_as(by_y)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            # of a 3 x 3 convolution with padding 1: the same with the kernel turned by 180 degrees
            grad_s = GatedConvolution._convolve(grad_y, weight.flip(2, 3), None, ctx.size, ctx.channels_last)
            grad_x = aten.silu_backward(grad_s, x)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            images = [grad_y, F.silu(x)]
            if ctx.channels_last:
                images = [image.unflatten(1, ctx.size).permute(0, 3, 1, 2) for image in images]
            ones, mask = [1, 1], [False, ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
            bias_sizes = [weight.shape[0]]
            _, grad_weight, grad_bias = aten.convolution_backward(
                *images, weight, bias_sizes, ones, ones, ones, False, [0, 0], weight.shape[0], mask
            )
        return grad_x, grad_weight, grad_bias, None, None
