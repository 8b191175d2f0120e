"""A ControlNet trained by main() in this process on a tiny model: resumed, drawn with, held against diffusers.

python -m pytest tests/integration/test_controlnet_training.py
"""

import shutil

import numpy as np
import pytest
import tiny
import torch
from diffusers import SanaControlNetModel, SanaControlNetPipeline, SanaTransformer2DModel
from helpers import SHORT_RUN, events, run_trainer, same
from helpers.inferring import images, infer
from PIL import Image
from safetensors.torch import load_file

from sana_kit.data.outlines import outlines
from sana_kit.errors import UserError
from sana_kit.model_card import write_model_card

WEIGHTS = "controlnet/diffusion_pytorch_model.safetensors"
PROMPT = "a red square"


@pytest.fixture(scope="module")
def common(tiny_model, tmp_path_factory):
    encodings = tmp_path_factory.mktemp("encodings")
    return [
        f"--pretrained_model_name_or_path={tiny_model}",
        f"--encodings_dir={encodings}",
        "--train_mode=controlnet",
        *SHORT_RUN,
    ]


@pytest.fixture(scope="module")
def control(image_folder, tmp_path_factory):
    """Outlines of the image folder, under the names of its images."""
    folder = tmp_path_factory.mktemp("control") / "outlines"
    folder.mkdir()
    for file in image_folder.glob("*.png"):
        outlines(Image.open(file).convert("RGB")).save(folder / file.name)
    return folder


@pytest.fixture(scope="module")
def flags(common, image_folder, control):
    return [
        *common,
        f"--instance_data_dir={image_folder}",
        f"--control_data_dir={control}",
        f"--validation_prompt={PROMPT}",
        f"--validation_control_image={control / 'image_00.png'}",
        "--num_validation_images=1",
        "--validation_steps=2",
        "--validation_inference_steps=2",
        "--validation_split=2",
        "--random_flip",
        "--caption_dropout=0.3",
        "--ema_decay=0.9",
        "--gradient_checkpointing",
    ]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    output = tmp_path_factory.mktemp("controlnet") / "out"
    assert run_trainer(*flags, f"--output_dir={output}") == 0
    return output


def test_a_resumed_run_is_the_run_to_the_bit(flags, whole, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    for name in ("checkpoint-4", "controlnet", "best", "raw"):
        shutil.rmtree(output / name)
    (output / "summary.json").unlink()  # as if it had been killed before its end
    assert run_trainer(*flags, f"--output_dir={output}", "--resume_from_checkpoint=latest") == 0
    for part in ("", "raw", "best", "checkpoint-4"):
        assert same(load_file(whole / part / WEIGHTS), load_file(output / part / WEIGHTS)), part
    for file in ("optimizer", "ema"):
        first, second = (load_file(folder / "checkpoint-4" / f"{file}.safetensors") for folder in (whole, output))
        assert same(first, second) and all(key.startswith("controlnet.") for key in first)
    last = "validation/step-000004/00-a-red-square-seed0.png"
    assert (whole / last).read_bytes() == (output / last).read_bytes()


def test_only_what_is_copied_but_the_embeddings_and_what_begins_at_zero_is_trained(whole, tiny_model):
    base = SanaTransformer2DModel.from_pretrained(tiny_model / "transformer").bfloat16().state_dict()
    trained, left = load_file(whole / WEIGHTS), []
    for name, value in trained.items():
        begins = base.get(name, torch.zeros_like(value))
        if torch.equal(value, begins):
            left.append(name.split(".")[0])
    assert set(left) == {"patch_embed", "time_embed", "caption_projection", "caption_norm"}
    assert not (whole / "transformer").exists() and not (whole / "sana_kit_base.json").exists()
    controlnet = SanaControlNetModel.from_pretrained(whole / "controlnet")
    assert len(controlnet.transformer_blocks) == 1


def test_the_drawing_script_and_diffusers_pipeline_draw_with_it(whole, tiny_model, control, tmp_path):
    """The command of the run's last lines; both draw what the other does, and not what the model alone does."""
    outlines = control / "image_00.png"
    same_image = ["--prompt", PROMPT, "--seeds", "5", "--num_inference_steps", "4", "--dtype", "fp32"]
    same_image += ["--height", "64", "--width", "64", "--complex_human_instruction", "none"]
    with_it = [*same_image, "--controlnet", whole, "--control_image", outlines]
    assert infer(tiny_model, tmp_path / "with", *with_it) == 0
    assert infer(tiny_model, tmp_path / "without", *same_image) == 0
    files = [tmp_path / folder / name for folder in ("with", "without") for name in images(tmp_path / folder)]
    drawn, alone = (np.array(Image.open(file)).astype(int) for file in files)
    controlnet = SanaControlNetModel.from_pretrained(whole / "controlnet")
    pipeline = SanaControlNetPipeline.from_pretrained(tiny_model, controlnet=controlnet)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"guidance_scale": 2.0, "height": 64, "width": 64, "num_inference_steps": 4}
    theirs = pipeline(
        PROMPT,
        control_image=Image.open(outlines).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS),
        generator=torch.Generator().manual_seed(5),
        complex_human_instruction=None,
        use_resolution_binning=False,
        **settings,
    ).images[0]
    apart = np.abs(drawn - np.array(theirs).astype(int))
    assert np.abs(drawn - alone).mean() > 1
    assert apart.max() <= 1  # 0 was measured


def test_validation_images_follow_the_control_image(flags, whole, control, tmp_path, capsys):
    drawn = sorted((whole / "validation").rglob("*.png"))
    assert [file.parent.name for file in drawn] == ["step-000000", "step-000002", "step-000004"]
    before, last = drawn[0].read_bytes(), drawn[-1].read_bytes()
    other = [flag for flag in flags if "validation_control_image" not in flag]
    other.append(f"--validation_control_image={control / 'image_03.png'}")
    assert run_trainer(*other, f"--output_dir={tmp_path / 'out'}") == 0
    again = sorted((tmp_path / "out" / "validation").rglob("*.png"))
    assert again[0].read_bytes() == before  # it adds nothing yet
    assert again[-1].read_bytes() != last
    assert same(load_file(tmp_path / "out" / WEIGHTS), load_file(whole / WEIGHTS))
    said = capsys.readouterr().out
    assert f"ControlNet: {tmp_path / 'out' / 'controlnet'}" in said
    command = f"--controlnet {tmp_path / 'out'} --control_image {control / 'image_03.png'} --height 64 --width 64"
    assert command in said and "--lora_weights" not in said


def test_the_card_says_how_to_draw_with_it(whole, tiny_model):
    card = (whole / "README.md").read_text()
    assert "SANA ControlNet weights, fine-tuned" in card
    for line in (
        "from diffusers import SanaControlNetModel, SanaControlNetPipeline",
        '    weights, subfolder="controlnet", torch_dtype=torch.bfloat16',
        '    control_image=load_image("control.png"),',
    ):
        assert line in card
    with pytest.raises(ValueError, match="must be one of .*controlnet"):
        write_model_card(whole, base_model=str(tiny_model), train_mode="oft")


def test_outlines_are_encoded_once_and_held_out_losses_follow_the_weights(
    whole, common, image_folder, tmp_path, capsys
):
    held_out = [line["raw"]["loss"] for line in events(whole, "held_out")]
    assert len(held_out) == 3 and len(set(held_out)) == 3
    more = [*common, f"--instance_data_dir={image_folder}", "--control_edges", "--max_train_steps=1"]
    told = []
    for start in ("first", "second"):
        assert run_trainer(*more, f"--output_dir={tmp_path / start}") == 0
        told += [line for line in capsys.readouterr().err.splitlines() if "encodings of the control images" in line]
    assert "6 images, 0 captions new; 0," in told[0] and "0 images, 0 captions new; 6," in told[1]
    assert same(load_file(tmp_path / "first" / WEIGHTS), load_file(tmp_path / "second" / WEIGHTS))


def test_other_control_images_are_told_on_a_resume(flags, whole, control, tmp_path, capsys):
    output, other = tmp_path / "out", tmp_path / "other"
    shutil.copytree(whole, output)
    shutil.copytree(control, other)
    Image.new("RGB", Image.open(control / "image_02.png").size).save(other / "image_02.png")
    more = [f"--control_data_dir={other}", "--max_train_steps=5", f"--output_dir={output}"]
    others = [flag for flag in flags if not flag.startswith("--control_data_dir")]  # two would be of two data sets
    assert run_trainer(*others, *more, "--resume_from_checkpoint=latest") == 0
    told = [line["message"] for line in events(output, "warning")]
    assert "the control images are other ones than when the checkpoint was written" in " ".join(told)


def test_everything_that_does_not_fit_is_told_at_once(common, image_folder, control, tmp_path):
    partial = tmp_path / "partial"
    shutil.copytree(control, partial)
    (partial / "image_01.png").unlink()
    wrong = [
        f"--instance_data_dir={image_folder}",
        f"--control_data_dir={partial}",
        "--rank=8",
        "--use_dora",
        "--base_quantization=int8",
        "--fused_blocks=auto",
        "--controlnet_layers=2",
        "--skip_bad_images",
        "--validation_prompt=a dog",
        f"--output_dir={tmp_path / 'out'}",
    ]
    said = refused(common, wrong)
    for text in (
        "--rank=8: has no effect without LoRA",
        "--use_dora: has no effect without LoRA",
        "--base_quantization=int8: it was made for a base under a LoRA",
        "--fused_blocks=auto: the fused blocks were made for",
        "--skip_bad_images: an image and its control image go together",
        "--controlnet_layers=2: block i is added behind block i + 1 of the model, which has 2. Use at most 1.",
        "1 of 6 images have no control image of their name: image_01.png",
        "--validation_control_image: 0 given for 1 validation prompt(s)",
    ):
        assert text in said, (text, said)
    assert not (tmp_path / "out").exists()


def test_which_control_images_must_be_said_and_other_modes_take_none(common, image_folder, tmp_path):
    data = [f"--instance_data_dir={image_folder}", f"--output_dir={tmp_path / 'out'}"]
    assert "none of them given" in refused(common, data)
    both = ["--control_edges", "--control_column=edges"]
    assert "several of them given" in refused(common, [*data, *both])
    assert "a folder has no columns" in refused(common, [*data, "--control_column=edges"])
    three = [f"--control_data_dir={tmp_path / name}" for name in "abc"]
    two = [*data, f"--instance_data_dir={tmp_path}", *three]
    assert "--control_data_dir: 3 folders for 2 data set(s)" in refused(common, two)
    said = refused(common, [*data, "--train_mode=lora", "--control_edges"])
    assert "--control_edges: has no effect without --train_mode controlnet" in said


def test_a_base_with_norms_of_queries_and_keys_and_sprint_are_refused(common, image_folder, tiny_sprint, tmp_path):
    newer = tiny.make_tiny_pipeline(tmp_path / "1.5", qk_norm="rms_norm_across_heads")
    data = [f"--instance_data_dir={image_folder}", "--control_edges", f"--output_dir={tmp_path / 'out'}"]
    said = refused(common, [*data, f"--pretrained_model_name_or_path={newer}"])
    assert "diffusers' SanaControlNetModel has no such norms" in said
    assert "SANA-Sprint" in refused(common, [*data, f"--pretrained_model_name_or_path={tiny_sprint}"])


def test_a_run_goes_on_with_a_controlnet(common, whole, image_folder, tiny_model, tmp_path):
    """A run of rate 0 is what it began with, to the bit; one that fits no longer is refused by name."""
    data = [f"--instance_data_dir={image_folder}", "--control_edges", f"--output_dir={tmp_path / 'out'}"]
    start = [f"--init_controlnet={whole}", "--learning_rate=0"]
    assert run_trainer(*common, *data, *start) == 0
    before, after = load_file(whole / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert same(before, after)
    first = next(event["loss"] for event in events(tmp_path / "out", "step"))
    new = [*data[:2], f"--output_dir={tmp_path / 'new'}", "--learning_rate=0"]
    assert run_trainer(*common, *new) == 0
    assert first != next(event["loss"] for event in events(tmp_path / "new", "step"))
    assert "--controlnet_layers=2" in refused(common, [*data, *start, "--controlnet_layers=2"])
    wide = tiny.make_tiny_controlnet(tmp_path / "wide", tiny.make_tiny_pipeline(tmp_path / "other", heads=6))
    assert f"--init_controlnet={wide}: its width is 48" in refused(common, [*data, f"--init_controlnet={wide}"])
    deep = tiny.make_tiny_controlnet(tmp_path / "deep", tiny_model, layers=2)
    assert "it has 2 blocks, and the model has a place for 1" in refused(common, [*data, f"--init_controlnet={deep}"])


def refused(common, flags):
    with pytest.raises(UserError) as caught:
        run_trainer(*common, *flags)
    return str(caught.value)
