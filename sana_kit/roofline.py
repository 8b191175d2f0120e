"""Where a step's time goes: bytes, kernels and kept activations, counted operator by operator on meta tensors.

`count_step` runs a step of a transformer that has no data (a few seconds, no memory) and counts every operator that
is no view: its FLOPs, the bytes of its inputs and outputs, and the seconds that they take at best on a chip. A tensor
that an operator reads through a broadcast counts once. Attention counts as one fused kernel each way, as a device
runs it. Used by tests/benchmarks/bench_roofline.py.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


@dataclass(frozen=True)
class Chip:
    """A chip's attainable rates: its data sheet's peaks times the share that large kernels reach.

    Attributes:
        flops: dense bf16 FLOP/s.
        bandwidth: bytes/s of its memory.
    """

    flops: float
    bandwidth: float


# 910B: the 376 TFLOP/s model (910B2). A100 80 GB SXM, H100 SXM.
CHIPS = {
    "910B": Chip(0.70 * 376e12, 0.80 * 1.6e12),
    "A100": Chip(0.80 * 312e12, 0.85 * 2.04e12),
    "H100": Chip(0.75 * 989e12, 0.85 * 3.35e12),
}

# Operators that give out memory or rename it, without a kernel.
FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "_unsafe_view",
    "lift_fresh",
}
KINDS = {
    "attention": ("scaled_dot_product", "flash_attention"),
    "convolution": ("convolution",),
    "product": ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul"),
    "norm": ("layer_norm", "rms_norm"),
    "reduction": ("sum", "mean", "var", "vector_norm", "amax"),
    "copy": ("_to_copy", "clone", "copy_", "cat", "stack", "contiguous", "constant_pad_nd", "repeat"),
}


def kind_of(name: str) -> str:
    """The kind of an operator ('aten.addmm.default'): a key of KINDS, else 'pointwise'."""
    base = name.split(".")[1]
    for kind in ("attention", "convolution", "norm"):
        if any(part in base for part in KINDS[kind]):
            return kind
    plain = base if base in KINDS["copy"] else base.rstrip("_")
    return next((kind for kind in ("product", "reduction", "copy") if plain in KINDS[kind]), "pointwise")


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes behind a tensor; an axis that is broadcast (stride 0) counts once."""
    sizes = (size if stride else min(size, 1) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return math.prod(sizes) * tensor.element_size()


@dataclass
class Row:
    """What one operator, one kind of operator or a whole step costs.

    Attributes:
        seconds: by chip, the sum over kernels of the longer of arithmetic and memory traffic.
    """

    kernels: int = 0
    bytes: int = 0
    flops: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CHIPS, 0.0))

    def add(self, other: Row) -> None:
        self.kernels += other.kernels
        self.bytes += other.bytes
        self.flops += other.flops
        for chip, seconds in other.seconds.items():
            self.seconds[chip] += seconds


def read_by(name: str, args: tuple, kwargs: dict) -> tuple:
    """What an operator ('aten.mul.out') reads: all arguments but the memory that it only writes (out=, copy_)."""
    base, overload = name.split(".")[1:3]
    if base in ("copy_", "fill_", "zero_"):
        return args[1:], kwargs
    if overload.endswith(("out", "grad_input")):
        kwargs = {key: value for key, value in kwargs.items() if key not in ("out", "grad_input")}
    return args, kwargs


def _attention_flops(name: str, args: tuple) -> float:
    """FLOPs of the CPU's fused attention kernel, which torch's own counter does not know: 2 products, 5 backward."""
    query, key = (args[1], args[2]) if "backward" in name else (args[0], args[1])
    batch, heads, queries, width = query.shape
    return (5 if "backward" in name else 2) * 2.0 * batch * heads * queries * key.shape[2] * width


def _convolution_backward_flops(args: tuple) -> float:
    """As many as forward for each of the two gradients asked for; torch's own counter forgets the groups."""
    grad, weight, wanted = args[0], args[2], args[-1]
    return 2.0 * grad.shape[0] * math.prod(grad.shape[2:]) * weight.numel() * sum(wanted[:2])


def _in_layout_of(image: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """A convolution's output in its input's layout, as CPU and CUDA give it; torch's meta kernel forgets it."""
    if image.device.type != "meta" or not image.is_contiguous(memory_format=torch.channels_last):
        return out
    return torch.empty_like(out, memory_format=torch.channels_last)


class StepCounter(TorchDispatchMode):
    """Counts every operator that runs under it, by name, in `rows`, and the bytes alive at most at once in `peak`.

    What was there before it does not count as alive, nor what an operator allocates and frees within itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, Row] = {}
        self.peak = self._alive = 0
        self._storages: set[int] = set()

    def _see(self, leaf: torch.Tensor) -> None:
        """Count a result's memory as alive until it is freed."""
        storage = leaf.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._storages:
            return
        self._storages.add(address)
        self._alive += size
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        self._storages.discard(address)
        self._alive -= size

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = str(func)
        if name == "aten.convolution.default":
            out = _in_layout_of(args[0], out)
        if func.is_view:
            return out
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, torch.nn.Parameter):
                self._see(leaf)
        if name.split(".")[1] in FREE:
            return out
        flops = 0.0
        if name == "aten.convolution_backward.default":
            flops = _convolution_backward_flops(args)
        elif func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        elif kind_of(name) == "attention":
            flops = _attention_flops(name, args)
        leaves = [*tree_leaves(read_by(name, args, kwargs)), *tree_leaves(out)]
        moved = sum(tensor_bytes(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor))
        seconds = {key: max(flops / chip.flops, moved / chip.bandwidth) for key, chip in CHIPS.items()}
        self.rows.setdefault(name, Row()).add(Row(1, moved, flops, seconds))
        return out


@contextlib.contextmanager
def one_attention_kernel() -> Iterator[None]:
    """Let scaled_dot_product_attention be one kernel on meta tensors too, where torch would take it apart.

    The product of scores is then neither written nor kept, as with the fused kernels of NPU, CUDA and CPU.
    """
    original = torch.nn.functional.scaled_dot_product_attention

    def fused(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **rest: object,
    ) -> torch.Tensor:
        if attn_mask is not None:  # the kernel wants an additive mask; one value per sample stands for it
            full = (query.shape[0], 1, query.shape[2], key.shape[2])
            attn_mask = torch.empty((full[0], 1, 1, full[3]), dtype=query.dtype, device=query.device).expand(full)
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, **rest
        )[0]

    torch.nn.functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = original


class KeptBytes:
    """Bytes that autograd keeps for the backward pass, by storage; `known` tensors (the weights) do not count."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._storages[storage._cdata] = storage  # held, so that no address is given out twice
        return tensor

    def hooks(self) -> contextlib.AbstractContextManager:
        """Context of the forward pass whose kept tensors are counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def total(self) -> int:
        """Bytes kept."""
        return sum(storage.nbytes() for storage in self._storages.values())


@dataclass
class StepCount:
    """A counted step.

    Attributes:
        rows: by operator.
        kept: bytes of activations kept for the backward pass; 0 without one.
        images: images of the batch that was counted.
        peak: bytes alive at most at once beside the weights: activations, gradients and what passes.
    """

    rows: dict[str, Row]
    kept: int
    images: int
    peak: int

    @property
    def total(self) -> Row:
        """The whole step."""
        return _sum(self.rows.values())

    def by_kind(self) -> dict[str, Row]:
        """Rows of KINDS and 'pointwise', the longest on the first chip first."""
        kinds: dict[str, list[Row]] = {}
        for name, row in self.rows.items():
            kinds.setdefault(kind_of(name), []).append(row)
        return _longest_first({kind: _sum(rows) for kind, rows in kinds.items()})

    def by_operator(self) -> dict[str, Row]:
        """Rows by operator, the longest on the first chip first."""
        return _longest_first(self.rows)


def _sum(rows: Iterable[Row]) -> Row:
    total = Row()
    for row in rows:
        total.add(row)
    return total


def _longest_first(rows: dict[str, Row]) -> dict[str, Row]:
    chip = next(iter(CHIPS))
    return dict(sorted(rows.items(), key=lambda item: -item[1].seconds[chip]))


def _inputs(
    transformer: torch.nn.Module, images: int, latent_hw: tuple[int, int], tokens: int
) -> dict[str, torch.Tensor]:
    """Arguments of the transformer's forward on its device, in its dtype, with a boolean mask built once."""
    config, parameter = transformer.config, next(transformer.parameters())
    where = {"device": parameter.device, "dtype": transformer.dtype}
    inputs = {
        "hidden_states": torch.zeros(images, config.in_channels, *latent_hw, **where),
        "encoder_hidden_states": torch.zeros(images, tokens, config.caption_channels, **where),
        "encoder_attention_mask": torch.ones(images, 1, 1, tokens, dtype=torch.bool, device=parameter.device),
        "timestep": torch.full((images,), 500.0, device=parameter.device),
    }
    if hasattr(transformer, "controlnet"):
        inputs["control"] = torch.zeros_like(inputs["hidden_states"])
    if config.guidance_embeds:
        inputs["guidance"] = torch.full((images,), 4.5, **where)
    return inputs


def count_training_step(
    transformer: torch.nn.Module, images: int, latent_hw: tuple[int, int], tokens: int
) -> StepCount:
    """Forward, loss and backward of one step; the optimizer's update is left out.

    Args:
        transformer: a SanaTransformer2DModel, best on meta; what is trained requires a gradient.
        images: batch size; latent_hw: latents' height and width; tokens: caption tokens.
    """
    inputs = _inputs(transformer, images, latent_hw, tokens)
    target = torch.zeros_like(inputs["hidden_states"])
    kept = KeptBytes([*transformer.parameters(), *transformer.buffers()])
    transformer.train()
    with one_attention_kernel(), StepCounter() as counter:
        with kept.hooks():
            prediction = transformer(**inputs, return_dict=False)[0]
            loss = torch.nn.functional.mse_loss(prediction.float(), target.float())
        size = kept.total
        loss.backward()
    for parameter in transformer.parameters():
        parameter.grad = None
    return StepCount(counter.rows, size, images, counter.peak)


def count_denoising_step(
    transformer: torch.nn.Module, images: int, latent_hw: tuple[int, int], tokens: int, *, one_timestep: bool = False
) -> StepCount:
    """One step with guidance: a forward pass over twice `images` and the combination of its two halves.

    Args:
        one_timestep: give the model one time step (1,) for all images, as `generation.denoise` gives it fused blocks.
    """
    inputs = _inputs(transformer, 2 * images, latent_hw, tokens)
    if one_timestep:
        inputs["timestep"] = inputs["timestep"][:1]
    transformer.eval()
    with torch.no_grad(), one_attention_kernel(), StepCounter() as counter:
        without, conditional = transformer(**inputs, return_dict=False)[0].chunk(2)
        torch.lerp(without, conditional, 4.5)
    return StepCount(counter.rows, 0, images, counter.peak)


def format_table(counts: dict[str, StepCount]) -> str:
    """One line per counted step: GB, kernels, kept GB and roofline milliseconds, per image but for the kernels."""
    head = f"{'':34}{'GB':>8}{'TFLOP':>8}{'kernels':>9}{'kept GB':>9}"
    lines = [head + "".join(f"{chip + ' ms':>10}" for chip in CHIPS)]
    for title, count in counts.items():
        total, images = count.total, count.images
        line = f"{title:34}{total.bytes / images / 1e9:8.1f}{total.flops / images / 1e12:8.2f}{total.kernels:9,d}"
        line += f"{count.kept / images / 1e9:9.2f}"
        lines.append(line + "".join(f"{seconds / images * 1e3:10.1f}" for seconds in total.seconds.values()))
    return "\n".join(lines)


def format_rows(count: StepCount, rows: dict[str, Row], most: int = 40) -> str:
    """One line per operator or kind: kernels, GB, milliseconds and share of the whole on each chip, per image."""
    total = count.total
    lines = []
    for name, row in list(rows.items())[:most]:
        line = f"  {name:52}{row.kernels:6,d}{row.bytes / count.images / 1e9:8.2f} GB"
        for chip, seconds in row.seconds.items():
            share = 100 * seconds / total.seconds[chip]
            line += f"{seconds / count.images * 1e3:8.2f} ms {share:4.1f} %"
        lines.append(line)
    return "\n".join(lines)


def build_on_meta(config: dict, dtype: torch.dtype, prepare: Callable[[torch.nn.Module], object]) -> torch.nn.Module:
    """A SanaTransformer2DModel without data, after `prepare(model)` (LoRA, trainable weights, processors)."""
    from diffusers import SanaTransformer2DModel

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = SanaTransformer2DModel(**config)
            prepare(model)
    finally:
        torch.set_default_dtype(default)
    return model
