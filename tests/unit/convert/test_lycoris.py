"""What LyCORIS adds beside LoRA, LoKr and LoHa (Tucker factors, whole differences, biases), and starts of runs.

python -m pytest tests/unit/convert/test_lycoris.py
"""

import pytest
import torch
from helpers.tiny import NARROW_TRANSFORMER
from safetensors.torch import load_file, save_file
from torch.nn.functional import conv2d

from sana_kit.convert.adapters import convert_adapter
from sana_kit.errors import UserError
from sana_kit.models.adapter import apply_loras, read_lora
from sana_kit.models.adapter_start import read_start

CONFIG = NARROW_TRANSFORMER
DEPTH, QUERY, OUT = (f"transformer_blocks.1.{name}" for name in ("ff.conv_depth", "attn1.to_q", "attn1.to_out.0"))


def transformer():
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(0)
    return SanaTransformer2DModel(**CONFIG).eval()


def written(path, module, tensors, prefix="lycoris_"):
    """A LyCORIS file that changes one layer."""
    stem = prefix + module.replace(".", "_")
    save_file({f"{stem}.{name}": torch.as_tensor(tensor).contiguous() for name, tensor in tensors.items()}, path)
    return path


def merged(*paths, factor=1.0):
    model = transformer()
    found = [read_lora(str(path), CONFIG) for path in paths]
    assert [problems for _, problems in found] == [[] for _ in paths]
    apply_loras(model, [(one, factor) for one, _ in found])
    return model.state_dict()


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * 0.3


def test_a_tucker_lora_is_its_three_convolutions_and_becomes_a_lora(tmp_path):
    down, mid, up = draws(3, 1, 1, 1), draws(3, 3, 3, 3), draws(160, 3, 1, 1)
    tensors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": 1.5}
    file = written(tmp_path / "t.safetensors", DEPTH, tensors)
    lora, _ = read_lora(str(file), CONFIG)
    assert (lora.kind, lora.rank, lora.scaling) == ("Tucker LoRA", {DEPTH: 3}, {DEPTH: 0.5})
    pixel = torch.zeros(1, 1, 5, 5)
    pixel[0, 0, 2, 2] = 1  # a kernel is the answer to a single pixel, turned by 180 degrees
    answer = conv2d(conv2d(conv2d(pixel, down), mid, padding=1), up)[0]
    kernel = answer[:, 1:4, 1:4].flip(1, 2)[:, None]
    key = f"{DEPTH}.weight"
    after = merged(file)
    assert torch.allclose(after[key] - transformer().state_dict()[key], 0.5 * kernel, atol=1e-6)
    convert_adapter(str(file), str(tmp_path / "own.safetensors"), "diffusers")
    assert torch.allclose(merged(tmp_path / "own.safetensors")[key], after[key], atol=1e-6)


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_tucker_factors_of_loha_and_lokr(tmp_path, kind):
    """Each entry of the core with its row and column, summed one by one."""

    def rebuilt(core, outputs, inputs):
        total = torch.zeros(outputs.shape[1], inputs.shape[1], *core.shape[2:])
        for i in range(core.shape[0]):
            for j in range(core.shape[1]):
                total += core[i, j] * outputs[i][:, None, None, None] * inputs[j][None, :, None, None]
        return total

    if kind == "LoHa":
        names = ("hada_t1", "hada_w1_a", "hada_w1_b", "hada_t2", "hada_w2_a", "hada_w2_b")
        parts = [draws(*s, seed=n) for n, s in enumerate([(2, 2, 3, 3), (2, 160), (2, 1)] * 2)]
        expected = rebuilt(*parts[:3]) * rebuilt(*parts[3:])
        tensors = dict(zip(names, parts, strict=True))
    else:
        first, core, outputs, inputs = draws(4, 1), draws(2, 2, 3, 3), draws(2, 40), draws(2, 1)
        tensors = {"lokr_w1": first, "lokr_t2": core, "lokr_w2_a": outputs, "lokr_w2_b": inputs}
        second = rebuilt(core, outputs, inputs)
        expected = torch.cat([value * second for value in first[:, 0]])
    file = written(tmp_path / "t.safetensors", DEPTH, {**tensors, "alpha": 1.0})
    assert read_lora(str(file), CONFIG)[0].kind == kind
    key = f"{DEPTH}.weight"
    assert torch.allclose(merged(file)[key] - transformer().state_dict()[key], 0.5 * expected, atol=1e-6)
    with pytest.raises(UserError, match="is no LoRA of a smaller rank than the layer"):
        convert_adapter(str(file), str(tmp_path / "x.safetensors"), "kohya")


def test_whole_differences_and_biases_are_added(tmp_path):
    diff, bias = draws(32, 32), draws(32)
    file = written(tmp_path / "d.safetensors", OUT, {"diff": diff, "diff_b": bias})
    lora, _ = read_lora(str(file), CONFIG)
    assert lora.kind == "whole differences and biases"
    before, after = transformer().state_dict(), merged(file, factor=0.5)
    assert torch.allclose(after[f"{OUT}.weight"], before[f"{OUT}.weight"] + 0.5 * diff)
    assert torch.allclose(after[f"{OUT}.bias"], before[f"{OUT}.bias"] + 0.5 * bias)
    convert_adapter(str(file), str(tmp_path / "again.safetensors"), "lycoris")
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in load_file(file).items())
    told = str(read_lora(str(written(tmp_path / "e.safetensors", QUERY, {"diff_b": bias})), CONFIG)[1][0])
    assert f"{QUERY} has a bias of (32,), none here" in told


def test_pefts_biases_are_scaled_as_its_weights_are(tmp_path):
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    settings = LoraConfig(r=2, lora_alpha=6, target_modules=["to_out.0"], lora_bias=True, init_lora_weights=False)
    model = get_peft_model(transformer(), settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            parameter.data = draws(*parameter.shape)
    model.save_pretrained(tmp_path / "peft")
    ours, theirs = merged(tmp_path / "peft"), None
    state = get_peft_model_state_dict(model)
    theirs = model.merge_and_unload().state_dict()
    assert len(state) == 4 * 3 and max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < 1e-6
    with pytest.raises(UserError, match="the comfyui layout has no place for"):
        convert_adapter(str(tmp_path / "peft"), str(tmp_path / "x.safetensors"), "comfyui")


def test_dora_with_a_norm_for_each_input(tmp_path):
    """LyCORIS' older files; a square layer is told from one with a norm for each output by the magnitude's shape."""
    down, up, magnitude = draws(2, 32), draws(32, 2), draws(1, 32).abs() + 0.5
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": 2.0, "dora_scale": magnitude}
    file = written(tmp_path / "d.safetensors", QUERY, tensors)
    key = f"{QUERY}.weight"
    moved = transformer().state_dict()[key] + up @ down
    expected = torch.stack([moved[:, i] / moved[:, i].norm() * magnitude[0, i] for i in range(32)], dim=1)
    assert torch.allclose(merged(file)[key], expected, atol=1e-6)
    convert_adapter(str(file), str(tmp_path / "k.safetensors"), "kohya")
    assert torch.equal(merged(tmp_path / "k.safetensors")[key], merged(file)[key])
    for layout in ("diffusers", "comfyui"):
        with pytest.raises(UserError, match="have one value for each input"):
            convert_adapter(str(file), str(tmp_path / f"{layout}.safetensors"), layout)
    assert "one value for each input" in str(read_start(str(file), CONFIG)[1][0])


def test_other_kinds_are_named(tmp_path):
    file = written(tmp_path / "o.safetensors", QUERY, {"oft_blocks": draws(8, 4, 4), "alpha": 1.0})
    (problem,) = read_lora(str(file), CONFIG)[1]
    assert "It seems to be OFT, which is not read" in str(problem)


def test_a_run_begins_with_several_adapters_that_add_up(tmp_path):
    """Of other ranks and scales in each layer, one of them a LoKr."""
    lora = {"lora_down.weight": draws(3, 32), "lora_up.weight": draws(32, 3), "alpha": 1.0}
    other = {"lora_down.weight": draws(2, 32, seed=4), "lora_up.weight": draws(32, 2, seed=4), "alpha": 4.0}
    lokr = {"lokr_w1": draws(4, 4), "lokr_w2_a": draws(8, 1), "lokr_w2_b": draws(1, 8), "alpha": 0.5}
    files = [
        written(tmp_path / f"{n}.safetensors", module, tensors, prefix)
        for n, (module, tensors, prefix) in enumerate(
            [(QUERY, lora, "lora_unet_"), (QUERY, other, "lycoris_"), (OUT, lokr, "lycoris_")]
        )
    ]
    factors = dict(zip(files, (0.5, -2, 3), strict=True))
    start, problems = read_start(",".join(f"{file}:{factor}" for file, factor in factors.items()), CONFIG)
    assert problems == [] and start.rank == {QUERY: 5, OUT: 4} and not start.factors
    model, whole = transformer(), transformer()
    apply_loras(model, [(start, 1.0)])
    apply_loras(whole, [(read_lora(str(file), CONFIG)[0], factor) for file, factor in factors.items()])
    ours, theirs = model.state_dict(), whole.state_dict()
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < 1e-6
    alone, _ = read_start(str(files[0]), CONFIG)
    assert torch.equal(alone.weights[f"{QUERY}.lora_B.weight"], lora["lora_up.weight"])
    _, problems = read_start(f"{files[0]}:0,{tmp_path / 'none'}", CONFIG)
    assert ["factor is 0" in str(p) for p in problems] == [True, False] and "no such file" in str(problems[1])
