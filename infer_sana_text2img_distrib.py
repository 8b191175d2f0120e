"""Images from prompts with a SANA model on several devices or machines, with or without LoRA weights.

    accelerate launch --num_processes=4 infer_sana_text2img_distrib.py
    accelerate launch --num_processes=4 infer_sana_text2img_distrib.py --lora_weights ./output
    accelerate launch --multi_gpu --num_processes=2 infer_sana_text2img_distrib.py      on a host that has only CPUs

Prompts x seeds are shared among the processes; every number of processes makes the same images, byte for byte.
"""

import sys

from sana_kit.inference.command import main

if __name__ == "__main__":
    sys.exit(main("Images from prompts with a SANA model on several devices or machines."))
