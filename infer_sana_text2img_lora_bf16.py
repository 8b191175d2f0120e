"""Images from prompts with a SANA model and LoRA weights, in bf16, on one device (Ascend NPU, CUDA GPU or CPU).

    python infer_sana_text2img_lora_bf16.py
    python infer_sana_text2img_lora_bf16.py --model_path ./SANA --lora_weights ./output --prompt "a red fox"

The adapter is ./output/pytorch_lora_weights.safetensors unless named; without a usable one the script stops.
"""

import sys

from sana_kit.inference.command import main

if __name__ == "__main__":
    sys.exit(
        main(
            "Images from prompts with a SANA model and LoRA weights.",
            lora_default="./output/pytorch_lora_weights.safetensors",
        )
    )
