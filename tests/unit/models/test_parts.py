"""Parts that are named beside a model, from folders and from the hub; schedulers that fit or do not.

python -m pytest tests/unit/models/test_parts.py
"""

import dataclasses
import json

import pytest
import tiny
import torch
from helpers.drawing import CPU
from huggingface_hub.utils import EntryNotFoundError

from sana_kit.errors import UserError
from sana_kit.models.folder import find_model
from sana_kit.models.loading import check_scheduler, draws_along_flow, load_vae
from sana_kit.models.members import MEMBERS
from sana_kit.models.parts import find_controlnet, find_part, find_vae, load_controlnet, with_vae


@pytest.fixture
def model(tiny_model):
    return find_model(str(tiny_model))[0]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands for the hub's snapshots: owner--name/COMMIT/file."""

    class NotThere(EntryNotFoundError):
        def __init__(self):
            Exception.__init__(self, "404")

    def download(name, file, **_):
        repository = tmp_path / name.replace("/", "--")
        path = repository / "c0ffee" / file
        if not repository.is_dir():
            raise ConnectionError("the hub cannot be reached\nsecond line")
        if not path.is_file():
            raise NotThere
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return tmp_path


def test_a_part_of_the_hub_is_known_by_its_commit(hub, model, tiny_model):
    for name, where in (("own/controlnet", ""), ("own/pipeline", "controlnet")):
        folder = hub / name.replace("/", "--") / "c0ffee" / where
        tiny.make_tiny_controlnet(folder, tiny_model)
        part, problems = find_controlnet(name, model)
        assert problems == [] and (part.place, part.subfolder, part.folder) == (name, where, None)
        assert part.arguments()["pretrained_model_name_or_path"] == name
    first = find_part("controlnet", "own/controlnet", "SanaControlNetModel", "controlnet", model)
    second = find_part("controlnet", "own/pipeline", "SanaControlNetModel", "controlnet", model)
    assert first.identity != second.identity
    with pytest.raises(UserError, match="is of SanaControlNetModel, and AutoencoderDC is needed"):
        find_part("vae", "own/controlnet", "AutoencoderDC", "vae", model)
    with pytest.raises(UserError, match="the hub cannot be reached"):
        find_part("vae", "own/unknown", "AutoencoderDC", "vae", model)
    (hub / "own--empty" / "c0ffee").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds neither config.json nor vae/config.json"):
        find_part("vae", "own/empty", "AutoencoderDC", "vae", model)


def test_a_vae_of_the_hub_cannot_be_compared_and_that_is_told(hub, model, tiny_model):
    folder = hub / "own--vae" / "c0ffee"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes((tiny_model / "vae/config.json").read_bytes())
    part, problems, notes = find_vae("own/vae", model)
    assert part is not None and problems == [] and "was not compared" in notes[0]


def test_a_part_of_a_folder_is_loaded_from_there(model, tiny_model, tmp_path):
    part, _ = find_controlnet(str(tiny.make_tiny_controlnet(tmp_path / "controlnet", tiny_model)), model)
    loaded = load_controlnet(part, device=CPU, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and not loaded.training
    vae, problems, notes = find_vae(str(tiny_model), model)
    assert problems == notes == [] and vae.subfolder == "vae"
    other = with_vae(model, vae)
    assert other.fingerprint != model.fingerprint and load_vae(other, device=CPU, dtype=torch.float32).config


def test_cut_off_weights_of_a_part_are_told(model, tiny_model, tmp_path):
    folder = tiny.make_tiny_controlnet(tmp_path / "controlnet", tiny_model)
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    part, (problem,) = find_controlnet(str(folder), model)
    assert part is None and "cut off" in problem.reason
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_layers": 2}))
    assert find_controlnet(str(folder), model)[1]


def test_schedulers_are_refused_by_name_where_they_do_not_fit(model, tiny_sprint):
    for name in ("checkpoint", "flow-dpm", "flow-euler"):
        assert check_scheduler(model, name) == [] and draws_along_flow(model, name)
    assert "Use one of" in check_scheduler(model, "ddim")[0].remedy
    other = dataclasses.replace(model, scheduler_config={"_class_name": "DDIMScheduler"})
    assert check_scheduler(other, "checkpoint") == [] and not draws_along_flow(other, "checkpoint")
    (problem,) = check_scheduler(other, "flow-euler")
    assert problem.value == "flow-euler" and "DDIMScheduler names no flow shift" in problem.reason
    sprint = find_model(str(tiny_sprint), members=MEMBERS)[0]
    assert [bool(check_scheduler(sprint, name)) for name in ("checkpoint", "flow-dpm", "flow-euler")] == [0, 1, 1]
    euler = dataclasses.replace(model, scheduler_config={"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3})
    assert draws_along_flow(euler, "checkpoint") and check_scheduler(euler, "flow-dpm") == []
