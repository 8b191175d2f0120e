"""How much arithmetic a picture costs, how fast a chip could do it at best, and how far a run is from that.

    python -m sana_kit.flops --config 1600M --resolution 1024 --chip 910B --images_per_second 28.7 --devices 8
    python -m sana_kit.flops --config MODEL_FOLDER --resolution 512 --mode full --batch_size 4 --chip H100

Used by the trainer for its MFU. Closed forms over the model's configuration; tests/test_flops.py holds them against
torch's FLOP counter on meta tensors. One multiply-add is two FLOPs; norms, activations and other element-wise work are
not counted, as usual. "TFLOP" is 10^12 operations, "TFLOP/s" a rate.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# The transformers of the published checkpoints (their transformer/config.json).
TRANSFORMERS = {
    "1600M": {
        "in_channels": 32,
        "out_channels": 32,
        "num_attention_heads": 70,
        "attention_head_dim": 32,
        "num_layers": 20,
        "num_cross_attention_heads": 20,
        "cross_attention_head_dim": 112,
        "cross_attention_dim": 2240,
        "caption_channels": 2304,
        "mlp_ratio": 2.5,
        "patch_size": 1,
    },
    "600M": {
        "in_channels": 32,
        "out_channels": 32,
        "num_attention_heads": 36,
        "attention_head_dim": 32,
        "num_layers": 28,
        "num_cross_attention_heads": 16,
        "cross_attention_head_dim": 72,
        "cross_attention_dim": 1152,
        "caption_channels": 2304,
        "mlp_ratio": 2.5,
        "patch_size": 1,
    },
}
# DC-AE f32c32, the VAE of every published Sana, and Gemma-2-2b-it, its text encoder (their config.json).
AUTOENCODER = {
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
}
TEXT_ENCODER = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}

# Memory bandwidth in bytes/s by device name, from the vendors' data sheets (the A100 is its 80 GB model, the H100 the
# SXM one); the first key found in the name counts, as in devices.PEAK_BF16_TFLOPS.
BANDWIDTH = {
    "910b": 1.6e12,
    "h200": 4.8e12,
    "h100 pcie": 2.0e12,
    "h100": 3.35e12,
    "h800": 3.35e12,
    "a100": 2.04e12,
    "a800": 2.04e12,
    "l40s": 0.864e12,
    "l40": 0.864e12,
    "4090": 1.01e12,
    "3090": 0.936e12,
    "a10": 0.6e12,
}

# Fewest and most gradients in one of DeepSpeed's buckets; the trainer sizes them to what is trained in between.
BUCKET_ELEMENTS = (2**16, 2 * 10**8)


@dataclass(frozen=True)
class Op:
    """One product of the forward pass: a layer with weights, or the product of two activations.

    Attributes:
        flops: forward, for one picture.
        activations: elements read and written, for one picture.
        weights: elements of the weight; 0 for a product of two activations.
        in_block: inside a transformer block, so recomputed under gradient checkpointing.
        trainable: whether its weight is trained.
        input_gradient: whether the gradient of its input is needed (of both inputs for a product of activations).
    """

    name: str
    flops: float
    activations: float
    weights: float = 0.0
    in_block: bool = False
    trainable: bool = False
    input_gradient: bool = False

    @property
    def backward_passes(self) -> int:
        """Products of this size in the backward pass."""
        if self.weights == 0:
            return 2 if self.input_gradient else 0
        return int(self.trainable) + int(self.input_gradient)


def _linear(name: str, tokens: float, inputs: int, outputs: int, **kwargs) -> Op:
    return Op(name, 2 * tokens * inputs * outputs, tokens * (inputs + outputs), inputs * outputs, **kwargs)


def _config(config) -> Mapping:
    """A plain mapping of a diffusers or transformers configuration, or of a mapping."""
    if isinstance(config, Mapping):
        return config
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def transformer_ops(
    transformer_config, latent_hw: tuple[int, int], caption_tokens: int, mode: str = "inference", rank: int = 4
) -> list[Op]:
    """The products of one forward pass of a SanaTransformer2DModel, for one picture.

    Args:
        transformer_config: the model's configuration (a mapping, or `transformer.config`).
        latent_hw: height and width of the latents.
        caption_tokens: prompt tokens that are computed (the padded length of the batch).
        mode: "inference", "lora" (adapters of `rank` on to_q, to_k and to_v of both attentions) or "full".
    """
    if mode not in ("inference", "lora", "full"):
        raise ValueError(f"mode={mode!r}: must be inference, lora or full.")
    c = _config(transformer_config)
    heads, head_dim, patch = c["num_attention_heads"], c["attention_head_dim"], c.get("patch_size", 1)
    width = heads * head_dim
    context = c.get("cross_attention_dim")
    cross_width = (c.get("num_cross_attention_heads") or 0) * (c.get("cross_attention_head_dim") or 0)
    hidden = int(c.get("mlp_ratio", 2.5) * width)
    in_channels, out_channels = c["in_channels"], c.get("out_channels") or c["in_channels"]
    tokens, text = (latent_hw[0] // patch) * (latent_hw[1] // patch), caption_tokens
    full, lora = mode == "full", mode == "lora"

    def projection(name: str, count: int, inputs: int, outputs: int, adapted: bool, gradient: bool) -> list[Op]:
        """A linear layer of a block and, on to_q, to_k and to_v, its adapter."""
        ops = [_linear(name, count, inputs, outputs, in_block=True, trainable=full, input_gradient=gradient)]
        if lora and adapted:
            shared = {"in_block": True, "trainable": True}
            ops.append(_linear(f"{name} lora_A", count, inputs, rank, input_gradient=gradient, **shared))
            ops.append(_linear(f"{name} lora_B", count, rank, outputs, input_gradient=True, **shared))
        return ops

    ops = [
        _linear("patch_embed", tokens, in_channels * patch**2, width, trainable=full),  # its input is data
        _linear("caption_projection 1", text, c["caption_channels"], width, trainable=full),
        _linear("caption_projection 2", text, width, width, trainable=full, input_gradient=full),
        _linear("time_embed 1", 1, 256, width, trainable=full),
        _linear("time_embed 2", 1, width, width, trainable=full, input_gradient=full),
        _linear("time_embed linear", 1, width, 6 * width, trainable=full, input_gradient=full),
    ]
    if c.get("guidance_embeds"):
        ops.append(_linear("guidance_embed 1", 1, 256, width, trainable=full))
        ops.append(_linear("guidance_embed 2", 1, width, width, trainable=full, input_gradient=full))
    for layer in range(c["num_layers"]):
        # With LoRA nothing before the first adapter is trained: the first block's input needs no gradient, and neither
        # does the prompt at any layer.
        gradient = full or (lora and layer > 0)
        for name in ("to_q", "to_k", "to_v"):
            ops += projection(f"attn1.{name}", tokens, width, width, True, gradient)
        training = full or lora
        products = 2 * tokens * width * (head_dim + 1)  # linear attention: (d + 1, N) x (N, d), then x (d, N)
        moved = tokens * (2 * width + heads) + width * (head_dim + 1)
        ops.append(Op("attn1 scores", products, moved, in_block=True, input_gradient=training))
        ops.append(Op("attn1 values", products, moved, in_block=True, input_gradient=training))
        ops += projection("attn1.to_out", tokens, width, width, False, training)
        if context is not None:
            ops += projection("attn2.to_q", tokens, width, cross_width, True, training)
            ops += projection("attn2.to_k", text, context, cross_width, True, full)
            ops += projection("attn2.to_v", text, context, cross_width, True, full)
            # softmax attention, fused: the (N, S) scores never reach memory
            products, moved = 2 * tokens * text * cross_width, (tokens + text) * cross_width
            ops.append(Op("attn2 scores", products, moved, in_block=True, input_gradient=training))
            ops.append(Op("attn2 values", products, moved, in_block=True, input_gradient=training))
            ops += projection("attn2.to_out", tokens, cross_width, width, False, training)
        ops += projection("ff.conv_inverted", tokens, width, 2 * hidden, False, training)
        depth = 2 * tokens * 2 * hidden * 9  # 3x3, one filter per channel
        shared = {"in_block": True, "trainable": full, "input_gradient": training}
        ops.append(Op("ff.conv_depth", depth, 2 * tokens * 2 * hidden, 2 * hidden * 9, **shared))
        ops += projection("ff.conv_point", tokens, hidden, width, False, training)
    ops.append(
        _linear("proj_out", tokens, width, out_channels * patch**2, trainable=full, input_gradient=full or lora)
    )
    return ops


def _passes(op: Op, training: bool, recomputed: float) -> float:
    if not training:
        return 1.0
    return 1.0 + op.backward_passes + (recomputed if op.in_block else 0.0)


def total_flops(ops: Sequence[Op], training: bool = False, recomputed: float = 0.0) -> float:
    """FLOPs of `ops`: forward alone, or with `training` also backward and the recomputed share of the blocks."""
    return sum(op.flops * _passes(op, training, recomputed) for op in ops)


def roofline_seconds(
    ops: Sequence[Op],
    peak: float,
    bandwidth: float,
    batch_size: int = 1,
    training: bool = False,
    recomputed: float = 0.0,
    bytes_per_element: int = 2,
) -> float:
    """Least seconds per picture on one device: each product takes as long as its arithmetic or its memory traffic.

    Weights are read once per pass and batch, activations once per product; element-wise work is taken as fused away,
    so no real run gets below this.

    Args:
        peak: FLOP/s; bandwidth: bytes/s; batch_size: pictures per pass on the device.
    """
    seconds = 0.0
    for op in ops:
        moved = (op.activations + op.weights / batch_size) * bytes_per_element
        seconds += max(op.flops / peak, moved / bandwidth) * _passes(op, training, recomputed)
    return seconds


def forward_flops_per_image(transformer_config, latent_hw: tuple[int, int], caption_tokens: int) -> float:
    """FLOPs of one forward pass of the transformer for one picture (one denoising step without guidance)."""
    return total_flops(transformer_ops(transformer_config, latent_hw, caption_tokens))


def training_flops_per_image(
    transformer_config,
    latent_hw: tuple[int, int],
    caption_tokens: int,
    mode: str = "lora",
    gradient_checkpointing: bool | float = False,
    rank: int = 4,
) -> float:
    """FLOPs of forward and backward of the transformer for one picture; encoding is not in it, it happens once.

    With LoRA the frozen weights get no gradients, only the inputs that lead back to an adapter do. For the model FLOPs
    utilisation (MFU) leave `gradient_checkpointing` off, whatever the run does: recomputation is no work of the model.
    With it on, the figure is what the device executes (for the hardware FLOPs utilisation).

    Args:
        transformer_config, latent_hw, caption_tokens: see `transformer_ops`.
        mode: "lora" or "full".
        gradient_checkpointing: False, True, or the share of the blocks that is recomputed (0 to 1).
    """
    if mode not in ("lora", "full"):
        raise ValueError(f"mode={mode!r}: must be lora or full.")
    ops = transformer_ops(transformer_config, latent_hw, caption_tokens, mode, rank)
    return total_flops(ops, training=True, recomputed=float(gradient_checkpointing))


def model_flops_utilisation(images_per_second: float, flops_per_image: float, devices: int, peak: float) -> float:
    """Share of the devices' peak that the model's own arithmetic makes up, 0 to 1 (peak in FLOP/s per device)."""
    return images_per_second * flops_per_image / (devices * peak)


def bucket_elements(trained: int) -> int:
    """How many gradients the trainer lets DeepSpeed put into one bucket, for so many trained weights."""
    fewest, most = BUCKET_ELEMENTS
    return min(max(trained, fewest), most)


def training_bytes(transformer_config, mode: str = "lora", rank: int = 4, devices: int = 8) -> dict[str, int]:
    """Bytes on one device under the kit's ZeRO-2 in bf16, activations apart; tests hold them against allocated bytes.

    Args:
        transformer_config, rank: see `transformer_ops`; biases and norms, a thousandth of the whole, are not counted.
        mode: "lora" or "full".
        devices: over how many masters, moments and reduced gradients are shared out.

    Returns:
        weights (bf16, the adapter's among them), gradients (the device's share, float32), masters and moments (its
        share, float32), passing: the larger of what a bucket of bf16 gradients and its buffer take in the backward
        pass, and of what the optimizer's step takes, a copy of the gradients and an intermediate of the same size.
    """
    ops = transformer_ops(transformer_config, (1, 1), 1, mode, rank)
    total = sum(op.weights for op in ops)
    trained = sum(op.weights for op in ops if op.trainable)
    share = math.ceil(trained / devices)
    return {
        "weights": round(2 * total),
        "gradients": 4 * share,
        "masters": 4 * share,
        "moments": 8 * share,
        "passing": max(2 * 2 * bucket_elements(int(trained)), 8 * share),
    }


# ---------------------------------------------------------------------------------------------------------------------
# VAE and text encoder


def _conv(name: str, pixels: float, inputs: int, outputs: int, kernel: int, groups: int = 1, read: float = 1.0) -> Op:
    """A convolution with `pixels` output positions, `read` input positions for each of them."""
    weights = outputs * inputs // groups * kernel**2
    return Op(name, 2 * pixels * weights, pixels * (outputs + inputs * read), weights)


def _vae_block(kind: str, channels: int, pixels: float, head_dim: int, scales: Sequence[int]) -> list[Op]:
    if kind == "ResBlock":
        return [_conv(f"conv{n}", pixels, channels, channels, 3) for n in (1, 2)]
    inner = channels // head_dim * head_dim
    ops = [_linear("to_qkv", pixels, channels, 3 * inner)]
    for kernel in scales:
        ops.append(_conv("multiscale in", pixels, 3 * inner, 3 * inner, kernel, groups=3 * inner))
        ops.append(_conv("multiscale out", pixels, 3 * inner, 3 * inner, 1, groups=3 * inner // head_dim))
    width = inner * (1 + len(scales))
    if pixels > head_dim:  # as in the model: linear attention where there are more positions than channels per head
        products = 2 * pixels * width * (head_dim + 1)
    else:
        products = 2 * pixels**2 * width
    ops += [Op("attention", products, 3 * pixels * width) for _ in range(2)]
    ops.append(_linear("to_out", pixels, width, channels))
    hidden = 4 * channels
    ops.append(_linear("conv_inverted", pixels, channels, 2 * hidden))
    ops.append(_conv("conv_depth", pixels, 2 * hidden, 2 * hidden, 3, groups=2 * hidden))
    ops.append(_linear("conv_point", pixels, hidden, channels))
    return ops


def _vae_halves(config: Mapping, half: str) -> tuple[list, list, list, list]:
    channels, layers = config[f"{half}_block_out_channels"], config[f"{half}_layers_per_block"]
    kinds, scales = config[f"{half}_block_types"], config[f"{half}_qkv_multiscales"]
    kinds = [kinds] * len(channels) if isinstance(kinds, str) else kinds
    return list(channels), list(layers), list(kinds), list(scales)


def vae_encode_ops(vae_config, height: int, width: int) -> list[Op]:
    """The products of AutoencoderDC.encode for one picture of `height` x `width` pixels."""
    c = _config(vae_config)
    channels, layers, kinds, scales = _vae_halves(c, "encoder")
    unshuffle = c.get("downsample_block_type", "pixel_unshuffle") == "pixel_unshuffle"
    pixels = float(height * width)

    def down(inputs: int, outputs: int) -> Op:  # a strided convolution, or one before a pixel unshuffle
        if unshuffle:
            return _conv("down", pixels, inputs, outputs // 4, 3)
        return _conv("down", pixels / 4, inputs, outputs, 3, read=4.0)

    if layers[0] > 0:
        ops = [_conv("conv_in", pixels, c["in_channels"], channels[0], 3)]
    else:
        ops = [down(c["in_channels"], channels[1])]
        pixels /= 4
    for i, count in enumerate(layers):
        for _ in range(count):
            ops += _vae_block(kinds[i], channels[i], pixels, c["attention_head_dim"], scales[i])
        if i < len(channels) - 1 and count > 0:
            ops.append(down(channels[i], channels[i + 1]))
            pixels /= 4
    ops.append(_conv("conv_out", pixels, channels[-1], c["latent_channels"], 3))
    return ops


def vae_decode_ops(vae_config, height: int, width: int) -> list[Op]:
    """The products of AutoencoderDC.decode, whole, for one picture of `height` x `width` pixels."""
    c = _config(vae_config)
    channels, layers, kinds, scales = _vae_halves(c, "decoder")
    interpolate = c.get("upsample_block_type", "pixel_shuffle") == "interpolate"
    halvings = sum(1 for i, count in enumerate(layers) if i < len(channels) - 1 and count > 0) + int(layers[0] == 0)
    pixels = height * width / 4.0**halvings

    def up(inputs: int, outputs: int) -> Op:
        if interpolate:
            return _conv("up", 4 * pixels, inputs, outputs, 3)
        return _conv("up", pixels, inputs, 4 * outputs, 3)

    ops = [_conv("conv_in", pixels, c["latent_channels"], channels[-1], 3)]
    for i in reversed(range(len(channels))):
        if i < len(channels) - 1 and layers[i] > 0:
            ops.append(up(channels[i + 1], channels[i]))
            pixels *= 4
        for _ in range(layers[i]):
            ops += _vae_block(kinds[i], channels[i], pixels, c["attention_head_dim"], scales[i])
    if layers[0] > 0:
        ops.append(_conv("conv_out", pixels, channels[0], c["in_channels"], 3))
    else:
        ops.append(up(channels[1], c["in_channels"]))
    return ops


def text_encoder_ops(text_config, tokens: int) -> list[Op]:
    """The products of one Gemma2Model forward pass over `tokens` tokens (without a vocabulary head)."""
    c = _config(text_config)
    hidden, heads, groups, dim = (
        c[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    ops = []
    for _ in range(c["num_hidden_layers"]):
        ops.append(_linear("q", tokens, hidden, heads * dim))
        ops.append(_linear("kv", tokens, hidden, 2 * groups * dim))
        ops += [Op("attention", 2 * tokens**2 * heads * dim, 2 * tokens * heads * dim) for _ in range(2)]
        ops.append(_linear("o", tokens, heads * dim, hidden))
        ops.append(_linear("gate, up", tokens, hidden, 2 * c["intermediate_size"]))
        ops.append(_linear("down", tokens, c["intermediate_size"], hidden))
    return ops


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def bandwidth_of(name: str) -> float | None:
    """Memory bandwidth in bytes/s of a device or chip name; None where it is not known."""
    return next((value for key, value in BANDWIDTH.items() if key in name.lower()), None)


def load_configs(name: str) -> tuple[Mapping, Mapping, Mapping, str]:
    """(transformer, VAE, text encoder configuration, title) of a named model, a SanaPipeline folder or a config.json.

    Parts that a folder lacks are those of the published checkpoints.

    Raises:
        ValueError: no such name and no such file.
    """
    if name in TRANSFORMERS:
        return TRANSFORMERS[name], AUTOENCODER, TEXT_ENCODER, f"SANA {name}"
    path = Path(name)
    file = path / "transformer" / "config.json" if (path / "transformer").is_dir() else path / "config.json"
    file = path if path.is_file() else file
    if not file.is_file():
        raise ValueError(
            f"--config={name}: neither a known model ({', '.join(TRANSFORMERS)}) nor a SanaPipeline folder, a"
            " transformer folder or a config.json of one."
        )

    def read(part: Path) -> dict:
        try:
            return json.loads(part.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"--config={name}: {part} is not JSON ({error}).") from error

    transformer = read(file)
    missing = [key for key in ("num_layers", "num_attention_heads", "caption_channels") if key not in transformer]
    if missing:
        raise ValueError(f"--config={name}: {file} is no SanaTransformer2DModel's: it lacks {', '.join(missing)}.")
    others = [
        read(path / part / "config.json") if (path / part / "config.json").is_file() else published
        for part, published in (("vae", AUTOENCODER), ("text_encoder", TEXT_ENCODER))
    ]
    return transformer, others[0], others[1], str(name)


def _vae_factor(vae_config: Mapping) -> int:
    channels, layers, _, _ = _vae_halves(vae_config, "encoder")
    return 2 ** (sum(1 for count in layers[:-1] if count > 0) + int(layers[0] == 0))


def report(options: argparse.Namespace) -> dict:
    """All figures of the command line as one dictionary; FLOPs per picture, seconds per picture, shares 0 to 1."""
    transformer, vae, text, title = load_configs(options.config)
    factor = _vae_factor(vae)
    if options.resolution % (factor * transformer.get("patch_size", 1)):
        raise ValueError(f"--resolution={options.resolution}: must be a multiple of {factor}, the VAE's factor.")
    latent = options.resolution // factor
    shape = ((latent, latent), options.caption_tokens)
    encode, decode = (ops(vae, options.resolution, options.resolution) for ops in (vae_encode_ops, vae_decode_ops))
    prompt = text_encoder_ops(text, options.caption_tokens)
    forward = transformer_ops(transformer, *shape)
    training = transformer_ops(transformer, *shape, mode=options.mode, rank=options.rank)
    recomputed = 1.0 if options.gradient_checkpointing else 0.0
    passes = options.num_inference_steps * (2 if options.guidance_scale > 1 else 1)
    flops = {
        "vae_encode": total_flops(encode),
        "text_encoder": total_flops(prompt),
        "transformer_forward": total_flops(forward),
        "training": total_flops(training, training=True),
        "training_executed": total_flops(training, training=True, recomputed=recomputed),
        # diffusers' trainer encodes picture, caption and a negative prompt in each step, and recomputes each block
        "training_uncached": total_flops(encode)
        + 2 * total_flops(prompt)
        + total_flops(training, training=True, recomputed=1.0),
        "vae_decode": total_flops(decode),
        "generation": passes * total_flops(forward) + 2 * total_flops(prompt) + total_flops(decode),
    }
    figures = {
        "title": title,
        "latents": latent,
        "tokens": (latent // transformer.get("patch_size", 1)) ** 2,
        "parameters": sum(op.weights for op in forward),
        "flops": flops,
        "bytes": training_bytes(transformer, options.mode, options.rank, options.devices),
    }
    peak, bandwidth = options.peak_tflops, options.bandwidth_tbs
    if options.chip:
        from .devices import PEAK_BF16_TFLOPS, peak_flops

        known = peak_flops(options.chip)
        if known is None and peak is None:
            raise ValueError(
                f"--chip={options.chip}: its peak is not known. Known: {', '.join(PEAK_BF16_TFLOPS)}; or give"
                " --peak_tflops (and --bandwidth_tbs)."
            )
        peak = peak if peak is not None else known / 1e12
        if bandwidth is None and bandwidth_of(options.chip) is not None:
            bandwidth = bandwidth_of(options.chip) / 1e12
    if options.images_per_second is not None and peak is None:
        raise ValueError("--images_per_second needs --chip or --peak_tflops: a share of what?")
    if peak is None:
        return figures
    peak *= 1e12
    figures["peak"], figures["devices"] = peak, options.devices
    # without a known bandwidth only the arithmetic bounds
    bytes_per_second = bandwidth * 1e12 if bandwidth is not None else float("inf")
    figures["bandwidth"] = bytes_per_second if bandwidth is not None else None
    step = roofline_seconds(training, peak, bytes_per_second, options.batch_size, True, recomputed)
    denoising = roofline_seconds(forward, peak, bytes_per_second, 2 if options.guidance_scale > 1 else 1)
    figures["roofline"] = {
        "training_seconds": step,
        "training_images_per_second": options.devices / step,
        "generation_seconds": passes * denoising
        + 2 * roofline_seconds(prompt, peak, bytes_per_second)
        + roofline_seconds(decode, peak, bytes_per_second),
    }
    if options.images_per_second is not None:
        rate = options.images_per_second
        figures["measured"] = {
            "images_per_second": rate,
            "mfu": model_flops_utilisation(rate, flops["training"], options.devices, peak),
            "executed": model_flops_utilisation(rate, flops["training_executed"], options.devices, peak),
            "executed_uncached": model_flops_utilisation(rate, flops["training_uncached"], options.devices, peak),
            "of_roofline": rate * step / options.devices,
        }
    return figures


def format_report(figures: dict, options: argparse.Namespace) -> str:
    """The figures as the text that the command prints."""

    def row(text: str, key: str) -> str:
        value = figures["flops"][key] / 1e12
        return f"  {text:<50}" + (f"{value:10.2f}" if value >= 0.1 else f"{value:10.3g}")

    checkpointing = "on" if options.gradient_checkpointing else "off"
    mode = f"LoRA rank {options.rank}" if options.mode == "lora" else "full"
    sizes = f"{figures['tokens']} tokens, {options.caption_tokens} caption tokens"
    lines = [
        f"{figures['title']} at {options.resolution} px: {sizes}",
        "",
        f"{'Arithmetic per picture':<52}{'TFLOP':>10}",
        row("VAE encode (once, then kept on disk)", "vae_encode"),
        row("text encoder (once per caption)", "text_encoder"),
        row("transformer, forward", "transformer_forward"),
        row(f"training step ({mode}), the model's own", "training"),
        row(f"training step, executed (checkpointing {checkpointing})", "training_executed"),
        row("the same as diffusers' trainer does it", "training_uncached"),
        row("VAE decode, whole", "vae_decode"),
        row(f"generation, {options.num_inference_steps} steps, guidance {options.guidance_scale:g}", "generation"),
    ]
    held = figures["bytes"]
    lines += ["", f"{f'Memory per device, ZeRO-2 on {options.devices}, beside the activations':<52}{'MB':>10}"]
    lines += [f"  {name:<50}{value / 1e6:10.1f}" for name, value in held.items()]
    lines += [f"  {'all but the weights':<50}{(sum(held.values()) - held['weights']) / 1e6:10.1f}"]
    if "peak" in figures:
        bandwidth = figures["bandwidth"]
        memory = f"{bandwidth / 1e12:.2f} TB/s" if bandwidth else "memory bandwidth not known, so not counted"
        rooflines = figures["roofline"]
        lines += [
            "",
            f"Roofline on {figures['devices']} x {options.chip or 'the given chip'}"
            f" ({figures['peak'] / 1e12:.0f} TFLOP/s bf16, {memory}), batch {options.batch_size}",
            f"  training    {rooflines['training_seconds'] * 1e3:9.2f} ms a picture and device:"
            f" at most {rooflines['training_images_per_second']:.1f} images/s",
            f"  generation  {rooflines['generation_seconds']:9.3f} s  a picture and device",
        ]
    if "measured" in figures:
        measured = figures["measured"]
        shares = (
            ("model FLOPs utilisation (MFU)", "mfu"),
            ("hardware FLOPs utilisation, as executed", "executed"),
            ("the same if it was diffusers' trainer", "executed_uncached"),
            ("share of the roofline", "of_roofline"),
        )
        lines += ["", f"Measured {measured['images_per_second']:g} images/s"]
        lines += [f"  {text:<50}{100 * measured[key]:10.1f} %" for text, key in shares]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sana_kit.flops", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--config", default="1600M", help=f"{', '.join(TRANSFORMERS)}, or a model folder (default 1600M)")
    add("--resolution", type=int, default=1024, help="pixels of a square picture (default 1024)")
    add("--caption_tokens", type=int, default=300, help="tokens per caption, padding included (default 300)")
    add("--mode", choices=("lora", "full"), default="lora", help="what is trained (default lora)")
    add("--rank", type=int, default=4, help="LoRA rank (default 4)")
    add("--gradient_checkpointing", action="store_true", help="the run recomputes each block")
    add("--batch_size", type=int, default=8, help="pictures per device and pass (default 8)")
    add("--num_inference_steps", type=int, default=28, help="denoising steps (default 28)")
    add("--guidance_scale", type=float, default=2.0, help="above 1 each denoising step runs twice (default 2)")
    add("--chip", help="910B, 910B1 to 910B4, A100, H100, ...")
    add("--peak_tflops", type=float, help="dense bf16 peak in TFLOP/s of a chip that is not known by name")
    add("--bandwidth_tbs", type=float, help="its memory bandwidth in TB/s")
    add("--devices", type=int, default=1, help="devices of the run (default 1)")
    add("--images_per_second", type=float, help="measured training throughput of all devices together")
    add("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(arguments)
    positive = ("resolution", "caption_tokens", "rank", "batch_size", "num_inference_steps", "devices")
    positive += ("peak_tflops", "bandwidth_tbs", "images_per_second")
    problems = [f"--{n}={getattr(options, n)}: must be above 0." for n in positive if (getattr(options, n) or 1) <= 0]
    problems += [f"--{n}=0: must be above 0." for n in positive if getattr(options, n) == 0]
    try:
        if problems:
            raise ValueError(" ".join(problems))
        figures = report(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(figures, indent=1) if options.json else format_report(figures, options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
