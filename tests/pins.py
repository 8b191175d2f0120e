"""Pins: the bits that must not change when the kit is rebuilt, taken from two kits and compared.

    python tests/pins.py record KIT_FOLDER OUT_FOLDER [--inputs FOLDER]   runs that kit and writes OUT_FOLDER/pins.json
    python tests/pins.py compare A/pins.json B/pins.json                  per pin equal or different, exit code 0 or 1
    python tests/pins.py resume KIT_FOLDER OLD_OUT NEW_OUT                goes on from an older kit's checkpoints

For instance, with a checkout of the older commit in ../older:

    python tests/pins.py record ../older ../pins/older --inputs ../pins/inputs
    python tests/pins.py record . ../pins/newer --inputs ../pins/inputs
    python tests/pins.py compare ../pins/older/pins.json ../pins/newer/pins.json
    python tests/pins.py resume . ../pins/older ../pins/resumed

Nothing of the kit is imported: its scripts are started by their command lines, on the CPU with one thread per
process, with the tiny model and the six images of tests/helpers/tiny.py. Random crops follow the run's seed, in
newer kits by --crop_seed. Pinned are, of a six-step LoRA run and of two steps of full fine-tuning, each on one
process and under ZeRO-2 with two processes: the weights of the checkpoints and of the result, the optimizer's
masters and moments, the random states, and the encodings' keys and values; of the inference scripts, without and
with that LoRA: the pixels of the manifest's images. A pin holds one SHA-256 per tensor, over dtype, shape and bytes,
not over the file's header. Bits depend on processor and libraries too: compare pins of one machine and one
environment.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

PINS_FILE = "pins.json"
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "deepspeed", "peft", "safetensors", "numpy", "pillow")
ADAPTER = "pytorch_lora_weights.safetensors"
OPTIMIZER = "optimizer.safetensors"
RANDOM_STATES = "random_states.pt"

TRAINING = [
    "--caption_column=text",
    "--instance_prompt=a drawing",
    "--resolution=64",
    "--random_flip",
    "--train_batch_size=2",
    "--gradient_accumulation_steps=2",
    "--lr_scheduler=cosine",
    "--lr_warmup_steps=0",
    "--seed=5",
    "--mixed_precision=bf16",
    "--report_to=none",
]
LORA = ["--train_mode=lora", "--rank=4", "--lora_alpha=4", "--lora_dropout=0.1", "--learning_rate=1e-2"]
LORA += ["--max_train_steps=6", "--checkpointing_steps=3"]
FULL = ["--train_mode=full", "--learning_rate=1e-3", "--max_train_steps=2", "--checkpointing_steps=1"]
# Per training run: processes, flags, the step to resume from, the last step.
TRAINING_RUNS = {
    "lora_one": (1, LORA, 3, 6),
    "lora_zero2": (2, LORA, 3, 6),
    "full_one": (1, FULL, 1, 2),
    "full_zero2": (2, FULL, 1, 2),
}
INFERENCE = ["--prompt=a red square on white", "--prompt=a photo of small dog", "--seeds", "8", "23"]
INFERENCE += ["--num_inference_steps=4", "--height=64", "--width=64", "--no_resolution_binning", "--batch_size=1"]
INFERENCE += ["--device=cpu"]


class PinError(RuntimeError):
    """A kit could not be run, or did not write what is to be pinned; the message names the file."""


# ---------------------------------------------------------------------------------------------------------------------
# Running a kit


def make_inputs(folder: Path) -> Path:
    """The tiny model and data set below `folder`, built once; every kit gets the same files."""
    if not (folder / "complete").is_file():
        from helpers import tiny

        if folder.exists() and any(folder.iterdir()):
            raise PinError(f"{folder}: neither empty nor inputs of an earlier record; name another folder.")
        tiny.make_tiny_pipeline(folder / "model")
        tiny.write_parquet_dataset(folder / "images")
        (folder / "complete").touch()
    return folder


def environment(kit: Path) -> dict[str, str]:
    """The environment of a kit's scripts: that kit alone on the path, offline, on the CPU, one thread."""
    outside = ("ACCELERATE_", "MASTER_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "SANA_")
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith(outside)},
        "PYTHONPATH": str(kit),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def run_script(kit: Path, log: Path, script: str, *flags: str, processes: int = 1) -> None:
    """Run a script of the kit, its output to `log`: plainly, or with more processes under the kit's ZeRO-2 config.

    Raises:
        PinError: it did not end with exit code 0.
    """
    command = [sys.executable]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command += ["-m", "accelerate.commands.launch", "--config_file", str(kit / "bf16_accelerate_config.yaml")]
        command += ["--num_processes", str(processes), "--main_process_port", str(port)]
    command += [str(kit / script), *flags]
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"running {log.stem}: {script} on {processes} process{'es' if processes > 1 else ''}", flush=True)
    with open(log, "w", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment(kit), cwd=kit).returncode
    if code != 0:
        tail = log.read_text(encoding="utf-8", errors="replace")[-4000:]
        raise PinError(f"{script} ended with exit code {code}; the end of {log}:\n{tail}")


def crops_by_seed(kit: Path) -> list[str]:
    """The flag by which a kit's crops follow the seed; older ones always did so."""
    known = any(
        "crop_seed: int" in path.read_text(encoding="utf-8") for path in (kit / "sana_kit/training").glob("*.py")
    )
    return ["--crop_seed=5"] if known else []


def train(kit: Path, inputs: Path, out: Path, name: str, *more: str) -> None:
    """One of TRAINING_RUNS into out/name."""
    processes, flags, _, _ = TRAINING_RUNS[name]
    source = [f"--pretrained_model_name_or_path={inputs / 'model'}", f"--dataset_name={inputs / 'images'}"]
    target = [f"--output_dir={out / name}"]
    log = out / "logs" / f"{name}.log"
    run_script(
        kit,
        log,
        "train_dreambooth_lora_sana.py",
        *source,
        *target,
        *TRAINING,
        *crops_by_seed(kit),
        *flags,
        *more,
        processes=processes,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Taking pins: {name of the pin: {name of the tensor: SHA-256}}


def digest(*parts: object) -> str:
    """SHA-256 of the parts, bytes as they are and anything else by its repr, each with its length before it."""
    sha = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()


def tensor_hash(tensor) -> str:
    """SHA-256 of dtype, shape and bytes of a torch tensor."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return digest(str(tensor.dtype), tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes())


def safetensors_pin(*paths: Path) -> dict[str, str]:
    """Hashes of the tensors of these files together.

    Raises:
        PinError: there is no such file, or no tensor in it.
    """
    from safetensors.torch import load_file

    for path in paths:
        if not path.is_file():
            raise PinError(f"{path}: the run did not write it")
    pin = {name: tensor_hash(tensor) for path in paths for name, tensor in load_file(path).items()}
    if not pin:
        raise PinError(f"no tensor in {', '.join(map(str, paths)) or 'no file'}")
    return pin


def random_states_pin(path: Path) -> dict[str, str]:
    """Hashes of every rank's generator states: rank 0 python, rank 0 numpy, ..."""
    import torch

    if not path.is_file():
        raise PinError(f"{path}: the run did not write it")
    states = torch.load(path, map_location="cpu", weights_only=True)["states"]
    return {
        f"rank {rank} {key}": tensor_hash(value) if torch.is_tensor(value) else digest(value)
        for rank, state in enumerate(states)
        for key, value in state.items()
    }


def weights_pin(folder: Path, full: bool) -> dict[str, str]:
    """The adapter, or the whole transformer, that lies in a checkpoint or in the output folder."""
    if not full:
        return safetensors_pin(folder / ADAPTER)
    shards = sorted((folder / "transformer").glob("*.safetensors"))
    if not shards:
        raise PinError(f"{folder / 'transformer'}: the run wrote no weights there")
    return safetensors_pin(*shards)


def training_pins(out: Path, name: str, steps: tuple[int, ...]) -> dict[str, dict[str, str]]:
    """Pins of out/name: of the checkpoints of these steps, of the result, and of the encodings."""
    full = name.startswith("full")
    weights = "transformer" if full else "adapter"
    pins = {}
    for step in steps:
        folder = out / name / f"checkpoint-{step}"
        pins[f"{name} step {step} {weights}"] = weights_pin(folder, full)
        pins[f"{name} step {step} optimizer"] = safetensors_pin(folder / OPTIMIZER)
        pins[f"{name} step {step} random states"] = random_states_pin(folder / RANDOM_STATES)
    pins[f"{name} result {weights}"] = weights_pin(out / name, full)
    for kind in ("latents", "prompts"):
        shards = sorted((out / name / "encodings" / kind).glob("*.safetensors"))
        pins[f"{name} encodings {kind}"] = safetensors_pin(*shards)
    return pins


def images_pin(folder: Path) -> dict[str, str]:
    """Hashes of the pixels of every image that the manifest names."""
    from PIL import Image

    manifest = folder / "manifest.jsonl"
    if not manifest.is_file():
        raise PinError(f"{manifest}: the run did not write it")
    pin = {}
    for line in map(json.loads, manifest.read_text(encoding="utf-8").splitlines()):
        with Image.open(folder / line["file"]) as image:
            pin[f"{line['file']} ({line['prompt']}, seed {line['seed']})"] = digest(
                image.mode, image.size, image.tobytes()
            )
    if len(pin) != 4:
        raise PinError(f"{manifest} names {len(pin)} images instead of 4")
    return pin


def files_pin(folder: Path) -> dict[str, str]:
    """Hashes of all files below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): digest(path.read_bytes()) for path in files}


# ---------------------------------------------------------------------------------------------------------------------
# The three commands


def new_folder(folder: Path) -> Path:
    """`folder`, made.

    Raises:
        PinError: something lies in it.
    """
    if folder.exists() and any(folder.iterdir()):
        raise PinError(f"{folder}: is not empty; name a new folder, since pins of two runs must not mix.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_pins(out: Path, kit: Path, inputs: Path, pins: dict) -> Path:
    """OUT_FOLDER/pins.json: the pins, where they were made and with which libraries."""
    import torch

    git = ["git", "-C", str(kit), "describe", "--always", "--dirty", "--abbrev=12"]
    described = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    content = {
        "kit": str(kit),
        "commit": described or None,
        "inputs": str(inputs),
        "flags": [*TRAINING, *LORA, *FULL, *INFERENCE],
        "environment": {
            **{name: version(name) for name in LIBRARIES},
            "python": sys.version.split()[0],
            "cpu": torch.backends.cpu.get_cpu_capability(),
        },
        "pins": pins,
    }
    path = out / PINS_FILE
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path


def read_pins(path: Path) -> dict:
    """The content of a pins.json, or of the one in a folder."""
    path = path / PINS_FILE if path.is_dir() else path
    if not path.is_file():
        raise PinError(f"{path}: no such file; `record` writes it.")
    return json.loads(path.read_text(encoding="utf-8"))


def record(kit: Path, out: Path, inputs: Path) -> None:
    """Run everything with the kit and write the pins."""
    new_folder(out)
    make_inputs(inputs)
    pins = {"inputs": files_pin(inputs)}
    for name, (_, _, middle, last) in TRAINING_RUNS.items():
        train(kit, inputs, out, name)
        pins.update(training_pins(out, name, (middle, last)))
    scripts = {
        "images_base": ["infer_sana_text2img_bf16.py"],
        "images_lora": ["infer_sana_text2img_lora_bf16.py", f"--lora_weights={out / 'lora_one'}"],
    }
    for name, command in scripts.items():
        flags = [f"--model_path={inputs / 'model'}", f"--output_path={out / name}", *INFERENCE]
        run_script(kit, out / "logs" / f"{name}.log", *command, *flags)
        pins[name] = images_pin(out / name)
    print(f"{len(pins)} pins in {write_pins(out, kit, inputs, pins)}")


def resume(kit: Path, old: Path, new: Path) -> bool:
    """Go on from the first checkpoint of each of the old runs; True where the last step's bits are the old run's."""
    content = read_pins(old)
    inputs = Path(content["inputs"])
    if files_pin(inputs) != content["pins"]["inputs"]:
        raise PinError(f"{inputs}: not the model and images that {old} was made with; record it again.")
    new_folder(new)
    pins = {}
    for name, (_, _, middle, last) in TRAINING_RUNS.items():
        shutil.copytree(old / name, new / name)
        shutil.rmtree(new / name / f"checkpoint-{last}")
        (new / name / ADAPTER).unlink(missing_ok=True)
        shutil.rmtree(new / name / "transformer", ignore_errors=True)
        train(kit, inputs, new, name, f"--resume_from_checkpoint=checkpoint-{middle}")
        pins.update(training_pins(new, name, (last,)))
    write_pins(new, kit, inputs, pins)
    return compare({**content, "pins": {name: content["pins"][name] for name in pins}}, read_pins(new))


def difference(first: dict[str, str], second: dict[str, str]) -> str | None:
    """What sets two pins apart, None if nothing does."""
    if first == second:
        return None
    if sorted(first.values()) == sorted(second.values()):
        return "the same bytes under other names"
    changed = [name for name in first if name in second and first[name] != second[name]]
    counts = {
        f"of {len(first.keys() & second.keys())} have other bytes": changed,
        "only in the first": [name for name in first if name not in second],
        "only in the second": [name for name in second if name not in first],
    }
    return "; ".join(f"{len(names)} {what} ({names[0]})" for what, names in counts.items() if names)


def compare(first: dict, second: dict) -> bool:
    """Print per pin whether it is equal; True if all are.

    Raises:
        PinError: they were taken with other flags.
    """
    if first.get("flags") != second.get("flags"):
        raise PinError("the two were taken with other flags; record both with this file.")
    made = [content["environment"] for content in (first, second)]
    print(f"first:  {first['kit']} at {first['commit']}\nsecond: {second['kit']} at {second['commit']}")
    for key in sorted(made[0].keys() | made[1].keys()):
        if made[0].get(key) != made[1].get(key):
            print(f"note: {key} {made[0].get(key)} and {made[1].get(key)}: bits may differ for that reason alone")
    different = 0
    for name in {**first["pins"], **second["pins"]}:
        if name not in first["pins"] or name not in second["pins"]:
            reason = f"only in the {'first' if name in first['pins'] else 'second'}"
        else:
            reason = difference(first["pins"][name], second["pins"][name])
        different += reason is not None
        print(f"equal      {name}" if reason is None else f"DIFFERENT  {name}: {reason}")
    print(f"{different} pins differ" if different else "all pins are equal")
    return not different


def main() -> int:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description="Pin the bits of a kit's runs and compare them with another kit's.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("record", help="run a kit and write its pins")
    one.add_argument("kit", type=Path, help="folder of the kit")
    one.add_argument("out", type=Path, help="new folder for the runs and pins.json")
    one.add_argument("--inputs", type=Path, help="folder of the tiny model and images, built where missing")
    two = commands.add_parser("compare", help="compare two pins.json")
    two.add_argument("first", type=Path)
    two.add_argument("second", type=Path)
    three = commands.add_parser("resume", help="go on from an older kit's checkpoints")
    three.add_argument("kit", type=Path, help="folder of the kit that resumes")
    three.add_argument("old", type=Path, help="OUT_FOLDER of the older kit's `record`; it stays as it is")
    three.add_argument("new", type=Path, help="new folder for the resumed runs and their pins.json")
    args = parser.parse_args()
    try:
        if args.command == "compare":
            return 0 if compare(read_pins(args.first), read_pins(args.second)) else 1
        kit = args.kit.resolve()
        if not (kit / "train_dreambooth_lora_sana.py").is_file():
            raise PinError(f"{kit}: no kit there (train_dreambooth_lora_sana.py is missing)")
        if args.command == "record":
            out = args.out.resolve()
            record(kit, out, (args.inputs or out.parent / "inputs").resolve())
            return 0
        return 0 if resume(kit, args.old.resolve(), args.new.resolve()) else 1
    except PinError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
