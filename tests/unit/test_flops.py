"""The closed forms of sana_kit/flops.py against torch's FLOP counter on meta tensors, and its command line.

Run: python -m pytest tests/unit/test_flops.py
"""

import json

import pytest
import torch
from helpers import KIT
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from sana_kit import flops
from sana_kit.arithmetic import (
    AUTOENCODER,
    TEXT_ENCODER,
    TRANSFORMERS,
    checkpoint_bytes,
    default_controlnet_layers,
    forward_flops_per_image,
    model_flops_utilisation,
    roofline_seconds,
    text_encoder_ops,
    total_flops,
    training_bytes,
    training_flops_per_image,
    transformer_ops,
    vae_decode_ops,
    vae_encode_ops,
)
from sana_kit.models.controlnet import ControlledTransformer, begin_controlnet
from sana_kit.models.folder import find_model
from sana_kit.models.lora import recompute_blocks

SMALL = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 6,
    "attention_head_dim": 16,
    "num_layers": 3,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 24,
    "cross_attention_dim": 96,
    "caption_channels": 48,
    "mlp_ratio": 2.5,
    "patch_size": 1,
}


def count_convolution_backward(*shapes, out_shape=None, **kwargs):
    """Each gradient of a convolution costs what its forward does; torch's own formula ignores the groups."""
    grad_out, inputs, weight = shapes[:3]
    mask = shapes[10]
    return sum(bool(flag) for flag in mask[:2]) * conv_flop_count(inputs, weight, grad_out)


def counter():
    # The mask of gradients is among the arguments, which the counter hands on as they are.
    return FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: count_convolution_backward}
    )


def build(config, mode, gradient_checkpointing=False, rank=4):
    from diffusers import SanaTransformer2DModel
    from peft import LoraConfig

    with torch.device("meta"):
        model = SanaTransformer2DModel(**config)
        if mode == "lora":
            model.requires_grad_(False)
            model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v"]))
    if gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def measure(model, config, latent_hw, caption_tokens, backward):
    with torch.device("meta"):
        latents = torch.empty(1, config["in_channels"], *latent_hw)
        prompt = torch.empty(1, caption_tokens, config["caption_channels"])
        timestep = torch.empty(1)
        with counter() as counted:
            if not backward:
                with torch.no_grad():
                    model(latents, prompt, timestep)
            else:
                model.train()
                model(latents, prompt, timestep, return_dict=False)[0].sum().backward()
    return counted.get_total_flops()


CONFIGS = [(TRANSFORMERS["1600M"], (32, 32), 300), (TRANSFORMERS["600M"], (16, 24), 77), (SMALL, (8, 8), 5)]
# A training step is counted on 4 of the published model's 20 blocks, all alike; a forward pass on all.
TRAINED = [(TRANSFORMERS["1600M"] | {"num_layers": 4}, (32, 32), 300), (SMALL, (8, 8), 5)]


@pytest.mark.parametrize(("config", "latent_hw", "caption_tokens"), CONFIGS, ids=["1600M", "600M", "small"])
def test_transformer_forward_equals_the_counter(config, latent_hw, caption_tokens):
    counted = measure(build(config, "inference"), config, latent_hw, caption_tokens, backward=False)
    assert forward_flops_per_image(config, latent_hw, caption_tokens) == pytest.approx(counted, rel=1e-3)


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize(("config", "latent_hw", "caption_tokens"), TRAINED, ids=["1600M", "small"])
def test_training_equals_the_counter(config, latent_hw, caption_tokens, mode, gradient_checkpointing):
    model = build(config, mode, gradient_checkpointing)
    counted = measure(model, config, latent_hw, caption_tokens, backward=True)
    computed = training_flops_per_image(config, latent_hw, caption_tokens, mode, gradient_checkpointing)
    assert computed == pytest.approx(counted, rel=0.005)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize(("config", "latent_hw", "caption_tokens"), TRAINED, ids=["1600M", "small"])
def test_training_a_controlnet_equals_the_counter(config, latent_hw, caption_tokens, gradient_checkpointing):
    layers, transformer = default_controlnet_layers(config), build(config, "inference").requires_grad_(False)
    model = ControlledTransformer(transformer, begin_controlnet(transformer, layers))
    for part in model.trained_parts():
        part.requires_grad_(True)
    if gradient_checkpointing:
        recompute_blocks(model.transformer, 1)
        recompute_blocks(model.controlnet, 1)
    with torch.device("meta"):
        latents, prompt = (
            torch.empty(1, config["in_channels"], *latent_hw),
            torch.empty(1, caption_tokens, config["caption_channels"]),
        )
        with counter() as counted:
            model.train()
            model(latents, prompt, None, torch.empty(1), latents)[0].sum().backward()
    size = (config, latent_hw, caption_tokens)
    computed = training_flops_per_image(*size, "controlnet", gradient_checkpointing, controlnet_layers=layers)
    assert computed == pytest.approx(counted.get_total_flops(), rel=0.005)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = training_bytes(config, "controlnet", devices=1, controlnet_layers=layers)
    assert held["masters"] / 4 == pytest.approx(trained, rel=0.02)  # biases are not counted
    whole = sum(p.numel() for p in model.parameters())
    assert held["weights"] / 2 == pytest.approx(whole, rel=0.02)


def test_figures_of_the_published_model():
    """The project's own figures for 1024 px, from another count (TFLOP)."""
    config = TRANSFORMERS["1600M"]
    size = ((32, 32), 300)
    assert forward_flops_per_image(config, *size) / 1e12 == pytest.approx(2.97, rel=0.02)
    assert training_flops_per_image(config, *size) / 1e12 == pytest.approx(5.85, rel=0.02)
    checkpointed = training_flops_per_image(config, *size, gradient_checkpointing=True)
    assert checkpointed / 1e12 == pytest.approx(8.81, rel=0.02)
    assert total_flops(vae_encode_ops(AUTOENCODER, 1024, 1024)) / 1e12 == pytest.approx(5.18, rel=0.02)
    assert total_flops(text_encoder_ops(TEXT_ENCODER, 300)) / 1e12 == pytest.approx(1.23, rel=0.02)


def test_half_the_blocks_recomputed_costs_half():
    whole, none, half = (
        training_flops_per_image(SMALL, (8, 8), 5, gradient_checkpointing=share) for share in (True, False, 0.5)
    )
    assert half == pytest.approx((whole + none) / 2)


@pytest.mark.parametrize(
    "change", [{}, {"downsample_block_type": "pixel_unshuffle", "upsample_block_type": "pixel_shuffle"}]
)
@pytest.mark.parametrize("size", [(1024, 1024), (256, 128)])
def test_autoencoder_equals_the_counter(change, size):
    from diffusers import AutoencoderDC

    config = {**AUTOENCODER, **change}
    with torch.device("meta"):
        vae = AutoencoderDC(**config)
        for ops, inputs in (
            (vae_encode_ops, (vae.encode, (1, 3, *size))),
            (vae_decode_ops, (vae.decode, (1, 32, size[0] // 32, size[1] // 32))),
        ):
            run, shape = inputs
            with counter() as counted, torch.no_grad():
                run(torch.empty(shape))
            assert total_flops(ops(config, *size)) == pytest.approx(counted.get_total_flops(), rel=1e-3)


def test_autoencoder_without_first_layer_equals_the_counter():
    """DC-AE variants with no layer at full size (f64, f128) begin and end with a resampling block."""
    from diffusers import AutoencoderDC

    config = {
        **AUTOENCODER,
        "encoder_layers_per_block": [0, 2, 2, 3, 3, 3],
        "decoder_layers_per_block": [0, 5, 5, 3, 3, 3],
    }
    with torch.device("meta"):
        vae = AutoencoderDC(**config)
        with counter() as encoded, torch.no_grad():
            latents = vae.encode(torch.empty(1, 3, 256, 256)).latent
        with counter() as decoded, torch.no_grad():
            vae.decode(latents)
    assert total_flops(vae_encode_ops(config, 256, 256)) == pytest.approx(encoded.get_total_flops(), rel=1e-3)
    assert total_flops(vae_decode_ops(config, 256, 256)) == pytest.approx(decoded.get_total_flops(), rel=1e-3)


def test_text_encoder_equals_the_counter():
    from transformers import Gemma2Config, Gemma2Model

    with torch.device("meta"):
        model = Gemma2Model(Gemma2Config(**TEXT_ENCODER, vocab_size=1000))
        with counter() as counted, torch.no_grad():
            model(torch.zeros(1, 300, dtype=torch.long))
    assert total_flops(text_encoder_ops(TEXT_ENCODER, 300)) == pytest.approx(counted.get_total_flops(), rel=0.02)


def test_named_configurations_have_the_published_parameters():
    """The weights of all products (biases, norms and tables are the rest) against the models' own count."""
    for name, parameters in (("1600M", 1_604_462_752), ("600M", 591_747_872)):
        ops = transformer_ops(TRANSFORMERS[name], (32, 32), 300)
        assert sum(op.weights for op in ops) == pytest.approx(parameters, rel=0.002)
        lora = transformer_ops(TRANSFORMERS[name], (32, 32), 300, "lora")
        trained = sum(op.weights for op in lora if op.trainable)
        if name == "1600M":
            assert trained == 2_150_400


def test_roofline_is_bounded_by_arithmetic_and_by_memory():
    ops = transformer_ops(SMALL, (8, 8), 5)
    total = total_flops(ops)
    assert roofline_seconds(ops, 1e12, float("inf")) == pytest.approx(total / 1e12)
    moved = sum(op.activations + op.weights for op in ops) * 2
    assert roofline_seconds(ops, float("inf"), 1e9) == pytest.approx(moved / 1e9)
    one, many = (roofline_seconds(ops, 1e12, 1e9, batch_size=n) for n in (1, 64))
    assert many < one  # weights are read once per batch
    assert roofline_seconds(ops, 1e12, 1e12) >= max(total / 1e12, moved / 1e12)


def test_utilisation():
    assert model_flops_utilisation(100.0, 2e12, devices=8, peak=100e12) == pytest.approx(0.25)


def test_command_line(capsys):
    line = "--config 1600M --resolution 1024 --chip 910B --images_per_second 28.7 --devices 8 --gradient_checkpointing"
    assert flops.main(line.split()) == 0
    text = capsys.readouterr().out
    assert "SANA 1600M at 1024 px: 1024 tokens" in text and "8 x 910B (313 TFLOP/s bf16, 1.60 TB/s)" in text
    assert flops.main([*line.split(), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["measured"]
    # the published figure: 28.7 images/s on 8 cards are 16 to 19 % of the peak for a step that keeps nothing
    assert 0.16 < measured["executed_uncached"] < 0.19
    assert measured["mfu"] == pytest.approx(28.7 * 5.85e12 / (8 * 313e12), rel=0.02)
    assert measured["mfu"] < measured["executed"] < measured["executed_uncached"]
    assert measured["mfu"] < measured["of_roofline"] < 1


def test_command_line_takes_a_model_folder(tmp_path, capsys):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(SMALL))
    assert flops.main(["--config", str(tmp_path), "--resolution", "256", "--caption_tokens", "5", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["flops"]["transformer_forward"] == forward_flops_per_image(SMALL, (8, 8), 5)
    assert "roofline" not in figures  # no chip was named


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--config nowhere", "--config=nowhere: neither a known model (1600M, 600M)"),
        ("--resolution 1000", "--resolution=1000: must be a multiple of 32"),
        ("--chip abacus", "--chip=abacus: its peak is not known"),
        ("--images_per_second 3", "needs --chip or --peak_tflops"),
        ("--devices 0 --batch_size -1", "--devices=0: must be above 0."),
    ],
)
def test_command_line_names_mistakes(arguments, message, capsys):
    assert flops.main(arguments.split()) == 2
    assert message in capsys.readouterr().err


def test_modes_are_checked():
    with pytest.raises(ValueError, match="mode='dora'"):
        training_flops_per_image(SMALL, (8, 8), 5, mode="dora")


def test_bytes_of_the_published_model_are_those_of_its_parameters():
    """Full: 1.604 billion weights; LoRA of rank 4: 2,150,400. Shares are of the devices, weights are not."""
    config = TRANSFORMERS["1600M"]
    lora, full = training_bytes(config, "lora", 4, 8), training_bytes(config, "full", devices=8)
    assert lora["masters"] == 4 * 2_150_400 // 8 and lora["moments"] == 2 * lora["masters"] == 2 * lora["gradients"]
    assert sum(lora.values()) - lora["weights"] < 100e6
    assert full["weights"] == pytest.approx(2 * 1_604_462_752, rel=2e-3)
    assert full["masters"] == pytest.approx(full["weights"] * 2 / 8, rel=1e-6)
    assert training_bytes(config, "full", devices=1)["masters"] == pytest.approx(8 * full["masters"], rel=1e-6)


def test_the_benchmarks_real_model_is_one_that_the_kit_takes(tmp_path, monkeypatch):
    """The published configuration with fewer blocks: what bench_training.py writes where there is a GPU."""
    monkeypatch.syspath_prepend(str(KIT / "tests" / "benchmarks"))
    import bench_training

    small = {"num_layers": 1, "num_attention_heads": 4, "cross_attention_dim": 128, "num_cross_attention_heads": 2}
    monkeypatch.setitem(TRANSFORMERS, "1600M", {**TRANSFORMERS["1600M"], **small, "cross_attention_head_dim": 64})
    bench_training.write_real_model(tmp_path / "model", "1600M", 1024, light=True)
    found, problems = find_model(str(tmp_path / "model"))
    assert problems == [] and found.vae_factor == 32


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_checkpoint_is_12_bytes_of_state_and_2_of_result_for_each_trained_weight(mode):
    one, eight = (training_bytes(TRANSFORMERS["1600M"], mode, 4, devices) for devices in (1, 8))
    trained = one["masters"] // 4
    assert checkpoint_bytes(one, mode, 1) == 14 * trained
    assert checkpoint_bytes(eight, mode, 8) == pytest.approx(14 * trained, rel=1e-4)


def test_the_command_prints_the_checkpoint_of_readmes_table(capsys):
    assert flops.main(["--config", "1600M", "--resolution", "1024"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["a", "checkpoint", "30.1"]
