"""Fine-tune SANA on your own images: LoRA (default) or all weights of the transformer.

    accelerate launch --config_file bf16_accelerate_config.yaml train_dreambooth_lora_sana.py \
        --pretrained_model_name_or_path=Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers \
        --dataset_name=pokemon-blip-captions --caption_column=text --instance_prompt="a pokemon" \
        --resolution=1024 --train_batch_size=8 --max_train_steps=5000 --mixed_precision=bf16 --output_dir=output

The accelerate config alone chooses the engine: one process, DDP, DeepSpeed ZeRO-1/2/3; Ascend NPU, CUDA GPU or CPU.
Every flag of diffusers' trainer of the same name is there (`--help` groups them); README.md lists the ones that
behave otherwise.

The way of the data: images and captions -> encoded once (sana_kit/encodings.py) -> VAE and text encoder leave
memory -> loader with noise -> transformer -> loss -> engine -> checkpoint-N -> pytorch_lora_weights.safetensors and
report.html.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from sana_kit import devices
from sana_kit.arithmetic import training_flops_per_image
from sana_kit.data.discover import load_class_images, load_images
from sana_kit.data.image_set import bad_image_problems, check_images, concat
from sana_kit.distributed import StopSignal
from sana_kit.encodings.encode import encode
from sana_kit.encodings.prompts import parse_instruction
from sana_kit.errors import EncodingStopped, run_as_script
from sana_kit.files import write_atomic
from sana_kit.locks import lock_folder
from sana_kit.models.loading import load_scheduler
from sana_kit.reports.report import refresh_report
from sana_kit.runlog import JsonLinesLog, PhaseClock, ThroughputMeter, console_bar
from sana_kit.training import checkpoints
from sana_kit.training.config import parse_args, public_config, redacted_command, validate_args, validation_prompts
from sana_kit.training.engine import Engine
from sana_kit.training.export import finish_outputs, write_final_weights
from sana_kit.training.optim import build_optimizer
from sana_kit.training.prior import generate_class_images
from sana_kit.training.recipes import flow_matching_loss, read_flow_shift
from sana_kit.training.recorder import check_finite, print_summary
from sana_kit.training.state import TrainState, check_same_images, data_digests, run_identity
from sana_kit.training.stream import SampleStream, StreamBatchSampler, collate
from sana_kit.training.transformer import prepare_transformer
from sana_kit.training.validation import Validation, validation_due
from sana_kit.workers import prepare_worker

PROCESS_STARTED = time.perf_counter()  # before the imports that take seconds


logger = logging.getLogger("sana")


def main(args: argparse.Namespace, process_started: float | None = None) -> int:
    """Train; returns the exit code: 0, or 143 / 130 after a SIGTERM / SIGINT that ended the run with a checkpoint.

    Args:
        process_started: time.perf_counter() when this process began, for the summary's start_seconds.
    """
    started = time.perf_counter()
    phases = PhaseClock(started if process_started is None else process_started)
    phases.mark("imports")
    base = validate_args(args, devices.accelerator_type())
    phases.mark("checks")

    # ------------------------------------------------------------------------------------------------- engine, logs
    engine = Engine.create(args)
    phases.mark("processes")
    main_process, device = engine.ranks.is_main, engine.device
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        level=logging.INFO if main_process else logging.WARNING,
        force=True,
    )
    for noisy in ("httpx", "DeepSpeed", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    devices.prepare_backend(device, allow_tf32=args.allow_tf32)
    output_dir = Path(args.output_dir)

    stop = StopSignal(engine.ranks)
    with lock_folder(output_dir, enabled=main_process):
        try:
            code = train(args, engine, base, output_dir, started, phases, stop)
            engine.ranks.close()
            return code
        except EncodingStopped:
            logger.warning("stopped while encoding; what is encoded is kept, the same command goes on from there")
            return stop.exit_code


def train(args, engine, base, output_dir: Path, started: float, phases: PhaseClock, stop: StopSignal) -> int:
    """The run itself, once the output folder is ours; `base` is the checked model. See `main`."""
    ranks, accelerator, device = engine.ranks, engine.accelerator, engine.device
    main_process, world_size = ranks.is_main, ranks.world_size
    from diffusers.optimization import get_scheduler

    # ------------------------------------------------------------------------------------------- where to start from
    resume, notes = checkpoints.start_or_resume(args, ranks)
    if args.seed is None:
        args.seed = ranks.agree(resume.state["seed"] if resume else int.from_bytes(os.urandom(4), "little"))
        logger.info("seed: %d (drawn; --seed=%d repeats this run)", args.seed, args.seed)
    devices.seed_everything(args.seed)
    log = JsonLinesLog(output_dir / "train_log.jsonl", main_process)
    for note in notes:
        logger.warning(note)
        log.write("warning", step=0, message=note)
    if args.resume_from_checkpoint == "latest" and resume is None:
        logger.info("no checkpoint in %s yet: starting at step 0", output_dir)

    # ------------------------------------------------------------------------------------- images and captions
    images = load_images(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        dataset_split=args.dataset_split,
        instance_data_dir=args.instance_data_dir,
        image_column=args.image_column,
        caption_column=args.caption_column,
        instance_prompt=args.instance_prompt,
        cache_dir=args.cache_dir,
        repeats=args.repeats,
        skip_bad_images=args.skip_bad_images,
    )
    check_same_images(images, stop.ranks)
    num_class = 0
    if args.with_prior_preservation:
        if not args.skip_bad_images and (bad := check_images(images)):  # before weights load for the class images
            raise ValueError("The training images cannot be used:\n- " + bad_image_problems([m for _, m in bad]))
        generate_class_images(args, accelerator, base)
        classes = load_class_images(args.class_data_dir, args.class_prompt, args.num_class_images)
        num_class = len(classes)
    num_instance = len(images)
    if main_process:
        for note in images.notes:
            logger.warning("data: %s", note)
            log.write("warning", step=0, message=note)
    instruction = parse_instruction(args.complex_human_instruction)
    extra_prompts = []
    if validation_prompts(args):
        extra_prompts = [(prompt, instruction) for prompt in validation_prompts(args)] + [("", None)]
    encoded = encode(
        concat(images, classes) if num_class else images,
        accelerator=accelerator,
        pretrained_model_name_or_path=args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
        store_dir=str(args.encodings_dir or output_dir / "encodings"),
        resolution=args.resolution,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        seed=args.seed,
        max_sequence_length=args.max_sequence_length,
        complex_human_instruction=instruction,
        vae_dtype=devices.DTYPES[args.vae_dtype],
        vae_batch_size=args.vae_batch_size if args.vae_batch_size == "auto" else int(args.vae_batch_size),
        extra_prompts=extra_prompts,
        skip_bad_images=args.skip_bad_images,
        should_stop=lambda: stop.requested,
        log=logger.warning,
    )
    for message in encoded.messages:
        log.write("warning", step=0, message=message)
    if len(encoded) != num_instance + num_class:  # bad images were skipped; class rows follow all instance rows
        last_instance_row = max(images.row(i) for i in range(num_instance))
        num_instance = sum(encoded.images.row(i) <= last_instance_row for i in range(len(encoded)))
        num_class = len(encoded) - num_instance
    logger.info(
        "encodings: %d images, %d captions new; %d, %d reused; %.1f s; %.1f MB of latents, %.1f MB of embeddings",
        encoded.encoded_images,
        encoded.encoded_prompts,
        encoded.reused_images,
        encoded.reused_prompts,
        encoded.seconds,
        encoded.bytes["latents"] / 1e6,
        encoded.bytes["prompts"] / 1e6,
    )

    # ------------------------------------------------------------------------------------------------ model, optimizer
    own_shift = read_flow_shift(load_scheduler(base).config)
    if args.flow_shift is None:
        args.flow_shift = own_shift
    logger.info("flow_shift: %s (the checkpoint's own: %s)", args.flow_shift, own_shift)
    phases.mark("images and encodings")
    devices.seed_everything(args.seed)  # the adapter's random start does not depend on what encoding consumed
    transformer = prepare_transformer(args, engine, base)
    phases.mark("transformer")
    trained = [p for p in transformer.parameters() if p.requires_grad]
    trainable = sum(p.numel() for p in trained)
    transformer_config = dict(transformer.config)
    if args.scale_lr:
        args.learning_rate *= args.gradient_accumulation_steps * args.train_batch_size * world_size
    optimizer = build_optimizer(args, trained, device)

    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * world_size
    if args.max_train_steps is None:
        args.max_train_steps = math.ceil(args.num_train_epochs * num_instance / samples_per_step)
    # Stepped once per update here, not by accelerate (which steps it once per process): lengths are in updates.
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    transformer.train()
    model, optimizer = engine.prepare(transformer, optimizer)

    # ------------------------------------------------------------------------------------------------------- resume
    digests = ranks.agree(data_digests(encoded.images) if main_process else None)
    state = TrainState(seed=args.seed, run=run_identity(args, num_instance, world_size, digests))
    state.run_id = ranks.agree(state.run_id)
    saver = checkpoints.Checkpointer(args, engine, state, lr_scheduler)
    for note in saver.load(resume):
        logger.warning(note)
        log.write("warning", step=state.global_step, message=note)
    if resume is not None:
        logger.info(
            "resumed from %s: step %d, %d samples seen", resume.folder.name, state.global_step, state.samples_seen
        )
    global_step, samples_seen = state.global_step, state.samples_seen
    logger.info("one checkpoint: %.1f MB", saver.bytes() / 1e6)

    # ------------------------------------------------------------------------------------------------------- loader
    stream = SampleStream(
        encoded,
        num_instance,
        num_class,
        seed=args.seed,
        weighting={k: getattr(args, k) for k in ("weighting_scheme", "logit_mean", "logit_std", "mode_scale")},
    )
    steps_left = max(args.max_train_steps - global_step, 0)
    batches = StreamBatchSampler(
        samples_seen,
        steps_left,
        args.train_batch_size,
        args.gradient_accumulation_steps,
        accelerator.process_index,
        world_size,
    )
    workers = args.dataloader_num_workers
    loader = torch.utils.data.DataLoader(
        stream,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        persistent_workers=workers > 0,
        pin_memory=device.type != "cpu",
        worker_init_fn=prepare_worker,
        generator=torch.Generator(),  # the loader's own draw must not move the state that dropout continues from
    )

    # ----------------------------------------------------------------------------------------------------- reporting
    config = {
        **public_config(args),
        "command": redacted_command(),
        "device": devices.device_name(device),
        "world_size": world_size,
    }
    log.write("resume" if resume else "start", step=global_step, world_size=world_size, config=config)
    if args.report_to != "none":
        trackable = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in config.items()}
        accelerator.init_trackers(
            "sana-dreambooth-lora", config=trackable, init_kwargs={"wandb": {"dir": str(output_dir)}}
        )
    validation = None
    if validation_prompts(args) and args.num_validation_images > 0:
        validation = Validation(args, accelerator, encoded, base, instruction)
    latents_shape = tuple(encoded[0]["latents"].shape)
    caption_tokens = float(encoded.prompt_tokens().mean())
    flops_per_image = training_flops_per_image(
        transformer_config,
        latents_shape[1:],
        caption_tokens,
        mode=args.train_mode,
        gradient_checkpointing=False,  # MFU counts the model's work, not the recomputation
    ) * (2 if num_class else 1)
    peak = args.peak_tflops * 1e12 if args.peak_tflops else devices.peak_flops(devices.device_name(device))
    logger.info("images: %d (+ %d of the class), trainable weights: %d", num_instance, num_class, trainable)
    logger.info(
        "updates: %d of %d images (%d per device x %d accumulation x %d processes), %.2f epochs",
        args.max_train_steps,
        samples_per_step,
        args.train_batch_size,
        args.gradient_accumulation_steps,
        world_size,
        args.max_train_steps * samples_per_step / num_instance,
    )

    def report_page() -> None:
        if main_process:
            refresh_report(output_dir, log, global_step)

    def validate() -> None:
        with meter.paused(), bar.paused() if bar is not None else nullcontext():
            shown = validation.run(engine.unwrap(model), global_step)
            log.write(
                "validation",
                step=global_step,
                files=[entry["file"] for entry in shown],
                prompts=[entry["prompt"] for entry in shown],
                seeds=[entry["seed"] for entry in shown],
            )
            report_page()

    def check_updates() -> list[float]:
        """The losses since the last call; waits for the device."""
        losses = accelerator.reduce(torch.stack(interval), reduction="mean").tolist()
        interval.clear()
        skipped = engine.guard.read()
        counts = (samples_seen, stream, samples_per_step, global_step)
        check_finite(losses, skipped, *counts, saver.last_good, args, engine, log)
        return losses

    def save() -> Path:
        with meter.paused(), bar.paused():
            state.global_step, state.samples_seen = global_step, samples_seen
            state.epoch, state.learning_rate = samples_seen / num_instance, lr_scheduler.get_last_lr()[0]
            folder, seconds = saver.save()
            log.write("checkpoint", step=global_step, path=folder.name, seconds=round(seconds, 3))
            report_page()
        return folder

    phases.mark("engine, checkpoint")
    # -------------------------------------------------------------------------------------------------------- train
    meter, bar = ThroughputMeter(samples_per_step), None
    meter.start()
    if validation is not None and global_step == 0:
        validate()  # what the model draws before it has learnt anything: the first row of the report
        phases.mark("first validation")
    first_step = global_step + 1
    bar = console_bar(
        args.max_train_steps,
        "training",
        initial=global_step,
        images_per_unit=samples_per_step,
        main_process=main_process,
    )
    devices.reset_peak_memory(device)
    interval = []  # losses since the last report, on the device: reading them would wait for it
    final_loss, interrupted = None, False
    batch_iterator = iter(loader)
    meter.start()  # once more: the first validation does not count
    while global_step < args.max_train_steps:
        step_loss = torch.zeros((), dtype=torch.float32, device=device)
        for _ in range(args.gradient_accumulation_steps):
            batch = {k: v.to(device, non_blocking=True) for k, v in next(batch_iterator).items()}
            with engine.accumulate():
                loss = flow_matching_loss(model, batch, args, num_class > 0)
                step_loss += loss.detach() / args.gradient_accumulation_steps
                engine.backward(loss)
                engine.step()
        lr_scheduler.step()
        global_step += 1
        samples_seen += samples_per_step
        interval.append(step_loss)
        meter.step()
        bar.update(1)
        if global_step == first_step:
            devices.synchronize(device)
            phases.mark("first step")
            logger.info("first step after %s", phases)
        interrupted = stop.agreed()

        # After the first step the only place where the host waits for the device.
        if global_step % args.logging_steps == 0 or global_step == args.max_train_steps or interrupted:
            losses = check_updates()
            finite = [value for value in losses if math.isfinite(value)]
            final_loss = sum(finite) / len(finite) if finite else float("nan")
            rate = meter.lap()
            figures = {
                "loss": final_loss,
                "loss_max": max(finite, default=None),  # a spike of one step would drown in the mean of the interval
                "learning_rate": lr_scheduler.get_last_lr()[0],
                "images_per_second": rate,
                "peak_memory_bytes": devices.peak_memory_bytes(device),
                "mfu": rate * flops_per_image / (peak * world_size) if peak and rate else None,
                "grad_norm": float(engine.guard.grad_norm) if engine.guard.grad_norm is not None else None,
            }
            log.write("step", step=global_step, epoch=samples_seen / num_instance, **figures)
            accelerator.log({k: v for k, v in figures.items() if v is not None}, step=global_step)
            bar.set_postfix(
                loss=f"{final_loss:.4f}",
                lr=f"{figures['learning_rate']:.1e}",
                memory=f"{figures['peak_memory_bytes'] / 2**30:.2f}GiB",
            )

        if interrupted:
            break
        if saver.due(global_step):
            if interval:  # between two reports: nothing that is not finite may get into a checkpoint
                check_updates()
            save()
        if validation is not None and validation_due(args, global_step, samples_seen, samples_per_step, num_instance):
            validate()
    bar.close()

    # ---------------------------------------------------------------------------------------------------------- end
    if interrupted:
        if saver.last_step != global_step:
            save()
        logger.warning(
            "stopped by signal %d after step %d; --resume_from_checkpoint=latest goes on from there",
            stop.signal,
            global_step,
        )
        log.write("warning", step=global_step, message=f"stopped by signal {stop.signal}")
    else:
        write_final_weights(args, engine, output_dir)
        if validation is not None:
            validate()
    summary = {
        "images_per_second": meter.steady_images_per_second(),
        "iterations_per_second": meter.steady_steps_per_second(),
        "steady_state_note": meter.steady_reason,
        "final_loss": final_loss,
        "duration_seconds": time.perf_counter() - started,
        "encode_seconds": encoded.seconds,
        "start_seconds": {phase: round(seconds, 3) for phase, seconds in phases.seconds.items()},
        "global_step": global_step,
        "world_size": world_size,
        "batch_size": args.train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "resolution": args.resolution,
        "mixed_precision": args.mixed_precision,
        "train_mode": args.train_mode,
        "device": devices.device_name(device),
        "device_type": device.type,
        "peak_memory_bytes": devices.peak_memory_bytes(device),
        "flops_per_image": flops_per_image,
        "skipped_updates": engine.guard.total,
        "interrupted_by_signal": stop.signal if interrupted else None,
    }
    if main_process:
        write_atomic(output_dir / "summary.json", lambda handle: handle.write(json.dumps(summary, indent=1).encode()))
        log.write("end", step=global_step, summary=summary)
        report_page()
        if not interrupted:
            finish_outputs(args, output_dir, validation)
        print_summary(summary)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    log.close()
    return stop.exit_code if interrupted else 0


if __name__ == "__main__":
    # Of ValueError and FloatingPointError the message is the help, too.
    expected = (ValueError, FloatingPointError)
    sys.exit(run_as_script(lambda: main(parse_args(), PROCESS_STARTED), expected=expected))
