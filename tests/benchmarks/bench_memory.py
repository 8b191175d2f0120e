"""Bytes of weights, gradients, optimizer and buckets per device, computed and allocated, under the kit's ZeRO-2.

    python tests/benchmarks/bench_memory.py --config 1600M --processes 2                  LoRA, rank 4; 9 GB in all
    python tests/benchmarks/bench_memory.py --config scaled --train_mode full --processes 2

The trainer's own functions build transformer, optimizer and engine and make two steps on an image of 2 x 2 latents,
whose activations count for little. `allocated` is what rank 0 holds in tensors after a backward pass, each storage
counted once; `computed` is what `python -m sana_kit.flops` prints. `passing` is what a whole step takes above that at
its peak, as torch counted it: gradients on their way, buffers of the collectives, and the few activations.
"""

import argparse
import gc
import json
import sys
import tempfile
import warnings
from pathlib import Path

KIT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(KIT), str(KIT / "tests"), str(KIT / "tests" / "benchmarks")]  # run as a file, from any folder

from sana_kit import devices  # noqa: E402
from sana_kit.arithmetic import default_controlnet_layers, training_bytes  # noqa: E402
from sana_kit.quiet import quiet_libraries  # noqa: E402

CPU_ROUNDS = 5


def live_storages(device) -> dict[int, int]:
    """Address and bytes of every tensor storage on the device that Python can reach."""
    import torch

    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thing in gc.get_objects():
            if issubclass(type(thing), torch.Tensor) and thing.device.type == device.type:
                storage = thing.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    found.pop(0, None)
    return found


def peak_of(work, device) -> int:
    """Bytes that `work` takes on the device at its peak above what is there before, as torch's allocator counts.

    On a CPU the least of several rounds: now and then gloo's own thread is the last to let go of a buffer, which the
    profiler does not see, so that a round can count too much and never too little.
    """
    if device.type != "cpu":
        devices.reset_peak_memory(device)  # to what is there now
        before = devices.peak_memory_bytes(device)
        work()
        return devices.peak_memory_bytes(device) - before
    return min(cpu_peak_of(work) for _ in range(CPU_ROUNDS))


def cpu_peak_of(work) -> int:
    """The same of one round on the CPU, of what this thread and autograd's allocate and free."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def read_transformer_config(model) -> dict:
    return json.loads((Path(model) / "transformer" / "config.json").read_text())


def role(options) -> None:
    """One rank: two steps, then its bytes by part on the main process as a line of JSON."""
    import torch
    from bench_training import build_engine

    from sana_kit import arithmetic

    if options.bucket_elements:
        arithmetic.BUCKET_ELEMENTS = (1, options.bucket_elements)
    layers = default_controlnet_layers(read_transformer_config(options.model))
    built = build_engine(options, "--train_batch_size=1", f"--rank={options.rank}", f"--controlnet_layers={layers}")
    accelerator, _, transformer, engine, _ = built
    device = accelerator.device
    config = transformer.config
    shown = torch.zeros(1, config.in_channels, 2, 2, dtype=torch.bfloat16, device=device)
    control = {"control": shown} if options.train_mode == "controlnet" else {}

    def backward():
        generator = torch.Generator().manual_seed(0)
        prediction = engine(
            hidden_states=torch.randn(1, config.in_channels, 2, 2, generator=generator).to(device, torch.bfloat16),
            encoder_hidden_states=torch.randn(1, 16, config.caption_channels).to(device, torch.bfloat16),
            encoder_attention_mask=torch.ones(1, 16, dtype=torch.bool, device=device),
            timestep=torch.full((1,), 500.0, device=device),
            return_dict=False,
            **control,
        )[0]
        engine.backward(prediction.float().square().mean())

    def step():
        backward()
        engine.step()

    zero = engine.optimizer
    step()  # moments are made in the first step
    held = sum(live_storages(device).values())
    peak = held + peak_of(step, device)
    backward()
    gc.collect()
    live = live_storages(device)

    def take(tensors) -> int:
        """Bytes of these tensors' storages, each counted for the first part that has it."""
        return sum(live.pop(t.untyped_storage().data_ptr(), 0) for t in tensors if t is not None)

    gradients = [g for group in zero.averaged_gradients.values() if group is not None for g in group]
    measured = {
        "weights": take(transformer.parameters()),
        "masters": take(zero.single_partition_of_fp32_groups),
        "moments": take(
            value
            for state in zero.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor) and value.ndim
        ),
        "gradients": take(gradients),
    }
    measured["passing"] = peak - sum(measured.values())
    if accelerator.is_main_process:
        processes = accelerator.num_processes
        computed = training_bytes(config, options.train_mode, rank=options.rank, devices=processes)
        print(json.dumps({"computed": computed, "allocated": measured}), flush=True)
    accelerator.end_training()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=("scaled", "1600M", "600M"), default="1600M")
    parser.add_argument("--train_mode", choices=("lora", "full", "controlnet"), default="lora")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--bucket_elements", type=int, help="most gradients in a bucket, instead of the trainer's")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--model", help="a SanaPipeline folder instead of --config")
    parser.add_argument("--role", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet_libraries()
    if options.role:
        role(options)
        return

    import bench_training

    with tempfile.TemporaryDirectory() as folder:
        model = options.model or Path(folder) / "model"
        if not options.model and options.config == "scaled":
            bench_training.write_scaled_model(model)
        elif not options.model:
            bench_training.write_real_model(model, options.config, 1024, light=True)
        flags = ["--role", f"--model={model}", f"--train_mode={options.train_mode}", f"--rank={options.rank}"]
        flags += [f"--bucket_elements={options.bucket_elements}"] if options.bucket_elements else []
        prefix = bench_training.command_prefix(options.processes, engine=True)
        out = bench_training.run([*prefix, Path(__file__).resolve(), *flags])
    figures = json.loads([line for line in out.splitlines() if line.startswith('{"computed"')][-1])
    if options.json:
        print(json.dumps(figures))
        return
    mode = {"lora": f"LoRA rank {options.rank}", "full": "full fine-tuning"}.get(options.train_mode, "ControlNet")
    print(f"{options.model or options.config}, {mode}, ZeRO-2, {options.processes} processes: MB of one device")
    print(f"{'':12}{'computed':>12}{'allocated':>12}")
    for part, value in figures["allocated"].items():
        print(f"{part:12}{figures['computed'][part] / 1e6:12.2f}{value / 1e6:12.2f}")
    beyond = {
        kind: sum(v for part, v in figures[kind].items() if part != "weights") for kind in ("computed", "allocated")
    }
    print(f"{'but weights':12}{beyond['computed'] / 1e6:12.2f}{beyond['allocated'] / 1e6:12.2f}")


if __name__ == "__main__":
    sys.exit(main())
