"""The lines of Python on a model card that draw with the weights."""

from __future__ import annotations

from patch_sana import ADAPTER_FILE


def snippet(base: str, repository: str, settings: dict, example: str, mode: str) -> str:
    """Python that draws with the weights as they were trained: size, instruction, checkpoint's own scheduler."""
    variant = f", variant={settings['variant']!r}" if settings.get("variant") else ""
    lines = ["import torch", *_loading(base, repository, variant, mode)]
    lines.append('pipeline.to("cuda" if torch.cuda.is_available() else "cpu")  # "npu" with torch_npu')
    lines += ["image = pipeline(", f"    prompt={example!r},"]
    lines += ['    control_image=load_image("control.png"),'] if mode == "controlnet" else []
    if settings.get("resolution"):
        side = settings["resolution"]
        lines.append(f"    height={side},")
        lines.append(f"    width={side},")
    steps, guidance = settings.get("validation_inference_steps"), settings.get("validation_guidance_scale")
    lines += [f"    num_inference_steps={steps},"] if steps else []
    lines += [f"    guidance_scale={guidance},"] if guidance else []
    instruction = settings.get("instruction", "default")
    if instruction != "default":  # what the prompts of the training had before them, None for nothing
        lines.append(f"    complex_human_instruction={instruction!r},")
    lines += ["    use_resolution_binning=False,", ").images[0]", 'image.save("image.png")']
    return "\n".join(lines)


def _loading(base: str, repository: str, variant: str, mode: str) -> list[str]:
    """The lines that import and load the pipeline."""
    if mode == "lora":
        return [
            "from diffusers import SanaPipeline",
            "",
            f"pipeline = SanaPipeline.from_pretrained({base!r}{variant}, torch_dtype=torch.bfloat16)",
            f"pipeline.load_lora_weights({repository!r})",
        ]
    if mode in ("lokr", "loha"):
        return [
            "from diffusers import SanaPipeline",
            "from huggingface_hub import hf_hub_download",
            "# of the kit that trained it: diffusers reads neither LoKr nor LoHa",
            "from sana_kit.models.adapter import apply_lora, read_lora",
            "",
            f"pipeline = SanaPipeline.from_pretrained({base!r}{variant}, torch_dtype=torch.bfloat16)",
            f"weights = hf_hub_download({repository!r}, {ADAPTER_FILE!r})",
            "adapter, problems = read_lora(weights, dict(pipeline.transformer.config))",
            "apply_lora(pipeline.transformer, adapter)",
        ]
    part, pipeline, model = "transformer", "SanaPipeline", "SanaTransformer2DModel"
    if mode == "controlnet":
        part, pipeline, model = "controlnet", "SanaControlNetPipeline", "SanaControlNetModel"
    lines = [f"from diffusers import {', '.join(sorted((pipeline, model)))}"]
    lines += ["from diffusers.utils import load_image"] if mode == "controlnet" else []
    load = f'{part} = {model}.from_pretrained(\n    weights, subfolder="{part}", torch_dtype=torch.bfloat16\n)'
    lines += ["", f"weights = {repository!r}", load, f"pipeline = {pipeline}.from_pretrained("]
    return [*lines, f"    {base!r}{variant}, {part}={part}, torch_dtype=torch.bfloat16", ")"]
