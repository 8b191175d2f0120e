"""What the images and encodings of a start cost per row, cold and warm: seconds and memory, for data sets of any size.

    python tests/benchmarks/bench_startup.py                          100,000 and 1,000,000 rows of a parquet table
    python tests/benchmarks/bench_startup.py --rows 100000 --kind folder     the same for image files with captions
    python tests/benchmarks/bench_startup.py --distinct_captions      every row with a caption of its own
    python tests/benchmarks/bench_startup.py --kind streaming --rows 1000 100000   tar shards, to the first step

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


def make_shards(folder: Path, rows: int) -> Path:
    """Tar shards of 1000 rows, or of rows / 16 where there are fewer; the folder."""
    import io
    import tarfile

    import tiny

    folder.mkdir(parents=True)
    images = []
    for image, _ in tiny.make_images(IMAGES, size=16):
        image.save(buffer := io.BytesIO(), "PNG")
        images.append(buffer.getvalue())
    each = min(1000, -(-rows // 16))
    for start in range(0, rows, each):
        with tarfile.open(folder / f"train-{start // each:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for row in range(start, min(rows, start + each)):
                for ending, data in (("png", images[row % IMAGES]), ("txt", caption(row, True).encode())):
                    member = tarfile.TarInfo(f"{row:08d}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return folder


def measure_streaming(work: Path, model: Path, rows: int, window: int) -> None:
    """A run of one update of the trainer with --streaming: seconds from the command to its first step, and memory."""
    shards, output = make_shards(work / f"shards-{rows}", rows), work / f"run-{rows}"
    command = [sys.executable, KIT / "train_dreambooth_lora_sana.py", f"--pretrained_model_name_or_path={model}"]
    command += ["--streaming", f"--dataset_name={shards}", "--caption_column=txt", f"--stream_window={window}"]
    command += ["--resolution=64", "--train_batch_size=4", "--max_train_steps=1", "--report_to=none", "--seed=0"]
    command += ["--complex_human_instruction=none", f"--output_dir={output}", "--mixed_precision=bf16"]
    began = time.perf_counter()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    seconds = time.perf_counter() - began
    summary = json.loads((output / "summary.json").read_text())
    phases = {name: round(value, 1) for name, value in summary["start_seconds"].items()}
    print(
        f"{rows:>10,} rows, {len(list(shards.iterdir())):,} tar shards, windows of {window}: first step after"
        f" {sum(phases.values()):.1f} s ({phases}); the whole command {seconds:.1f} s",
        flush=True,
    )


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
    parser.add_argument("--kind", choices=("parquet", "folder", "streaming"), default="parquet")
    parser.add_argument("--window", type=int, default=256, help="images of a window, with --kind streaming")
    parser.add_argument("--distinct_captions", action="store_true", help="a caption of its own for every row")
    parser.add_argument("--quick_cold", action="store_true", help="look at each distinct image once")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sana_startup_") as folder:
        import tiny

        model = tiny.make_tiny_pipeline(Path(folder) / "model")
        for rows in args.rows:
            if args.kind == "streaming":
                measure_streaming(Path(folder), model, rows, args.window)
                continue
            measure(Path(folder), model, rows, args.kind, args.distinct_captions, args.quick_cold)
    return 0


if __name__ == "__main__":
    sys.exit(main())
