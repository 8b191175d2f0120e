"""Inference against the reference kit's way of doing it: by roofline at 4096 px, and measured on a scaled model.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_inference.py                  everything
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_inference.py --parts roofline

The reference kit calls SanaPipeline once per image, with a float32 VAE and `enable_tiling(1024, 1024)`, which leaves
diffusers' stride of 448 px: 100 tiles at 4096 px. The measured part keeps the proportions on a model that a CPU can
run (image and tiles an eighth as wide), and prints seconds per step and per decode, so that the figure for 28 steps
needs no half-hour run. The processes part launches the distributed script with 1 and 2 processes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KIT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(KIT), str(KIT / "tests")]  # run as a file, from any folder

from sana_kit.arithmetic import AUTOENCODER, TRANSFORMERS, roofline_seconds, transformer_ops, vae_decode_ops  # noqa: E402
from sana_kit.devices import find_chip  # noqa: E402
from sana_kit.encodings.prompts import collate_prompt_embeds, parse_instruction  # noqa: E402
from sana_kit.generation.decode import MAX_TILE_PIXELS, decode_latents, plan_tiles  # noqa: E402
from sana_kit.generation.denoise import denoise, initial_noise  # noqa: E402
from sana_kit.generation.jobs import plan_jobs  # noqa: E402
from sana_kit.generation.texts import encode_texts, job_texts, split_texts  # noqa: E402
from sana_kit.models.loading import load_pipeline  # noqa: E402


def roofline():
    """Least seconds per 4096 px image of the 1600M model: 28 steps with guidance, then the decode."""

    transformer, vae = TRANSFORMERS["1600M"], AUTOENCODER
    lengths = [min(start + 32, 128) - start for start in range(0, 128, 14)]
    reference_tiles = [(height * 32, width * 32) for height in lengths for width in lengths]
    rows, columns = plan_tiles(4096, 4096, 32, MAX_TILE_PIXELS[2])
    kit_tiles = [((b - a) * 32, (d - c) * 32) for a, b in rows for c, d in columns]
    print("Roofline, one 4096 x 4096 px image, 28 steps, guidance, SANA 1600M (seconds)")
    print(f"{'chip':8} {'float32 rate':>14} {'reference':>24} {'kit':>22} {'ratio':>6}")
    # float32 products at a quarter of the bf16 rate (Ascend 910B), at half of it (TF32, HF32), or a bf16 VAE after all
    for chip, share, name in (
        ("910b", 1 / 4, "a quarter"),
        ("910b", 1 / 2, "half (HF32)"),
        ("910b", 1, "bf16 VAE"),
        ("a100", 1 / 8, "an eighth"),
        ("a100", 1 / 2, "half (TF32)"),
    ):
        peak, bandwidth = find_chip(chip).tflops * 1e12, find_chip(chip).bandwidth

        def steps(tokens, peak=peak, bandwidth=bandwidth):
            return 28 * 2 * roofline_seconds(transformer_ops(transformer, (128, 128), tokens), peak, bandwidth, 2)

        def decode(tiles, rate, size, bandwidth=bandwidth):
            return sum(
                roofline_seconds(vae_decode_ops(vae, *tile), rate, bandwidth, bytes_per_element=size) for tile in tiles
            )

        reference = steps(300), decode(reference_tiles, peak * share, 2 if share == 1 else 4)
        kit = steps(96), decode(kit_tiles, peak, 2)  # 96: a long prompt's own tokens instead of 300 padded ones
        print(
            f"{chip:8} {name:>14} {reference[0]:8.2f} + {reference[1]:5.2f} = {sum(reference):5.2f}"
            f" {kit[0]:7.2f} + {kit[1]:4.2f} = {sum(kit):5.2f} {sum(reference) / sum(kit):6.2f}"
        )


def scaled_model(folder):
    """A SanaPipeline whose parts keep the proportions of the 1600M model, with random weights, for a CPU."""
    import torch
    from helpers import tiny

    torch.manual_seed(0)
    # decode : denoising step = 3.0 in FLOPs, as at 4096 px
    vae = {**tiny.SCALED_VAE, "latent_channels": 32, "decoder_layers": (3, 3, 3, 3)}
    text = {**tiny.SCALED_TEXT, "num_key_value_heads": 2}
    transformer = {**tiny.SCALED_TRANSFORMER, "in_channels": 32, "out_channels": 32, "sample_size": 64}
    tiny.build_pipeline(vae=vae, text=text, transformer=transformer).to(torch.bfloat16).save_pretrained(folder)


def measured(folder, steps, rounds):
    """CPU seconds per denoising step and per decode of a 512 px image, reference way and kit, in turns."""
    import torch
    from diffusers import SanaPipeline

    from sana_kit.generation import decode

    cpu, size, prompt, negative = torch.device("cpu"), 512, "a red square on white", "blurry"
    # the tiling of 4096 px, an eighth as large: reference tile 128 stride 56, kit at most 272 with 32 shared
    decode.MAX_TILE_PIXELS = {2: 272 * 272, 4: 272 * 192}
    decode.TILE_OVERLAP = 32
    reference = SanaPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    reference.set_progress_bar_config(disable=True)
    reference.vae.to(torch.float32)
    reference.vae.enable_tiling(128, 128, 56, 56)
    kit = load_pipeline(str(folder), device=cpu)
    jobs = plan_jobs(
        [prompt], [8], height=size, width=size, num_inference_steps=steps, guidance_scale=2.0, negative_prompt=negative
    )
    seconds = {
        "reference": {"text": 0.0, "denoise": 0.0, "decode": 0.0},
        "kit": {"text": 0.0, "denoise": 0.0, "decode": 0.0},
    }

    def timed(way, part, action):
        start = time.process_time()  # of one thread: what a busy machine does to the wall clock is not the subject
        result = action()
        seconds[way][part] += (time.process_time() - start) / rounds
        return result

    instruction = parse_instruction("default")
    texts = job_texts(jobs)

    def reference_way():
        encoded = timed(
            "reference",
            "text",
            lambda: reference.encode_prompt(
                prompt, True, negative_prompt=negative, complex_human_instruction=instruction
            ),
        )
        names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
        latents = timed(
            "reference",
            "denoise",
            lambda: (
                reference(
                    negative_prompt=None,
                    height=size,
                    width=size,
                    num_inference_steps=steps,
                    guidance_scale=2.0,
                    generator=torch.Generator().manual_seed(8),
                    use_resolution_binning=False,
                    output_type="latent",
                    **dict(zip(names, encoded, strict=True)),
                ).images
            ),
        )
        return timed("reference", "decode", lambda: reference.vae.decode(latents.float() / 0.41407).sample)

    def kit_way():
        encoded = timed(
            "kit",
            "text",
            lambda: encode_texts(kit.tokenizer, kit.text_encoder, texts, instruction, device=cpu),
        )
        prompts, negatives = split_texts(encoded)
        noise, generator = initial_noise(jobs[0], (32, size // 8, size // 8))
        padded, mask = collate_prompt_embeds([negatives[negative], prompts[prompt]])
        latents = timed(
            "kit",
            "denoise",
            lambda: denoise(
                kit.transformer,
                kit.scheduler,
                noise,
                padded,
                mask,
                num_inference_steps=steps,
                guidance_scale=2.0,
                dtype=torch.bfloat16,
                generators=[generator],
            ),
        )
        return timed("kit", "decode", lambda: decode_latents(kit.vae, latents))

    with torch.no_grad():
        for _ in range(rounds):
            reference_way()
            kit_way()
    print(f"\nMeasured on this CPU, {torch.get_num_threads()} thread(s), scaled model, 512 px (CPU seconds)")
    print(f"{'':10} {'prompt':>8} {'a step':>8} {'decode':>8} {'28 steps + decode':>18}")
    totals = {}
    for way, parts in seconds.items():
        totals[way] = 28 * parts["denoise"] / steps + parts["decode"]
        print(
            f"{way:10} {parts['text']:8.3f} {parts['denoise'] / steps:8.3f} {parts['decode']:8.3f} {totals[way]:18.2f}"
        )
    print(
        f"{'ratio':10} {'':8} {'':8} {seconds['reference']['decode'] / seconds['kit']['decode']:8.2f}"
        f" {totals['reference'] / totals['kit']:18.2f}"
    )


def processes(folder, images, steps):
    """E2E images/s of the distributed script with 1 and 2 processes of one thread each, loading apart."""
    sys.path.insert(0, str(KIT / "tests"))
    from helpers import script_environment

    print("\nDistributed script, scaled model, 256 px, one thread per process (images/s without loading)")
    rates = {}
    for count in (1, 2):
        out = folder / f"out{count}"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(count)]
        command += [
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "0",
        ]
        command += ["--multi_gpu"] if count > 1 else []
        command += [str(KIT / "infer_sana_text2img_distrib.py"), "--model_path", str(folder / "model")]
        command += ["--output_path", str(out), "--height", "256", "--width", "256", "--prompt", "a red square"]
        command += [
            "--num_inference_steps",
            str(steps),
            "--no_resolution_binning",
            "--seeds",
            *map(str, range(images)),
        ]
        subprocess.run(command, check=True, env=script_environment(), cwd=KIT, stdout=subprocess.DEVNULL)
        rates[count] = json.loads((out / "summary.json").read_text())["images_per_second"]
        print(f"{count} process(es): {rates[count]:.3f}")
    same = all(
        path.read_bytes() == (folder / "out2" / path.name).read_bytes()
        for path in (folder / "out1").glob("*-seed*.png")
    )
    print(
        f"2 processes are {rates[2] / rates[1]:.2f} times 1; the images are {'the same' if same else 'NOT THE SAME'}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["roofline", "measured", "processes"])
    parser.add_argument("--steps", type=int, default=3, help="denoising steps per measured image")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--images", type=int, default=12, help="of the processes part")
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "roofline" in args.parts:
        roofline()
    if {"measured", "processes"} & set(args.parts):
        with tempfile.TemporaryDirectory() as folder:
            scaled_model(Path(folder) / "model")
            if "measured" in args.parts:
                measured(Path(folder) / "model", args.steps, args.rounds)
            if "processes" in args.parts:
                processes(Path(folder), args.images, 2 * args.steps)


if __name__ == "__main__":
    main()
