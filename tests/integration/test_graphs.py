"""CUDA graphs, as far as no card is needed: the compiler sees one graph each way, and the numbers are the plain ones.

python -m pytest tests/integration/test_graphs.py
"""

import pytest
import torch
from helpers.tiny import NARROW_TRANSFORMER

from sana_kit.models.attention import set_attention
from sana_kit.models.graphs import record_graphs
from sana_kit.models.lora import lora_config

CONFIG = {
    **NARROW_TRANSFORMER,
    "num_layers": 1,
    "qk_norm": "rms_norm_across_heads",
    "interpolation_scale": 2.0,
}


@pytest.fixture
def compiled(monkeypatch):
    """torch.compile as the kit calls it, but with the compiler's back end that needs neither card nor C++ compiler."""
    asked, compile_ = [], torch.compile

    def traced(function, **settings):
        asked.append(settings.pop("mode"))
        return compile_(function, backend="aot_eager", **settings)

    monkeypatch.setattr(torch, "compile", traced)
    marks = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    torch._dynamo.reset()
    yield asked, marks
    torch._dynamo.reset()


def model():
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(**CONFIG)
    transformer.add_adapter(lora_config(rank=2, alpha=4, init_lora_weights=False))
    set_attention(transformer, "auto", torch.device("cpu"))
    return transformer


def passed(transformer):
    """(prediction, gradients) of one pass; gradients none where it is not trained."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[1, 5:] = False
    inputs = {
        "hidden_states": torch.randn(2, 4, 4, 6, generator=generator),
        "encoder_hidden_states": torch.randn(2, 16, 24, generator=generator),
        "encoder_attention_mask": mask,
        "timestep": torch.tensor([100.0, 900.0]),
        "return_dict": False,
    }
    with torch.set_grad_enabled(transformer.training):
        (prediction,) = transformer(**inputs)
    if not transformer.training:
        return prediction, {}
    transformer.zero_grad()
    prediction.square().mean().backward()
    return prediction.detach(), {n: p.grad for n, p in transformer.named_parameters() if p.grad is not None}


def test_a_training_step_is_one_graph_with_the_plain_numbers(compiled):
    """fullgraph: the compiler raises where anything would break the graph, forward or backward."""
    asked, marks = compiled
    plain, graphed = model().train(), model().train()
    record_graphs(graphed, training=True)
    names = [name for name, _ in graphed.named_parameters()]
    assert asked == ["reduce-overhead"] and names == [name for name, _ in plain.named_parameters()]
    (expected, wanted), (got, found) = passed(plain), passed(graphed)
    assert torch.equal(got, expected) and wanted.keys() == found.keys() and len(found) == 2 * 3 * 2
    assert all(torch.equal(found[name], wanted[name]) for name in wanted) and len(marks) == 1
    assert torch.equal(passed(graphed.eval())[0], passed(plain.eval())[0])
    assert len(marks) == 1  # validation in between is not recorded
