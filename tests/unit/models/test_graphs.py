"""CUDA graphs: what goes with them and what they keep; integration/test_graphs.py compiles a step."""

import pytest
import torch

from sana_kit import devices
from sana_kit.errors import UserError
from sana_kit.flags import parse
from sana_kit.inference.config import InferConfig
from sana_kit.inference.plan import check
from sana_kit.models.graphs import record_graphs
from sana_kit.training.config import parse_args
from sana_kit.training.graphs import graph_problems
from sana_kit.training.launch_config import LaunchConfig
from sana_kit.training.stream import caption_multiple


def test_predictions_outlive_the_graphs_memory(monkeypatch):
    memory = torch.zeros(2)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda: (memory,))
    module = torch.nn.Identity().eval()
    record_graphs(module, training=False)
    (first,) = module()
    memory += 1  # the next step, in the same memory
    assert first.tolist() == [0, 0] and module()[0].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("flags", "launch", "told"),
    [
        ([], {}, []),
        (["--aspect_ratio_buckets"], {}, ["with aspect_ratio_buckets batches have several"]),
        (["--resolution=512,1024"], {}, ["with several resolutions batches have several"]),
        (["--gradient_checkpointing", "--compile"], {}, ["recomputed blocks", "compile has nothing left to do"]),
        (["--gradient_accumulation_steps=2"], {"zero_stage": 3}, ["ZeRO-3 gathers weights", "outlive the pass"]),
        (["--train_mode=controlnet"], {"zero_stage": 2}, ["not tried with a ControlNet"]),
    ],
)
def test_what_does_not_go_with_graphs_is_told(flags, launch, told):
    config = parse_args(["--pretrained_model_name_or_path=x", "--instance_data_dir=y", "--cuda_graphs", *flags])
    found = graph_problems(config, "cuda", LaunchConfig(**launch))
    assert [part in str(problem) for part, problem in zip(told, found, strict=True)] == [True] * len(told)
    for device in ("cpu", "npu"):
        assert f"and this is {device}" in str(graph_problems(config, device, LaunchConfig(**launch))[0])
    assert caption_multiple(config) == 300 and devices.KINDS["cuda"].graphs
    without = parse_args(["--pretrained_model_name_or_path=x", "--instance_data_dir=y", *flags])
    assert graph_problems(without, "cpu", LaunchConfig(**launch)) == [] and caption_multiple(without) == 16


def test_drawing_with_graphs_is_refused_where_they_cannot_be(tiny_model, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b", "height": 64, "width": 128}\n')
    flags = [f"--model_path={tiny_model}", f"--prompts_file={prompts}", "--cuda_graphs", "--pag_scale=2"]
    config, _ = parse(InferConfig, "", [*flags, "--pag_layers=0", "--fused_blocks=auto"])
    with pytest.raises(UserError) as caught:
        check(config, torch.device("cpu"))
    said = str(caught.value)
    for part in ("and this is cpu", "the images have 2 sizes", "perturbed attention", "fuses diffusers' own blocks"):
        assert part in said, said
