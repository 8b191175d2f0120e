"""The command line of the three infer_sana_text2img_*.py scripts, which differ in their defaults only.

Nothing heavy is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from sana_kit import flags
from sana_kit.flags import flag, section

DEFAULT_MODEL = "Efficient-Large-Model/Sana_1600M_4Kpx_BF16_diffusers"
DEFAULT_PROMPTS = Path(__file__).with_name("prompts.jsonl")
DEFAULT_SEEDS = (8, 23, 42, 1334)


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """Which model, and how it computes."""

    model_path: str = flag(
        DEFAULT_MODEL,
        "diffusers folder, hub name, or the output folder of a full fine-tuning (which holds transformer/)",
        path=True,
    )
    base_model: str | None = flag(
        None, "base of a fully fine-tuned transformer that names none: diffusers folder or hub name", path=True
    )
    revision: str | None = flag(None, "revision of a hub model: branch, tag or commit")
    variant: str | None = flag(None, "variant of the weights files, such as fp16; parts without it take plain files")
    cache_dir: str | None = flag(None, "where hub models are kept; default: huggingface_hub's own", path=True)
    dtype: str = flag(
        "bf16",
        "of the transformer (fp16: not for bf16 weights)",
        choices=("bf16", "fp32", "fp16"),
        heading="precision and speed",
    )
    vae_dtype: str | None = flag(
        None, "of the VAE's decoder; default: bf16, and fp32 where --dtype is fp32", choices=("bf16", "fp32")
    )
    vae: str | None = flag(
        None,
        "another AutoencoderDC for the same latents, such as DC-AE 1.1 or DC-AE-Lite: its folder, a pipeline's folder,"
        " or a hub name",
        path=True,
    )
    quantize: str | None = flag(
        None,
        "how weights of the transformer and the text encoder are kept: int8, fp8 (torchao) or nf4 (bitsandbytes);"
        " products stay in --dtype",
        choices=("int8", "fp8", "nf4"),
    )
    device: str = flag("auto", "auto, cpu, cuda, cuda:N, npu or npu:N")
    attention: str = flag("auto", "cross-attention kernel", choices=("auto", "sdpa", "npu_fusion"))
    cuda_graphs: bool = flag(
        False,
        "CUDA: compile the whole transformer and play its steps as recorded graphs, one for each size of a batch;"
        " images of one size only. Not tried on a card yet",
    )
    fused_blocks: str = flag(
        "off",
        "auto: hand-written SANA blocks with fewer passes over memory, where they fit; images are equal but for"
        " rounding, so off keeps the bits of earlier ones",
        choices=("off", "auto"),
    )


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """Which adapter, and how strong."""

    lora_weights: tuple[str, ...] = flag(
        (),
        "adapter: a safetensors file of any layout (diffusers, PEFT, kohya, ComfyUI, LyCORIS), or a folder that holds"
        " pytorch_lora_weights.safetensors; PATH:0.8 gives it a strength, and several are separated by blanks or"
        " commas; default: none, of the LoRA script ./output/pytorch_lora_weights.safetensors",
        repeat=True,
        many=True,
        path=True,
    )
    lora_scale: float = flag(1.0, "strength of all adapters together", low=-1e6, high=1e6)
    fuse_lora: bool = flag(
        True,
        "keep the adapter beside the weights instead of merging it into them for the run",
        off="no_fuse_lora",
    )


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """Which images."""

    prompt: tuple[str, ...] = flag((), "a prompt; may be given several times", repeat=True)
    prompts_file: str | None = flag(
        None,
        "prompts: .txt (one a line, # begins a comment), .jsonl, .json, .csv or .tsv with prompt and, if wanted,"
        " negative_prompt, seeds, height, width, init_image, strength, mask_image, control_image (paths from the"
        f" file's own folder); default without --prompt: {DEFAULT_PROMPTS.name} of the kit",
        path=True,
    )
    negative_prompt: str | None = flag(
        None, "for every prompt (SANA-Sprint takes none); default: the one in the prompts file, else the empty text"
    )
    seeds: tuple[int, ...] = flag(DEFAULT_SEEDS, "one image per prompt each", low=-(2**63), high=2**64 - 1)
    num_inference_steps: int | None = flag(
        None, "denoising steps; default: 28, of SANA-Sprint 2", low=1, heading="steps, sizes, texts"
    )
    guidance_scale: float | None = flag(
        None,
        "classifier-free guidance, 1 and below: none; of SANA-Sprint an input of the model; default: 2.0, of"
        " SANA-Sprint 4.5",
        low=-1e6,
        high=1e6,
    )
    scheduler: str = flag(
        "checkpoint",
        "the checkpoint's own, DPM-Solver++ on flow sigmas, or Euler on them (with the checkpoint's flow shift);"
        " SANA-Sprint has its own only",
        choices=("checkpoint", "flow-dpm", "flow-euler"),
    )
    height: int | None = flag(
        None,
        "pixels; default: --width, else what the LoRA was trained at, else the checkpoint's native size",
        low=1,
    )
    width: int | None = flag(None, "pixels; default: --height, else as for the height", low=1)
    complex_human_instruction: str | None = flag(
        None,
        "lines put before each prompt: default (SanaPipeline's own), none, a file, or a JSON list; without the flag:"
        " what the LoRA was trained with, if its file says so, else default",
        path=True,
    )
    max_sequence_length: int = flag(300, "tokens of a prompt that count", low=1)
    resolution_binning: bool = flag(
        True,
        "work at the size asked for, never at the nearest trained size; default: at that one where its pixels are"
        " within a factor of 2",
        off="no_resolution_binning",
    )


@dataclasses.dataclass(frozen=True)
class InputSettings:
    """What images are drawn from and along beside their prompts."""

    init_image: str | None = flag(None, "image to begin from, instead of noise alone", path=True)
    strength: float | None = flag(
        None,
        "share of the steps that are done from --init_image on: near 0 keeps it, 1 draws anew; default: 0.6, of"
        " SANA-Sprint 0.5, with --mask_image 1",
        above=0.0,
        high=1.0,
    )
    mask_image: str | None = flag(
        None, "of --init_image's size: white is drawn anew, black is kept to the bit (not SANA-Sprint)", path=True
    )
    controlnet: str | None = flag(
        None, "SanaControlNetModel: its folder, a pipeline's folder, or a hub name (not SANA-Sprint)", path=True
    )
    control_image: str | None = flag(None, "what --controlnet sees, such as outlines", path=True)
    control_scale: float = flag(1.0, "strength of --controlnet", low=-1e6, high=1e6)
    pag_scale: float = flag(
        0.0,
        "perturbed attention guidance, 0: none; a step then costs one more prediction (not SANA-Sprint)",
        low=0,
        high=1e6,
    )
    pag_layers: tuple[int, ...] = flag(
        (), "blocks whose self-attention is perturbed, from 0; default: 8 of 20, 14 of 28 blocks", low=0
    )


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Where to, and how many at once."""

    batch_size: str = flag("auto", "images per call of the transformer: a number, or auto (by size and device)")
    output_path: str = flag("./infer_result", "folder for images, manifest and contact sheet", path=True)
    overwrite: bool = flag(False, "make finished images again instead of keeping those that are whole")


@dataclasses.dataclass(frozen=True)
class InferConfig:
    """All settings of an inference run."""

    model: ModelSettings = section("model")
    lora: LoraSettings = section("LoRA")
    images: ImageSettings = section("images")
    inputs: InputSettings = section("images to begin from and to follow")
    run: RunSettings = section("run")


def parse_config(description: str, argv: Sequence[str] | None = None, lora_default: str | None = None) -> InferConfig:
    """The configuration of a script's command line; SystemExit 2 for what is no flag of it.

    `lora_default`: an adapter that the script takes if none is named.
    """
    epilog = f"Without --lora_weights this script takes {lora_default}." if lora_default else None
    config, given = flags.parse(InferConfig, description, argv, epilog=epilog)
    if lora_default is None or "lora_weights" in given:
        return config
    return dataclasses.replace(config, lora=dataclasses.replace(config.lora, lora_weights=(lora_default,)))
