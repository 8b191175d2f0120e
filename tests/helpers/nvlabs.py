"""SANA's transformer in NVlabs' layout, as a function of its tensors: what conversions are held against.

Written from the paper (arXiv 2410.10629, section 3: linear attention with ReLU and Mix-FFN; arXiv 2501.18427 and
2503.09641 for query and key norms and the guidance embedding) and the names of the tensors; no file of NVlabs or
diffusers is used. One image and one caption at a time, so that no mask is needed: a caption has its own tokens only.
"""

import math

import torch
from torch.nn.functional import conv2d, layer_norm, linear, silu

HEAD_DIM = 32  # of the linear attention


def rms(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def waves(values, width=256):
    """Sinusoids of time steps or guidance (B,) -> (B, width), cosines first."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2, dtype=torch.float32) / (width // 2))
    angles = values.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class NVlabsSana:
    """The network of `state`; `heads` and `head_dim` of the two attentions cannot be read off the tensors.

    Args:
        eps: of the denominator of the linear attention, of the norms in self- and in cross-attention.
        positions: (1, N, width) to add to the patches, None where the member has none (up to 1024 px).
    """

    def __init__(self, state, cross_heads, head_dim=HEAD_DIM, eps=(1e-8, 1e-5, 1e-6), positions=None):
        self.state, self.cross_heads, self.head_dim = state, cross_heads, head_dim
        self.eps, self.positions = eps, positions
        self.depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))

    def of(self, name):
        return self.state[f"{name}.weight"], self.state.get(f"{name}.bias")

    def perceptron(self, name, x, between=silu, parts=("mlp.0", "mlp.2")):
        return linear(between(linear(x, *self.of(f"{name}.{parts[0]}"))), *self.of(f"{name}.{parts[1]}"))

    def patches(self, x):
        found = conv2d(x, *self.of("x_embedder.proj"), stride=self.state["x_embedder.proj.weight"].shape[-1])
        found = found.flatten(2).transpose(1, 2)
        return found if self.positions is None else found + self.positions

    def caption(self, y):
        hidden = self.perceptron(
            "y_embedder", y, lambda x: torch.nn.functional.gelu(x, approximate="tanh"), ("y_proj.fc1", "y_proj.fc2")
        )
        return rms(hidden, self.state["attention_y_norm.weight"], 1e-5)

    def time(self, t, guidance):
        found = self.perceptron("t_embedder", waves(t))
        return found if guidance is None else found + self.perceptron("cfg_embedder", waves(guidance))

    def self_attention(self, name, x):
        q, k, v = linear(x, *self.of(f"{name}.qkv")).chunk(3, dim=-1)
        if f"{name}.q_norm.weight" in self.state:
            q, k = (rms(z, self.state[f"{name}.{n}_norm.weight"], self.eps[1]) for z, n in ((q, "q"), (k, "k")))
        q, k, v = (z.unflatten(-1, (-1, self.head_dim)) for z in (q.relu(), k.relu(), v))  # (B, N, heads, dim)
        memory = torch.einsum("bnhd,bnhe->bhde", k, v)
        weight = torch.einsum("bnhd,bhd->bnh", q, k.sum(1)) + self.eps[0]
        out = torch.einsum("bnhd,bhde->bnhe", q, memory) / weight[..., None]
        return linear(out.flatten(2), *self.of(f"{name}.proj"))

    def cross_attention(self, name, x, y):
        q = linear(x, *self.of(f"{name}.q_linear"))
        k, v = linear(y, *self.of(f"{name}.kv_linear")).chunk(2, dim=-1)
        if f"{name}.q_norm.weight" in self.state:
            q, k = (rms(z, self.state[f"{name}.{n}_norm.weight"], self.eps[2]) for z, n in ((q, "q"), (k, "k")))
        q, k, v = (z.unflatten(-1, (self.cross_heads, -1)).transpose(1, 2) for z in (q, k, v))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return linear((scores @ v).transpose(1, 2).flatten(2), *self.of(f"{name}.proj"))

    def mix(self, name, x, size):
        x = x.transpose(1, 2).unflatten(2, size)
        x = silu(conv2d(x, *self.of(f"{name}.inverted_conv.conv")))
        x, gate = conv2d(x, *self.of(f"{name}.depth_conv.conv"), padding=1, groups=x.shape[1]).chunk(2, dim=1)
        return conv2d(x * silu(gate), *self.of(f"{name}.point_conv.conv")).flatten(2).transpose(1, 2)

    def block(self, name, x, y, six, size):
        def norm(z, shift, scale):
            return layer_norm(z, z.shape[-1:], eps=1e-6) * (1 + scale) + shift

        table = self.state[f"{name}.scale_shift_table"] + six  # (B, 6, width)
        shift, scale, gate, shift_mix, scale_mix, gate_mix = table.unsqueeze(2).unbind(1)
        x = x + gate * self.self_attention(f"{name}.attn", norm(x, shift, scale))
        x = x + self.cross_attention(f"{name}.cross_attn", x, y)
        return x + gate_mix * self.mix(f"{name}.mlp", norm(x, shift_mix, scale_mix), size)

    def skips(self, signal, caption, six, size):
        """What the copied blocks of a ControlNet give, one for each, from the control signal at their entrance."""
        copies = sorted({int(name.split(".")[1]) for name in self.state if name.startswith("controlnet.")})
        found = []
        for index in copies:
            signal = self.block(f"controlnet.{index}.copied_block", signal, caption, six, size)
            found.append(linear(signal, *self.of(f"controlnet.{index}.after_proj")))
        return found

    def __call__(self, x, t, y, guidance=None, control=None, as_diffusers=False):
        """x (B, C, h, w), t (B,), y (B, T, D) -> (B, C, h, w).

        Args:
            guidance: (B,), as the guidance embedding takes it (already scaled).
            control: (B, C, h, w) latents of a control image.
            as_diffusers: the wiring of diffusers' ControlNet. NVlabs' copied blocks start from the output of block 0,
                and what copy i gives enters block i + 1; diffusers' start from the patches, and it is added to what
                block i + 1 puts out.
        """
        patch = self.state["x_embedder.proj.weight"].shape[-1]
        size = (x.shape[-2] // patch, x.shape[-1] // patch)
        patches, caption, embedded = self.patches(x), self.caption(y), self.time(t, guidance)
        six = linear(silu(embedded), *self.of("t_block.1")).unflatten(1, (6, -1))
        hidden, skips = self.block("blocks.0", patches, caption, six, size), []
        if control is not None:
            signal = linear(self.patches(control), *self.of("controlnet.0.before_proj"))
            skips = self.skips(signal + (patches if as_diffusers else hidden), caption, six, size)
        for index in range(1, self.depth):
            skip = skips[index - 1] if index <= len(skips) else 0
            entering, after = (0, skip) if as_diffusers else (skip, 0)
            hidden = self.block(f"blocks.{index}", hidden + entering, caption, six, size) + after
        shift, scale = (self.state["final_layer.scale_shift_table"] + embedded[:, None]).unsqueeze(2).unbind(1)
        hidden = layer_norm(hidden, hidden.shape[-1:], eps=1e-6) * (1 + scale) + shift
        out = linear(hidden, *self.of("final_layer.linear")).unflatten(1, size).unflatten(-1, (patch, patch, -1))
        return torch.einsum("bhwpqc->bchpwq", out).flatten(4, 5).flatten(2, 3)
