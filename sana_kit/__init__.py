"""What the SANA fine-tuning and inference scripts share. Imports run one way: scripts -> sana_kit -> libraries."""
