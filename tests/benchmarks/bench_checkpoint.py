"""Seconds and bytes of a checkpoint of full fine-tuning under the kit's ZeRO-2, and the host memory it takes.

    python tests/benchmarks/bench_checkpoint.py --config 600M --processes 2     about 16 GB of memory, 20 GB of disk
    python tests/benchmarks/bench_checkpoint.py --config scaled

One update on one small image, so that the moments are there; then checkpoint-1, the result, and a start that goes on
from it. Memory is the largest resident size of a rank, sampled five times a second: `before` while it trains, `saving`
until the checkpoint is there.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench_training
import psutil

KIT = Path(__file__).resolve().parent.parent.parent


def resident(process: psutil.Process) -> int:
    """Largest resident size of a rank below `process`, in bytes."""
    sizes = [0]
    for child in process.children(recursive=True):
        try:
            sizes.append(child.memory_info().rss)
        except psutil.Error:
            continue
    return max(sizes)


def train(options, model: Path, data: Path, output: Path, *more: str) -> tuple[list[dict], dict[str, int]]:
    """(lines of the run's log, {"before", "saving": bytes})."""
    flags = bench_training.trainer_flags(options, model, data, output)
    flags += ["--train_mode=full", "--complex_human_instruction=none", "--report_to=none", "--checkpointing_steps=1"]
    prefix = bench_training.command_prefix(options.processes, engine=True)
    command = [*prefix, KIT / "train_dreambooth_lora_sana.py", *flags, *more]
    peak = {"before": 0, "saving": 0}
    with open(output.with_suffix(".log"), "w", encoding="utf-8") as log:
        run = psutil.Popen([str(word) for word in command], stdout=log, stderr=subprocess.STDOUT)
        while run.poll() is None:
            saving = any(output.glob(".checkpoint-*.partial-*"))
            kind = "saving" if saving else "before"
            if not (output / "checkpoint-1").exists() or saving:
                peak[kind] = max(peak[kind], resident(run))
            time.sleep(0.2)
    if run.returncode:
        sys.exit(Path(log.name).read_text(encoding="utf-8")[-4000:])
    return [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()], peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=("scaled", "600M", "1600M"), default="600M")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", help="where everything is written; default a temporary folder")
    options = parser.parse_args()
    options.resolution, options.batch_size, options.steps, options.tokens = 64, 1, 1, 24
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        work = Path(folder)
        if options.config == "scaled":
            model = bench_training.write_scaled_model(work / "model")
        else:
            model = bench_training.write_real_model(work / "model", options.config, 64, light=True)
        data = bench_training.write_images(work / "data", count=2, pixels=64)
        lines, peak = train(options, model, data, work / "out")
        (saved,) = [line for line in lines if line["event"] == "checkpoint"]
        size = sum(path.stat().st_size for path in (work / "out" / "checkpoint-1").rglob("*") if path.is_file())
        options.steps = 2
        begin = time.monotonic()
        train(options, model, data, work / "out", "--resume_from_checkpoint=latest", "--checkpoints_total_limit=1")
        resumed = time.monotonic() - begin
    figures = {
        "config": options.config,
        "processes": options.processes,
        "checkpoint_gb": size / 1e9,
        "seconds": saved["seconds"],
        "gb_per_second": size / 1e9 / saved["seconds"],
        "rank_gb_before": peak["before"] / 1e9,
        "rank_gb_saving": peak["saving"] / 1e9,
        "resumed_run_seconds": resumed,
    }
    print(json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in figures.items()}))


if __name__ == "__main__":
    main()
