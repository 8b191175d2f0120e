"""What the images and encodings of a start cost per row, cold and warm: seconds and memory, for data sets of any size.

    python tests/benchmarks/bench_startup.py                          100,000 and 1,000,000 rows of a parquet table
    python tests/benchmarks/bench_startup.py --rows 100000 --kind folder     the same for image files with captions
    python tests/benchmarks/bench_startup.py --distinct_captions      every row with a caption of its own

A start is `load_images` and `encode`, as the trainer calls them, in a process of its own. The table holds a few
distinct tiny images, each row one of them, and 16 distinct captions (or one a row). The store is filled by the cold
start, whose tiny model encodes each distinct thing once; where every row has a caption of its own, the embeddings are
made up, since the start and not the text encoder is measured. --quick_cold looks at each distinct image once, so that
a million rows are ready in a minute; the warm starts are the same. Time a row is CPU time. Memory is what the process
holds for itself (RssAnon) after the start, less what it held before; pages of mapped files, which all processes share,
are told beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KIT = Path(__file__).resolve().parents[2]
IMAGES, CAPTIONS = 8, 16


def caption(row: int, distinct: bool) -> str:
    """About 60 characters."""
    number = row if distinct else row % CAPTIONS
    return f"a photograph of the small red square number {number:08d} on white"


def make_table(folder: Path, rows: int, distinct: bool) -> list[str]:
    """A parquet table; the flags that name it."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import tiny

    folder.mkdir(parents=True)
    images = []
    for number, (image, _) in enumerate(tiny.make_images(IMAGES, size=16)):
        image.save(folder / f"{number}.png")
        images.append((folder / f"{number}.png").read_bytes())
        (folder / f"{number}.png").unlink()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", kind), ("text", pa.string())])
    with pq.ParquetWriter(folder / "train.parquet", schema) as writer:
        for start in range(0, rows, 10000):
            block = range(start, min(rows, start + 10000))
            cells = [{"bytes": images[row % IMAGES], "path": None} for row in block]
            texts = [caption(row, distinct) for row in block]
            writer.write_table(pa.table({"image": pa.array(cells, kind), "text": texts}, schema=schema))
    return ["dataset_name", str(folder)]


def make_folder(folder: Path, rows: int, distinct: bool) -> list[str]:
    """A folder of PNG files with .txt captions; the flags that name it."""
    import tiny

    folder.mkdir(parents=True)
    for number, (image, _) in enumerate(tiny.make_images(IMAGES, size=16)):
        image.save(folder / f"{number:07d}.png")
    data = [(folder / f"{number:07d}.png").read_bytes() for number in range(IMAGES)]
    for row in range(rows):
        (folder / f"{row:07d}.png").write_bytes(data[row % IMAGES])
        (folder / f"{row:07d}.txt").write_text(caption(row, distinct))
    return ["instance_data_dir", str(folder)]


def memory() -> dict[str, int]:
    """Resident bytes of this process: its own, and mapped files'."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}


def made_up_embeddings() -> None:
    """Encode prompts to noise: what is measured is the start, not the text encoder."""
    import torch

    from sana_kit.encodings import encode_prompts

    def noise(tokenizer, encoder, prompts, instruction, length, device):
        return list(torch.zeros(len(prompts), 2, 4, dtype=torch.bfloat16))

    encode_prompts._encode_group = noise


def look_once() -> None:
    """Look at each distinct image once, without threads."""
    from sana_kit.data import headers

    found, look = {}, headers.inspect_image

    def known(data: bytes, name: str):
        if data not in found:
            found[data] = look(data, name)
        return found[data]

    headers.inspect_image, headers.default_workers = known, lambda: 0


def start(model: str, field: str, name: str, store: str, made_up: bool, quick: bool) -> dict:
    """One start of this process; seconds and bytes by part."""
    import torch

    from sana_kit.data.discover import load_images
    from sana_kit.distributed import Ranks
    from sana_kit.encodings import store as store_module
    from sana_kit.encodings.encode import encode
    from sana_kit.encodings.settings import EncodingSettings
    from sana_kit.models.folder import find_model

    if quick:
        look_once()
    if made_up:
        made_up_embeddings()
        store_module.SHARD_ITEMS = 4096
    ranks, base_model = Ranks(0, 1, torch.device("cpu")), find_model(model)[0]
    column = "text" if field == "dataset_name" else None
    before, clock, cpu = memory(), time.perf_counter(), time.process_time()
    images = load_images(
        **{field: name}, caption_column=column, instance_prompt="x", remember_in=f"{store}/images", ranks=ranks
    )
    loaded = time.perf_counter()
    settings = EncodingSettings(encodings_dir=store, resolution=64, center_crop=True, text_batch_size=1024)
    encoded = encode(images, base_model, settings, ranks=ranks, extra_prompts=[("", None)])
    ended, after = time.perf_counter(), memory()
    assert int(encoded.latents(len(encoded) - 1).shape[0]) == 4
    return {
        "cpu_seconds": time.process_time() - cpu,
        "images_seconds": loaded - clock,
        "encodings_seconds": ended - loaded,
        "own_bytes": after["RssAnon"] - before["RssAnon"],
        "mapped_bytes": after["RssFile"] - before["RssFile"],
        "encoded": encoded.facts.encoded_images + encoded.facts.encoded_prompts,
    }


def measure(work: Path, model: Path, rows: int, kind: str, distinct: bool, quick: bool) -> None:
    """Make the data set, start cold and warm, print a line for each."""
    make = make_table if kind == "parquet" else make_folder
    source = make(work / f"data-{rows}", rows, distinct)
    time.sleep(2.1)  # files that changed a moment ago are looked at again
    store = str(work / f"store-{rows}")
    for name in ("cold", "warm", "warm"):
        command = [
            sys.executable,
            __file__,
            "--start",
            str(model),
            *source,
            store,
            str(int(distinct)),
            str(int(quick)),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        found = json.loads(done.stdout.splitlines()[-1])
        seconds = found["images_seconds"] + found["encodings_seconds"]
        print(
            f"{rows:>10,} rows, {kind}, {name}: {seconds:7.2f} s, {found['cpu_seconds']:.2f} s of CPU ="
            f" {found['cpu_seconds'] / rows * 1e6:6.2f} us a row"
            f" (images {found['images_seconds']:.2f} s, encodings {found['encodings_seconds']:.2f} s);"
            f" {found['own_bytes'] / rows:6.1f} bytes a row, {found['mapped_bytes'] / rows:6.1f} more mapped;"
            f" {found['encoded']} encoded",
            flush=True,
        )


def main() -> int:
    """The command line; see the top of this file."""
    sys.path[:0] = [str(KIT), str(KIT / "tests"), str(KIT / "tests" / "helpers")]
    if sys.argv[1:2] == ["--start"]:
        print(json.dumps(start(*sys.argv[2:6], sys.argv[6] == "1", sys.argv[7] == "1")))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000], help="sizes of data sets")
    parser.add_argument("--kind", choices=("parquet", "folder"), default="parquet", help="what the images lie in")
    parser.add_argument("--distinct_captions", action="store_true", help="a caption of its own for every row")
    parser.add_argument("--quick_cold", action="store_true", help="look at each distinct image once")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sana_startup_") as folder:
        import tiny

        model = tiny.make_tiny_pipeline(Path(folder) / "model")
        for rows in args.rows:
            measure(Path(folder), model, rows, args.kind, args.distinct_captions, args.quick_cold)
    return 0


if __name__ == "__main__":
    sys.exit(main())
