"""A local web page that draws with a model and an adapter, and shows running and finished trainings.

python -m sana_kit.playground --model_path ./SANA --lora_weights ./output
"""
