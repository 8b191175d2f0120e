"""The final weights, the model card, the upload."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open

from patch_sana import ADAPTER_FILE, base_model_fingerprint
from sana_kit import model_card
from sana_kit.data.image_set import ImageSet
from sana_kit.errors import CheckpointError, UserError
from sana_kit.files import apply_umask, remove_tree, unique_name, write_atomic
from sana_kit.models.about import LoraAbout, about_metadata, shared_words
from sana_kit.models.adapter import apply_lora, read_lora
from sana_kit.models.folder import Model
from sana_kit.models.loading import load_transformer
from sana_kit.training import checkpoints
from sana_kit.training.checkpoint_folders import MODEL_FOLDERS
from sana_kit.training.config import TrainConfig
from sana_kit.training.ema import WeightAverage
from sana_kit.training.engine import Engine
from sana_kit.training.shares import share_out, write_shares
from sana_kit.training.state import TrainState


def write_model(engine: Engine, config: TrainConfig, folder: Path) -> None:
    """Write the trained transformer or ControlNet as a diffusers folder below `folder`; every rank calls it."""
    files = checkpoints.split_model(engine)
    _, problem = write_shares(folder, share_out(files, [0]), engine.ranks.rank)
    if problem is not None:
        raise CheckpointError(f"Could not write the model into {folder}: {problem}")
    if engine.ranks.is_main:
        checkpoints.write_model_facts(folder, engine, config, files)


def upcast_adapter(folder: Path, masters: dict) -> None:
    """Rewrite the adapter file with float32 masters, for --upcast_before_saving under an engine with bf16 weights."""
    path = folder / ADAPTER_FILE
    with safe_open(path, framework="pt") as handle:
        metadata, keys = handle.metadata(), list(handle.keys())
        tensors = {}
        for key in keys:
            name = key.removeprefix("transformer.")
            # DoRA's magnitude has no .weight in the file
            stem = name.removesuffix(".weight")
            # factors of LoKr and LoHa are parameters themselves
            whole = f"{stem}.default"
            tensors[key] = masters[whole if whole in masters else f"{whole}.weight"]
    write_atomic(path, lambda handle: handle.write(safetensors.torch.save(tensors, metadata=metadata)))


def write_merged(config: TrainConfig, base_model: Model, engine: Engine) -> None:
    """The adapter of the output folder merged into the base's weights, as transformer/; every rank calls it.

    The base is loaded anew on the host: the weights of the run are cast, packed or quantised.
    """

    def merge() -> None:
        if not engine.ranks.is_main:
            return
        output_dir = Path(config.output_dir)
        lora, problems = read_lora(str(output_dir), base_model.transformer_config)
        if lora is None:
            raise UserError(problems)
        transformer = load_transformer(base_model, device=torch.device("cpu"), dtype=engine.compute_dtype)
        apply_lora(transformer, lora)
        partial = output_dir / ".final.partial"
        remove_tree(partial)
        partial.mkdir(parents=True)
        transformer.save_pretrained(partial / "transformer")
        checkpoints.write_base_name(partial, config)
        apply_umask(path for path in partial.rglob("*") if path.is_file())
        _put_in_place(partial, output_dir)

    engine.ranks.run_on_all(merge)


def write_result(config: TrainConfig, base_model: Model, engine: Engine, average: WeightAverage) -> None:
    """The result in the output folder; with an average that one, and the raw weights in raw/ beside it.

    Where it is asked for, transformer/ with the adapter merged into the weights, too.
    """
    output_dir = Path(config.output_dir)
    engine.check_weights("the result")
    if average and not config.ema_only_final:
        write_weights(config, engine, output_dir / "raw")
    with average.in_model():
        write_weights(config, engine, output_dir)
    if config.save_merged:
        write_merged(config, base_model, engine)


def write_weights(config: TrainConfig, engine: Engine, output_dir: Path) -> None:
    """The adapter (or transformer/, controlnet/) in a folder, written beside and renamed; every rank calls it."""
    main = engine.ranks.is_main
    masters = {}
    if config.upcast_before_saving and config.train_mode == "lora":
        masters = {name: master for name, master in engine.result_masters(keep=main) if main}
    partial = output_dir / ".final.partial"
    if main:
        remove_tree(partial)
        partial.mkdir(parents=True)
    with engine.result_weights():
        if config.train_mode == "lora":
            engine.write_adapter(partial)
        else:
            engine.ranks.run_on_all(lambda: write_model(engine, config, partial))
    if main:
        if masters:
            upcast_adapter(partial, masters)
        apply_umask(path for path in partial.rglob("*") if path.is_file())
        _put_in_place(partial, output_dir)
    engine.ranks.barrier()


def _put_in_place(partial: Path, output_dir: Path) -> None:
    """Give the new files their names; a folder of an earlier result goes only once the new one is there."""
    for path in sorted(partial.iterdir()):
        target = output_dir / path.name
        old = target.with_name(unique_name(target.name, "replaced"))
        if target.is_dir():
            os.replace(target, old)
        os.replace(path, target)
        remove_tree(old)
    partial.rmdir()


def _trigger(config: TrainConfig, images: ImageSet) -> str | None:
    """What the user put before or behind every caption, else what the captions share by themselves."""
    given = (config.caption_prefix or config.caption_suffix).strip(" ,.;:")
    return given or shared_words(images.all_captions)


def final_weights(config: TrainConfig) -> Path:
    """Where the result of a finished run lies."""
    return Path(config.output_dir, MODEL_FOLDERS.get(config.train_mode, ADAPTER_FILE))


def adapter_metadata(
    config: TrainConfig,
    base_model: Model,
    transformer: torch.nn.Module,
    instruction: list[str] | None,
    images: ImageSet,
    state: TrainState,
) -> Callable[[], dict[str, str]]:
    """What each adapter file of this run says of its training, as the hook of patch_sana.py asks for it.

    `transformer` is asked before the engine gets it: ZeRO-3 cuts its weights up.
    """
    about = LoraAbout(
        rank=config.rank,
        alpha=config.adapter.alpha,
        base_model=model_card.hub_id(base_model.name) or Path(base_model.name).name,
        base_sha256=base_model_fingerprint(transformer)["sha256"] if config.train_mode == "lora" else None,
        instruction=None if instruction is None else tuple(instruction),
        trigger=_trigger(config, images),
        resolution=config.side,
        images=len(images),
    )
    return lambda: about_metadata(dataclasses.replace(about, steps=state.global_step))


def write_card(config: TrainConfig, images: ImageSet) -> None:
    """The model card."""
    lora, output_dir = config.train_mode == "lora", Path(config.output_dir)
    model_card.write_model_card(
        output_dir,
        base_model=config.pretrained_model_name_or_path,
        dataset=[data_set.name for data_set in config.sets],
        trigger=_trigger(config, images),
        validation_prompts=config.validation.prompts,
        command=model_card.this_command(),
        train_mode=config.adapter_type if lora else config.train_mode,
        rank=config.rank if lora else None,
        lora_alpha=config.adapter.alpha if lora else None,
    )


def upload(config: TrainConfig) -> None:
    """Everything that a user of the weights needs goes to the hub, where that was asked for."""
    output_dir = Path(config.output_dir)
    if config.push_to_hub:
        model_card.push(output_dir, config.hub_model_id or output_dir.name, config.hub_token)
