"""How much arithmetic an image costs, how fast a chip could do it at best, and how far a run is from that.

    python -m sana_kit.flops --config 1600M --resolution 1024 --chip 910B --images_per_second 28.7 --devices 8
    python -m sana_kit.flops --config MODEL_FOLDER --resolution 512 --mode full --batch_size 4 --chip H100
    python -m sana_kit.flops --step --config 1600M --resolution 1024 --caption_tokens 80    where a step's time goes

"TFLOP" is 10^12 operations, "TFLOP/s" a rate. The closed forms are in sana_kit/arithmetic.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from sana_kit.arithmetic import (
    AUTOENCODER,
    TEXT_ENCODER,
    TRANSFORMERS,
    checkpoint_bytes,
    model_flops_utilisation,
    roofline_seconds,
    text_encoder_ops,
    total_flops,
    training_bytes,
    training_ops,
    transformer_ops,
    vae_decode_ops,
    vae_encode_ops,
    vae_halves,
)
from sana_kit.errors import run_as_script
from sana_kit.flags import Parser


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
    _, layers, _, _ = vae_halves(vae_config, "encoder")
    return 2 ** (sum(1 for count in layers[:-1] if count > 0) + int(layers[0] == 0))


def _chip(options: argparse.Namespace) -> tuple[float | None, float | None]:
    """(peak in FLOP/s, memory bandwidth in bytes/s) by name or by flags; None where not given or not known."""
    from sana_kit.devices import chips, find_chip  # with torch

    peak, bandwidth = options.peak_tflops, options.bandwidth_tbs
    known = find_chip(options.chip) if options.chip else None
    if options.chip and known is None and peak is None:
        raise ValueError(
            f"--chip={options.chip}: its peak is not known. Known: {', '.join(chips())}; or give --peak_tflops (and"
            " --bandwidth_tbs)."
        )
    peak = peak * 1e12 if peak is not None else known.tflops * 1e12 if known else None
    return peak, bandwidth * 1e12 if bandwidth is not None else known.bandwidth if known else None


def report(options: argparse.Namespace) -> dict:
    """All figures of the command line as one dictionary; FLOPs per image, seconds per image, shares 0 to 1."""
    transformer, vae, text, title = load_configs(options.config)
    factor, patch = _vae_factor(vae), transformer.get("patch_size", 1)
    if options.resolution % (factor * patch):
        raise ValueError(f"--resolution={options.resolution}: must be a multiple of {factor}, the VAE's factor.")
    peak, bandwidth = _chip(options)
    if options.images_per_second is not None and peak is None:
        raise ValueError("--images_per_second needs --chip or --peak_tflops: a share of what?")
    latent = options.resolution // factor
    shape = ((latent, latent), options.caption_tokens)
    ops = {
        "encode": vae_encode_ops(vae, options.resolution, options.resolution),
        "decode": vae_decode_ops(vae, options.resolution, options.resolution),
        "prompt": text_encoder_ops(text, options.caption_tokens),
        "forward": transformer_ops(transformer, *shape),
        "training": training_ops(transformer, *shape, options.mode, options.rank),
    }
    held = training_bytes(transformer, options.mode, options.rank, options.devices)
    figures = {
        "title": title,
        "latents": latent,
        "tokens": (latent // patch) ** 2,
        "parameters": sum(op.weights for op in ops["forward"]),
        "flops": _flops(ops, options),
        "bytes": held,
        "checkpoint": checkpoint_bytes(held, options.mode, options.devices),
    }
    if peak is None:
        return figures
    figures["peak"], figures["devices"], figures["bandwidth"] = peak, options.devices, bandwidth
    figures["roofline"] = _rooflines(ops, options, peak, bandwidth)
    if options.images_per_second is not None:
        figures["measured"] = _measured(figures, options)
    return figures


def _recomputed(options: argparse.Namespace) -> float:
    return 1.0 if options.gradient_checkpointing else 0.0


def _passes(options: argparse.Namespace) -> int:
    """Forward passes for one generated image."""
    return options.num_inference_steps * (2 if options.guidance_scale > 1 else 1)


def _flops(ops: Mapping[str, list], options: argparse.Namespace) -> dict[str, float]:
    """FLOPs per image of each part of training and of generation."""
    encode, decode, prompt, forward = (total_flops(ops[part]) for part in ("encode", "decode", "prompt", "forward"))
    training = ops["training"]
    return {
        "vae_encode": encode,
        "text_encoder": prompt,
        "transformer_forward": forward,
        "training": total_flops(training, training=True),
        "training_executed": total_flops(training, training=True, recomputed=_recomputed(options)),
        # diffusers' trainer encodes image, caption and a negative prompt in each step, and recomputes each block
        "training_uncached": encode + 2 * prompt + total_flops(training, training=True, recomputed=1.0),
        "vae_decode": decode,
        "generation": _passes(options) * forward + 2 * prompt + decode,
    }


def _rooflines(
    ops: Mapping[str, list], options: argparse.Namespace, peak: float, bandwidth: float | None
) -> dict[str, float]:
    """Least seconds per image, and images per second; without a known bandwidth only the arithmetic bounds."""
    moved = bandwidth if bandwidth is not None else float("inf")
    step = roofline_seconds(ops["training"], peak, moved, options.batch_size, True, _recomputed(options))
    denoising = roofline_seconds(ops["forward"], peak, moved, 2 if options.guidance_scale > 1 else 1)
    texts, decoding = (roofline_seconds(ops[part], peak, moved) for part in ("prompt", "decode"))
    return {
        "training_seconds": step,
        "training_images_per_second": options.devices / step,
        "generation_seconds": _passes(options) * denoising + 2 * texts + decoding,
    }


def _measured(figures: Mapping, options: argparse.Namespace) -> dict[str, float]:
    """Shares, 0 to 1, that a measured rate is of the peak and of the roofline."""
    rate, flops = options.images_per_second, figures["flops"]

    def share(part: str) -> float:
        return model_flops_utilisation(rate, flops[part], options.devices, figures["peak"])

    return {
        "images_per_second": rate,
        "mfu": share("training"),
        "executed": share("training_executed"),
        "executed_uncached": share("training_uncached"),
        "of_roofline": rate * figures["roofline"]["training_seconds"] / options.devices,
    }


def format_report(figures: dict, options: argparse.Namespace) -> str:
    """The figures as the text that the command prints."""

    def row(text: str, key: str) -> str:
        value = figures["flops"][key] / 1e12
        return f"  {text:<50}" + (f"{value:10.2f}" if value >= 0.1 else f"{value:10.3g}")

    checkpointing = "on" if options.gradient_checkpointing else "off"
    mode = f"LoRA rank {options.rank}" if options.mode == "lora" else options.mode
    # diffusers has no trainer of ControlNets for SANA
    uncached = "encoding in each step" if options.mode == "controlnet" else "as diffusers' trainer does it"
    sizes = f"{figures['tokens']} tokens, {options.caption_tokens} caption tokens"
    lines = [
        f"{figures['title']} at {options.resolution} px: {sizes}",
        "",
        f"{'Arithmetic per image':<52}{'TFLOP':>10}",
        row("VAE encode (once, then kept on disk)", "vae_encode"),
        row("text encoder (once per caption)", "text_encoder"),
        row("transformer, forward", "transformer_forward"),
        row(f"training step ({mode}), the model's own", "training"),
        row(f"training step, executed (checkpointing {checkpointing})", "training_executed"),
        row(f"the same {uncached}", "training_uncached"),
        row("VAE decode, whole", "vae_decode"),
        row(f"generation, {options.num_inference_steps} steps, guidance {options.guidance_scale:g}", "generation"),
    ]
    held = figures["bytes"]
    lines += ["", f"{f'Memory per device, ZeRO-2 on {options.devices}, beside the activations':<52}{'MB':>10}"]
    lines += [f"  {name:<50}{value / 1e6:10.1f}" for name, value in held.items()]
    lines += [f"  {'all but the weights':<50}{(sum(held.values()) - held['weights']) / 1e6:10.1f}"]
    lines += ["", f"{'On disk':<52}{'MB':>10}", f"  {'a checkpoint':<50}{figures['checkpoint'] / 1e6:10.1f}"]
    if "peak" in figures:
        bandwidth = figures["bandwidth"]
        memory = f"{bandwidth / 1e12:.2f} TB/s" if bandwidth else "memory bandwidth not known, so not counted"
        rooflines = figures["roofline"]
        lines += [
            "",
            f"Roofline on {figures['devices']} x {options.chip or 'the given chip'}"
            f" ({figures['peak'] / 1e12:.0f} TFLOP/s bf16, {memory}), batch {options.batch_size}",
            f"  training    {rooflines['training_seconds'] * 1e3:9.2f} ms an image and device:"
            f" at most {rooflines['training_images_per_second']:.1f} images/s",
            f"  generation  {rooflines['generation_seconds']:9.3f} s  an image and device",
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


def print_steps(options: argparse.Namespace) -> None:
    """What `--step` prints: bytes, kernels, kept activations, roofline times, by step, block and kind of operator."""
    from sana_kit import roofline, step_table  # torch, diffusers and peft, which nothing else here needs

    transformer, vae, _, title = load_configs(options.config)
    side = options.resolution // _vae_factor(vae)
    config = {key: value for key, value in transformer.items() if not key.startswith("_")}
    shape = {"latent_hw": (side, side), "images": options.batch_size, "tokens": options.caption_tokens}
    counts = step_table.count_steps({**config, "sample_size": side}, step_table.STEPS, step_table.BLOCKS, **shape)
    sizes = f"{options.resolution} px, batch {options.batch_size}, {options.caption_tokens} caption tokens, bf16"
    print(f"{title} at {sizes}; per image, kernels per step, counted; without the optimizer's update")
    print(f"blocks: {step_table.BLOCK_HELP}\n\n{roofline.format_table(counts)}")
    for name, count in counts.items():
        if name.endswith("fused block"):
            print(f"\n{name}: kernels, GB, roofline ms and share on {', '.join(roofline.CHIPS)}, by kind of operator")
            print(roofline.format_rows(count, count.by_kind()))
    print(f"\nWhat the blocks bring, beside diffusers':\n{step_table.format_changes(counts)}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m sana_kit.flops", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--config", default="1600M", help=f"{', '.join(TRANSFORMERS)}, or a model folder")
    add("--resolution", type=int, default=1024, help="pixels of a square image")
    add("--caption_tokens", type=int, default=300, help="tokens per caption, padding included")
    add("--mode", choices=("lora", "full", "controlnet"), default="lora", help="what is trained")
    add("--rank", type=int, default=4, help="LoRA rank")
    add("--gradient_checkpointing", action="store_true", help="the run recomputes each block")
    add("--batch_size", type=int, default=8, help="images per device and pass")
    add("--num_inference_steps", type=int, default=28, help="denoising steps")
    add("--guidance_scale", type=float, default=2.0, help="above 1 each denoising step runs twice")
    add("--chip", help="910B, 910B1 to 910B4, A100, H100, ...")
    add("--peak_tflops", type=float, help="dense bf16 peak in TFLOP/s of a chip that is not known by name")
    add("--bandwidth_tbs", type=float, help="its memory bandwidth in TB/s")
    add("--devices", type=int, default=1, help="devices of the run")
    add("--images_per_second", type=float, help="measured training throughput of all devices together")
    add("--step", action="store_true", help="count a step's bytes, kernels and roofline time instead, op by op")
    add("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(arguments)
    positive: tuple[str, ...] = (
        "resolution",
        "caption_tokens",
        "rank",
        "batch_size",
        "num_inference_steps",
        "devices",
    )
    positive += ("peak_tflops", "bandwidth_tbs", "images_per_second")
    problems = [f"--{n}={getattr(options, n)}: must be above 0." for n in positive if (getattr(options, n) or 1) <= 0]
    problems += [f"--{n}=0: must be above 0." for n in positive if getattr(options, n) == 0]
    try:
        if problems:
            raise ValueError(" ".join(problems))
        if options.step:
            print_steps(options)
            return 0
        figures = report(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(figures, indent=1) if options.json else format_report(figures, options))
    return 0


if __name__ == "__main__":
    sys.exit(run_as_script(main))
