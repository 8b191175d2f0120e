"""Starting a run: what finetune_sana_dreambooth_lora_deepspeed_bf16.sh leaves to Python.

host.py: devices, the accelerate config, a free port, how many processes. ranks.py: `accelerate launch` in this
process, its environment, the trainer's own exit code. __main__.py: the checks, then the processes, then the last line.
"""
