"""Images from prompts with a SANA model, in bf16, on one device (Ascend NPU, CUDA GPU or CPU).

    python infer_sana_text2img_bf16.py
    python infer_sana_text2img_bf16.py --model_path ./SANA --prompt "a red fox" --seeds 8 23 --height 1024 --width 1024

Started again, the same command keeps finished images. `--help` lists the flags; sana_kit/inference/ is what runs.
"""

import sys

from sana_kit.inference.command import main

if __name__ == "__main__":
    sys.exit(main("Images from prompts with a SANA model."))
