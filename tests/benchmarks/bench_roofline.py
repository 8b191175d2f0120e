"""Bytes, kernels, kept activations and the roofline time of one step, operator by operator, beside diffusers' block.

    python tests/benchmarks/bench_roofline.py                         the 1600M model at 1024 px, counted; seconds
    python tests/benchmarks/bench_roofline.py --step lora4 --operators 15
    python tests/benchmarks/bench_roofline.py --time --threads 1      the scaled model's steps on the CPU, timed
    python tests/benchmarks/bench_roofline.py --compiled              LoRA's step compiled, by the compiler's own count

Counted on meta tensors: no memory, no weights. Blocks: `diffusers` as its transformer comes, `kit` with the kit's
attention processors and LoRA layers, `fused` with the kit's hand-written block. All in one run.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

KIT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(KIT), str(KIT / "tests")]

import torch  # noqa: E402  after the kit's path

from sana_kit import arithmetic, devices, roofline  # noqa: E402
from sana_kit.models.fused import one_timestep  # noqa: E402
from sana_kit.quiet import quiet_libraries  # noqa: E402
from sana_kit.step_table import BLOCKS, STEPS, count_steps, prepare  # noqa: E402


def count(options: argparse.Namespace) -> None:
    """Print the table of every step and block, then where each step's time goes."""
    config = {**arithmetic.TRANSFORMERS[options.config], "sample_size": options.resolution // 32}
    side = (options.resolution // 32,) * 2
    shape = {"latent_hw": side, "images": options.batch_size, "tokens": options.tokens}
    counts = count_steps(config, options.step, options.block, **shape)
    where = f"{options.resolution} px, batch {options.batch_size}, {options.tokens} caption tokens, bf16"
    print(f"SANA {options.config}, {where}; per image, kernels per step; without the optimizer's update\n")
    print(roofline.format_table(counts))
    for title, one in counts.items():
        print(f"\n{title}: kernels, GB, roofline ms and share on {', '.join(roofline.CHIPS)}, by kind")
        print(roofline.format_rows(one, one.by_kind()))
        if options.operators:
            print("by operator")
            print(roofline.format_rows(one, one.by_operator(), options.operators))


def scaled_models(step: str, blocks: list[str], dtype: torch.dtype) -> dict:
    """The scaled model of the benchmarks on the CPU, once for each block, with equal weights."""
    from diffusers import SanaTransformer2DModel
    from helpers import tiny

    torch.manual_seed(0)
    base = SanaTransformer2DModel(**tiny.SCALED_TRANSFORMER).to(dtype)
    models = {}
    for block in blocks:
        models[block] = copy.deepcopy(base)
        prepare(models[block], step, block, dtype)
        models[block].train(step != "denoise")
    return models


def time_steps(options: argparse.Namespace) -> None:
    """Print the median CPU milliseconds of each block's step, the blocks taking turns; other work disturbs little.

    Pages of freed tensors are kept, as trainer and drawing keep them, also for diffusers' block.
    """
    devices.keep_freed_memory(torch.device("cpu"))
    for step in options.step:
        models = scaled_models(step, options.block, torch.bfloat16)
        images = options.batch_size * (2 if step == "denoise" else 1)
        config = next(iter(models.values())).config
        latents = torch.randn(images, config.in_channels, 32, 32).bfloat16()
        captions = torch.randn(images, 32, config.caption_channels).bfloat16()
        mask, timestep = torch.ones(images, 1, 1, 32, dtype=torch.bool), torch.full((images,), 500.0)
        times: dict[str, list[float]] = {block: [] for block in models}
        for _ in range(options.rounds):
            for block, model in models.items():
                start = time.process_time()
                times_given = timestep[:1] if step == "denoise" and one_timestep(model) else timestep  # as `denoise`
                with torch.set_grad_enabled(step != "denoise"):
                    out = model(latents, captions, times_given, encoder_attention_mask=mask, return_dict=False)[0]
                    if step != "denoise":
                        (out.float() ** 2).mean().backward()
                        model.zero_grad()
                times[block].append(time.process_time() - start)
        medians = {block: statistics.median(values[2:]) * 1e3 for block, values in times.items()}
        print(f"{step}: scaled model, 256 px, batch {options.batch_size}, bf16, {torch.get_num_threads()} thread(s)")
        for block, milliseconds in medians.items():
            ratios = "  ".join(f"{milliseconds / other:.3f} of {name}" for name, other in medians.items())
            print(f"  {block:10}{milliseconds:9.1f} ms   {ratios}")


def count_compiled(options: argparse.Namespace) -> None:
    """Print the bytes per image that one block's passes move compiled, times the model's blocks; takes minutes."""
    from helpers.compiled import compiled_bytes

    config = arithmetic.TRANSFORMERS[options.config]
    size = {"images": options.batch_size, "side": options.resolution // 32, "tokens": options.tokens}
    where = f"{options.resolution} px, batch {options.batch_size}, {options.tokens} caption tokens, bf16"
    print(f"SANA {options.config}, {where}; LoRA of rank 4, the blocks under torch.compile")
    print("GB per image by the compiler's own count on a CPU:")
    for block in options.block:
        share = config["num_layers"] / options.batch_size / 1e9
        ways = [count * share for count in compiled_bytes(config, block, **size)]
        print(f"  {block:10}{sum(ways):6.1f}   forward {ways[0]:.1f}, backward {ways[1]:.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=sorted(arithmetic.TRANSFORMERS), default="1600M")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=80)
    parser.add_argument("--step", choices=STEPS, action="append", help="one step, may be repeated; default all")
    parser.add_argument("--block", choices=BLOCKS, action="append", help="one block, may be repeated; default all")
    parser.add_argument("--operators", type=int, default=0, metavar="N", help="also the N longest operators")
    parser.add_argument("--time", action="store_true", help="time the scaled model on the CPU instead of counting")
    parser.add_argument("--compiled", action="store_true", help="count compiled blocks instead; needs a C++ compiler")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12, help="timed rounds, of which the first two do not count")
    options = parser.parse_args()
    quiet_libraries()
    options.step, options.block = options.step or list(STEPS), options.block or list(BLOCKS)
    if options.time:
        torch.set_num_threads(options.threads)
        time_steps(options)
    elif options.compiled:
        count_compiled(options)
    else:
        count(options)


if __name__ == "__main__":
    main()
