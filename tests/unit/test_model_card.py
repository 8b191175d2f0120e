"""The model card as text and front matter; integration/test_card_upload.py uploads it."""

import json
import re

import pytest
from helpers.card_runs import TOKEN, front_matter, make_run_folder, write
from PIL import Image

from sana_kit import model_card


@pytest.fixture
def run_folder(tmp_path):
    return make_run_folder(tmp_path)


def test_card_in_the_hubs_format(run_folder):
    path = write(run_folder)
    assert path == run_folder / "README.md"
    text = path.read_text(encoding="utf-8")
    data = front_matter(text)
    assert data["base_model"] == "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"
    assert data["base_model_relation"] == "adapter" and data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == "text-to-image" and data["datasets"] == ["lambdalabs/pokemon-blip-captions"]
    assert data["instance_prompt"] == "a photo of sks dog" and {"lora", "sana", "template:sd-lora"} <= set(
        data["tags"]
    )
    assert [item["text"] for item in data["widget"]] == ['a "quoted" prompt: with\nlines & `ticks` | bars', "一只小狗"]
    for item in data["widget"]:
        with Image.open(run_folder / item["output"]["url"]) as image:
            assert image.size == (1024, 512) and image.getpixel((0, 0)) == (255, 0, 0)  # of the last validation
    assert "license" not in data and text.count(model_card.LICENSE_MARK) == 2
    assert "| steps | `500` |" in text and "| rank, alpha | 4, 4 |" in text
    assert TOKEN not in text and "--hub_token=REMOVED --hub_token REMOVED --rank=4" in text
    assert f"torch {model_card.package_versions()['torch']}" in text
    code = re.search(r"```python\n(.*?)\n```", text, re.S)[1]
    compile(code, "card", "exec")
    assert "load_lora_weights(" in code and ", variant='bf16', torch_dtype=" in code
    from huggingface_hub import ModelCard

    assert ModelCard(text).data.to_dict()["base_model"] == data["base_model"]  # the hub's own reader takes it


def test_several_data_sets_are_named_and_local_ones_are_not(run_folder, tmp_path):
    text = write(run_folder, dataset=["lambdalabs/one", str(tmp_path), "lambdalabs/two"]).read_text(encoding="utf-8")
    assert front_matter(text)["datasets"] == ["lambdalabs/one", "lambdalabs/two"]
    (told,) = [line for line in text.splitlines() if "fine-tuned from" in line]
    assert "datasets/lambdalabs/one" in told and "datasets/lambdalabs/two" in told and str(tmp_path) not in text


def test_the_users_licence_and_text_are_kept(run_folder):
    path = write(run_folder)
    chosen = path.read_text().replace(path.read_text().splitlines()[1], "license: cc-by-sa-4.0\nlicense_link: LICENSE")
    path.write_text(chosen)
    text = write(run_folder).read_text()
    data = front_matter(text)
    assert data["license"] == "cc-by-sa-4.0" and data["license_link"] == "LICENSE"
    assert model_card.LICENSE_MARK not in text and "The author chose `cc-by-sa-4.0`" in text
    path.write_text("# My own words\n")
    assert write(run_folder) == run_folder / "README.generated.md"
    assert path.read_text() == "# My own words\n"


def test_a_given_licence_wins(run_folder):
    assert front_matter(write(run_folder, license="apache-2.0").read_text())["license"] == "apache-2.0"


def test_local_paths_are_not_told(run_folder, tmp_path):
    base = tmp_path / "models" / "secret-base"
    base.mkdir(parents=True)
    text = write(run_folder, base_model=str(base), dataset=str(tmp_path), command=None).read_text()
    assert str(tmp_path) not in text and "secret-base" not in text
    data = front_matter(text)
    assert "base_model" not in data and "datasets" not in data
    (base / "model_index.json").write_text(json.dumps({"_name_or_path": "Owner/Known"}))
    assert front_matter(write(run_folder, base_model=str(base)).read_text())["base_model"] == "Owner/Known"


def test_before_and_after_stand_side_by_side(run_folder):
    text = write(run_folder).read_text()
    assert "| ![before](model_card/before_01.png) | ![after](model_card/image_01.png) |" in text
    with Image.open(run_folder / "model_card" / "before_01.png") as image:
        assert image.getpixel((0, 0)) == (128, 128, 128)


def test_the_command_tells_no_local_path(run_folder):
    words = ["accelerate", "launch", "--config_file", "/home/me/kit/a.yaml", "train.py", "--output_dir=./out/mine"]
    text = write(run_folder, command=[*words, "--rank=4", "--dataset_name=owner/set"]).read_text()
    assert (
        "accelerate launch --config_file a.yaml train.py --output_dir=mine --rank=4 --dataset_name=owner/set" in text
    )


def test_the_base_models_own_licence_is_named(run_folder, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: nvidia-scl\n---\n")
    assert "The base model says of itself: `nvidia-scl`" in write(run_folder, base_model=str(base)).read_text()


def test_full_fine_tuning_and_no_images(tmp_path):
    text = write(
        tmp_path, train_mode="full", rank=None, validation_prompts=["an owl"], versions={"torch": "1"}
    ).read_text()
    data = front_matter(text)
    assert data["base_model_relation"] == "finetune" and "lora" not in data["tags"]
    assert data["widget"] == [{"text": "an owl"}] and "<Gallery />" not in text and "Versions: torch 1." in text
    assert "SanaTransformer2DModel.from_pretrained" in text
    with pytest.raises(ValueError, match="train_mode='qlora'"):
        write(tmp_path, train_mode="qlora")


@pytest.mark.parametrize(
    ("command", "clean"),
    [
        (["x", f"--hub_token={TOKEN}", "--a=1"], "x --hub_token=REMOVED --a=1"),
        (["x", "--hub-token", "abc", "--a"], "x --hub-token REMOVED --a"),
        (["x", "--hub_token", "--a", "abc"], "x --hub_token --a abc"),
        ("WANDB_API_KEY=123 HF_TOKEN=abc x --b", "WANDB_API_KEY=REMOVED HF_TOKEN=REMOVED x --b"),
        (["x", "--note", f"see {TOKEN}"], "x --note 'see REMOVED'"),
        (["x", "https://me:pass@host/path"], "x https://REMOVED@host/path"),
        (["x", "--max_sequence_length=300", "--instance_prompt=a token of love"],
         "x --max_sequence_length=300 '--instance_prompt=a token of love'"),
    ],
)  # fmt: skip
def test_secrets_are_removed_from_the_command_and_nothing_else(command, clean):
    assert model_card.redact_command(command) == clean


def test_text_cannot_break_out_of_the_card(tmp_path):
    prompt = "x ``` y\n---\nlicense: evil"
    text = write(tmp_path, trigger=prompt, command=["echo", "````\n## Heading"]).read_text()
    assert front_matter(text)["instance_prompt"] == prompt and "license" not in front_matter(text)
    assert "`````bash" in text


@pytest.mark.parametrize(
    ("named", "line"),
    [
        ("none", "    complex_human_instruction=None,\n"),
        ('["Draw: "]', "    complex_human_instruction=['Draw: '],\n"),
        ("default", None),
    ],
)
def test_the_snippet_has_the_instruction_that_the_run_trained_with(tmp_path, named, line):
    """SanaPipeline puts its own before the prompt of whoever names none."""
    config = {"complex_human_instruction": named, "resolution": 64}
    (tmp_path / "train_log.jsonl").write_text(json.dumps({"event": "start", "step": 0, "time": 0, "config": config}))
    card = model_card.write_model_card(tmp_path, base_model="a/b", trigger="x", train_mode="lora").read_text()
    assert line in card if line else "complex_human_instruction" not in card
