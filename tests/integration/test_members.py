"""The inference scripts on other members of the SANA family and with other ways to draw, in-process on tiny models.

python -m pytest tests/integration/test_members.py
"""

import json

from helpers.drawing import write_lora
from helpers.inferring import images, infer, manifest
from PIL import Image

ONE = ("--prompt", "a red square", "--seeds", "8")


def draw_sprint(model, output, *flags):
    """A run at SANA-Sprint's own number of steps."""
    argv = ["--num_inference_steps", "2", "--dtype", "fp32", *flags]
    return infer(model, output, *argv)


def test_the_checkpoint_chooses_sprint_and_its_defaults(tiny_sprint, tmp_path, capsys):
    from sana_kit.inference.command import main

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
    assert "was not trained on SANA-Sprint" in capsys.readouterr().out
    assert len(set(images(tmp_path / "out").values())) == 2


def test_negative_prompts_of_a_file_are_left_out_for_sprint_and_told(tiny_sprint, tmp_path, capsys):
    listed = tmp_path / "prompts.jsonl"
    listed.write_text(json.dumps({"prompt": "a dog", "negative_prompt": "blue"}))
    assert draw_sprint(tiny_sprint, tmp_path / "out", "--prompts_file", listed, "--seeds", "8") == 0
    assert "those of the prompts file are left out" in capsys.readouterr().out
