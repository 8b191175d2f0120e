"""Fine-tune SANA on your own images: LoRA (default) or all weights of the transformer.

    accelerate launch --config_file bf16_accelerate_config.yaml train_dreambooth_lora_sana.py \
        --pretrained_model_name_or_path=Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers \
        --dataset_name=pokemon-blip-captions --caption_column=text --instance_prompt="a pokemon" \
        --resolution=1024 --train_batch_size=8 --max_train_steps=5000 --mixed_precision=bf16 --output_dir=output

The accelerate config alone chooses the engine: one process, DDP, DeepSpeed ZeRO-1/2/3; Ascend NPU, CUDA GPU or CPU.
Every flag of diffusers' trainer of the same name is there (`--help` groups them); README.md lists the ones that
behave otherwise.

The way of the data: images and captions -> encoded once (sana_kit/encodings) -> VAE and text encoder leave memory ->
loader with noise -> transformer -> loss -> engine -> checkpoint-N -> pytorch_lora_weights.safetensors and report.html.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time

PROCESS_STARTED = time.perf_counter()

if __name__ == "__main__" and "LOCAL_RANK" in os.environ:  # a launcher stops its ranks, and says so
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from sana_kit.quiet import leave_on_signals
from sana_kit.training.config import TrainConfig, parse_args

if __name__ == "__main__":  # --help and a misspelt flag answer before the imports that take seconds
    CONFIG = parse_args()
    if "LOCAL_RANK" not in os.environ:
        leave_on_signals(" before the run began")
    gc.disable()  # looking for garbage would be a fifth of the imports' time; main() switches it on again

import logging

import torch

from sana_kit import devices
from sana_kit.distributed import StopSignal
from sana_kit.errors import EncodingStopped, UserError, run_as_script
from sana_kit.locks import lock_folder
from sana_kit.models.folder import Model
from sana_kit.throughput import PhaseClock
from sana_kit.training import checkpoints
from sana_kit.training.check import check, tell_all_ranks
from sana_kit.training.ema import WeightAverage
from sana_kit.training.engine import Engine
from sana_kit.training.export import adapter_metadata, final_weights, write_result
from sana_kit.training.held_out import HeldOut
from sana_kit.training.leave import leave
from sana_kit.training.optim import build_optimizer, build_schedule
from sana_kit.training.plan import Plan, describe, make_plan, print_plan
from sana_kit.training.recipes import RECIPES, FlowMatching
from sana_kit.training.recomputation import fit_to_device
from sana_kit.training.recorder import Recorder, configure_logging
from sana_kit.training.samples import Samples, load_samples
from sana_kit.training.state import TrainState, with_seeds
from sana_kit.training.stream import build_loader, build_stream
from sana_kit.training.transformer import prepare_transformer
from sana_kit.training.validation import Validator

logger = logging.getLogger("sana")


def main(config: TrainConfig, process_started: float | None = None) -> int:
    """Train; returns the exit code: 0, or 143 / 130 after a SIGTERM / SIGINT that ended the run with a checkpoint.

    Args:
        process_started: time.perf_counter() when this process began, for the summary's start_seconds.
    """
    phases = PhaseClock(time.perf_counter() if process_started is None else process_started)
    phases.mark("imports")

    # 1. Every problem at once, before a weight is loaded
    try:
        checked = check(config)
    except UserError as error:
        tell_all_ranks(error)
    config, base_model = checked.config, checked.base_model
    phases.mark("checks")
    if config.dry_run:
        return print_plan(config, base_model)

    # 2. Processes: the accelerate config picks the engine
    engine = Engine.create(config, checked.launch)
    ranks = engine.ranks
    ranks.run_on_all(lambda: None)  # what another rank found wrong is raised here
    phases.mark("processes")
    if not gc.isenabled():  # off since the imports: thousands of modules, none of which is ever garbage
        gc.freeze()
        gc.enable()
    configure_logging(ranks.is_main)
    devices.prepare_backend(engine.device, allow_tf32=config.allow_tf32)
    config = fit_to_device(config, base_model, engine)
    stop = StopSignal(ranks)
    with lock_folder(config.output_dir, enabled=ranks.is_main), Recorder(config, engine, phases) as recorder:
        for note in base_model.notes:
            recorder.warn(note)
        try:
            code = run(config, base_model, engine, stop, recorder)
        except EncodingStopped:
            logger.warning("stopped before the first step; what is encoded is kept, the same command goes on from it")
            code = stop.exit_code
    ranks.close()
    return code


def run(config: TrainConfig, base_model: Model, engine: Engine, stop: StopSignal, recorder: Recorder) -> int:
    """The run itself, once the output folder is ours; see `main`."""
    ranks, phases = engine.ranks, recorder.phases

    # 3. Where to start from
    resume, notes = checkpoints.start_or_resume(config, ranks)
    for note in notes:
        recorder.warn(note)
    config = with_seeds(config, resume.state if resume else None, ranks)
    devices.seed_everything(config.seed)

    # 4. Data: encoded once; VAE and text encoder leave memory
    samples = load_samples(config, base_model, ranks, stop, recorder, resume)
    encoded = samples.encoded
    order = samples.order(config, micro_step=config.train_batch_size * ranks.world_size)
    counts = samples.counts_of_sets(len(config.sets), config.crops_per_image)
    config, plan = make_plan(config, counts, samples.num_class, ranks.world_size, order)
    if checkpoints.is_finished(config, resume, plan.steps, final_weights(config), ranks):
        logger.info("this run is finished: %s is there, and nothing is left to do", final_weights(config))
        engine.close()
        return 0
    phases.mark("images and encodings")

    # 5. Model, optimizer, engine
    devices.seed_everything(config.seed)  # the adapter's random start does not depend on what encoding consumed
    transformer = prepare_transformer(config, engine, base_model)
    phases.mark("transformer")
    trainable = [(name, p) for name, p in transformer.named_parameters() if p.requires_grad]
    optimizer = build_optimizer(config, trainable, engine.device)
    schedule = build_schedule(config, optimizer, plan.steps)
    state = TrainState.begin(config, plan.num_instance, ranks, samples.digests)
    metadata = adapter_metadata(config, base_model, transformer, samples.instruction, encoded.images, state)
    engine.prepare(transformer, optimizer, metadata)
    average = WeightAverage(engine, config.ema_decay)

    # 6. State: what a resumed run needs, by name
    saver = checkpoints.Checkpointer(config, engine, state, schedule, average)
    for note in saver.load(resume):
        recorder.warn(note, state.global_step)

    # 7. Train
    recipe = RECIPES[base_model.pipeline_class].of(config)
    stream = build_stream(config, encoded, order, plan.num_class, recipe)
    state.samples_seen = order.first_position(state.samples_seen)
    loader = build_loader(config, stream, plan, state, ranks, engine.device)
    validator = Validator(config, plan, base_model, engine, encoded, samples.instruction, average, stop)
    held_out = HeldOut(config, plan, engine, encoded, samples.held_out, recipe, average)
    recorder.begin(config, plan, state, stream, encoded, describe(config, plan, base_model, engine.chip))
    phases.mark("engine, checkpoint")
    look_first(held_out, validator, state, recorder)
    recorder.start_clock()
    stopped = train(
        plan, engine, recipe, schedule, samples, loader, state, average, saver, held_out, validator, recorder, stop
    )

    # 8. Leave
    if not stopped:
        write_result(config, base_model, engine, average)
        look_last(samples, validator, state, recorder, stop)
    return leave(config, engine, encoded.images, state, recorder, stop if stopped else None)


def look_first(held_out: HeldOut, validator: Validator, state: TrainState, recorder: Recorder) -> None:
    """What the model can do before it has learnt anything, the first row of the report; nothing of a resumed run."""
    if state.global_step:
        return
    if held_out.indices:
        measure(held_out, state, recorder)
    if validator.jobs:
        validate(validator, state, recorder)
    recorder.phases.mark("first validation")


def look_last(samples: Samples, validator: Validator, state: TrainState, recorder: Recorder, stop: StopSignal) -> None:
    """What it has learnt, the last row of the report, and whether that is more than copies of training images."""
    if validator.jobs:
        drawn = validate(validator, state, recorder)
        recorder.compare(samples.encoded, samples.num_instance, drawn, stop)


def train(
    plan: Plan,
    engine: Engine,
    recipe: FlowMatching,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    samples: Samples,
    loader: torch.utils.data.DataLoader,
    state: TrainState,
    average: WeightAverage,
    saver: checkpoints.Checkpointer,
    held_out: HeldOut,
    validator: Validator,
    recorder: Recorder,
    stop: StopSignal,
) -> bool:
    """The updates that are left; returns whether a signal ended them, with a checkpoint.

    Only the recorder waits for the device, where figures are due. Every part says itself when it is due.
    """
    batches = iter(loader)
    while state.global_step < plan.steps:
        if not samples.ready(state, plan.samples_per_step, recorder.paused):
            if saver.last_step != state.global_step and state.global_step:
                save(saver, recorder)
            return True
        loss = torch.zeros((), dtype=torch.float32, device=engine.device)
        for _ in range(plan.accumulation):
            batch = engine.on_device(next(batches))
            with engine.accumulate():
                part = recipe.loss(engine.model, batch, engine.compute_dtype)
                loss += part.detach() / plan.accumulation
                engine.backward(part)
                engine.step()
        schedule.step()
        state.advance(plan.samples_per_step, plan.epoch_samples, float(schedule.get_last_lr()[0]))
        average.update(state.global_step)
        stopping = stop.agreed()
        recorder.update(loss, state.learning_rate, stopping)
        if held_out.due(state):
            measure(held_out, state, recorder)
        if stopping or saver.due(state.global_step):
            save(saver, recorder)
        if stopping or held_out.over(state):
            return stopping
        if validator.due(state):
            validate(validator, state, recorder)
    return False


def save(saver: checkpoints.Checkpointer, recorder: Recorder) -> None:
    """Write a checkpoint, outside the measured time; nothing that is not finite gets into one."""
    with recorder.paused():
        recorder.settle()
        recorder.checkpoint(*saver.save())


def measure(held_out: HeldOut, state: TrainState, recorder: Recorder) -> None:
    """Measure the held-out loss and keep the best weights, outside the measured time."""
    with recorder.paused():
        recorder.settle()
        recorder.held_out(held_out.measure(state))


def validate(validator: Validator, state: TrainState, recorder: Recorder) -> list[dict]:
    """Draw the validation images with the live weights, or their average, outside the measured time; returns them."""
    with recorder.paused():
        drawn = validator.draw(state.global_step)
        recorder.validation(drawn)
    return drawn


if __name__ == "__main__":
    # Of ValueError and FloatingPointError the message is the help, too.
    expected = (ValueError, FloatingPointError)
    sys.exit(run_as_script(lambda: main(CONFIG, PROCESS_STARTED), expected=expected))
