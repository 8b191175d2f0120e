"""The final weights, the model card, the upload."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from sana_kit.files import apply_umask, write_atomic
from sana_kit.training import checkpoints
from sana_kit.training.config import redacted_command
from sana_kit.training.engine import collect_optimizer_state


def write_transformer(accelerator, model, args, folder: Path) -> None:
    """Write a full fine-tuned transformer as a diffusers folder below `folder`; every rank calls it (ZeRO-3
    gathers).
    """
    from huggingface_hub import save_torch_state_dict

    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        transformer = accelerator.unwrap_model(model)
        state = {k: v.to(torch.bfloat16) if args.mixed_precision == "bf16" else v for k, v in state.items()}
        transformer.save_config(folder / "transformer")
        save_torch_state_dict(
            state, folder / "transformer", filename_pattern="diffusion_pytorch_model{suffix}.safetensors"
        )
        base = {"base_model": args.pretrained_model_name_or_path, "revision": args.revision}
        (folder / "sana_kit_base.json").write_text(json.dumps(base), encoding="utf-8")


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


def write_final_weights(
    args, accelerator, model, optimizer, named_parameters, write_weights, output_dir: Path
) -> None:
    """The adapter (or transformer/) in the output folder, written beside and renamed."""
    import shutil

    masters = {}
    if args.upcast_before_saving and args.train_mode == "lora":
        keep = accelerator.is_main_process
        for key, tensor in collect_optimizer_state(model, optimizer, named_parameters, keep):
            if keep and key.endswith("|master"):
                masters[key.removesuffix("|master")] = tensor
    partial = output_dir / ".final.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    write_weights(partial)
    if accelerator.is_main_process:
        if masters:
            upcast_adapter(partial, masters)
        apply_umask(path for path in partial.rglob("*") if path.is_file())
        for path in sorted(partial.iterdir()):
            target = output_dir / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
        partial.rmdir()
    accelerator.wait_for_everyone()


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
