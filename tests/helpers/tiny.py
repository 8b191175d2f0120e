"""Tiny, real things for the tests: a complete SanaPipeline folder of about half a megabyte, and small image sets.

Used by conftest.py; by hand: `python tests/helpers/tiny.py OUTPUT_FOLDER` writes a tiny pipeline there.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = (
    "a an the red green blue yellow square circle stripe on white with of photo drawing dog cat small large".split()
)


def make_tokenizer(words=WORDS):
    """A byte-level BPE GemmaTokenizerFast, built offline. pad 0, eos 1, bos 2, unk 3, as in Gemma's own vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import GemmaTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(words)] + list(words), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    return GemmaTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def make_scheduler(flow_shift=3.0):
    """The published checkpoints' DPMSolver; they have flow_shift 3.0, those of 4096 px 6.0."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=flow_shift,
        final_sigmas_type="zero",
    )


def build_pipeline(*, vae, text, transformer, words=WORDS, sprint=False, flow_shift=3.0):
    """A SanaPipeline, or a SanaSprintPipeline, with random weights from torch's generator as it stands.

    The VAE is a DC-AE with the blocks of the published one: of factor 8 with 4 blocks, as the published of 32 with 6.

    Args:
        vae: latent_channels, head_dim, channels (4 or 6), encoder_layers and decoder_layers (one per block).
        text: sizes of a Gemma2Config.
        transformer: arguments of SanaTransformer2DModel.
    """
    from diffusers import AutoencoderDC, SanaPipeline, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
    from transformers import Gemma2Config, Gemma2Model

    attending = len(vae["channels"]) - 3
    blocks = (*("ResBlock",) * 3, *("EfficientViTBlock",) * attending)
    multiscales = (*((),) * 3, *((5,),) * attending)
    autoencoder = AutoencoderDC(
        in_channels=3,
        latent_channels=vae["latent_channels"],
        attention_head_dim=vae["head_dim"],
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=vae["channels"],
        decoder_block_out_channels=vae["channels"],
        encoder_qkv_multiscales=multiscales,
        decoder_qkv_multiscales=multiscales,
        encoder_layers_per_block=vae["encoder_layers"],
        decoder_layers_per_block=vae["decoder_layers"],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    text_encoder = Gemma2Model(
        Gemma2Config(vocab_size=600, pad_token_id=0, eos_token_id=1, bos_token_id=2, **text)  # make_tokenizer's
    )
    return (SanaSprintPipeline if sprint else SanaPipeline)(
        tokenizer=make_tokenizer(words),
        text_encoder=text_encoder,
        vae=autoencoder,
        transformer=SanaTransformer2DModel(**transformer),
        scheduler=SCMScheduler() if sprint else make_scheduler(flow_shift),
    )


def make_tiny_pipeline(
    folder,
    seed=0,
    sample_size=16,
    qk_norm=None,
    layers=2,
    latent_channels=4,
    heads=4,
    sprint=False,
    interpolation_scale=None,
    flow_shift=3.0,
    vae_blocks=4,
):
    """Write a complete SanaPipeline (random weights from `seed`) to `folder` and return the folder as a Path.

    `sprint`: a SanaSprintPipeline instead, with the norms and the guidance embedding that its transformer has.
    `vae_blocks`: 4 for 8 pixels a latent, 6 for the 32 of the published VAE.

    Latents of `latent_channels`, Gemma2 of width 32, Sana transformer of `layers` x `heads` heads of 8: at 64 px the
    latents are (4, 8, 8).
    """
    import torch

    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    build_pipeline(
        vae={
            "latent_channels": latent_channels,
            "head_dim": 8,
            "channels": (8, 8, 16, 16, 16, 16)[:vae_blocks],
            "encoder_layers": (1,) * vae_blocks,
            "decoder_layers": (1,) * vae_blocks,
        },
        text={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
        transformer={
            "in_channels": latent_channels,
            "out_channels": latent_channels,
            "num_layers": layers,
            "num_attention_heads": heads,
            "attention_head_dim": 8,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": heads * 4,
            "cross_attention_dim": heads * 8,
            "caption_channels": 32,
            "sample_size": sample_size,
            "qk_norm": "rms_norm_across_heads" if sprint else qk_norm,
            **({"guidance_embeds": True, "guidance_embeds_scale": 0.1} if sprint else {}),
            **({} if interpolation_scale is None else {"interpolation_scale": interpolation_scale}),
        },
        sprint=sprint,
        flow_shift=flow_shift,
    ).save_pretrained(folder)
    torch.set_rng_state(generator_state)
    return Path(folder)


def make_tiny_controlnet(folder, model, layers=1, seed=3):
    """Write a SanaControlNetModel for the transformer of a tiny pipeline; returns the folder as a Path.

    Random weights from `seed`, those that begin at zero in training too: else it would add nothing.
    """
    import torch
    from diffusers import SanaControlNetModel

    config = json.loads((Path(model) / "transformer/config.json").read_text())
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    for name in ("guidance_embeds", "guidance_embeds_scale", "qk_norm", "timestep_scale"):
        own.pop(name, None)
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    controlnet = SanaControlNetModel(**{**own, "num_layers": layers})
    for layer in (controlnet.input_block, *controlnet.controlnet_blocks):
        torch.nn.init.normal_(layer.weight, std=0.3)
    controlnet.save_pretrained(folder)
    torch.set_rng_state(generator_state)
    return Path(folder)


# Sizes for the benchmarks: VAE encode : text encode : transformer forward = 5.2 : 1.2 : 3.0 FLOPs per 256 px image,
# as of the 1600M model at 1024 px.
# Config of the smallest SanaTransformer2DModel that has every part.
NARROW_TRANSFORMER = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 24,
    "sample_size": 16,
}
SCALED_VAE = {
    "latent_channels": 8,
    "head_dim": 32,
    "channels": (64, 64, 128, 128),
    "encoder_layers": (2, 2, 2, 2),
    "decoder_layers": (2, 2, 2, 2),
}
SCALED_TEXT = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 10,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
SCALED_TRANSFORMER = {
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 6,
    "num_attention_heads": 10,
    "attention_head_dim": 32,
    "num_cross_attention_heads": 5,
    "cross_attention_head_dim": 64,
    "cross_attention_dim": 320,
    "caption_channels": 256,
    "sample_size": 32,
}


def make_images(count=6, size=80, seed=0):
    """`count` distinct (PIL RGB image, caption) pairs: a coloured square on a light ground, wider than high."""
    generator = np.random.default_rng(seed)
    pairs = []
    for index in range(count):
        pixels = generator.integers(200, 256, (size, size + 8 * (index % 3), 3), dtype=np.uint8)
        colour = generator.integers(0, 160, 3)
        pixels[16 : 40 + index, 16:48] = colour
        name = ("red", "green", "blue")[int(colour.argmax())]
        pairs.append((Image.fromarray(pixels), f"a {name} square {index} on white"))
    return pairs


def write_image_folder(folder, count=6, captions=True, size=80):
    """Images as PNG with a .txt caption of the same name beside each."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for index, (image, caption) in enumerate(make_images(count, size)):
        image.save(folder / f"image_{index:02d}.png")
        if captions:
            (folder / f"image_{index:02d}.txt").write_text(caption, encoding="utf-8")
    return folder


def write_parquet_dataset(folder, count=6, extras=True, size=80):
    """The pokemon-blip-captions layout: dataset_infos.json, README.MD, data/train-001.parquet with image and text."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    folder = Path(folder)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    pairs = make_images(count, size)
    features = Features({"image": ImageFeature(), "text": Value("string")})
    dataset = Dataset.from_dict({"image": [p for p, _ in pairs], "text": [c for _, c in pairs]}, features=features)
    dataset.to_parquet(str(folder / "data" / "train-001.parquet"))
    if extras:
        (folder / "dataset_infos.json").write_text(json.dumps({}), encoding="utf-8")
        (folder / "README.MD").write_text("# images\n", encoding="utf-8")
    return folder


if __name__ == "__main__":
    print(make_tiny_pipeline(sys.argv[1]))
