"""The final weights, the model card, the upload."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from sana_kit.errors import CheckpointError
from sana_kit.files import apply_umask, write_atomic
from sana_kit.training import checkpoints
from sana_kit.training.config import redacted_command
from sana_kit.training.engine import Engine, collect_masters
from sana_kit.training.shares import MODEL_FILE_BYTES, share_out, split_files, write_shares


def write_transformer(engine: Engine, args, folder: Path) -> None:
    """Write a full fine-tuned transformer as a diffusers folder below `folder`; every rank calls it."""
    files = split_files(checkpoints.TRANSFORMER_STEM, engine.weight_entries(), MODEL_FILE_BYTES)
    _, problem = write_shares(folder, share_out(files, [0]), engine.ranks.rank)
    if problem is not None:
        raise CheckpointError(f"Could not write the model into {folder}: {problem}")
    if engine.ranks.is_main:
        checkpoints.write_model_facts(folder, engine, args, files)


def upcast_adapter(folder: Path, masters: dict) -> None:
    """Rewrite the adapter file with float32 masters, for --upcast_before_saving under an engine with bf16 weights."""
    from safetensors import safe_open
    from safetensors.torch import save

    path = folder / checkpoints.ADAPTER_FILE
    with safe_open(path, framework="pt") as handle:
        metadata, keys = handle.metadata(), list(handle.keys())
        tensors = {}
        for key in keys:
            name = key.removeprefix("transformer.")
            master = masters.get(name.replace(".weight", ".default.weight"))
            assert master is not None, key
            tensors[key] = master
    write_atomic(path, lambda handle: handle.write(save(tensors, metadata=metadata)))


def write_final_weights(args, engine: Engine, output_dir: Path) -> None:
    """The adapter (or transformer/) in the output folder, written beside and renamed."""
    main = engine.ranks.is_main
    engine.check_weights("the result")
    masters = {}
    if args.upcast_before_saving and args.train_mode == "lora":
        masters = {name: master for name, master in collect_masters(engine, keep=main) if main}
    partial = output_dir / ".final.partial"
    if main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    if args.train_mode == "lora":
        engine.write_adapter(partial)
    else:
        engine.ranks.run_on_all(lambda: write_transformer(engine, args, partial))
    if main:
        if masters:
            upcast_adapter(partial, masters)
        apply_umask(path for path in partial.rglob("*") if path.is_file())
        for path in sorted(partial.iterdir()):
            target = output_dir / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
        partial.rmdir()
    engine.ranks.barrier()


def finish_outputs(args, output_dir: Path, validation) -> None:
    """Model card, and the upload where it was asked for."""
    from sana_kit import model_card

    model_card.write_model_card(
        output_dir,
        base_model=args.pretrained_model_name_or_path,
        dataset=args.dataset_name or args.instance_data_dir,
        validation_prompts=validation.prompts if validation else [],
        command=redacted_command(),
        train_mode=args.train_mode,
        rank=args.rank if args.train_mode == "lora" else None,
        lora_alpha=args.lora_alpha if args.train_mode == "lora" else None,
    )
    if args.push_to_hub:
        model_card.push(output_dir, args.hub_model_id or output_dir.name, args.hub_token)
