"""Resident memory of encoding, which must not follow the number of images.

    python tests/benchmarks/bench_encoding_memory.py              100 and 1,000 images of 256 px

Distinct captioned images of --size px (noise over a gradient, as JPEG files) are encoded by the tiny model, each count
in a process of its own; the peak of resident memory (VmHWM) and what is resident afterwards, without and with mapped
files, are printed, and the largest count's peak over the smallest's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

KIT = Path(__file__).resolve().parents[2]


def make_images(folder: Path, count: int, size: int) -> Path:
    """`count` distinct JPEG files with a caption each."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    generator = np.random.default_rng(0)
    ramp = np.linspace(0, 200, size, dtype=np.float32)
    for number in range(count):
        colour = generator.integers(0, 55, 3)
        pixels = ramp[:, None, None] + colour + generator.normal(0, 8, (size, size, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:06d}.jpg")
        (folder / f"{number:06d}.txt").write_text(
            f"a photo of small square number {number} " + "on white " * (number % 40)
        )
    return folder


def encode_once(model: str, images: str, store: str, size: int) -> dict[str, int]:
    """Bytes of this process after encoding a folder into an empty store."""
    import torch

    from sana_kit.data.discover import load_images
    from sana_kit.distributed import Ranks
    from sana_kit.encodings.encode import encode
    from sana_kit.encodings.settings import EncodingSettings
    from sana_kit.models.folder import find_model

    ranks = Ranks(0, 1, torch.device("cpu"))
    found = load_images(instance_data_dir=images, instance_prompt="x", remember_in=f"{store}/images", ranks=ranks)
    encoded = encode(found, find_model(model)[0], EncodingSettings(store, size), ranks=ranks)
    assert encoded.facts.encoded_images == len(found)
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS", "RssAnon")}


def main() -> int:
    """The command line; see the top of this file."""
    sys.path[:0] = [str(KIT), str(KIT / "tests"), str(KIT / "tests" / "helpers")]
    if sys.argv[1:2] == ["--encode"]:
        print(json.dumps(encode_once(*sys.argv[2:5], int(sys.argv[5]))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 1000], help="numbers of images")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side")
    args = parser.parse_args()
    import tiny

    peaks = []
    with tempfile.TemporaryDirectory(prefix="sana_encoding_") as folder:
        work = Path(folder)
        model = tiny.make_tiny_pipeline(work / "model")
        for count in args.counts:
            images = make_images(work / f"images-{count}", count, args.size)
            command = [sys.executable, __file__, "--encode", model, images, work / f"store-{count}", str(args.size)]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr[-3000:])
            found = json.loads(done.stdout.splitlines()[-1])
            peaks.append(found["VmHWM"])
            told = ", ".join(f"{name} {value / 1e6:.0f} MB" for name, value in found.items())
            print(f"{count:>7,} images at {args.size} px: {told}", flush=True)
    print(f"peak, largest over smallest: {peaks[-1] / peaks[0]:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
