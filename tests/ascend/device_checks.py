"""Compare the emulated NPU with the CPU, operator by operator, and try what a device must refuse.

Run by tests/ascend/test_ascend.py; by hand:
    bash tests/ascend/run.sh python tests/ascend/device_checks.py OUTPUT_FOLDER [PIPELINE_FOLDER]
Writes OUTPUT_FOLDER/checks.json, and OUTPUT_FOLDER/images.npz with what a SanaPipeline draws on the device.
"""

import copy
import io
import json
import os
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

from sana_kit.models import fused_ops
from sana_kit.models.attention import set_attention

DTYPES = (torch.float32, torch.bfloat16)
# Largest difference allowed, as a share of the largest value: sums in another order in float32; a few roundings of
# 2**-8 in bfloat16, where torch_npu and the CPU round between different steps.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}


def device_tensor(tensor):
    return tensor.to("npu")


# ---------------------------------------------------------------------------------------------------------------------
# Operators: name, function of float tensors, their shapes


def keep_mask(tensor, *shape):
    """A boolean mask on the tensor's device, the same on every device; the first key of each row is kept."""
    mask = (torch.arange(int(torch.tensor(shape).prod())).reshape(shape) * 7 % 5) < 3
    mask[..., 0] = True
    return mask.to(tensor.device)


def attention(shape=None, **options):
    def run(q, k, v):
        mask = None if shape is None else keep_mask(q, *shape)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)

    return run


def additive(q, k, v):
    bias = torch.where(keep_mask(q, 2, 1, 1, 5), 0.0, -10000.0).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def fusion(layout, mask_shape=None):
    """torch_npu.npu_fusion_attention on the device, the plain formula on the CPU; arguments are (B, N, S, d)."""

    def run(q, k, v):
        hidden = None if mask_shape is None else ~keep_mask(q, *mask_shape)
        scale = q.shape[-1] ** -0.5
        if q.device.type == "cpu":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=None if hidden is None else ~hidden, scale=scale)
        import torch_npu

        b, n, s, d = q.shape
        shaped = {
            "BNSD": lambda t: t,
            "BSND": lambda t: t.transpose(1, 2),
            "BSH": lambda t: t.transpose(1, 2).flatten(2),
            "SBH": lambda t: t.permute(2, 0, 1, 3).flatten(2),
        }[layout]
        q, k, v = (shaped(t).contiguous() for t in (q, k, v))
        out = torch_npu.npu_fusion_attention(q, k, v, n, layout, atten_mask=hidden, scale=scale)[0]
        if layout == "BNSD":
            return out
        if layout == "BSND":
            return out.transpose(1, 2)
        out = out.transpose(0, 1) if layout == "SBH" else out
        return out.reshape(b, s, n, d).transpose(1, 2)

    return run


def rms_norm(x, weight):
    """torch_npu.npu_rms_norm on the device, its formula in float32 on the CPU."""
    if x.device.type == "npu":
        import torch_npu

        return torch_npu.npu_rms_norm(x, weight, epsilon=1e-5)[0]
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.float()).to(x.dtype)


def linear_attention(q, k, v):
    """Sana's self-attention: relu features, a row of ones for the sums, in float32; (B, N, d, S)."""
    q, k = F.relu(q).float(), F.relu(k).float()
    v = F.pad(v.float(), (0, 0, 0, 1), value=1.0)
    out = torch.matmul(torch.matmul(v, k.transpose(-1, -2)), q)
    return (out[:, :, :-1] / (out[:, :, -1:] + 1e-3)).to(v.dtype)


def fused_projection(*scales):
    """LoraProjection of a frozen weight of ones and sines, one update of 8 outputs for each scale."""

    def run(x, *matrices):
        weight = torch.arange(8 * len(scales) * x.shape[1], dtype=torch.float32).sin().view(-1, x.shape[1]) / 4
        parts = [fused_ops.Part(8 * number, 8 * number + 8, scale) for number, scale in enumerate(scales)]
        return fused_ops.LoraProjection.apply(x, None, weight.to(x), None, parts, False, *matrices)

    return run


def fused_attention(*qkv):
    """LinearAttention of positive features, whose sums are far from zero."""
    query, *rest = (part.abs() for part in qkv)
    return fused_ops.LinearAttention.apply(2, query, *(rest or (None, None)))


def fused_convolution(x, weight, bias):
    return fused_ops.GatedConvolution.apply(x, weight, bias, (6, 6), False)


def in_place(x, y):
    out = x.clone()
    out.add_(y).mul_(0.5).sub_(y, alpha=2).clamp_(-2, 2)
    out[:, 1:3].neg_()
    out.transpose(0, 1)[0].zero_()
    return out.masked_fill_(keep_mask(out, *out.shape), 0.25)


def optimizer(name, **options):
    """Three steps of an optimizer; the parameters themselves are the result."""

    def run(p, g):
        parameter = torch.nn.Parameter(p.detach().clone())
        made = getattr(torch.optim, name)([parameter], lr=0.05, **options)
        for scale in (1.0, -0.5, 2.0):
            parameter.grad = g.detach() * scale
            torch.nn.utils.clip_grad_norm_([parameter], 1.0)
            made.step()
        return parameter.detach()

    return run


QKV = [(2, 4, 7, 16), (2, 4, 5, 16), (2, 4, 5, 16)]
SELF = [(2, 4, 6, 16)] * 3
IMAGE = (2, 8, 6, 6)
OPERATORS = [
    ("conv2d", lambda x, w, b: F.conv2d(x, w, b, padding=1), [IMAGE, (6, 8, 3, 3), (6,)]),
    ("conv2d stride 2", lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1), [IMAGE, (6, 8, 3, 3), (6,)]),
    ("conv2d 1x1", lambda x, w: F.conv2d(x, w), [IMAGE, (16, 8, 1, 1)]),
    ("conv2d depthwise", lambda x, w, b: F.conv2d(x, w, b, padding=1, groups=8), [IMAGE, (8, 1, 3, 3), (8,)]),
    ("conv2d depthwise 5x5", lambda x, w: F.conv2d(x, w, padding=2, groups=8), [IMAGE, (8, 1, 5, 5)]),
    ("conv_transpose2d", lambda x, w: F.conv_transpose2d(x, w, stride=2), [IMAGE, (8, 4, 2, 2)]),
    ("linear", F.linear, [(2, 5, 16), (12, 16), (12,)]),
    ("linear without bias", F.linear, [(2, 5, 16), (12, 16)]),
    ("matmul", torch.matmul, [(2, 3, 5, 8), (2, 3, 8, 4)]),
    ("matmul broadcast", torch.matmul, [(2, 3, 5, 8), (3, 8, 4)]),
    ("matmul folded", torch.matmul, [(2, 3, 5, 8), (8, 4)]),
    ("matmul vector", torch.matmul, [(5, 8), (8,)]),
    ("bmm", torch.bmm, [(3, 5, 8), (3, 8, 4)]),
    ("baddbmm", torch.baddbmm, [(3, 5, 4), (3, 5, 8), (3, 8, 4)]),
    ("einsum", lambda a, b: torch.einsum("bnd,bmd->bnm", a, b), [(2, 5, 8), (2, 6, 8)]),
    ("layer_norm", lambda x, w, b: F.layer_norm(x, (16,), w, b), [(2, 5, 16), (16,), (16,)]),
    ("layer_norm without weights", lambda x: F.layer_norm(x, (16,), eps=1e-6), [(2, 5, 16)]),
    ("group_norm", lambda x, w, b: F.group_norm(x, 4, w, b), [IMAGE, (8,), (8,)]),
    ("rms_norm of torch", lambda x, w: F.rms_norm(x, (16,), w, 1e-5), [(2, 5, 16), (16,)]),
    ("npu_rms_norm", rms_norm, [(2, 5, 16), (16,)]),
    ("npu_rms_norm of a view", lambda x, w: rms_norm(x.movedim(1, -1), w), [IMAGE, (8,)]),
    ("attention", attention(), QKV),
    ("attention, mask 11SS", attention((1, 1, 7, 5)), QKV),
    ("attention, mask B1SS", attention((2, 1, 7, 5)), QKV),
    ("attention, mask BNSS", attention((2, 4, 7, 5)), QKV),
    ("attention, mask SS", attention((7, 5)), QKV),
    ("attention, mask B11S", attention((2, 1, 1, 5)), QKV),
    ("attention, additive mask", additive, QKV),
    ("attention, causal", attention(is_causal=True), SELF),
    ("attention, scale", attention(scale=0.1), QKV),
    ("attention, 3 dimensions", attention(), [(4, 7, 16), (4, 5, 16), (4, 5, 16)]),
    ("attention, grouped", attention(enable_gqa=True), [(2, 4, 7, 16), (2, 2, 5, 16), (2, 2, 5, 16)]),
    ("npu_fusion_attention BNSD", fusion("BNSD"), QKV),
    ("npu_fusion_attention BNSD, mask B1SS", fusion("BNSD", (2, 1, 7, 5)), QKV),
    ("npu_fusion_attention BSND, mask BNSS", fusion("BSND", (2, 4, 7, 5)), QKV),
    ("npu_fusion_attention BSH, mask 11SS", fusion("BSH", (1, 1, 7, 5)), QKV),
    ("npu_fusion_attention SBH, mask SS", fusion("SBH", (7, 5)), QKV),
    ("linear attention of Sana", linear_attention, [(2, 3, 4, 6)] * 3),
    (
        "fused block: norm",
        lambda x, f, s: fused_ops.ModulatedNorm.apply(x, f, s, 1e-6),
        [(2, 5, 16), *[(2, 1, 16)] * 2],
    ),
    ("fused block: residual", fused_ops.GatedResidual.apply, [(2, 5, 16), (2, 1, 16), (2, 5, 16)]),
    ("fused block: one projection", fused_projection(2.0), [(10, 16), (3, 16), (8, 3)]),
    ("fused block: alike projections", fused_projection(0.5, 0.5), [(10, 16), *[(3, 16)] * 2, *[(8, 3)] * 2]),
    ("fused block: projections", fused_projection(0.5, 2.0), [(10, 16), *[(3, 16)] * 2, *[(8, 3)] * 2]),
    ("fused block: linear attention", fused_attention, [(2, 6, 3 * 16)]),
    ("fused block: linear attention, apart", fused_attention, [(2, 6, 16)] * 3),
    ("fused block: mix-FFN", fused_convolution, [(2, 16, 6, 6), (16, 1, 3, 3), (16,)]),
    ("silu", F.silu, [(3, 5, 4)]),
    ("gelu tanh", lambda x: F.gelu(x, approximate="tanh"), [(3, 5, 4)]),
    ("gelu", F.gelu, [(3, 5, 4)]),
    ("gated linear unit", lambda x: (lambda a, b: a * F.silu(b))(*x.chunk(2, dim=1)), [IMAGE]),
    ("relu", F.relu, [(3, 5, 4)]),
    ("sigmoid", torch.sigmoid, [(3, 5, 4)]),
    ("tanh", torch.tanh, [(3, 5, 4)]),
    ("softmax", lambda x: x.softmax(-1), [(3, 5, 4)]),
    ("log_softmax", lambda x: F.log_softmax(x, -1), [(3, 5, 4)]),
    ("softmax to float32", lambda x: F.softmax(x, -1, dtype=torch.float32), [(3, 5, 4)]),
    ("interpolate nearest", lambda x: F.interpolate(x, scale_factor=2, mode="nearest"), [IMAGE]),
    ("interpolate bilinear", lambda x: F.interpolate(x, size=(9, 9), mode="bilinear"), [IMAGE]),
    ("interpolate bicubic", lambda x: F.interpolate(x, size=(9, 9), mode="bicubic"), [IMAGE]),
    ("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), [IMAGE]),
    ("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), [IMAGE]),
    ("avg_pool2d", lambda x: F.avg_pool2d(x, 2), [IMAGE]),
    ("pad constant", lambda x: F.pad(x, (1, 2, 0, 1), value=0.5), [IMAGE]),
    ("pad reflect", lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), [IMAGE]),
    ("embedding", lambda w: F.embedding(torch.tensor([[0, 3], [5, 3]], device=w.device), w), [(6, 8)]),
    ("gather", lambda x: x.gather(1, torch.tensor([[0, 2], [1, 1]], device=x.device)), [(2, 3)]),
    ("index_select", lambda x: x.index_select(1, torch.tensor([2, 0, 2], device=x.device)), [(2, 3)]),
    ("index by tensor", lambda x: x[torch.tensor([1, 0, 1], device=x.device)], [(2, 3)]),
    ("index by mask", lambda x: x[keep_mask(x, 4, 5)], [(4, 5)]),
    ("index_put", lambda x, y: x.index_put((torch.tensor([1, 3], device=x.device),), y), [(4, 5), (2, 5)]),
    ("scatter_add", lambda x, y: x.scatter_add(0, torch.tensor([[0, 1, 1]], device=x.device), y), [(4, 3), (1, 3)]),
    ("where", lambda x, y: torch.where(keep_mask(x, 3, 4), x, y), [(3, 4), (3, 4)]),
    ("masked_fill", lambda x: x.masked_fill(keep_mask(x, 3, 4), -1.0), [(3, 4)]),
    ("to bfloat16 and back", lambda x: x.to(torch.bfloat16).to(torch.float32), [(3, 4)]),
    ("to float16 and back", lambda x: x.to(torch.float16).to(x.dtype), [(3, 4)]),
    ("cast of a view", lambda x: x.transpose(0, 1).to(torch.float32), [(3, 4)]),
    ("in-place", in_place, [(4, 5), (4, 5)]),
    ("copy_ into a view", lambda x, y: x.clone().t().copy_(y), [(3, 4), (4, 3)]),
    ("views", lambda x: x.permute(0, 2, 3, 1).flatten(1, 2).unflatten(-1, (2, 4))[:, 2:30:3].movedim(2, 0), [IMAGE]),
    ("expand and sum", lambda x: x[:, None].expand(3, 4, 5).sum((0, 2)), [(3, 5)]),
    ("cat and stack", lambda x, y: torch.stack(torch.cat([x, y], 1).split(2, 1)), [(3, 2), (3, 4)]),
    ("flip and roll", lambda x: x.flip(-1).roll(1, 0), [(3, 4)]),
    ("repeat_interleave", lambda x: x.repeat_interleave(3, dim=1), [(3, 4)]),
    ("unfold", lambda x: F.unfold(x, 2), [IMAGE]),
    ("arithmetic", lambda x, y: (x + y) * 0.3 - x / (y.abs() + 1) + 2 * y - x**2, [(3, 4), (3, 4)]),
    ("broadcast", lambda x, y: x * y + x, [(2, 3, 4), (4,)]),
    ("exp log sqrt rsqrt", lambda x: torch.exp(x) + torch.log(x.abs() + 1).sqrt() + torch.rsqrt(x**2 + 1), [(3, 4)]),
    ("cos sin", lambda x: torch.cat([x.cos(), x.sin()], -1), [(3, 4)]),
    ("addcmul lerp", lambda x, y: torch.lerp(torch.addcmul(x, x, y, value=0.5), y, 0.3), [(3, 4), (3, 4)]),
    ("sum mean var", lambda x: x.sum(1) + x.mean(1) + x.var(1), [(3, 4, 5)]),
    ("norm amax", lambda x: torch.linalg.vector_norm(x, dim=1) + x.amax(1), [(3, 4)]),
    ("cumsum", lambda x: x.cumsum(-1), [(3, 4)]),
    ("sort topk", lambda x: x.sort(-1).values + x.topk(4, -1).values, [(3, 4)]),
    ("tril", lambda x: x.tril(), [(4, 4)]),
    ("mse_loss", F.mse_loss, [(3, 4), (3, 4)]),
    ("l1 smooth loss", F.smooth_l1_loss, [(3, 4), (3, 4)]),
    ("cross_entropy", lambda x: F.cross_entropy(x, torch.tensor([1, 0, 3], device=x.device)), [(3, 4)]),
    ("adamw", optimizer("AdamW"), [(6, 5), (6, 5)]),
    ("adamw foreach", optimizer("AdamW", foreach=True), [(6, 5), (6, 5)]),
    ("adamw one by one", optimizer("AdamW", foreach=False), [(6, 5), (6, 5)]),
    ("sgd momentum", optimizer("SGD", momentum=0.9), [(6, 5), (6, 5)]),
]


def compare_operators():
    """One row per operator and dtype: the error of the result and of the gradients, as shares of the largest value."""
    rows = []
    for dtype in DTYPES:
        for name, function, shapes in OPERATORS:
            generator = torch.Generator().manual_seed(len(name))
            inputs = [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]
            row = {"operator": name, "dtype": str(dtype).removeprefix("torch."), "bound": BOUNDS[dtype]}
            try:
                on_cpu = run_both_ways(function, inputs, generator)
                on_npu = run_both_ways(function, [device_tensor(t) for t in inputs], generator)
                row["forward"] = error(on_cpu[0], on_npu[0])
                row["backward"] = max((error(a, b) for a, b in zip(on_cpu[1], on_npu[1], strict=True)), default=None)
            except Exception as problem:  # a row that fails must not hide the others
                row["failed"] = f"{type(problem).__name__}: {problem}"
            rows.append(row)
    return rows


def run_both_ways(function, inputs, generator):
    """(result, [gradients]); the gradient list is empty where the result has none."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    if not out.requires_grad:
        return out, []
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=generator).to(out.dtype).to(out.device))
    return out.detach(), [t.grad for t in leaves if t.grad is not None]


def error(reference, found):
    if found.device.type != "npu" or reference.dtype != found.dtype or reference.shape != found.shape:
        raise AssertionError(
            f"{found.device} {found.dtype} {tuple(found.shape)} instead of {reference.dtype} {tuple(reference.shape)}"
        )
    reference, found = reference.double(), found.cpu().double()
    if not reference.numel():
        return 0.0
    return ((reference - found).abs().max() / reference.abs().max().clamp_min(1e-30)).item()


# ---------------------------------------------------------------------------------------------------------------------
# What a device refuses


def npu(*shape, dtype=torch.bfloat16):
    return torch.ones(*shape, dtype=dtype, device="npu")


def fused(q=(2, 4, 7, 16), k=(2, 4, 5, 16), heads=4, layout="BNSD", dtype=torch.bfloat16, **options):
    import torch_npu

    q, k = npu(*q, dtype=dtype), npu(*k, dtype=dtype)
    torch_npu.npu_fusion_attention(q, k, k.clone(), heads, layout, **options)
    torch.npu.synchronize()


REFUSED = {
    "CPU and NPU in one operator": lambda: npu(3) + torch.ones(3, dtype=torch.bfloat16),
    "a CPU weight": lambda: F.linear(npu(2, 8), torch.ones(4, 8, dtype=torch.bfloat16)),
    "a CPU index for embedding": lambda: F.embedding(torch.tensor([1]), npu(4, 8)),
    "CPU key in fused attention": lambda: F.scaled_dot_product_attention(
        npu(2, 4, 7, 16), torch.ones(2, 4, 5, 16, dtype=torch.bfloat16), npu(2, 4, 5, 16)
    ),
    "two NPUs in one operator": lambda: npu(3) + torch.ones(3, dtype=torch.bfloat16, device="npu:1"),
    "a device that is not there": lambda: torch.ones(3, device="npu:7"),
    "a CPU generator": lambda: torch.randn(3, device="npu", generator=torch.Generator()),
    "fused: unknown layout": lambda: fused(layout="BDNS"),
    "fused: wrong number of heads": lambda: fused(heads=3),
    "fused: mask B11S": lambda: fused(atten_mask=npu(2, 1, 1, 5, dtype=torch.bool)),
    "fused: mask per head but not per batch": lambda: fused(atten_mask=npu(1, 4, 7, 5, dtype=torch.bool)),
    "fused: mask of another length": lambda: fused(atten_mask=npu(7, 6, dtype=torch.bool)),
    "fused: additive mask": lambda: fused(atten_mask=npu(2, 1, 7, 5)),
    "fused: head dim above 768": lambda: fused(q=(1, 1, 2, 800), k=(1, 1, 2, 800), heads=1),
    "fused: float64": lambda: fused(dtype=torch.float64),
    "fused: key of another head dim": lambda: fused(k=(2, 4, 5, 8)),
    "fused: keep_prob 0": lambda: fused(keep_prob=0.0),
    "rms norm: weight of another length": lambda: rms_norm(npu(2, 8), npu(4)) and torch.npu.synchronize(),
    "torch.cuda from the kit's code": lambda: torch.cuda.is_available(),
    "more memory than there is": lambda: torch.empty(70 * 2**30, dtype=torch.uint8, device="npu"),
}


def try_refused():
    found = {}
    for name, call in REFUSED.items():
        try:
            call()
            torch.npu.synchronize()
            found[name] = None
        except Exception as refusal:
            found[name] = f"{type(refusal).__name__}: {refusal}"
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers, dtypes, memory, copies


def generator_checks():
    draws = {
        "randn": lambda: torch.randn(64, device="npu"),
        "rand": lambda: torch.rand(64, device="npu"),
        "randint": lambda: torch.randint(0, 1000, (64,), device="npu"),
        "normal_": lambda: npu(64, dtype=torch.float32).normal_(),
        "bernoulli": lambda: torch.full((64,), 0.5, device="npu").bernoulli(),
        "randperm": lambda: torch.randperm(64, device="npu"),
        "multinomial": lambda: torch.ones(8, device="npu").multinomial(64, replacement=True),
        "dropout": lambda: F.dropout(npu(64), 0.5),
    }
    found = {}
    for name, draw in draws.items():
        torch.npu.manual_seed_all(3)
        first = draw().cpu()
        state = torch.npu.get_rng_state("npu:0")
        second = draw().cpu()
        torch.npu.set_rng_state(state, "npu:0")
        again = draw().cpu()
        torch.npu.manual_seed_all(3)
        found[name] = {
            "same seed, same draw": torch.equal(first, draw().cpu()),
            "second draw differs": not torch.equal(first, second),
            "state restored": torch.equal(second, again),
        }
    cpu_state = torch.get_rng_state()
    torch.randn(8, device="npu"), torch.randperm(8, device="npu"), F.dropout(npu(64), 0.5)
    found["the CPU's state"] = {"untouched": torch.equal(cpu_state, torch.get_rng_state())}
    own = torch.Generator("npu").manual_seed(5)
    default_state = torch.npu.get_rng_state()
    a = torch.randn(8, device="npu", generator=own)
    b = torch.randn(8, device="npu", generator=torch.Generator("npu").manual_seed(5))
    found["a generator of one's own"] = {
        "same seed, same draw": torch.equal(a, b),
        "default generator untouched": torch.equal(default_state, torch.npu.get_rng_state()),
    }
    x = torch.ones(100_000, device="npu", requires_grad=True)
    out = F.dropout(x, 0.25)
    out.sum().backward()
    normal, kept = torch.randn(100_000, device="npu"), (out != 0).float().mean().item()
    found["distributions"] = {
        "normal": abs(normal.mean().item()) < 0.02 and abs(normal.std().item() - 1) < 0.02,
        "dropout keeps its share": abs(kept - 0.75) < 0.01,
        "dropout rescales": abs(out.max().item() - 1 / 0.75) < 1e-6,
        "dropout's gradient has its mask": torch.equal(x.grad, out.detach()),
    }
    return found


def dtype_checks():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = npu(3, dtype=torch.float32)
        complex_numbers = torch.tensor([1 + 2j, 3 - 1j])
        return {
            "double() on the device": str(x.double().dtype),
            "to the host as float64": str(x.to("cpu", torch.float64).dtype),
            "complex comes back": torch.equal(complex_numbers.npu().cpu(), complex_numbers),
            "item": x.sum().item(),
        }


def memory_checks():
    before = torch.npu.memory_allocated()
    block = torch.empty(8 * 2**20, dtype=torch.uint8, device="npu")
    during = torch.npu.memory_allocated() - before
    free, total = torch.npu.mem_get_info()
    del block
    torch.npu.empty_cache()
    return {
        "allocated": during,
        "given back": torch.npu.memory_allocated() == before,
        "peak": torch.npu.max_memory_allocated() >= before + 8 * 2**20,
        "total": total,
        "free": free,
        "pinned": torch.ones(4).pin_memory().is_pinned(),
    }


def saved_and_loaded(tensor):
    """Whether torch.save and torch.load give the tensor back, on the device and, with map_location, on the CPU."""
    file = io.BytesIO()
    torch.save({"x": tensor}, file)
    results = []
    for location, kind in ((None, "npu"), ("cpu", "cpu")):
        file.seek(0)
        loaded = torch.load(file, map_location=location, weights_only=True)["x"]
        results.append(loaded.device.type == kind and torch.equal(loaded.cpu(), tensor.cpu()))
    return all(results)


def arrives_late(tensor):
    """Whether an asynchronous copy to the host is there after a wait, and not before."""
    target = torch.zeros(tensor.shape).pin_memory()
    torch.npu.synchronize()
    target.copy_(tensor, non_blocking=True)
    early = target.abs().sum().item()
    torch.npu.synchronize()
    by_device = torch.equal(target, tensor.cpu())
    target.zero_().copy_(tensor, non_blocking=True)
    torch.npu.current_stream().record_event().synchronize()
    return early == 0 and by_device and torch.equal(target, tensor.cpu())


def copy_checks():
    x = torch.arange(24.0).reshape(2, 3, 4)
    y = x.npu()
    return {
        "there and back": torch.equal(y.cpu(), x),
        "a view comes back": torch.equal(y.permute(2, 0, 1)[1:].cpu(), x.permute(2, 0, 1)[1:]),
        "to the device without waiting": torch.equal(x.pin_memory().to("npu", non_blocking=True).to("cpu"), x),
        "not before one waits": arrives_late(y),
        "from one device to another": torch.equal(y.to("npu:1").cpu(), x) and y.to("npu:1").device.index == 1,
        "saved and loaded": saved_and_loaded(y),
        "deepcopy": torch.equal(copy.deepcopy(y).cpu(), x),
    }


# ---------------------------------------------------------------------------------------------------------------------


def draw_images(folder, attentions=("diffusers", "sdpa", "npu_fusion")):
    """(name, image array) of a SanaPipeline on the device, once per way of attention, in float32 and bfloat16."""
    from diffusers import SanaPipeline

    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

    for dtype in DTYPES:
        pipeline = SanaPipeline.from_pretrained(folder, torch_dtype=dtype).to("npu")
        for attention_name in attentions:
            if attention_name != "diffusers":
                set_attention(pipeline.transformer, attention_name, torch.device("npu:0"))
            yield f"{attention_name}_{str(dtype).removeprefix('torch.')}", draw(pipeline)


def draw(pipeline):
    """Two images with the arguments that tests/ascend/test_ascend.py gives on the CPU."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        ["a red square", "a dog"],
        height=128,
        width=128,
        num_inference_steps=3,
        guidance_scale=2.0,
        generator=[torch.Generator("cpu").manual_seed(s) for s in (1, 2)],
        output_type="np",
    ).images


def main(output, pipeline=None):
    import emulated_kernels
    import numpy as np

    start = time.perf_counter()
    results = {
        "devices": torch.npu.device_count(),
        "operators": compare_operators(),
        "refused": try_refused(),
        "generators": generator_checks(),
        "dtypes": dtype_checks(),
        "memory": memory_checks(),
        "copies": copy_checks(),
    }
    results["kernels"] = emulated_kernels.kernel_calls()
    if pipeline is not None:
        np.savez(os.path.join(output, "images.npz"), **dict(draw_images(pipeline)))
        after = emulated_kernels.kernel_calls()
        results["pipeline_kernels"] = {k: v - results["kernels"].get(k, 0) for k, v in after.items()}
    results["seconds"] = time.perf_counter() - start
    Path(output, "checks.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
