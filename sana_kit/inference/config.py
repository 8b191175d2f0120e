"""The command line of the three infer_sana_text2img_*.py scripts, which differ in their defaults only."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path

DEFAULT_MODEL = "Efficient-Large-Model/Sana_1600M_4Kpx_BF16_diffusers"


DEFAULT_PROMPTS = Path(__file__).with_name("prompts.jsonl")


DEFAULT_SEEDS = (8, 23, 42, 1334)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations, which names the nearest flag for a misspelt one."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_args(self, args=None, namespace=None):
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            said = []
            for word in unknown:
                near = difflib.get_close_matches(word.split("=")[0], flags, n=1) if word.startswith("-") else []
                said.append(f"{word} (did you mean {near[0]}?)" if near else word)
            self.error("unrecognized arguments: " + " ".join(said))
        return known


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults behind the help of flags that have a value."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.const is not None else super()._get_help_string(action)


def build_parser(description: str, lora_default: str | None = None) -> argparse.ArgumentParser:
    """The flags of the inference scripts. `lora_default`: an adapter that the script takes if none is named."""
    parser = Parser(description=description, formatter_class=_Help)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model_path",
        default=DEFAULT_MODEL,
        help="diffusers folder, hub name, or the output folder of a full fine-tuning (which holds transformer/)",
    )
    model.add_argument(
        "--base_model", help="base of a fully fine-tuned transformer that names none: diffusers folder or hub name"
    )
    model.add_argument("--revision", help="revision of a hub model: branch, tag or commit")
    model.add_argument("--variant", help="variant of the weights files, such as fp16")
    model.add_argument("--cache_dir", help="where hub models are kept; default: huggingface_hub's own")
    model.add_argument("--dtype", default="bf16", help="of the transformer: bf16, fp32 or fp16 (not for bf16 weights)")
    model.add_argument(
        "--vae_dtype", help="of the VAE's decoder: bf16 or fp32; default: bf16, and fp32 where --dtype is fp32"
    )
    model.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, npu or npu:N")
    model.add_argument("--attention", default="auto", help="cross-attention kernel: auto, sdpa or npu_fusion")
    lora = parser.add_argument_group("LoRA")
    lora.add_argument(
        "--lora_weights",
        default=lora_default,
        help="adapter: a safetensors file, or a folder that holds pytorch_lora_weights.safetensors",
    )
    lora.add_argument("--lora_scale", type=float, default=1.0, help="strength of the adapter")
    lora.add_argument(
        "--no_fuse_lora",
        dest="fuse_lora",
        action="store_false",
        help="keep the adapter beside the weights instead of merging it into them for the run",
    )
    what = parser.add_argument_group("images")
    what.add_argument("--prompt", action="append", help="a prompt; may be given several times")
    what.add_argument(
        "--prompts_file",
        help="prompts: a .txt file with one a line, or a .jsonl file with objects of prompt and, if wanted,"
        f" negative_prompt, seeds, height, width; default without --prompt: {DEFAULT_PROMPTS.name} of the kit",
    )
    what.add_argument(
        "--negative_prompt", help="for every prompt; default: the one in the prompts file, else the empty text"
    )
    what.add_argument("--seeds", type=int, nargs="+", default=list(DEFAULT_SEEDS), help="one image per prompt each")
    what.add_argument("--num_inference_steps", type=int, default=28, help="denoising steps")
    what.add_argument("--guidance_scale", type=float, default=2.0, help="classifier-free guidance; 1 and below: none")
    what.add_argument(
        "--height", type=int, help="pixels; default: the checkpoint's native size, or the width if given"
    )
    what.add_argument(
        "--width", type=int, help="pixels; default: the checkpoint's native size, or the height if given"
    )
    what.add_argument(
        "--complex_human_instruction",
        default="default",
        help="lines put before each prompt: default (SanaPipeline's own), none, a file, or a JSON list",
    )
    what.add_argument("--max_sequence_length", type=int, default=300, help="tokens of a prompt that count")
    what.add_argument(
        "--no_resolution_binning",
        dest="resolution_binning",
        action="store_false",
        help="work at the size asked for, never at the nearest trained size; default: at that one where its pixels are"
        " within a factor of 2",
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--batch_size",
        default="auto",
        help="images per call of the transformer: a number, or auto (by size and device)",
    )
    run.add_argument("--output_path", default="./infer_result", help="folder for images, manifest and contact sheet")
    run.add_argument(
        "--overwrite", action="store_true", help="make finished images again instead of keeping those that are whole"
    )
    return parser
