"""The inference scripts on other members of the SANA family and with other ways to draw, in-process on tiny models.

python -m pytest tests/integration/test_members.py
"""

import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderDC
from helpers.drawing import input_image, write_lora
from helpers.inferring import images, infer, manifest
from PIL import Image

from sana_kit.inference.command import main

ONE = ("--prompt", "a red square", "--seeds", "8")


def draw_sprint(model, output, *flags):
    """A run at SANA-Sprint's own number of steps."""
    argv = ["--num_inference_steps", "2", "--dtype", "fp32", *flags]
    return infer(model, output, *argv)


def test_the_checkpoint_chooses_sprint_and_its_defaults(tiny_sprint, tmp_path, capsys):
    argv = ["--model_path", tiny_sprint, "--output_path", tmp_path, "--height", "64", "--width", "96", *ONE]
    assert main("test", [str(word) for word in argv]) == 0
    (line,) = manifest(tmp_path).values()
    assert (line["num_inference_steps"], line["guidance_scale"], line["negative_prompt"]) == (2, 4.5, None)
    assert "1 images: 1 prompts, 96x64 px, 2 steps each" in capsys.readouterr().out
    (name,) = images(tmp_path)
    assert Image.open(tmp_path / name).size == (96, 64)
    assert main("test", [str(word) for word in argv]) == 0  # goes on, and finds everything done
    assert json.loads((tmp_path / "summary.json").read_text())["kept"] == 1


def test_sprint_draws_in_one_to_four_steps(tiny_sprint, tmp_path):
    for steps in (1, 2, 3, 4):
        assert draw_sprint(tiny_sprint, tmp_path, *ONE, "--num_inference_steps", steps) == 0
    assert len(set(images(tmp_path).values())) == 4


def test_what_sprint_cannot_do_is_refused_by_name(tiny_sprint, tmp_path, capsys):
    flags = ("--scheduler", "flow-euler", "--negative_prompt", "blue")
    assert draw_sprint(tiny_sprint, tmp_path / "out", *ONE, *flags) == 1
    said = capsys.readouterr().err
    assert "--scheduler=flow-euler: SANA-Sprint mixes image and noise along a circle (SCMScheduler)" in said
    assert "--negative_prompt=blue: SANA-Sprint takes no negative prompt" in said
    assert not (tmp_path / "out").exists()


def test_a_lora_of_another_member_acts_on_sprint_with_a_warning(tiny_sprint, tmp_path, capsys):
    """The layers of SANA-1.5 and of Sprint have the same names and shapes."""
    lora = write_lora(tiny_sprint, tmp_path / "lora")
    assert draw_sprint(tiny_sprint, tmp_path / "out", *ONE) == 0
    capsys.readouterr()
    assert draw_sprint(tiny_sprint, tmp_path / "out", *ONE, "--lora_weights", lora) == 0
    assert "Its layers fit SANA-Sprint and are used as they are" in capsys.readouterr().out
    assert len(set(images(tmp_path / "out").values())) == 2


def test_negative_prompts_of_a_file_are_left_out_for_sprint_and_told(tiny_sprint, tmp_path, capsys):
    listed = tmp_path / "prompts.jsonl"
    listed.write_text(json.dumps({"prompt": "a dog", "negative_prompt": "blue"}))
    assert draw_sprint(tiny_sprint, tmp_path / "out", "--prompts_file", listed, "--seeds", "8") == 0
    assert "those of the prompts file are left out" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Images to begin from and to follow


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """init.png, other.png and mask.png of 96 x 64 px, small.png of 32 x 32."""
    folder = tmp_path_factory.mktemp("inputs")
    input_image(folder / "init.png")
    input_image(folder / "other.png", seed=1)
    input_image(folder / "mask.png", mask=True)
    input_image(folder / "small.png", size=(32, 32))
    return folder


def test_image_to_image_and_inpainting_by_flags(tiny_model, files, tmp_path, capsys):
    begin = ("--dtype", "fp32", "--num_inference_steps", 4, "--init_image", files / "init.png")
    assert infer(tiny_model, tmp_path, *ONE, "--num_inference_steps", 4, "--dtype", "fp32") == 0
    assert infer(tiny_model, tmp_path, *ONE, *begin) == 0
    assert infer(tiny_model, tmp_path, *ONE, *begin, "--strength", 0.5) == 0
    assert infer(tiny_model, tmp_path, *ONE, *begin, "--mask_image", files / "mask.png") == 0
    lines = list(manifest(tmp_path).values())
    assert [line.get("strength") for line in lines] == [None, 0.6, 0.5, None]  # a masked one is drawn anew
    assert all(line["init_image"] == str(files / "init.png") for line in lines[1:])
    assert json.loads(Image.open(tmp_path / lines[2]["file"]).text["sana"])["strength"] == 0.5
    masked = np.asarray(Image.open(tmp_path / lines[3]["file"]))
    assert np.array_equal(masked[:, :48], np.asarray(Image.open(files / "init.png"))[:, :48])
    assert len(set(images(tmp_path).values())) == 4
    assert json.loads((tmp_path / "summary.json").read_text())["failed"] == []


def test_a_prompts_file_names_images_from_its_own_folder(tiny_model, files, tmp_path):
    rows = ["prompt,init_image,strength", "a dog,init.png,0.5", "a dog,other.png,", "a dog,,"]
    (files / "list.csv").write_text("\n".join(rows))
    out = tmp_path / "out"
    flags = ("--prompts_file", files / "list.csv", "--seeds", 8, "--num_inference_steps", 4, "--batch_size", 4)
    assert infer(tiny_model, out, *flags) == 0
    lines = list(manifest(out).values())
    told = [(line.get("init_image", "").rpartition("/")[2], line.get("strength")) for line in lines]
    assert told == [("init.png", 0.5), ("other.png", 0.6), ("", None)]
    assert json.loads((out / "summary.json").read_text())["largest_group"] == 1  # no two are of one kind
    first = images(out)
    input_image(files / "other.png", seed=2)  # another image is another job, under the same path
    assert infer(tiny_model, out, *flags) == 0
    assert len(images(out)) == 4 and json.loads((out / "summary.json").read_text())["kept"] == 2
    assert all(images(out)[name] == data for name, data in first.items())


def test_image_to_image_of_sprint_by_flags(tiny_sprint, files, tmp_path):
    assert draw_sprint(tiny_sprint, tmp_path, *ONE) == 0
    assert draw_sprint(tiny_sprint, tmp_path, *ONE, "--init_image", files / "init.png") == 0
    assert list(manifest(tmp_path).values())[1]["strength"] == 0.5
    assert len(set(images(tmp_path).values())) == 2


def test_a_controlnet_and_perturbed_attention_by_flags(tiny_model, files, tmp_path, capsys):
    controlnet = tiny.make_tiny_controlnet(tmp_path / "controlnet", tiny_model)
    control = ("--controlnet", controlnet, "--control_image", files / "init.png")
    out = tmp_path / "out"
    assert infer(tiny_model, out, *ONE) == 0
    assert infer(tiny_model, out, *ONE, *control) == 0
    assert infer(tiny_model, out, *ONE, *control, "--control_scale", 0.5) == 0
    assert infer(tiny_model, out, *ONE, "--pag_scale", 3, "--pag_layers", 1) == 0
    assert infer(tiny_model, out, *ONE, "--pag_scale", 3, "--pag_layers", 0) == 0
    lines = list(manifest(out).values())
    assert len(set(images(out).values())) == 5
    assert [line.get("controlnet") for line in lines] == [None, str(controlnet), str(controlnet), None, None]
    # a pipeline's folder, which holds controlnet/ and can be the model too; the same weights are the same images
    whole = shutil.copytree(tiny_model, tmp_path / "whole")
    shutil.copytree(controlnet, whole / "controlnet")
    index = json.loads((whole / "model_index.json").read_text())
    index |= {"_class_name": "SanaControlNetPipeline", "controlnet": ["diffusers", "SanaControlNetModel"]}
    (whole / "model_index.json").write_text(json.dumps(index))
    assert infer(whole, out, *ONE, "--controlnet", whole, "--control_image", files / "init.png") == 0
    assert json.loads((out / "summary.json").read_text())["kept"] == 1


def test_inputs_that_cannot_be_used_are_told_at_once(tiny_model, tiny_sprint, files, tmp_path, capsys):
    def told(model, *flags):
        assert infer(model, tmp_path / "out", *ONE, *flags) == 1
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    (tmp_path / "text.png").write_text("no image")
    said = told(
        tiny_model,
        *("--init_image", tmp_path / "text.png", "--mask_image", tmp_path / "none.png", "--strength", "1.5"),
        *("--control_image", files / "init.png", "--pag_scale", "3"),
    )
    for part in (
        "--init_image: ",
        "not an image of a known format",
        "none.png: cannot be read (No such file",
        "--strength=1.5: must be at most 1",
        "--control_image: has no effect without a ControlNet",
        "--pag_layers: this model has 2 blocks, for which no choice is known",
    ):
        assert part in said, part
    said = told(tiny_model, "--strength", 0.5, "--mask_image", files / "mask.png", "--control_scale", 2)
    assert "--strength=0.5: has no effect without an init image" in said
    assert "--mask_image: has no effect without an init image" in said
    assert "--control_scale=2.0: has no effect without a ControlNet" in said
    said = told(tiny_model, "--init_image", files / "init.png", "--mask_image", files / "small.png")
    assert "small.png: is 32x32 px, and the init image 96x64" in said
    said = told(tiny_model, "--init_image", files / "init.png", "--strength", 0.9)
    assert "--strength=0.9: of 2 step(s) none is left out" in said and "Take at most 0.5, or more steps" in said
    said = told(tiny_model, "--pag_layers", 1)
    assert "--pag_layers=1: has no effect without --pag_scale" in said
    said = told(tiny_model, "--pag_scale", 2, "--pag_layers", 2)
    assert "--pag_layers=2: this model's blocks are 0 to 1" in said
    controlnet = tiny.make_tiny_controlnet(tmp_path / "controlnet", tiny_model)
    said = told(
        tiny_sprint,
        *("--controlnet", controlnet, "--control_image", files / "init.png", "--pag_scale", 2),
        *("--init_image", files / "init.png", "--mask_image", files / "mask.png"),
    )
    for part in ("--controlnet=", "--pag_scale=2.0: SANA-Sprint", "--mask_image: SANA-Sprint"):
        assert part in said, part
    said = told(tiny_model, "--controlnet", controlnet)
    assert "1 of 1 prompts have no control image" in said
    said = told(tiny_model, "--controlnet", tiny_model / "vae", "--control_image", files / "init.png")
    assert "its config.json is of AutoencoderDC, and SanaControlNetModel is needed" in said


def test_a_controlnet_of_another_size_is_refused(tiny_model, files, tmp_path, capsys):
    wide = tiny.make_tiny_pipeline(tmp_path / "wide", heads=8)
    controlnet = tiny.make_tiny_controlnet(tmp_path / "controlnet", wide)
    flags = ("--controlnet", controlnet, "--control_image", files / "init.png")
    assert infer(tiny_model, tmp_path / "out", *ONE, *flags) == 1
    assert "its width is 64, that of the model's transformer 32" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Another VAE


def change_vae(source, target, change, **config):
    """A copy of a VAE's folder, with changed weights and config."""
    vae = AutoencoderDC.from_pretrained(source)
    with torch.no_grad():
        change(vae)
    vae.register_to_config(**config)
    vae.save_pretrained(target)
    return target


def test_another_decoder_for_the_same_latents(tiny_model, tmp_path, capsys):
    """As DC-AE 1.1 and Lite: the encoder is the same, the decoder is not."""
    decoder = change_vae(tiny_model / "vae", tmp_path / "decoder/vae", lambda vae: vae.decoder.conv_out.weight.mul_(2))
    out = tmp_path / "out"
    assert infer(tiny_model, out, *ONE) == 0
    capsys.readouterr()
    assert infer(tiny_model, out, *ONE, "--vae", tmp_path / "decoder") == 0  # a pipeline's folder
    assert "not the model's own" not in capsys.readouterr().out
    assert infer(tiny_model, out, *ONE, "--vae", decoder) == 0
    assert json.loads((out / "summary.json").read_text())["kept"] == 1
    assert len(set(images(out).values())) == 2
    assert list(manifest(out).values())[1]["vae"] == str(tmp_path / "decoder")
    copied = shutil.copytree(tiny_model / "vae", tmp_path / "copy")
    assert infer(tiny_model, tmp_path / "same", *ONE, "--vae", copied) == 0
    assert set(images(tmp_path / "same").values()) <= set(images(out).values())


def test_a_vae_of_other_latents_is_refused_or_told(tiny_model, tmp_path, capsys):
    other = change_vae(tiny_model / "vae", tmp_path / "other", lambda vae: vae.encoder.conv_out.weight.mul_(2))
    assert infer(tiny_model, tmp_path / "out", *ONE, "--vae", other) == 0
    assert "is not the model's own: its decoder was trained for other latents" in capsys.readouterr().out
    scaled = change_vae(tiny_model / "vae", tmp_path / "scaled", lambda vae: None, scaling_factor=0.5)
    assert infer(tiny_model, tmp_path / "none", *ONE, "--vae", scaled) == 1
    assert "its scaling factor: 0.5; that of the model's own VAE: 0.41407" in capsys.readouterr().err
    wide = tiny.make_tiny_pipeline(tmp_path / "wide", latent_channels=8)
    assert infer(tiny_model, tmp_path / "none", *ONE, "--vae", wide) == 1
    assert "its latent channels: 8; that of the model's own VAE: 4" in capsys.readouterr().err
    assert infer(tiny_model, tmp_path / "none", *ONE, "--vae", tmp_path / "nowhere") == 1
    assert "no such folder. Give its folder (AutoencoderDC)" in capsys.readouterr().err
