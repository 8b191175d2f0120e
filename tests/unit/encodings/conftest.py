"""Fixtures of the encodings' tests: `run` encodes into a store of the test's own."""

import contextlib

import pytest
import torch

from sana_kit.distributed import Ranks
from sana_kit.encodings.encode import encode
from sana_kit.encodings.settings import EncodingSettings
from sana_kit.models.folder import find_model


@pytest.fixture(scope="session")
def pipeline(tiny_model):
    """The real SanaPipeline of the tiny model, in bf16."""
    from diffusers import SanaPipeline

    pipeline = SanaPipeline.from_pretrained(tiny_model)
    return pipeline.to(dtype=torch.bfloat16)


@pytest.fixture
def run(tmp_path, tiny_model):
    """A function that encodes images on one process; settings, `model` (a folder or a Model) and words of `encode`."""

    def call(images, model=tiny_model, **changes):
        words = {name: changes.pop(name) for name in ("extra_prompts", "stop", "log", "seed") if name in changes}
        defaults = {"encodings_dir": str(tmp_path / "store"), "resolution": 64, "num_workers": 2}
        if not hasattr(model, "base"):
            model, problems = find_model(str(model))
            assert not problems
        ranks = Ranks(0, 1, torch.device("cpu"))
        return encode(images, model, EncodingSettings(**{**defaults, **changes}), ranks=ranks, **words)

    return call


@pytest.fixture
def no_models(monkeypatch):
    """Makes loading a model an error inside `with no_models():`."""

    @contextlib.contextmanager
    def forbidden():
        def refuse(*_, **__):
            raise AssertionError("a model was loaded")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sana_kit.encodings.encoders.load_vae", refuse)
            patch.setattr("sana_kit.encodings.encoders.load_text_encoder", refuse)
            yield

    return forbidden
