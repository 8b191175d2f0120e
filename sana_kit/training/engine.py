"""The engine of a run: accelerate's Accelerator, and below it one process, DDP or DeepSpeed's ZeRO.

The accelerate config alone chooses it; the trainer asks the engine and never which one it is. Everything of accelerate
and DeepSpeed that is not their documented face lies here, in zero.py and in launch_config.py, each name with the
versions it was read in.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.parallel import DistributedDataParallel

from patch_sana import check_adapter, create_save_model_hook
from sana_kit import devices
from sana_kit.distributed import Ranks, check_world_size, force_cpu, process_group_handlers
from sana_kit.errors import CheckpointError
from sana_kit.launchers import announced_wait
from sana_kit.training import zero
from sana_kit.training.launch_config import LaunchConfig
from sana_kit.training.optim_state import (
    GroupNumbers,
    averaged,
    averaging_key,
    base_optimizer,
    optimizer_family,
    restored_state,
    state_numbers,
    state_tensors,
)
from sana_kit.training.updates import UpdateGuard, gradient_norm, step_if_finite

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from sana_kit.training.config import TrainConfig

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def compute_dtype(settings: TrainConfig) -> torch.dtype:
    """What the transformer computes in; `settings.mixed_precision` is "no", "fp16" or "bf16"."""
    return DTYPES[settings.mixed_precision]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint.

    Attributes:
        key: its name in the file.
        dtype, shape: of the whole tensor.
        fetch: (keep) -> the tensor on the CPU where `keep`, else None. Under ZeRO a collective: every rank calls the
            entries' `fetch` in one order.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    fetch: Callable[[bool], torch.Tensor | None]

    @property
    def bytes(self) -> int:
        """Bytes of the tensor in a file."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@announced_wait()
def _create_accelerator(settings: TrainConfig, launch: LaunchConfig) -> Accelerator:
    """The Accelerator; `settings` and `launch` have been brought together by `launch_config.settle`."""
    from accelerate import Accelerator, DeepSpeedPlugin, DistributedDataParallelKwargs
    from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

    handlers, plugin = process_group_handlers(), None
    precision = settings.mixed_precision
    if launch.deepspeed:
        zero.leave_out_shm_operator()
        zero.leave_out_muon_compilation()
        # Given here, since accelerate would read them from the environment, where a config without them says "None".
        plugin = DeepSpeedPlugin(
            gradient_accumulation_steps=settings.gradient_accumulation_steps, gradient_clipping=settings.max_grad_norm
        )
    else:
        handlers.append(DistributedDataParallelKwargs(gradient_as_bucket_view=True))
        if settings.train_mode != "full" and precision == "bf16":
            # The frozen base runs in bf16 as it is; LoRA layers and ControlNets cast for themselves (models/lora.py,
            # models/controlnet.py): no global autocast, which would run every norm in float32.
            precision = "no"
    trackers = None if settings.report_to == "none" else settings.report_to
    accelerator = Accelerator(
        cpu=force_cpu(),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=settings.gradient_accumulation_steps),
        mixed_precision=precision,
        deepspeed_plugin=plugin,
        log_with=trackers,
        project_config=ProjectConfiguration(
            project_dir=settings.output_dir, logging_dir=str(Path(settings.output_dir, settings.logging_dir))
        ),
        kwargs_handlers=handlers,
    )
    check_world_size(accelerator.num_processes)
    if plugin is not None:
        zero.fill_config(plugin.deepspeed_config, settings, accelerator.num_processes)
        # transformers would load the text encoder partitioned under ZeRO-3, for an engine that it never gets.
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    return accelerator


class Engine:
    """What runs the forward, backward and update of a run.

    Attributes:
        accelerator: accelerate's, for trackers and `reduce`.
        ranks: the processes and their agreement.
        device: of this rank.
        kind: "single", "ddp" or "zero1", "zero2", "zero3".
        mixed_precision: "no", "fp16" or "bf16".
        compute_dtype: what the transformer computes in.
        weight_dtype: what its weights are loaded in: float32 where they are their own masters, else compute_dtype.
        guard: the updates that were left out, and the newest gradient norm.
        named_parameters: (name, parameter) of the trainable ones, after `prepare`.
        model: what is called in a step, the transformer in the engine's wrappers; after `prepare`.
    """

    def __init__(self, accelerator: Accelerator, settings: TrainConfig, launch: LaunchConfig):
        self.accelerator, self.launch, self.ranks = accelerator, launch, Ranks.of(accelerator)
        self.device, self.train_mode = accelerator.device, settings.train_mode
        self.mixed_precision, self.max_grad_norm = settings.mixed_precision, settings.max_grad_norm
        self.compute_dtype = compute_dtype(settings)
        masters_apart = launch.deepspeed or settings.train_mode != "full"
        self.weight_dtype = self.compute_dtype if masters_apart else torch.float32
        several = accelerator.num_processes > 1
        self.kind = f"zero{launch.zero_stage}" if launch.deepspeed else "ddp" if several else "single"
        self.guard = UpdateGuard()
        self.named_parameters: list[tuple[str, torch.nn.Parameter]] = []
        self._holds_result = False
        self.model: torch.nn.Module | None = None
        self._transformer: torch.nn.Module | None = None
        self._optimizer: AcceleratedOptimizer | None = None
        self._save_adapter: Callable[[list, list, str], None] | None = None
        self._groups: GroupNumbers | None = None

    @classmethod
    def create(cls, settings: TrainConfig, launch: LaunchConfig | None = None) -> Engine:
        """The engine that the accelerate config asks for.

        Args:
            settings: mixed_precision, gradient_accumulation_steps, max_grad_norm (as `launch_config.settle` gave
                them), train_mode, train_batch_size, output_dir, logging_dir, report_to.
            launch: the accelerate config; read from the environment by default.

        Raises:
            UserError: a setting and the DeepSpeed config contradict each other.
        """
        launch = LaunchConfig.read() if launch is None else launch
        return cls(_create_accelerator(settings, launch), settings, launch)

    @property
    def under_deepspeed(self) -> bool:
        """Whether DeepSpeed's ZeRO is the engine."""
        return self.launch.deepspeed

    @property
    def chip(self) -> devices.Chip | None:
        """What is known of this rank's device."""
        return devices.find_chip(devices.device_name(self.device))

    def close(self) -> None:
        """Wait for all ranks and end the trackers; the run went well."""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    # ------------------------------------------------------------------------------------------------ model, optimizer

    def prepare(
        self,
        transformer: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        metadata: Callable[[], Mapping[str, str]] | None = None,
    ) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        """Hand model and optimizer to the engine; returns what is called and stepped from now on.

        Args:
            metadata: () -> further entries of each adapter file's metadata.
        """
        self.named_parameters = [(n, p) for n, p in transformer.named_parameters() if p.requires_grad]
        self._transformer = transformer
        if self.train_mode == "lora":  # describes the base while its weights are whole
            self._save_adapter = create_save_model_hook(self.accelerator, self.unwrap, transformer, metadata)
        if self.launch.deepspeed:
            numel = sum(p.numel() for _, p in self.named_parameters)
            zero.fit_buckets(self.accelerator.state.deepspeed_plugin.deepspeed_config, numel)
        if self.kind == "ddp":  # every rank has loaded the same; quantised weights have no broadcast
            odd = [name for name, p in transformer.named_parameters() if type(p) is not torch.nn.Parameter]
            if odd:  # DDP has no public setting for that (torch 2.1 to 2.13)
                DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(transformer, odd)
        self.model, self._optimizer = self.accelerator.prepare(transformer, optimizer)
        self._groups = GroupNumbers(self.base_optimizer)
        devices.keep_freed_memory(self.device)
        return self.model, self._optimizer

    def unwrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model without the engine's wrappers."""
        model = self.accelerator.unwrap_model(model)
        return getattr(model, "_orig_mod", model)

    @property
    def transformer(self) -> torch.nn.Module:
        """The model as it was given to `prepare`: its names hold no wrapper's."""
        return self._transformer

    @property
    def result_module(self) -> torch.nn.Module:
        """Whose weights are the result of a run that trains no adapter: the transformer, or its ControlNet."""
        return self._transformer.controlnet if self.train_mode == "controlnet" else self._transformer

    @property
    def partitioned(self) -> bool:
        """Whether each forward pass is a collective of all ranks: ZeRO-3, where each holds a part of every weight."""
        return self.kind == "zero3"

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer below the wrappers."""
        return base_optimizer(self._optimizer)

    @property
    def _zero(self) -> object:
        """The ZeRO optimizer, None for other engines."""
        return self.model.optimizer if self.launch.deepspeed else None

    # ------------------------------------------------------------------------------------------------------- the step

    def on_device(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A micro-batch on this rank's device; copies from pinned memory are not waited for."""
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def accumulate(self) -> contextlib.AbstractContextManager:
        """Context of one micro-step; gradients are shared between ranks in the last one of an update."""
        return self.accelerator.accumulate(self.model)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a micro-step's mean loss."""
        if self.launch.deepspeed:
            self.model.set_gradient_accumulation_boundary(is_boundary=self.accelerator.sync_gradients)
            self.model.backward(loss)
        else:
            self.accelerator.backward(loss)

    def step(self) -> None:
        """After the last micro-step of an update: clip, step unless the gradient is not finite, clear gradients."""
        if not self.accelerator.sync_gradients:
            return
        if self.launch.deepspeed:
            self.guard.add(*zero.engine_step(self.model))
            return
        self.accelerator.unscale_gradients()
        norm = gradient_norm([p for _, p in self.named_parameters], self.max_grad_norm)
        if self.accelerator.scaler is not None:  # fp16: the scaler decides, and lowers its scale
            self._optimizer.step()
            left_out = self._optimizer.step_was_skipped
        else:
            left_out = step_if_finite(self._optimizer, self.base_optimizer, norm)
        self.guard.add(left_out, norm)
        self._optimizer.zero_grad()

    @property
    def scales_loss(self) -> bool:
        """Whether updates are left out now and then by design: fp16's loss scale is found by trying."""
        return self.mixed_precision == "fp16"

    # -------------------------------------------------------------------------------------------- state, any engine's

    def optimizer_entries(self) -> list[Entry]:
        """Masters and optimizer tensors of the trainable parameters: "<name>|master", "<name>|exp_avg", ..."""
        base, found = self.base_optimizer, []
        keys = zero.tensor_keys(self._zero, base) if self.launch.deepspeed else ()
        for name, parameter in self.named_parameters:
            shape = zero.whole_shape(parameter)
            if self.launch.deepspeed:
                found.append(Entry(f"{name}|master", torch.float32, shape, _bound(zero.fetch_master, parameter)))
                for key in keys:
                    fetch = _bound(zero.fetch_state, parameter, key)
                    found.append(Entry(f"{name}|{key}", torch.float32, shape, fetch))
                continue
            found.append(Entry(f"{name}|master", torch.float32, shape, _bound(_copy, parameter, torch.float32)))
            for key, value in state_tensors(base.state.get(parameter, {})).items():
                fetch = _bound(_copy, value, value.dtype)
                found.append(Entry(f"{name}|{key}", value.dtype, tuple(value.shape), fetch))
        return found

    def weight_entries(self) -> list[Entry]:
        """Every weight and buffer of `result_module` as it is saved: in bf16 where the run computes in bf16."""
        found = []
        for name, tensor in self.result_module.state_dict(keep_vars=True).items():
            dtype = tensor.dtype
            if self.mixed_precision == "bf16" and dtype == torch.float32:
                dtype = torch.bfloat16
            found.append(Entry(name, dtype, zero.whole_shape(tensor), _bound(_whole, tensor, dtype)))
        return found

    def masters(self) -> list[torch.Tensor]:
        """The float32 tensors of this rank that the optimizer steps: whole parameters, or ZeRO's flat partitions."""
        if self.launch.deepspeed:
            return zero.flat_partitions(self._zero, self.base_optimizer)
        return [parameter for _, parameter in self.named_parameters]

    def master_entries(self, kind: str) -> list[Entry]:
        """The masters as "<name>|kind", fetched as they are then; see `optimizer_entries`."""
        masters = [entry for entry in self.optimizer_entries() if entry.key.endswith("|master")]
        return [dataclasses.replace(entry, key=f"{entry.key.removesuffix('|master')}|{kind}") for entry in masters]

    def set_masters(self, read: Callable[[str], torch.Tensor]) -> None:
        """Give every master a new value; `read(name)` is the whole tensor, the same on every rank."""
        with torch.no_grad():
            for name, parameter in self.named_parameters:
                if self.launch.deepspeed:
                    zero.set_master(self._zero, self.base_optimizer, parameter, read(name))
                else:
                    parameter.copy_(read(name).to(parameter.device))

    def weights_from_masters(self) -> None:
        """Round the masters into the weights that the model computes with; every rank calls it."""
        if not self.launch.deepspeed:
            return
        with torch.no_grad():
            for _, parameter in self.named_parameters:
                parameter.copy_(zero.fetch_master(parameter, keep=True).to(parameter.device))

    def optimizer_numbers(self) -> dict:
        """What the optimizer keeps beside tensors, as JSON values; `restore_optimizer` takes it back."""
        base = self.base_optimizer
        if self.launch.deepspeed:
            numbers, own = state_numbers(zero.first_state(base)), {}
        else:
            states = [(name, state_numbers(base.state[p])) for name, p in self.named_parameters if base.state.get(p)]
            numbers = states[0][1] if states else {}
            own = {name: found for name, found in states if found != numbers}
        return {"class": type(base).__name__, "numbers": numbers, "own_numbers": own, "groups": self._groups.changed()}

    def restore_optimizer(self, saved: dict, keys: Sequence[str], read: Callable[[str], torch.Tensor]) -> None:
        """Put masters, optimizer tensors and numbers back, whatever engine and world size wrote them.

        Args:
            saved: what `optimizer_numbers` gave.
            keys: every key of the checkpoint's optimizer tensors.
            read: (key) -> tensor, the same on every rank; called by all ranks in one order.

        Raises:
            CheckpointError: the checkpoint was written with another optimizer.
        """
        base = self.base_optimizer
        if optimizer_family(saved["class"]) != optimizer_family(type(base).__name__):
            raise CheckpointError(
                f"The checkpoint was written with optimizer {saved['class']}, this run uses {type(base).__name__}."
                " Resume with the same optimizer."
            )
        of_parameter = {name: [] for name, _ in self.named_parameters}
        for key in keys:
            name, _, kind = key.rpartition("|")
            if kind != "master":
                of_parameter[name].append(kind)
        if self.launch.deepspeed:
            first = of_parameter[self.named_parameters[0][0]]
            zero.restore(self._zero, base, self.named_parameters, first, saved["numbers"], read)
        else:
            with torch.no_grad():
                for name, parameter in self.named_parameters:
                    parameter.copy_(read(f"{name}|master").to(parameter.device))
                    numbers = saved["own_numbers"].get(name, saved["numbers"])
                    if of_parameter[name] or numbers:
                        tensors = {k: read(f"{name}|{k}") for k in of_parameter[name]}
                        base.state[parameter] = restored_state(base, numbers, tensors, parameter.device)
        self._groups.restore(saved["groups"])

    def loss_scale(self) -> dict | None:
        """The state of fp16's loss scale as JSON values, None where the run has none."""
        if self.launch.deepspeed:
            return zero.loss_scale(self._zero)
        return None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()

    def restore_loss_scale(self, saved: dict | None) -> bool:
        """Put it back; False where the checkpoint holds none, or one of another engine, though this run needs it."""
        here = self.loss_scale()
        if here is None or saved is None or set(saved) != set(here):
            return here is None
        if self.launch.deepspeed:
            zero.restore_loss_scale(self._zero, saved)
        else:
            self.accelerator.scaler.load_state_dict(saved)
        return True

    # ------------------------------------------------------------------------------------------------------- weights

    @contextlib.contextmanager
    def result_weights(self) -> Iterator[None]:
        """Within it the model holds the weights that the run is judged by and hands out; every rank enters it.

        Those are the trained ones, but for an optimizer that steps one set of weights and means another to be used
        (schedule-free AdamW). Afterwards the trained ones are back, to the bit; masters and moments are not touched.
        """
        if averaging_key(self.base_optimizer) is None or self._holds_result:
            yield
            return
        kept = []
        with torch.no_grad():
            for (_, parameter), (_, result) in zip(self.named_parameters, self.result_masters(True), strict=True):
                with zero.writable(parameter):
                    kept.append(parameter.detach().to("cpu", copy=True))
                    parameter.copy_(result)
        self._holds_result = True
        try:
            yield
        finally:
            self._holds_result = False
            with torch.no_grad():
                for (_, parameter), own in zip(self.named_parameters, kept, strict=True):
                    with zero.writable(parameter):
                        parameter.copy_(own)

    def result_masters(self, keep: bool) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Yield (name, float32 values of `result_weights` on the CPU where `keep`); every rank iterates to the end."""
        base, entries = self.base_optimizer, {entry.key: entry for entry in self.optimizer_entries()}
        # within `result_weights` a parameter that is its own master is the result already
        other = None if self._holds_result and not self.launch.deepspeed else averaging_key(base)
        for name, _ in self.named_parameters:
            master = entries[f"{name}|master"].fetch(keep)
            if f"{name}|{other}" in entries:  # not before the first step
                beside = entries[f"{name}|{other}"].fetch(keep)
                master = averaged(base, master, beside) if keep else None
            yield name, master

    def write_adapter(self, folder: Path) -> None:
        """Write the LoRA adapter into `folder`; every rank calls it, the main one writes."""
        self._save_adapter([self.model], [], str(folder))

    def check_adapter(self, folder: Path, same_weights: bool) -> None:
        """ValueError unless the adapter in `folder` belongs to this model, and holds the same weights if asked."""
        check_adapter(str(folder), self.unwrap(self.model), same_weights=same_weights)

    def nonfinite_weights(self) -> list[str]:
        """Names of trainable parameters that hold a value that is not finite, of those parts that this rank has."""
        held = [(name, getattr(p, "ds_tensor", p)) for name, p in self.named_parameters]
        with torch.no_grad():
            bad = torch.stack([~torch.isfinite(tensor).all() for _, tensor in held]).tolist()
        return [name for (name, _), found in zip(held, bad, strict=True) if found]

    def check_weights(self, what: str) -> None:
        """Raise CheckpointError on every rank if any rank's weights are not finite; `what` was to be written."""
        names = list(dict.fromkeys(name for found in self.ranks.gather(self.nonfinite_weights()) for name in found))
        if names:
            raise CheckpointError(
                f"{what} was not written: {len(names)} of {len(self.named_parameters)} trainable tensors hold values"
                f" that are not finite, the first is {names[0]}. Go on from the last whole checkpoint with a lower"
                " learning rate."
            )


def _bound(fetch: Callable, *arguments: object) -> Callable[[bool], torch.Tensor | None]:
    return lambda keep: fetch(*arguments, keep)


def _copy(tensor: torch.Tensor, dtype: torch.dtype, keep: bool) -> torch.Tensor | None:
    return tensor.detach().to("cpu", dtype) if keep else None


def _whole(tensor: torch.Tensor, dtype: torch.dtype, keep: bool) -> torch.Tensor | None:
    whole = zero.fetch_weight(tensor, keep)
    return whole.to(dtype) if keep else None
