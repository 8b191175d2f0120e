"""What the SANA fine-tuning and inference scripts share. Imports run one way: scripts -> sana_kit -> libraries."""

__version__ = "0.1.0.dev0"  # of the kit, written into every adapter
