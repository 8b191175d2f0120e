"""Checkpoints: written beside and renamed when whole, found again, resumed exactly, on any number of processes.

A `checkpoint-N` folder holds

    pytorch_lora_weights.safetensors   LoRA: the adapter, as patch_sana.py writes it
    transformer/                       full fine-tuning: the model's weights in the dtype of the run
    controlnet/                        the same of a ControlNet that is trained
    optimizer.safetensors              per trainable parameter: float32 master, and the optimizer's tensors
    ema.safetensors                    with --ema_decay: the average of each master
    (optimizer-00001-of-00020....)     the same in several files where they are large
    trainer_state.json                 TrainState, and the optimizer's and the loss scale's numbers
    random_states.pt                   every rank's generator states, the device's too (plain tensors and numbers)
    manifest.json                      size and SHA-256 of each file

Optimizer state is stored per parameter, whole, and not as an engine's shards: ZeRO-1/2/3, DDP and a single process
write and read the same files, so a checkpoint of P processes resumes on Q. Ranks that see the folder share the writing
(shares.py); one rename makes the checkpoint whole. On a resume rank 0 reads and passes on tensor by tensor, so
machines that share no folder resume from the first machine's.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sana_kit import devices
from sana_kit.errors import CheckpointError, Problem, UserError, setting
from sana_kit.files import expand, remove_tree
from sana_kit.training.checkpoint_folders import (
    FORMAT,
    MODEL_FOLDERS,
    STATE_FILE,
    all_checkpoints,
    find_checkpoint,
    find_damage,
    list_checkpoints,
    prune_checkpoints,
    put_in_place,
    read_state,
    recover,
    set_later_aside,
    set_run_aside,
    write_manifest,
)
from sana_kit.training.checkpoint_reader import OPTIMIZER_STEM, RANDOM_FILE, CheckpointReader
from sana_kit.training.engine import Engine
from sana_kit.training.shares import (
    MODEL_FILE_BYTES,
    TensorFile,
    index_of,
    share_out,
    split_files,
    write_shares,
)
from sana_kit.training.state import DECISIVE, OF_LORA, TrainState, differences, pack_random_state, unpack_random_state
from sana_kit.training.zero import whole_shape

if TYPE_CHECKING:
    from sana_kit.distributed import Ranks
    from sana_kit.training.config import TrainConfig
    from sana_kit.training.ema import WeightAverage

__all__ = ["Checkpointer", "Resume", "find_damage", "list_checkpoints", "start_or_resume"]

logger = logging.getLogger("sana")

AVERAGE_STEM = "ema"
MODEL_STEM = "diffusion_pytorch_model"
# Below this one rank writes alone: agreeing on the shares would take longer.
SHARED_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Resume:
    """A checkpoint to go on from.

    Attributes:
        folder: where it lies; only rank 0 needs to see it.
        state: its trainer_state.json in today's FORMAT.
    """

    folder: Path
    state: dict


def start_or_resume(settings: TrainConfig, ranks: Ranks) -> tuple[Resume | None, list[str]]:
    """Make the output folder ready and find the checkpoint to go on from: rank 0 does it and tells all.

    Args:
        settings: output_dir, resume_from_checkpoint, overwrite_output_dir, and the names of `state.DECISIVE`.

    Returns:
        (the checkpoint or None for a fresh start, notes for the log).

    Raises:
        UserError: the checkpoint asked for is not there, is damaged, or holds another kind of run.
    """
    output_dir = expand(settings.output_dir)

    def look() -> tuple[str | None, dict | None, list[str]]:
        if not ranks.is_main:
            return None, None, []
        notes = [f"{name} was whole but not yet in place; brought back" for name in recover(output_dir)]
        if settings.overwrite_output_dir:
            aside = set_run_aside(output_dir)
            if aside is not None:  # as the user asked: told, and no warning
                logger.info("what lay in %s was set aside in %s", output_dir, aside.name)
        if not settings.resume_from_checkpoint:
            return None, None, notes
        folder, found = find_checkpoint(output_dir, settings.resume_from_checkpoint)
        if folder is None:
            return None, None, [*notes, *found]
        state = read_state(folder)
        _check_kind(settings, folder, state)
        return str(folder), state, [*notes, *found]

    folder, state, notes = ranks.agree(ranks.run_on_all(look))
    return (Resume(Path(folder), state) if folder else None), notes


def _check_kind(settings: TrainConfig, folder: Path, state: dict) -> None:
    """UserError where the run trains something that the checkpoint's tensors do not fit."""
    before = state["run"]
    problems = []
    for key in DECISIVE:
        value, saved = getattr(settings, key), before.get(key)
        same = str(value).lower() == str(saved).lower() if key == "optimizer" else value == saved
        if key in before and not same and (settings.train_mode == "lora" or key not in OF_LORA):
            reason = f"{folder.name} was trained with {key} {saved}"
            problems.append(Problem(key, value, reason, f"Resume with {key} {saved}, or start afresh."))
    if problems:
        raise UserError(problems, f"{folder} does not fit this run:")


def is_finished(settings: TrainConfig, resume: Resume | None, steps: int, result: Path, ranks: Ranks) -> bool:
    """Whether the run in `result`'s folder has made all its updates and written its result: rank 0 looks.

    Its last checkpoint may be older than its end, or there may be none. Who names a checkpoint instead of "latest"
    goes back to it, unless it is the end itself.

    Raises:
        UserError: a longer run is to go on from the "latest" checkpoint; of the shorter one only the result is left.
    """
    return ranks.agree(ranks.run_on_all(lambda: ranks.is_main and _is_finished(settings, resume, steps, result)))


def _is_finished(settings: TrainConfig, resume: Resume | None, steps: int, result: Path) -> bool:
    wanted, early_stopping = settings.resume_from_checkpoint, settings.early_stopping
    state = resume.state if resume is not None else {"global_step": 0}
    if early_stopping is not None and state.get("since_best", 0) >= early_stopping:
        steps = state["global_step"]
    try:
        summary = json.loads((result.parent / "summary.json").read_text(encoding="utf-8"))
        end, interrupted = int(summary["global_step"]), summary["interrupted_by_signal"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if resume is None and wanted == "latest" and result.exists() and end < steps:
        reason = f"{result.parent} holds {result.name}, after {end} updates, and no checkpoint to go on from"
        remedy = f"Choose another {setting('output_dir')}, or set it aside with"
        remedy += f" {setting('overwrite_output_dir')} instead."
        raise UserError(Problem("resume_from_checkpoint", wanted, reason, remedy))
    if interrupted is not None or not result.exists() or end < steps:
        return False
    return end == state["global_step"] or (wanted == "latest" and end > state["global_step"])


class Checkpointer:
    """Writes the checkpoints of a run and goes on from one; knows when one is due.

    Every method is called by all ranks.

    Attributes:
        last_step: global step of the newest checkpoint that this run wrote or went on from, None before.
    """

    def __init__(
        self,
        settings: TrainConfig,
        engine: Engine,
        state: TrainState,
        schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
        average: WeightAverage | None = None,
    ):
        """Args:
        settings: output_dir, checkpointing_steps, checkpoints_total_limit, and for full fine-tuning
            pretrained_model_name_or_path and revision.
        engine: after `prepare`.
        state: of the run; `load` fills it, `save` reads it.
        schedule: the learning rate's, stepped once an update; `load` replays it.
        average: the `ema.WeightAverage` of the run; None or a false one where it keeps none.
        """
        self._average = average
        self._settings, self._engine, self.state, self._schedule = settings, engine, state, schedule
        self._output_dir = expand(settings.output_dir)
        self.last_step: int | None = None
        state.sequence = max(
            state.sequence, engine.ranks.agree(max((c.sequence for c in all_checkpoints(self._output_dir)), default=0))
        )

    def due(self, step: int) -> bool:
        """Whether a checkpoint belongs after this update."""
        return step % self._settings.checkpointing_steps == 0

    @property
    def last_good(self) -> str:
        """The newest checkpoint in words, for messages."""
        return f"checkpoint-{self.last_step}" if self.last_step else "none was written"

    def bytes(self) -> int:
        """Bytes of the tensors of one checkpoint."""
        engine = self._engine
        trained = sum(torch.Size(whole_shape(p)).numel() for _, p in engine.named_parameters)
        entries = engine.optimizer_entries()
        moments = sum(e.bytes for e in entries if not e.key.endswith("|master"))
        weights = sum(e.bytes for e in engine.weight_entries()) if engine.train_mode in MODEL_FOLDERS else 2 * trained
        # before the first step there are no moments: two a weight, as of AdamW
        return 4 * trained + (moments or 8 * trained) + weights

    # ---------------------------------------------------------------------------------------------------------- write

    def save(self) -> tuple[Path, float]:
        """Write checkpoint-N for N = state.global_step; returns (folder, seconds).

        Raises:
            CheckpointError: on every rank, if any rank could not write, or something that was to be saved is not
                finite. Nothing is left under the final name then, and older checkpoints are untouched.
        """
        started = time.perf_counter()
        ranks, step = self._engine.ranks, self.state.global_step
        self.state.sequence += 1
        final = self._output_dir / f"checkpoint-{step}"
        partial = Path(ranks.agree(str(self._output_dir / f".checkpoint-{step}.partial-{uuid.uuid4().hex[:12]}")))
        problem = self._write(partial)
        failed = [found for found in ranks.gather(problem) if found]
        if not failed:
            failed = [found for found in ranks.gather(self._finish(partial, final)) if found]
        if failed:
            raise CheckpointError(ranks.agree(self._failure(partial, final, failed[0])))
        ranks.barrier()
        self.last_step = step
        return final, time.perf_counter() - started

    def _write(self, partial: Path) -> str | None:
        """Everything but the manifest; what went wrong on this rank, None if nothing did."""
        engine, ranks = self._engine, self._engine.ranks
        files = split_files(OPTIMIZER_STEM, engine.optimizer_entries())
        model_files = []
        if engine.train_mode in MODEL_FOLDERS:
            model_files = split_model(engine)
        problem = _attempt(lambda: _make_folder(partial)) if ranks.is_main else None
        writers = self._writers(partial, files + model_files)
        random_states = ranks.gather(pack_random_state(devices.random_state(engine.device)))
        self._written, written_problem = write_shares(partial, share_out(files, writers), ranks.rank)
        problem = problem or written_problem or self._write_average(partial, writers)
        with engine.result_weights():
            if engine.train_mode == "lora":
                problem = _attempt(lambda: engine.write_adapter(partial)) or problem
            else:
                written, written_problem = write_shares(partial, share_out(model_files, writers), ranks.rank)
                self._written.update(written)
                problem = problem or written_problem
        if ranks.is_main and problem is None:
            problem = _attempt(lambda: self._write_small_files(partial, random_states, model_files))
        return problem

    def _write_average(self, partial: Path, writers: list[int]) -> str | None:
        if not self._average:
            return None
        with self._average.in_masters():
            files = split_files(AVERAGE_STEM, self._engine.master_entries(AVERAGE_STEM))
            written, problem = write_shares(partial, share_out(files, writers), self._engine.ranks.rank)
        self._written |= written
        return problem

    def _writers(self, partial: Path, files: list[TensorFile]) -> list[int]:
        """The ranks that see the main rank's folder, where there is enough to share; else the main rank."""
        ranks = self._engine.ranks
        if ranks.world_size == 1 or sum(file.bytes for file in files) < SHARED_BYTES:
            return [0]
        ranks.barrier()
        # a folder of the same path on another machine's disk does not hold this very folder
        sees = partial.is_dir()
        return [rank for rank, there in enumerate(ranks.gather(sees)) if there] or [0]

    def _write_small_files(self, partial: Path, random_states: list, model_files: list[TensorFile]) -> None:
        engine = self._engine
        if model_files:
            write_model_facts(partial, engine, self._settings, model_files)
        torch.save({"world_size": engine.ranks.world_size, "states": random_states}, partial / RANDOM_FILE)
        state = {
            **dataclasses.asdict(self.state),
            "format": FORMAT,
            "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "optimizer": engine.optimizer_numbers(),
            "loss_scale": engine.loss_scale(),
        }
        (partial / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")

    def _finish(self, partial: Path, final: Path) -> str | None:
        """The manifest of all ranks' files, then the name; older checkpoints of this run go only after that."""
        ranks = self._engine.ranks
        known = {name: entry for written in ranks.gather(self._written) for name, entry in written.items()}
        if not ranks.is_main:
            return None

        def rename() -> None:
            write_manifest(partial, known)
            put_in_place(partial, final)
            prune_checkpoints(self._output_dir, self._settings.checkpoints_total_limit, self.state.run_id, final)

        return _attempt(rename)

    def _failure(self, partial: Path, final: Path, problem: str) -> str:
        if self._engine.ranks.is_main:
            remove_tree(partial)
        whole = [path.name for _, path in list_checkpoints(self._output_dir) if find_damage(path, False) is None]
        there = ", ".join(whole) or "none"
        if "not finite" in problem:
            remedy = "Go on from one of them with a lower learning rate."
        else:
            remedy = "Free space or choose another output folder, then go on from the latest of them."
        return f"Could not write {final}: {problem}. Older checkpoints are untouched: {there}. {remedy}"

    # ----------------------------------------------------------------------------------------------------------- read

    def load(self, resume: Resume | None) -> list[str]:
        """Go on from `resume`, or begin: weights, optimizer, schedule, loss scale, random states, and the state.

        Later checkpoints of the folder are set aside. Returns a sentence for each thing that differs from the run
        that wrote the checkpoint.

        Raises:
            CheckpointError: the checkpoint does not fit this model or optimizer.
        """
        engine, state = self._engine, self.state
        if resume is None:
            self._seed()
            return []
        saved = resume.state
        with ExitStack() as open_files:
            reader = CheckpointReader(resume.folder, engine, open_files)
            engine.ranks.run_on_all(lambda: self._check_adapter(resume.folder, same_weights=False))
            notes = self._load_average(resume.folder, open_files)
            reader.check(engine.named_parameters)
            engine.restore_optimizer(saved["optimizer"], list(reader.tensors), reader.read)
            if notes:
                self._average.begin_at_masters()
            with engine.result_weights():
                engine.ranks.run_on_all(lambda: self._check_adapter(resume.folder, same_weights=True))
            random_states = engine.ranks.agree(reader.random_states())
        state.go_on_from(saved)
        self.last_step = state.global_step
        if self._schedule is not None:
            _replay(self._schedule, state.global_step)
        notes += differences(saved["run"], state.run)
        if not engine.restore_loss_scale(saved["loss_scale"]):
            notes.append("the checkpoint holds no loss scale of this engine: fp16 starts with its own")
        if random_states["world_size"] == engine.ranks.world_size:
            packed = random_states["states"][engine.ranks.rank]
            devices.set_random_state(unpack_random_state(packed), engine.device)
        else:
            self._seed()
        aside = engine.ranks.agree(self._set_later_aside(resume.folder))
        if aside is not None:
            notes.append(f"checkpoints that were written after {resume.folder.name} were set aside in {aside}")
        return notes

    def _load_average(self, folder: Path, open_files: ExitStack) -> list[str]:
        """Before the masters get their own values: they hold the average for a moment. Returns what to tell."""
        if not self._average:
            return []
        reader = CheckpointReader(folder, self._engine, open_files, AVERAGE_STEM)
        if not reader.tensors:
            return [f"{folder.name} holds no average of the weights: it begins anew, at the weights of {folder.name}"]
        reader.check(self._engine.named_parameters)
        self._engine.set_masters(lambda name: reader.read(f"{name}|{AVERAGE_STEM}"))
        self._average.begin_at_masters()
        return []

    def _seed(self) -> None:
        """Dropout differs between ranks, and goes on differently after a change of world size."""
        number = self.state.seed * 1_000_003 + 97 * self.state.global_step + self._engine.ranks.rank
        devices.seed_everything(number % 2**63)

    def _check_adapter(self, folder: Path, same_weights: bool) -> None:
        if self._engine.ranks.is_main and self._engine.train_mode == "lora":
            self._engine.check_adapter(folder, same_weights)

    def _set_later_aside(self, folder: Path) -> str | None:
        aside = set_later_aside(self._output_dir, folder) if self._engine.ranks.is_main else None
        return aside.name if aside else None


def _replay(schedule: torch.optim.lr_scheduler.LRScheduler, steps: int) -> None:
    import warnings

    with warnings.catch_warnings():  # torch warns that no optimizer step came before
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(steps):
            schedule.step()


def _attempt(action: Callable[[], object]) -> str | None:
    """Run `action`; what it raised, in words. Disk full, quota, permission: told to every rank by the caller."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _make_folder(partial: Path) -> None:
    remove_tree(partial)
    partial.mkdir(parents=True)


def split_model(engine: Engine) -> list[TensorFile]:
    """The files of a run's model, below the folder that holds it."""
    stem = f"{MODEL_FOLDERS[engine.train_mode]}/{MODEL_STEM}"
    return split_files(stem, engine.weight_entries(), MODEL_FILE_BYTES)


def write_model_facts(folder: Path, engine: Engine, settings: TrainConfig, files: list[TensorFile]) -> None:
    """What a diffusers folder holds beside the tensors: config, index of several files; and the base model's name."""
    place = folder / MODEL_FOLDERS[engine.train_mode]
    engine.result_module.save_config(place)
    if len(files) > 1:
        index = place / f"{MODEL_STEM}.safetensors.index.json"
        index.write_text(json.dumps(index_of(files), indent=2), encoding="utf-8")
    if engine.train_mode == "full":
        write_base_name(folder, settings)


def write_base_name(folder: Path, settings: TrainConfig) -> None:
    """Which model the other parts of a fine-tuned transformer come from."""
    base = {"base_model": settings.pretrained_model_name_or_path, "revision": settings.revision}
    (folder / "sana_kit_base.json").write_text(json.dumps(base), encoding="utf-8")
