"""Fixtures of the encodings' tests: `run` encodes into a store of the test's own."""

import contextlib

import pytest
import torch
from helpers.stores import encode_alone


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
        return encode_alone(images, model, tmp_path / "store", **changes)

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
