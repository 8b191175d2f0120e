"""Quantised layers and images of a tiny model, as JSON: quantized.py MODEL LORA OUTPUT. Started by test_quantize.py.

Its own process, because the libraries are on no other's path: each import of diffusers would take longer with them.
"""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import torch
from helpers.drawing import CPU, draw, encode_few, plan
from torch import nn

from sana_kit.inference.command import main
from sana_kit.models.folder import find_model
from sana_kit.models.loading import load_pipeline, load_text_encoder
from sana_kit.models.quantize import QUANTIZATIONS, quantize_problems, quantize_weights


def layer_error(name: str) -> float:
    """Relative error of a linear layer and a 1 x 1 convolution together."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(96, 64, 1), nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.Flatten(2))
    layers.append(nn.Linear(64, 32)).requires_grad_(False)
    images = torch.randn(2, 96, 8, 8)
    expected = layers(images)
    made = copy.deepcopy(layers)
    assert quantize_weights(made, name, torch.float32) == 2
    return float((made(images) - expected).norm() / expected.norm())


def stored_bytes(module: nn.Module) -> int:
    """Bytes of the weights of a module, the parts of quantised ones counted."""
    total = 0
    for tensor in module.state_dict().values():
        parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else None
        total += sum(getattr(tensor, part).nbytes for part in parts) if parts else tensor.nbytes
    return total


def images_of(model: str, lora: str | None, name: str | None, fuse: bool = True) -> np.ndarray:
    settings = {"device": CPU, "dtype": torch.float32, "text_encoder": False}
    pipeline = load_pipeline(model, lora_weights=lora, fuse_lora=fuse, quantize=name, **settings)
    jobs = plan(["a red square"], [8, 23], steps=4)
    drawn = draw(pipeline, encoded, jobs)
    return np.stack([np.asarray(image).astype(int) for image in drawn])


def text_error(encoder: nn.Module) -> float:
    """Relative error of the text encoder's states for one line of tokens."""
    tokens = torch.arange(4, 30)[None]
    with torch.no_grad():
        states, expected = (each(tokens).last_hidden_state for each in (encoder, whole.text_encoder))
    return float((states - expected).norm() / expected.norm())


model, lora, output = sys.argv[1:]
whole = load_pipeline(model, device=CPU, dtype=torch.float32)
encoded = encode_few(whole)
plain, adapted = images_of(model, None, None), images_of(model, lora, None)
told = {"bytes": {"none": stored_bytes(whole.transformer.transformer_blocks)}}
told["adapter"] = float(abs(plain - adapted).mean())
for name in QUANTIZATIONS:
    assert quantize_problems(name, CPU) == []
    part = {"layer_error": layer_error(name)}
    part["levels"] = float(abs(images_of(model, None, name) - plain).mean())
    part["levels_with_adapter"] = float(abs(images_of(model, lora, name) - adapted).mean())
    part["levels_with_adapter_apart"] = float(abs(images_of(model, lora, name, fuse=False) - adapted).mean())
    loaded = load_pipeline(model, device=CPU, dtype=torch.float32, quantize=name, text_encoder=False)
    told["bytes"][name] = stored_bytes(loaded.transformer.transformer_blocks)
    found, _ = find_model(model)
    _, encoder = load_text_encoder(found, device=CPU, dtype=torch.float32, quantize=name)
    part["text_error"] = text_error(encoder)
    flags = ["--model_path", model, "--output_path", output, "--height", "64", "--width", "96", "--seeds", "8"]
    flags += ["--prompt", "a dog", "--num_inference_steps", "2", "--quantize", name]
    part["exit"] = main("quantised", flags)
    told[name] = part
Path(output, "told.json").write_text(json.dumps(told))
