"""What this kit computes beside diffusers and NVlabs, in numbers. `python -m sana_kit.parity` is the command."""
