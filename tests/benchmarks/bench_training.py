"""Training speed: the kit beside a bare loop and beside diffusers' own trainer, in turn on one machine.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_training.py --diffusers PATH_OF_A_CHECKOUT
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_training.py --diffusers PATH --processes 2      with ZeRO-2
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_training.py --train_mode full --processes 2    no diffusers' side
    python tests/benchmarks/bench_training.py --config 1600M --resolution 1024 --batch_size 8      on a GPU or an NPU
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_training.py --baseline CHECKOUT --fused_blocks auto    an older kit

`bare` is the least that a step can be: the same transformer with the same LoRA and engine, forward, backward and
optimizer step on tensors that stay on the device, of the shapes that the kit's batches have. `diffusers` is its own
train_dreambooth_lora_sana.py from a checkout's HEAD, with the reference kit's edits (made by patch_sana.py: bf16 VAE)
and `--gradient_checkpointing`, as the reference kit starts it. On a CPU a scaled model keeps the real proportions:
VAE encode : text encode : transformer forward = 5.2 : 1.2 : 3.0 FLOPs per image. Each figure is the median over the
rounds.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KIT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(KIT), str(KIT / "tests")]  # run as a file, from any folder

from sana_kit import devices  # noqa: E402
from sana_kit.arithmetic import AUTOENCODER, TEXT_ENCODER, TRANSFORMERS  # noqa: E402
from sana_kit.models.folder import find_model  # noqa: E402
from sana_kit.training.config import parse_args  # noqa: E402
from sana_kit.training.engine import Engine  # noqa: E402
from sana_kit.training.optim import build_optimizer  # noqa: E402
from sana_kit.training.transformer import prepare_transformer  # noqa: E402

WORDS = (
    "a drawing of the small large red green blue yellow square circle dog cat tree house with on under near".split()
)


# Runs a script that notes, after each backward pass, the CPU seconds that its process has had.
CLOCKED = """
import os, runpy, sys, time
import torch

own = torch.autograd.backward


def backward(*args, **kwargs):
    own(*args, **kwargs)
    if os.environ.get("RANK", "0") == "0":
        with open(os.environ["BENCH_CPU"], "a") as file:
            file.write(f"{time.process_time()}\\n")


torch.autograd.backward = backward
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def clocked(work: Path, command: list, environment=None, kit: Path = KIT) -> tuple[str, float]:
    """(what the script printed, CPU seconds of rank 0 from one backward pass to the next, the first two left out)."""
    runner, marks = work / "clocked.py", work / "cpu.txt"
    runner.write_text(CLOCKED)
    marks.unlink(missing_ok=True)
    prefix = command.index(next(word for word in command if str(word).endswith(".py")))
    out = run([*command[:prefix], runner, *command[prefix:]], {**(environment or {}), "BENCH_CPU": str(marks)}, kit)
    times = [float(line) for line in marks.read_text().split()]
    return out, statistics.median(after - before for before, after in itertools.pairwise(times[2:]))


def write_scaled_model(folder: Path) -> Path:
    """A random SanaPipeline whose parts cost 5.2 : 1.2 : 3.0 per 256 px image, in bf16."""
    import torch
    from helpers import tiny

    torch.manual_seed(0)
    sizes = {"vae": tiny.SCALED_VAE, "text": tiny.SCALED_TEXT, "transformer": tiny.SCALED_TRANSFORMER}
    tiny.build_pipeline(**sizes, words=WORDS).to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_real_model(folder: Path, name: str, resolution: int, light: bool = False) -> Path:
    """A SanaPipeline of the published configurations with random weights in bf16.

    Args:
        light: VAE and text encoder of the same interfaces with next to no layers, where only the transformer counts.
    """
    import torch
    from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
    from helpers.tiny import make_scheduler, make_tokenizer
    from transformers import Gemma2Config, Gemma2Model

    vae = dict(AUTOENCODER)
    text = {**TEXT_ENCODER, "vocab_size": 600, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    if light:
        for half in ("encoder", "decoder"):
            vae[f"{half}_block_out_channels"] = [32] * len(vae[f"{half}_block_out_channels"])
            vae[f"{half}_layers_per_block"] = [1] * len(vae[f"{half}_layers_per_block"])
        text |= {"num_hidden_layers": 1, "intermediate_size": 64}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # 1.6 billion weights in float32 first would not fit everywhere
    try:
        with devices.pick_device():
            parts = (
                Gemma2Model(Gemma2Config(**text)),
                AutoencoderDC(**vae),
                SanaTransformer2DModel(**{**TRANSFORMERS[name], "sample_size": resolution // 32}),
            )
    finally:
        torch.set_default_dtype(torch.float32)
    SanaPipeline(make_tokenizer(WORDS), *parts, make_scheduler()).save_pretrained(folder)
    return folder


def write_images(folder: Path, count: int, pixels: int) -> Path:
    """A parquet data set of noise images with captions of 12 to 24 words."""
    import numpy as np
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature
    from PIL import Image

    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (pixels, pixels, 3), dtype=np.uint8)) for _ in range(count)]
    texts = [" ".join(generator.choice(WORDS, int(generator.integers(12, 25)))) for _ in range(count)]
    (folder / "data").mkdir(parents=True)
    features = Features({"image": ImageFeature(), "text": Value("string")})
    Dataset.from_dict({"image": images, "text": texts}, features=features).to_parquet(
        str(folder / "data" / "train-001.parquet")
    )
    return folder


def command_prefix(processes: int, engine: bool = False) -> list[str]:
    """Plain Python for one process, unless an engine is asked for; accelerate with the kit's ZeRO-2 config else."""
    if processes == 1 and not engine:
        return [sys.executable]
    from helpers import free_port

    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port())]
    return [*launch, "--num_processes", str(processes), "--config_file", str(KIT / "bf16_accelerate_config.yaml")]


def run(command, environment=None, kit: Path = KIT) -> str:
    path = os.pathsep.join([str(kit), *filter(None, [os.environ.get("PYTHONPATH")])])  # an emulated host is made by it
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, **(environment or {})},
    )
    if done.returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def trainer_flags(options, model: Path, data: Path, output: Path) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={model}",
        f"--dataset_name={data}",
        "--caption_column=text",
        "--instance_prompt=x",
        f"--resolution={options.resolution}",
        f"--train_batch_size={options.batch_size}",
        f"--max_train_steps={options.steps}",
        "--checkpointing_steps=100000",
        "--mixed_precision=bf16",
        "--seed=0",
        f"--output_dir={output}",
    ]


def measure_kit(options, model, data, work, kit: Path = KIT) -> tuple[float, float]:
    """Steady-state images/s from the trainer's own summary, and CPU seconds an image; encodings are made once."""
    place = work / ("kit" if kit == KIT else "baseline")
    output = Path(tempfile.mkdtemp(dir=place)) / "run"  # a fresh run each round
    flags = trainer_flags(options, model, data, output)
    flags += ["--complex_human_instruction=none", "--report_to=none", "--logging_steps=2"]
    flags += [f"--train_mode={options.train_mode}", f"--encodings_dir={place / 'encodings'}"]
    if kit == KIT:
        flags += [f"--fused_blocks={options.fused_blocks}"]
    command = [*command_prefix(options.processes), kit / "train_dreambooth_lora_sana.py", *flags]
    _, spent = clocked(work, command, kit=kit)
    return json.loads((output / "summary.json").read_text())["images_per_second"], spent / options.batch_size


def measure_bare(options, model, data, work) -> tuple[float, float]:
    """Images/s of the bare loop, as its rank 0 prints it, and CPU seconds an image."""
    arguments = ["--role=bare", f"--model={model}", f"--batch_size={options.batch_size}", f"--steps={options.steps}"]
    arguments += [f"--resolution={options.resolution}", f"--tokens={options.tokens}"]
    arguments += [f"--train_mode={options.train_mode}", f"--fused_blocks={options.fused_blocks}"]
    out, spent = clocked(work, [*command_prefix(options.processes), Path(__file__).resolve(), *arguments])
    return float(out.strip().splitlines()[-1].split()[-1]), spent / options.batch_size


def build_engine(options, *flags: str):
    """(accelerator, found model, transformer, prepared model, optimizer) as the trainer's own functions make them.

    options: model and train_mode; flags: more of the trainer's.
    """

    args = parse_args(
        [f"--pretrained_model_name_or_path={options.model}", "--mixed_precision=bf16", "--report_to=none"]
        + [f"--train_mode={options.train_mode}", f"--fused_blocks={getattr(options, 'fused_blocks', 'off')}", *flags]
    )
    found, problems = find_model(str(options.model))
    assert not problems, problems
    engine = Engine.create(args)
    transformer = prepare_transformer(args, engine, found)
    transformer.train()
    trainable = [(name, p) for name, p in transformer.named_parameters() if p.requires_grad]
    optimizer = build_optimizer(args, trainable, engine.device)
    return engine.accelerator, found, transformer, *engine.prepare(transformer, optimizer)


def bare(options) -> None:
    """Forward, backward and optimizer step on resident tensors, under the engine that the launcher chose."""
    import torch

    built = build_engine(options, f"--train_batch_size={options.batch_size}")
    accelerator, model_found, transformer, model, optimizer = built
    device = accelerator.device
    config = transformer.config
    side = options.resolution // model_found.vae_factor
    batch, generator = options.batch_size, torch.Generator().manual_seed(0)

    def resident(*shape):
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    latents, target = resident(batch, config.in_channels, side, side), resident(batch, config.in_channels, side, side)
    embeds = resident(batch, options.tokens, config.caption_channels)
    mask = torch.ones(batch, options.tokens, dtype=torch.bool, device=device)
    timestep = torch.full((batch,), 500.0, device=device)
    times = []
    for _ in range(options.steps):
        start = time.perf_counter()
        prediction = model(
            hidden_states=latents,
            encoder_hidden_states=embeds,
            encoder_attention_mask=mask,
            timestep=timestep,
            return_dict=False,
        )[0]
        loss = torch.nn.functional.mse_loss(prediction.float(), target.float())
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        times.append(time.perf_counter() - start)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print("images/s", batch * accelerator.num_processes / statistics.median(times[2:]), flush=True)
    accelerator.end_training()


def prepare_upstream(options, work: Path) -> list:
    """diffusers' trainer from the checkout, patched, and the command that runs it and times its steps."""
    name = "train_dreambooth_lora_sana.py"
    shown = subprocess.run(
        ["git", "-C", options.diffusers, "show", f"HEAD:examples/dreambooth/{name}"], capture_output=True
    )
    source = shown.stdout or (Path(options.diffusers) / "examples" / "dreambooth" / name).read_bytes()
    folder = work / "upstream"
    folder.mkdir()
    (folder / name).write_bytes(source)
    if not options.unpatched:
        run([sys.executable, KIT / "patch_sana.py", folder / name])
    workers = KIT / "tests" / "distributed" / "workers"
    shutil.copytree(workers / "stand_in", work / "stand_in")
    run_with_gloo = (workers / "run_with_gloo.py").read_text()
    timing = (
        "import time\n"
        "def log(self, values, step=None, **rest):\n"
        "    if self.is_main_process:\n"
        "        open(os.environ['BENCH_TIMES'], 'a').write(f'{time.perf_counter()}\\n')\n"
        "accelerate.Accelerator.log = log\n"
    )
    patched = run_with_gloo.replace("def main():\n", f"{timing}\n\ndef main():\n")
    if options.processes == 1:  # one process needs no group
        patched = patched.replace("    accelerate.Accelerator.__init__ = with_gloo\n", "")
    assert "BENCH_TIMES" in patched
    runner = work / "run_upstream.py"
    runner.write_text(patched)
    return [runner, folder / name]


def measure_upstream(options, model, data, work, script) -> tuple[float, float]:
    """Images/s and CPU seconds an image of diffusers' trainer: median step after the first two."""
    output, times_file = work / "upstream_out", work / "times.txt"
    shutil.rmtree(output, ignore_errors=True)
    times_file.unlink(missing_ok=True)
    flags = trainer_flags(options, model, data, output) + ["--gradient_checkpointing", "--report_to=tensorboard"]
    command = [*command_prefix(options.processes), *script, *flags]
    _, spent = clocked(work, command, {"BENCH_TIMES": str(times_file)})
    marks = [float(line) for line in times_file.read_text().split()]
    steps = [after - before for before, after in zip(marks, marks[1:], strict=False)][1:]
    return options.batch_size * options.processes / statistics.median(steps), spent / options.batch_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", help="a checkout (or bare git folder) of diffusers")
    parser.add_argument("--baseline", type=Path, help="a checkout of an older commit of the kit, its trainer as it is")
    parser.add_argument("--fused_blocks", choices=("off", "auto"), default="off", help="of the kit and the bare loop")
    parser.add_argument("--unpatched", action="store_true", help="diffusers' trainer as it is: float32 VAE")
    parser.add_argument("--config", choices=("scaled", "1600M", "600M"), default="scaled")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train_mode", choices=("lora", "full"), default="lora")
    parser.add_argument("--tokens", type=int, default=32, help="caption tokens of the bare loop's batches")
    parser.add_argument("--role", choices=("compare", "bare"), default="compare", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "bare":
        bare(options)
        return
    if options.diffusers and options.train_mode == "full":
        parser.error("--diffusers: its train_dreambooth_lora_sana.py trains LoRA only; leave one of the two flags out")

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = work / "model"
        if options.config == "scaled":
            write_scaled_model(model)
        else:
            write_real_model(model, options.config, options.resolution)
        data = write_images(work / "data", 16, options.resolution)
        upstream = prepare_upstream(options, work) if options.diffusers else None
        figures = {"bare": [], "kit": [], "baseline": [], "diffusers": []}
        for name in ("kit", "baseline"):
            (work / name).mkdir()
        for number in range(options.rounds):
            figures["bare"].append(measure_bare(options, model, data, work))
            figures["kit"].append(measure_kit(options, model, data, work))
            if options.baseline:
                figures["baseline"].append(measure_kit(options, model, data, work, options.baseline.resolve()))
            if upstream:
                figures["diffusers"].append(measure_upstream(options, model, data, work, upstream))
            print(
                f"round {number + 1}: " + ", ".join(f"{k} {v[-1][0]:.3f}" for k, v in figures.items() if v), flush=True
            )
        engine = "one process" if options.processes == 1 else f"ZeRO-2, {options.processes} processes"
        print(
            f"\n{options.config} model, {options.train_mode}, {options.resolution} px, batch {options.batch_size} per"
            f" process, bf16, {engine},"
            f" fused blocks {options.fused_blocks},"
            f" {os.environ.get('OMP_NUM_THREADS', 'all')} thread(s) per process, median of {options.rounds} rounds"
        )
        rates, spent = ({name: [pair[i] for pair in pairs] for name, pairs in figures.items()} for i in (0, 1))
        kit, own = statistics.median(rates["kit"]), statistics.median(spent["kit"])
        print(f"{'':12}{'images/s':>10}{'min':>9}{'max':>9}{'kit / it':>10}{'CPU s an image':>16}{'it / kit':>10}")
        for name, values in rates.items():
            if values:
                middle, cpu = statistics.median(values), statistics.median(spent[name])
                line = f"{name:12}{middle:10.3f}{min(values):9.3f}{max(values):9.3f}{kit / middle:10.2f}"
                print(f"{line}{cpu:16.3f}{cpu / own:10.2f}")


if __name__ == "__main__":
    main()
