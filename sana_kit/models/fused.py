"""The fused SANA block: diffusers' SanaTransformerBlock with fewer passes over memory and less kept for training.

`fuse_blocks` is the one place that decides which transformers get it; the others keep diffusers' block, and
`compile_blocks` hands either to torch's compiler, for which the fused one has operations of its own. Parameters,
their names and the state dict stay as they are, LoRA layers of peft included, so that adapters, checkpoints and
engines see no difference. tests/unit/models/test_fused.py holds it against diffusers' block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from peft.tuners import lora
from torch import nn

from sana_kit.devices import kind_of
from sana_kit.models import compiled_ops, fused_ops
from sana_kit.models.attention import LinearAttentionProcessor, attend
from sana_kit.models.fused_ops import Part

FUSED_CHOICES = ("auto", "off")
# float16 is left to diffusers: the denominator's epsilon is zero in it.
DTYPES = (torch.bfloat16, torch.float32, torch.float64)

# Weight and bias of several linear layers that lie together in memory.
Joined = tuple[torch.Tensor | None, torch.Tensor | None]


def base_linear(module: nn.Module) -> nn.Module:
    """The module itself, or the base layer under peft's LoRA."""
    return getattr(module, "base_layer", module)


def adapters_of(module: nn.Module) -> list[str]:
    """Names of the LoRA adapters whose updates the module adds at this moment."""
    if not hasattr(module, "lora_A") or module.disable_adapters or module.merged:
        return []
    return [name for name in module.active_adapters if name in module.lora_A]


class FusedSanaBlock(SanaTransformerBlock):
    """A SanaTransformerBlock whose forward runs through sana_kit.models.fused_ops.

    Never built: `fuse_blocks` changes the class of blocks that are there.

    Attributes:
        ops: the module of its operations.
        joined: per group of projections, their weights as one, where `project` shall not look for them.
        channels_last: layout of the mix-FFN's images.
        image_by_image: whether drawing takes the mix-FFN, whose inner tensors are the largest, one image at a time.
    """

    ops: ModuleType = fused_ops
    joined: dict[str, Joined] = {}  # noqa: RUF012  nothing is put into it
    channels_last: bool
    image_by_image: bool

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> torch.Tensor:
        """hidden_states (B, N, D), encoder_hidden_states (B, S, D), timestep (B, 6 D), or (1, 6 D) for all images.

        encoder_attention_mask: boolean (B, 1, 1 or N, S), as the kernel of attn2's processor reads it, or diffusers'
        own additive one, (B, 1, S). attention_mask is not used, as in diffusers.
        """
        # the patch embedding leaves channels first in memory; every later block finds tokens first
        hidden_states = hidden_states.contiguous()
        modulation = self.scale_shift_table[None] + timestep.reshape(len(timestep), 6, -1)
        shift1, _, gate1, shift2, _, gate2 = modulation.chunk(6, dim=1)
        factor1, factor2 = (modulation[:, 1::3] + 1).chunk(2, dim=1)

        x = self.ops.ModulatedNorm.apply(hidden_states, factor1, shift1, self.norm1.eps)
        x = self._self_attention(x)
        hidden_states = self.ops.GatedResidual.apply(hidden_states, gate1, x)
        hidden_states = self._cross_attention(hidden_states, encoder_hidden_states, encoder_attention_mask)
        x = self.ops.ModulatedNorm.apply(hidden_states, factor2, shift2, self.norm2.eps)
        if len(gate2) == 1 and self.channels_last and not torch.is_grad_enabled():
            return self._add_feed_forward(hidden_states, gate2, x, (height, width))
        return self.ops.GatedResidual.apply(hidden_states, gate2, self._feed_forward(x, (height, width)))

    def _project(self, group: str, x: torch.Tensor, passes: bool = False) -> list[torch.Tensor]:
        """Outputs of one of GROUPS for the same input, as `project` gives them."""
        return project(projections(self, group), x, passes, ops=self.ops, joined=self.joined.get(group))

    def _self_attention(self, x: torch.Tensor) -> torch.Tensor:
        """Linear attention: (B, N, D) -> (B, N, D)."""
        attn = self.attn1
        if not isinstance(attn.processor, (LinearAttentionProcessor, SanaLinearAttnProcessor2_0)):
            return attn(x)  # perturbed for a while, for guidance
        qkv = self._project("attn1.qkv", x)
        key = value = None
        if attn.norm_q is not None or len(qkv) > 1:
            query, key, value = qkv if len(qkv) > 1 else qkv[0].chunk(3, -1)
            query = attn.norm_q(query) if attn.norm_q is not None else query
            key = attn.norm_k(key) if attn.norm_k is not None else key
        else:
            query = qkv[0]
        out = self.ops.LinearAttention.apply(attn.heads, query, key, value)
        return attn.to_out[1](attn.to_out[0](out))

    def _cross_attention(self, x: torch.Tensor, captions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """x plus its attention to the captions: (B, N, D), (B, S, D) -> (B, N, D)."""
        attn = self.attn2
        if mask is not None and mask.ndim == 3:
            mask = mask[:, None]
        query, x = self._project("attn2.q", x, passes=True)
        key_value = self._project("attn2.kv", captions)
        key, value = key_value if len(key_value) > 1 else key_value[0].chunk(2, -1)
        query = attn.norm_q(query) if attn.norm_q is not None else query
        key = attn.norm_k(key) if attn.norm_k is not None else key
        query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (query, key, value))
        kernel = getattr(attn.processor, "kernel", "sdpa")
        return self._add_captions(x, attend(query, key, value, mask, kernel).transpose(1, 2).flatten(2))

    def _add_captions(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """x plus the cross-attention's last projection of out: (B, N, D) each."""
        return x + self.attn2.to_out[1](self.attn2.to_out[0](out))

    def _feed_forward(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """The mix-FFN: (B, N, D) -> (B, N, D)."""
        ff = self.ff
        inverted, depth, point = ff.conv_inverted, ff.conv_depth, ff.conv_point
        if self.channels_last:
            inner = F.linear(x, inverted.weight.flatten(1), inverted.bias)  # a 1 x 1 convolution
            inner = self.ops.GatedConvolution.apply(inner, depth.weight, depth.bias, size, True)
            return F.linear(inner, point.weight.flatten(1))
        inner = inverted(x.unflatten(1, size).permute(0, 3, 1, 2))
        inner = self.ops.GatedConvolution.apply(inner, depth.weight, depth.bias, size, False)
        return point(inner).flatten(2).transpose(1, 2)

    def _add_feed_forward(
        self, residual: torch.Tensor, gate: torch.Tensor, x: torch.Tensor, size: tuple[int, int]
    ) -> torch.Tensor:
        """residual + gate * mix-FFN(x), for drawing: residual and x (B, N, D), one gate (1, 1, D) -> (B, N, D).

        The gate goes into the last product's weight where that is less than the tokens, and the sum into the product.
        """
        ff = self.ff
        inverted, depth, point = ff.conv_inverted, ff.conv_depth, ff.conv_point
        into = point.weight.flatten(1)
        (images, tokens, _), inner_width = x.shape, into.shape[1]
        fold = images * tokens > inner_width
        if fold:
            into = into * gate.view(-1, 1)
        out = torch.empty_like(residual)
        at_once = 1 if self.image_by_image else images
        for first in range(0, images, at_once):
            rows = slice(first, first + at_once)
            inner = F.linear(x[rows], inverted.weight.flatten(1), inverted.bias)
            inner = self.ops.GatedConvolution.apply(inner, depth.weight, depth.bias, size, True)
            if fold:
                of_rows = residual[rows].flatten(0, 1), inner.flatten(0, 1), into.t()
                torch.addmm(*of_rows, out=out[rows].flatten(0, 1))
            else:
                torch.addcmul(residual[rows], gate, F.linear(inner, into), out=out[rows])
        return out


class CompiledSanaBlock(FusedSanaBlock):
    """A FusedSanaBlock in the form that torch's compiler makes few passes of; for frozen base weights."""

    ops = compiled_ops

    def _add_captions(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """As above; within the product, so that the sum is written once and not made again by each of its readers."""
        linear, dropout = self.attn2.to_out
        if type(linear) is not nn.Linear or (dropout.p and dropout.training):
            return super()._add_captions(x, out)
        return torch.addmm(x.flatten(0, 1), out.flatten(0, 1), linear.weight.t()).view(x.shape) + linear.bias

    def join(self) -> None:
        """Look up the joined weights, which the compiler cannot."""
        self.joined = {group: packed([base_linear(one) for one in projections(self, group)]) for group in GROUPS}

    def _add_feed_forward(
        self, residual: torch.Tensor, gate: torch.Tensor, x: torch.Tensor, size: tuple[int, int]
    ) -> torch.Tensor:
        return self.ops.GatedResidual.apply(residual, gate, self._feed_forward(x, size))

    def _apply(self, fn: Callable, recurse: bool = True) -> CompiledSanaBlock:
        """Of `.to()` and kin, which give each weight memory of its own."""
        super()._apply(fn, recurse)
        pack_block(self)
        self.join()
        return self


# Projections of the same input, by the attention that has them.
GROUPS = ("attn1.qkv", "attn2.q", "attn2.kv")


def projections(block: nn.Module, group: str) -> list[nn.Module]:
    """The modules of one of GROUPS."""
    attention, letters = group.split(".")
    return [getattr(getattr(block, attention), f"to_{letter}") for letter in letters]


def one_timestep(transformer: nn.Module) -> bool:
    """Whether the model takes one time step (1,) for a whole batch, as all its blocks are fused; it is quicker so."""
    return all(isinstance(block, FusedSanaBlock) for block in transformer.transformer_blocks)


def project(
    modules: Sequence[nn.Module],
    x: torch.Tensor,
    passes: bool = False,
    *,
    ops: ModuleType = fused_ops,
    joined: Joined | None = None,
) -> list[torch.Tensor]:
    """Outputs of several linear layers (LoRA or plain) of the same input: one tensor if their weights lie together.

    Args:
        x: (B, N, D); passes: give x back as the last one, its gradient added within the product.
        ops: where LoraProjection is; joined: the layers' weights and biases as one, if they were looked up before.

    Returns:
        [(B, N, sum of outputs)], or one (B, N, outputs) per module; then x if it passes.
    """
    bases = [base_linear(module) for module in modules]
    if any(base.weight.requires_grad for base in bases):
        return [*(module(x) for module in modules), *([x] if passes else [])]
    weight, bias = packed(bases) if joined is None else joined
    if weight is None:
        outs = [project([module], x, ops=ops)[0] for module in modules]
        return [*outs, *([x] if passes else [])]
    parts, downs, ups, lows = [], [], [], []
    start = 0
    for module, base in zip(modules, bases, strict=True):
        for name in adapters_of(module):
            down, up = module.lora_A[name].weight, module.lora_B[name].weight
            parts.append(Part(start, start + base.out_features, module.scaling[name]))
            downs.append(down)
            ups.append(up)
            dropout = module.lora_dropout[name]
            if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p:
                lows.append(F.linear(dropout(x), down.to(x.dtype)).flatten(0, 1))
        start += base.out_features
    if not parts:
        return [F.linear(x, weight, bias), *([x] if passes else [])]
    flat, shape = x.reshape(-1, x.shape[-1]), (*x.shape[:-1], start)
    low = torch.cat(lows, 1) if lows else None
    out = ops.LoraProjection.apply(flat, low, weight, bias, parts, passes, *([] if lows else downs), *ups)
    return [out[0].view(shape), out[1].view(x.shape)] if passes else [out.view(shape)]


def packed(bases: Sequence[nn.Linear]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Weights (and biases) of linear layers as one, without a copy; (None, None) if they do not lie together."""
    weight = _joined([base.weight for base in bases])
    if weight is None or bases[0].bias is None:
        return weight, None
    bias = _joined([base.bias for base in bases])
    return (None, None) if bias is None else (weight, bias)


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The tensors of one storage, each beginning where the former ends, as one along the first axis; else None."""
    first, offset, rows = tensors[0], tensors[0].storage_offset(), 0
    for tensor in tensors:
        same = tensor.untyped_storage()._cdata == first.untyped_storage()._cdata
        if not (same and tensor.is_contiguous() and tensor.storage_offset() == offset):
            return None
        offset += tensor.numel()
        rows += tensor.shape[0]
    if len(tensors) == 1:
        return first.detach()
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


@torch.no_grad()
def pack(bases: Sequence[nn.Linear]) -> None:
    """Let frozen layers' weights (and biases) be consecutive parts of one tensor each; names and values stay."""
    for name in ("weight", "bias"):
        tensors = [getattr(base, name) for base in bases]
        if any(tensor is None or tensor.requires_grad for tensor in tensors) or _joined(tensors) is not None:
            continue
        together = torch.cat([tensor.data for tensor in tensors])
        for tensor, own in zip(tensors, together.split([len(tensor) for tensor in tensors]), strict=True):
            tensor.data = own


def _attention_obstacles(attn: nn.Module) -> Iterator[str]:
    """Why an attention's projections cannot be computed by LoraProjection."""
    if attn.rescale_output_factor != 1 or attn.norm_cross is not None:
        yield "its attention has parts that SANA has not"
    for name in ("to_q", "to_k", "to_v"):
        module = getattr(attn, name)
        base = base_linear(module)
        if type(base) is nn.Linear and type(base.weight) is not nn.Parameter:
            yield f"the weight of {name} is kept in few bits"
        elif type(base) is not nn.Linear or not base.weight.is_floating_point():
            yield f"{name} is a {type(base).__name__}, not a plain linear layer"
        if module is base:
            continue
        if not isinstance(module, lora.Linear):
            yield f"the adapter of {name} is a {type(module).__name__}, not LoRA on a linear layer"
        elif getattr(module, "lora_variant", None) or any(module.use_dora.values()):
            yield f"the adapter of {name} is a variant of LoRA (DoRA, for instance)"
        elif any(up.bias is not None for up in module.lora_B.values()):
            yield f"the adapter of {name} has a bias"


def _block_obstacles(block: nn.Module) -> Iterator[str]:
    """Why a block cannot be computed by FusedSanaBlock."""
    if type(block) not in (SanaTransformerBlock, FusedSanaBlock):
        yield f"its blocks are {type(block).__name__}, not SanaTransformerBlock"
        return
    if any(hasattr(parameter, "ds_id") for parameter in block.parameters()):
        yield "its weights are partitioned between the ranks (ZeRO-3)"
        return
    dtypes = {parameter.dtype for name, parameter in block.named_parameters() if ".lora_" not in name}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        yield "its weights are " + " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    if block.attn2 is None:
        yield "it has no cross-attention"
        return
    for attn in (block.attn1, block.attn2):
        yield from _attention_obstacles(attn)
    ff, norms = block.ff, (block.norm1, block.norm2)
    if any(type(module) is not nn.Conv2d for module in (ff.conv_inverted, ff.conv_depth, ff.conv_point)):
        yield "its convolutions have adapters"
    if ff.norm is not None or ff.residual_connection or any(norm.elementwise_affine for norm in norms):
        yield "its norms or its mix-FFN have parts that SANA has not"


def fuse_blocks(
    transformer: nn.Module,
    choice: str = "auto",
    *,
    autocast: bool = False,
    compiled: bool = False,
    graphs: bool = False,
) -> str:
    """Give a SanaTransformer2DModel the fused block where it can have it; the one place that decides.

    Call it when adapters are in place, weights on their device and `requires_grad` set; calling it again is no harm.

    Args:
        choice: "auto", or "off" for diffusers' own block.
        autocast: whether the weights stay float32 while an autocast computes in another dtype.
        compiled: whether `compile_blocks` will follow.
        graphs: whether the whole transformer will be compiled and recorded.

    Returns:
        What was chosen and why, for the log.

    Raises:
        ValueError: an unknown choice.
    """
    if choice not in FUSED_CHOICES:
        raise ValueError(f"fused blocks: {choice!r} is not among {', '.join(FUSED_CHOICES)}")
    obstacles = ["switched off"] if choice == "off" else []
    if autocast:
        obstacles.append("weights stay float32 under an autocast")
    if graphs:
        obstacles.append("recorded graphs were tried with diffusers' block alone")
    if compiled and any(parameter.requires_grad for parameter in _base_weights(transformer)):
        obstacles.append("torch.compile fuses diffusers' block itself where its weights are trained")
    obstacles += [reason for block in transformer.transformer_blocks for reason in _block_obstacles(block)]
    if obstacles:
        unfuse_blocks(transformer)
        return f"diffusers' block: {obstacles[0]}"
    device = next(transformer.parameters()).device.type
    # counted on meta as an accelerator runs it
    channels_last = device == "meta" or kind_of(device).channels_last
    image_by_image = device != "meta" and kind_of(device).image_by_image
    compiled = compiled and device != "meta"  # tensors without data meet no compiler
    for block in transformer.transformer_blocks:
        block.__class__ = CompiledSanaBlock if compiled else FusedSanaBlock
        block.channels_last, block.image_by_image = channels_last or compiled, image_by_image and not compiled
        pack_block(block)
        if compiled:
            block.join()
    if compiled:
        return "fused block for torch.compile"
    return f"fused block, mix-FFN with channels {'last' if channels_last else 'first'}"


def _base_weights(transformer: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of the blocks that are no adapter's."""
    for block in transformer.transformer_blocks:
        yield from (parameter for name, parameter in block.named_parameters() if ".lora_" not in name)


def pack_block(block: nn.Module) -> None:
    """Let the frozen weights of each group of projections lie together."""
    for group in GROUPS:
        pack([base_linear(module) for module in projections(block, group)])


def compile_blocks(transformer: nn.Module) -> None:
    """torch.compile each block: one compilation serves all of a kind, and parameter names stay."""
    for block in transformer.transformer_blocks:
        options = compiled_ops.COMPILER_OPTIONS if isinstance(block, CompiledSanaBlock) else None
        block.compile(options=options)


def unfuse_blocks(transformer: nn.Module) -> None:
    """Give fused blocks diffusers' class again, and each weight memory of its own (for save_pretrained, say)."""
    for block in transformer.transformer_blocks:
        if not isinstance(block, FusedSanaBlock):
            continue
        block.__class__ = SanaTransformerBlock
        del block.channels_last, block.image_by_image
        block.__dict__.pop("joined", None)
        for attn in (block.attn1, block.attn2):
            for module in (attn.to_q, attn.to_k, attn.to_v):
                for parameter in base_linear(module).parameters():
                    if parameter.untyped_storage().nbytes() > parameter.numel() * parameter.element_size():
                        parameter.data = parameter.data.clone()
