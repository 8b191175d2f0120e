"""A long run watched from outside: 2,000 steps under ZeRO-2 with 2 processes, a checkpoint every 20.

    python tests/benchmarks/soak.py [--steps 2000]

Prints resident memory, open files and steps/s of each rank over the first and the last quarter; exit code 1 if memory
grew by more than 5 %, open files grew at all, or the speed fell by more than 15 %. Kept out of CI: it takes minutes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

KIT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(KIT), str(KIT / "tests")]
TRAINER = "train_dreambooth_lora_sana.py"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    from helpers import free_port, script_environment, tiny

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = tiny.make_tiny_pipeline(work / "model")
        data = tiny.write_image_folder(work / "images")
        output = work / "out"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port())]
        command += [
            "--config_file",
            str(KIT / "bf16_accelerate_config.yaml"),
            "--num_processes",
            "2",
            str(KIT / TRAINER),
        ]
        command += [f"--pretrained_model_name_or_path={model}", f"--instance_data_dir={data}", "--resolution=64"]
        command += ["--train_batch_size=1", f"--max_train_steps={options.steps}", "--checkpointing_steps=20"]
        command += ["--checkpoints_total_limit=3", "--logging_steps=10", f"--output_dir={output}", "--seed=0"]
        command += ["--complex_human_instruction=none", "--dataloader_num_workers=1"]
        log = open(work / "log.txt", "wb")
        process = subprocess.Popen(command, stdout=log, stderr=log, env=script_environment())
        seen = []  # (step, {rank: (resident bytes, open files)})
        while process.poll() is None:
            time.sleep(2)
            path = output / "train_log.jsonl"
            steps = (
                [line for line in path.read_text().splitlines() if '"event": "step"' in line] if path.exists() else []
            )
            ranks = {}
            for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
                try:
                    environment = child.environ()
                    if TRAINER in " ".join(child.cmdline()) and child.parent().pid == process.pid:
                        ranks[environment["RANK"]] = (child.memory_info().rss, child.num_fds())
                except (psutil.Error, KeyError):
                    continue
            if steps and len(ranks) == 2:
                seen.append((json.loads(steps[-1])["step"], ranks))
        if process.returncode:
            print((work / "log.txt").read_text()[-3000:])
            return 1
        entries = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]

    rates = [(e["step"], e["images_per_second"] / 2) for e in entries if e["event"] == "step"]
    saved = [e["seconds"] for e in entries if e["event"] == "checkpoint"]
    quarter = options.steps / 4
    bad = []
    print(f"{options.steps} steps, {len(saved)} checkpoints of {statistics.median(saved):.2f} s, {len(seen)} samples")
    for rank in ("0", "1"):
        # The first tenth is start-up: caches fill, workers start.
        first = [ranks[rank] for step, ranks in seen if options.steps / 10 < step <= options.steps / 10 + quarter]
        last = [ranks[rank] for step, ranks in seen if step > 3 * quarter]
        memory = [statistics.median(r for r, _ in part) / 2**20 for part in (first, last)]
        files = [statistics.median(f for _, f in part) for part in (first, last)]
        print(
            f"rank {rank}: resident {memory[0]:.1f} -> {memory[1]:.1f} MiB,"
            f" open files {files[0]:.0f} -> {files[1]:.0f}"
        )
        bad += ["memory"] * (memory[1] > 1.05 * memory[0]) + ["files"] * (files[1] > files[0])
    speed = [
        statistics.median(r for step, r in rates if low < step <= high)
        for low, high in ((options.steps / 10, options.steps / 10 + quarter), (3 * quarter, options.steps))
    ]
    print(f"steps/s {speed[0]:.2f} -> {speed[1]:.2f}")
    bad += ["speed"] * (speed[1] < 0.85 * speed[0])
    print("flat" if not bad else f"NOT flat: {', '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
