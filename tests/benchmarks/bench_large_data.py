"""What 10^8 images need on paper, and a slice of each figure measured here: reading, decoding, bytes of the store.

    python tests/benchmarks/bench_large_data.py [--images 512] [--caption_tokens 80] [--share 0.4]

Measured: images/s and bytes/s that `--streaming` reads from tar shards of JPEG files of 1024 px, images/s that one
core decodes and crops, and bytes that a store of encodings of SANA 1600M's shapes takes, headers included. Counted:
FLOPs of the VAE and of the text encoder with the instruction before each caption. Hours are these FLOPs at `--share`
of a chip's peak: what share a card reaches was not measured here.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
import tempfile
import time
from pathlib import Path

KIT = Path(__file__).resolve().parents[2]
IMAGES = 10**8


def make_shards(folder: Path, count: int, each: int = 64) -> int:
    """Tar shards of JPEG files with the detail of a photograph, 1024 px; mean bytes of one."""
    import numpy as np
    from PIL import Image

    random, sizes = np.random.default_rng(0), []
    kinds = []
    for _ in range(16):  # coarse shapes with fine grain
        coarse = Image.fromarray(random.integers(0, 255, (48, 48, 3), dtype=np.uint8)).resize((1280, 1024))
        grain = random.normal(0, 9, (1024, 1280, 3))
        pixels = np.clip(np.asarray(coarse, np.float32) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(buffer := io.BytesIO(), "JPEG", quality=85)
        kinds.append(buffer.getvalue())
    for start in range(0, count, each):
        with tarfile.open(folder / f"train-{start // each:05d}.tar", "w") as archive:
            for number in range(start, min(count, start + each)):
                data = kinds[number % len(kinds)]
                sizes.append(len(data))
                for ending, part in (("jpg", data), ("txt", f"a photograph of thing {number}".encode())):
                    member = tarfile.TarInfo(f"{number:08d}.{ending}")
                    member.size = len(part)
                    archive.addfile(member, io.BytesIO(part))
    return sum(sizes) // len(sizes)


def measure_reading(work: Path, count: int) -> tuple[float, int, float]:
    """(images/s read by one process, mean bytes of one, images/s decoded and cropped by one core)."""
    import torch

    from sana_kit.data.assemble import Asked
    from sana_kit.data.streaming import find_shards
    from sana_kit.data.tables import Wanted
    from sana_kit.data.transform import plan_transform
    from sana_kit.data.windows import WindowReader
    from sana_kit.distributed import Ranks

    folder = work / "shards"
    folder.mkdir()
    size = make_shards(folder, count)
    shards = find_shards(Wanted(str(folder), None, "image", "txt", None, None))
    reader = WindowReader(shards, Asked(None), size=count // 2, seed=0, ranks=Ranks(0, 1, torch.device("cpu")))
    reader.read(work / "first", 10**12, lambda: False)  # imports, and the listing of the files
    began = time.perf_counter()
    images = reader.read(work / "second", 10**12, lambda: False)
    read = len(images) / (time.perf_counter() - began)
    began, some = time.process_time(), range(0, len(images), max(1, len(images) // 64))
    for i in some:
        plan = plan_transform(
            images.size(i), target=(1024, 1024), center_crop=False, random_flip=False, seed=0, index=i
        )
        images.pixels(i, plan)
    return read, size, len(some) / (time.process_time() - began)


def measure_store(work: Path, count: int, tokens: int, wide: int) -> tuple[int, int]:
    """Bytes on the disk of (latents, embeddings) of one image, in a store of so many."""
    import numpy as np
    import torch

    from sana_kit.encodings.store import ShardWriter

    found = []
    for part, shape in (("latents", (32, 32, 32)), ("prompts", (tokens, wide))):
        folder = work / part
        folder.mkdir()
        with ShardWriter(folder, part) as writer:
            for number in range(count):
                key = np.frombuffer(number.to_bytes(32, "big"), np.uint8)
                writer.add(key, torch.randn(shape).bfloat16())
                writer.flush_if_due()
        found.append(sum(path.stat().st_size for path in folder.iterdir()) // count)
    return found[0], found[1]


def instruction_tokens() -> int:
    """Tokens of SanaPipeline's instruction, about: Gemma's tokenizer makes 4 letters a token of such English."""
    from sana_kit.encodings.prompts import parse_instruction

    return round(len("\n".join(parse_instruction("default"))) / 4)


def main() -> int:
    """The command line; see the top of this file."""
    sys.path[:0] = [str(KIT)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512, help="of the measured slice")
    parser.add_argument("--caption_tokens", type=int, default=80)
    parser.add_argument("--share", type=float, default=0.4, help="of the chip's peak that hours are counted with")
    args = parser.parse_args()
    from sana_kit import devices
    from sana_kit.arithmetic import text_encoder_ops, total_flops, vae_encode_ops
    from sana_kit.flops import load_configs

    transformer, vae, text, _ = load_configs("1600M")
    with tempfile.TemporaryDirectory(prefix="sana_large_") as folder:
        work = Path(folder)
        read, size, decoded = measure_reading(work, args.images)
        latents, prompts = measure_store(work, args.images, args.caption_tokens, transformer["caption_channels"])
    print(f"measured, {args.images} JPEG files of 1280 x 1024 in tar shards, {size / 1e3:.0f} kB each:")
    print(f"  read by one process of --streaming: {read:.0f} images/s, {read * size / 1e6:.0f} MB/s")
    print(f"  decoded and cropped to 1024 px by one core: {decoded:.0f} images/s")
    print(f"  store: {latents:,} bytes of latents, {prompts:,} of embeddings ({args.caption_tokens} tokens) an image")
    print(f"  so {IMAGES:.0e} images: {IMAGES * latents / 1e12:.1f} TB and {IMAGES * prompts / 1e12:.1f} TB")
    before = instruction_tokens()
    each = total_flops(vae_encode_ops(vae, 1024, 1024))
    texts = total_flops(text_encoder_ops(text, before + args.caption_tokens))
    told = f"VAE {each / 1e12:.2f}, text encoder {texts / 1e12:.2f} (about {before} + {args.caption_tokens} tokens)"
    print(f"counted, TFLOP an image: {told}")
    for name in ("910B", "H100"):
        peak = devices.find_chip(name).tflops * 1e12
        rate = args.share * peak / (each + texts)
        print(f"{name}, at {100 * args.share:.0f} % of {peak / 1e12:.0f} TFLOP/s: {rate:.0f} images/s a card", end="")
        print(f", {rate / decoded:.1f} cores decode for it, {rate * size / 1e6:.0f} MB/s to read,", end="")
        print(f" {rate * (latents + prompts) / 1e6:.0f} MB/s to write")
        for cards in (8, 256):
            hours = IMAGES / rate / cards / 3600
            least = hours * args.share
            print(f"  {cards:>3} cards: {hours:,.1f} h ({least:,.1f} h at all of the peak)", end="")
            print(
                f"; {cards * rate * size / 1e9:.1f} GB/s read, {cards * rate * (latents + prompts) / 1e9:.1f} written"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
