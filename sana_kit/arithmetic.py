"""FLOPs and bytes of SANA's parts in closed form, over their configurations.

Used by sana_kit/flops.py and, for the MFU, by the trainer; the tests hold it against torch's FLOP counter.
One multiply-add is two FLOPs; norms, activations and other element-wise work are not counted, as usual.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    ModelConfig: TypeAlias = Mapping[str, object] | PretrainedConfig

# The transformers of the published checkpoints (their transformer/config.json).
_1600M = {
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
}
_600M = {"num_attention_heads": 36, "num_layers": 28}
_600M |= {"num_cross_attention_heads": 16, "cross_attention_head_dim": 72, "cross_attention_dim": 1152}
TRANSFORMERS = {"1600M": _1600M, "600M": {**_1600M, **_600M}}


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


# Fewest and most gradients in one of DeepSpeed's buckets; the trainer sizes them to what is trained in between.
BUCKET_ELEMENTS = (2**16, 2 * 10**8)


@dataclass(frozen=True)
class Op:
    """One product of the forward pass: a layer with weights, or the product of two activations.

    Attributes:
        flops: forward, for one image.
        activations: elements read and written, for one image.
        weights: elements of the weight; 0 for a product of two activations.
        in_block: inside a transformer block, so recomputed under gradient checkpointing.
        trainable: whether its weight is trained.
        input_gradient: whether the gradient of its input is needed (of both inputs for a product of activations).
        one_sided: of a product of activations, whether only one of them needs its gradient.
    """

    name: str
    flops: float
    activations: float
    weights: float = 0.0
    in_block: bool = False
    trainable: bool = False
    input_gradient: bool = False
    one_sided: bool = False

    @property
    def backward_passes(self) -> int:
        """Products of this size in the backward pass."""
        if self.weights == 0:
            return (1 if self.one_sided else 2) if self.input_gradient else 0
        return int(self.trainable) + int(self.input_gradient)


def _linear(name: str, tokens: float, inputs: int, outputs: int, **kwargs: bool) -> Op:
    return Op(name, 2 * tokens * inputs * outputs, tokens * (inputs + outputs), inputs * outputs, **kwargs)


def _config(config: ModelConfig) -> Mapping:
    """A plain mapping of a diffusers or transformers configuration, or of a mapping."""
    if isinstance(config, Mapping):
        return config
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def transformer_ops(
    transformer_config: ModelConfig,
    latent_hw: tuple[int, int],
    caption_tokens: float,
    mode: str = "inference",
    rank: int = 4,
) -> list[Op]:
    """The products of one forward pass of a SanaTransformer2DModel, for one image.

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

    def projection(name: str, count: float, inputs: int, outputs: int, adapted: bool, gradient: bool) -> list[Op]:
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


def default_controlnet_layers(transformer_config: Mapping) -> int:
    """Blocks of a ControlNet: 7, or one less than the transformer has.

    7 are those of NVlabs' ControlNets, for 20 and for 28 blocks. Block i of it is added behind block i + 1 of the
    transformer, so a last one would have no place.
    """
    return min(7, transformer_config["num_layers"] - 1)


def controlnet_ops(
    transformer_config: ModelConfig, latent_hw: tuple[int, int], caption_tokens: float, layers: int
) -> list[Op]:
    """The products of a frozen transformer's forward pass and of the ControlNet that is trained beside it.

    What the ControlNet adds comes in behind the second block, so gradients run through the blocks behind that one and
    never to the caption. Its embeddings are frozen copies.

    Args:
        layers: blocks of the ControlNet.
    """
    c = _config(transformer_config)

    def blocks(count: int, trainable: bool, gradient: bool) -> list[Op]:
        ops = transformer_ops({**c, "num_layers": count}, latent_hw, caption_tokens)
        return [
            replace(
                op,
                trainable=trainable and op.weights > 0,
                input_gradient=gradient and op.name not in ("attn2.to_k", "attn2.to_v"),
                one_sided=not trainable and op.name in ("attn2 scores", "attn2 values"),
                in_block=gradient,  # what has no gradient is not recomputed
            )
            for op in ops
            if op.in_block
        ]

    *embeddings, last = transformer_ops({**c, "num_layers": 0}, latent_hw, caption_tokens)
    width, patch = c["num_attention_heads"] * c["attention_head_dim"], c.get("patch_size", 1)
    tokens = (latent_hw[0] // patch) * (latent_hw[1] // patch)
    before = _linear("input_block", tokens, width, width, trainable=True)
    after = _linear("controlnet_block", tokens, width, width, trainable=True, input_gradient=True)
    image = replace(embeddings[0], name="controlnet patch_embed of latents and control image", weights=0)
    return [
        *embeddings,
        *blocks(2, False, False),
        *blocks(c["num_layers"] - 2, False, True),
        replace(last, input_gradient=True),
        *embeddings,
        image,
        before,
        *blocks(layers, True, True),
        *[after] * layers,
    ]


def training_ops(
    transformer_config: ModelConfig,
    latent_hw: tuple[int, int],
    caption_tokens: float,
    mode: str,
    rank: int = 4,
    controlnet_layers: int | None = None,
) -> list[Op]:
    """The products of a training step's forward pass: `mode` "lora", "full" or "controlnet" (layers None: default)."""
    if mode == "controlnet":
        layers = controlnet_layers or default_controlnet_layers(_config(transformer_config))
        return controlnet_ops(transformer_config, latent_hw, caption_tokens, layers)
    return transformer_ops(transformer_config, latent_hw, caption_tokens, mode, rank)


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
    """Least seconds per image on one device: each product takes as long as its arithmetic or its memory traffic.

    Weights are read once per pass and batch, activations once per product; element-wise work is taken as fused away,
    so no real run gets below this.

    Args:
        peak: FLOP/s; bandwidth: bytes/s; batch_size: images per pass on the device.
    """
    seconds = 0.0
    for op in ops:
        moved = (op.activations + op.weights / batch_size) * bytes_per_element
        seconds += max(op.flops / peak, moved / bandwidth) * _passes(op, training, recomputed)
    return seconds


def forward_flops_per_image(transformer_config: ModelConfig, latent_hw: tuple[int, int], caption_tokens: int) -> float:
    """FLOPs of one forward pass of the transformer for one image (one denoising step without guidance)."""
    return total_flops(transformer_ops(transformer_config, latent_hw, caption_tokens))


def training_flops_per_image(
    transformer_config: ModelConfig,
    latent_hw: tuple[int, int],
    caption_tokens: float,
    mode: str = "lora",
    gradient_checkpointing: bool | float = False,
    rank: int = 4,
    controlnet_layers: int | None = None,
) -> float:
    """FLOPs of forward and backward of the transformer for one image; encoding is not in it, it happens once.

    With LoRA the frozen weights get no gradients, only the inputs that lead back to an adapter do.

    Args:
        transformer_config, latent_hw, caption_tokens: see `transformer_ops`.
        mode: "lora", "full" or "controlnet", whose ControlNet has `controlnet_layers` blocks.
        gradient_checkpointing: True, or the share of the blocks recomputed; False for the model's own work (MFU).
    """
    if mode not in ("lora", "full", "controlnet"):
        raise ValueError(f"mode={mode!r}: must be lora, full or controlnet.")
    ops = training_ops(transformer_config, latent_hw, caption_tokens, mode, rank, controlnet_layers)
    return total_flops(ops, training=True, recomputed=float(gradient_checkpointing))


def model_flops_utilisation(images_per_second: float, flops_per_image: float, devices: int, peak: float) -> float:
    """Share of the devices' peak that the model's own arithmetic makes up, 0 to 1 (peak in FLOP/s per device)."""
    return images_per_second * flops_per_image / (devices * peak)


def bucket_elements(trained: int) -> int:
    """How many gradients the trainer lets DeepSpeed put into one bucket, for so many trained weights."""
    fewest, most = BUCKET_ELEMENTS
    return min(max(trained, fewest), most)


def training_bytes(
    transformer_config: ModelConfig,
    mode: str = "lora",
    rank: int = 4,
    devices: int = 8,
    controlnet_layers: int | None = None,
    adapter_weights: int | None = None,
) -> dict[str, int]:
    """Bytes on one device under the kit's ZeRO-2 in bf16, activations apart; tests hold them against allocated bytes.

    Args:
        transformer_config, rank: see `transformer_ops`; biases and norms, a thousandth of the whole, are not counted.
        mode: "lora", "full" or "controlnet", whose ControlNet has `controlnet_layers` blocks.
        devices: over how many masters, moments and reduced gradients are shared out.
        adapter_weights: of another adapter than a LoRA of `rank` on to_q, to_k and to_v.

    Returns:
        weights (bf16, the adapter's among them), gradients (the device's share, float32), masters and moments (its
        share, float32), passing: the larger of what a bucket of bf16 gradients and its buffer take in the backward
        pass, and of what the optimizer's step takes, a copy of the gradients and an intermediate of the same size.
    """
    ops = training_ops(transformer_config, (1, 1), 1, mode, rank, controlnet_layers)
    total = sum(op.weights for op in ops)
    trained = sum(op.weights for op in ops if op.trainable)
    if adapter_weights is not None:
        total, trained = total - trained + adapter_weights, adapter_weights
    share = math.ceil(trained / devices)
    return {
        "weights": round(2 * total),
        "gradients": 4 * share,
        "masters": 4 * share,
        "moments": 8 * share,
        "passing": max(2 * 2 * bucket_elements(int(trained)), 8 * share),
    }


def checkpoint_bytes(held: Mapping[str, int], mode: str, devices: int) -> int:
    """Bytes of a checkpoint, from `training_bytes`: masters and moments, and the trained weights as they are used."""
    return 3 * held["masters"] * devices + (held["weights"] if mode == "full" else held["masters"] * devices // 2)


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


def vae_halves(config: Mapping, half: str) -> tuple[list, list, list, list]:
    channels, layers = config[f"{half}_block_out_channels"], config[f"{half}_layers_per_block"]
    kinds, scales = config[f"{half}_block_types"], config[f"{half}_qkv_multiscales"]
    kinds = [kinds] * len(channels) if isinstance(kinds, str) else kinds
    return list(channels), list(layers), list(kinds), list(scales)


def vae_encode_ops(vae_config: ModelConfig, height: int, width: int) -> list[Op]:
    """The products of AutoencoderDC.encode for one image of `height` x `width` pixels."""
    c = _config(vae_config)
    channels, layers, kinds, scales = vae_halves(c, "encoder")
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


def vae_decode_ops(vae_config: ModelConfig, height: int, width: int) -> list[Op]:
    """The products of AutoencoderDC.decode, whole, for one image of `height` x `width` pixels."""
    c = _config(vae_config)
    channels, layers, kinds, scales = vae_halves(c, "decoder")
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


def text_encoder_ops(text_config: ModelConfig, tokens: int) -> list[Op]:
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
