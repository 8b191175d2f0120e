"""Adapters of every layout: the same weights before and after a conversion, and the same bytes on the way back.

python -m pytest tests/unit/convert/test_adapters.py
"""

import json

import pytest
import torch
from helpers.tiny import NARROW_TRANSFORMER
from safetensors.torch import load_file, save_file

import patch_sana
from sana_kit.convert.adapters import convert_adapter
from sana_kit.errors import UserError
from sana_kit.flags import parse
from sana_kit.inference.config import InferConfig
from sana_kit.models.adapter import apply_loras, parse_adapters, read_lora
from sana_kit.models.keys import from_nvlabs, to_nvlabs, unflatten
from sana_kit.models.layouts import open_any_adapter, settings_of
from sana_kit.models.weights import meta_transformer

CONFIG = {**NARROW_TRANSFORMER, "qk_norm": "rms_norm_across_heads"}
RANKS = {"attn1.to_q": 4, "attn1.to_k": 4, "attn1.to_v": 4, "attn1.to_out.0": 4, "attn2.to_k": 4, "attn2.to_v": 2}
RANKS |= {"ff.conv_point": 3, "ff.conv_inverted": 4}
OTHERS = ["kohya", "comfyui", "lycoris", "peft"]


def transformer(seed=0):
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(seed)
    return SanaTransformer2DModel(**CONFIG).eval()


def random_pair(weight, rank, generator):
    down = torch.randn(rank, *weight.shape[1:], generator=generator) * 0.3
    up = torch.randn(weight.shape[0], rank, *(1 for _ in weight.shape[2:]), generator=generator) * 0.3
    return down, up


def lora(folder, *, dora=False, dtype=torch.float32, modules=None, alpha=8, seed=1, **settings):
    """A LoRA in the kit's own layout, on layers of every kind, with ranks of their own."""
    generator, model = torch.Generator().manual_seed(seed), dict(meta_transformer(CONFIG).named_modules())
    ranks = {f"transformer_blocks.{b}.{name}": rank for b in range(2) for name, rank in RANKS.items()}
    ranks = modules or {**ranks, "proj_out": 4, "caption_projection.linear_1": 4, "time_embed.linear": 4}
    tensors = {}
    for module, rank in ranks.items():
        weight = model[module].weight
        down, up = random_pair(weight, rank, generator)
        stem = f"transformer.{module}"
        tensors |= {f"{stem}.lora_A.weight": down.to(dtype), f"{stem}.lora_B.weight": up.to(dtype)}
        if dora:
            shape = (1, -1, 1, 1) if weight.ndim > 2 else (-1,)
            magnitude = (torch.rand(weight.shape[0], generator=generator) + 0.5).reshape(shape).to(dtype)
            tensors[f"{stem}.lora_magnitude_vector"] = magnitude
    config = {
        "r": 4,
        "lora_alpha": alpha,
        "use_dora": dora,
        "use_rslora": False,
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != 4},
        "alpha_pattern": {module: rank * alpha / 4 for module, rank in ranks.items() if rank != 4},
        "target_modules": sorted(ranks),
        **settings,
    }
    patch_sana.write_adapter(folder, tensors, config, {"name": "base"}, {"modelspec.title": "a title"})
    return folder / patch_sana.ADAPTER_FILE


def merged(*paths, factor=1.0):
    """State of a transformer with adapters in its weights."""
    model = transformer()
    found = [read_lora(str(path), CONFIG) for path in paths]
    assert [problems for _, problems in found] == [[] for _ in paths]
    apply_loras(model, [(one, factor) for one, _ in found])
    return model.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def converted(source, folder, layout):
    """The file that a conversion wrote."""
    convert_adapter(str(source), str(folder), layout)
    (file,) = folder.glob("*.safetensors")
    return file


@pytest.mark.parametrize("layout", OTHERS)
@pytest.mark.parametrize("kind", [{}, {"dora": True}, {"dtype": torch.bfloat16}, {"alpha": 3}])
def test_there_and_back_is_byte_equal_and_means_the_same(tmp_path, layout, kind):
    modules = None
    if kind.get("dora"):  # a stack of DoRA layers needs all of them
        modules = {f"transformer_blocks.1.attn1.to_{x}": 4 for x in "qkv"} | {"proj_out": 2}
        modules |= {"transformer_blocks.0.ff.conv_inverted": 4}
    original = lora(tmp_path / "own", modules=modules, **kind)
    there = converted(original, tmp_path / layout, layout)
    assert open_any_adapter(str(there)).layout == layout
    back = converted(there, tmp_path / "back", "diffusers")
    assert back.read_bytes() == original.read_bytes()
    expected = merged(original)
    assert same(merged(there), expected) and not same(expected, transformer().state_dict())
    again = converted(back, tmp_path / "again", layout)
    assert again.read_bytes() == there.read_bytes()


@pytest.mark.parametrize("layout", OTHERS)
def test_rslora_keeps_its_strength_in_every_layout(tmp_path, layout):
    """alpha / sqrt(rank) there is alpha / rank with another alpha in layouts that have a tensor of it."""
    modules = {f"transformer_blocks.1.attn1.to_{x}": 4 for x in "qkv"} | {"proj_out": 2}
    original = lora(tmp_path / "own", modules=modules, use_rslora=True)
    assert not same(merged(original), merged(lora(tmp_path / "plain", modules=modules)))
    there = converted(original, tmp_path / layout, layout)
    expected, got = merged(original), merged(there)
    assert max(float((expected[key] - got[key]).abs().max()) for key in got) < 1e-6
    assert converted(there, tmp_path / "back", "diffusers").read_bytes() == original.read_bytes()


def test_a_stack_of_several_strengths_is_told_to_be_rounded(tmp_path):
    modules = {f"transformer_blocks.1.attn1.to_{x}": 4 for x in "qkv"}
    alphas = {"transformer_blocks.1.attn1.to_q": 3, "transformer_blocks.1.attn1.to_k": 16}
    original = lora(tmp_path / "own", modules=modules, alpha_pattern=alphas)
    lines = convert_adapter(str(original), str(tmp_path / "c.safetensors"), "comfyui")
    assert any("differs between the layers of blocks.1.attn.qkv" in line for line in lines)
    expected, got = merged(original), merged(tmp_path / "c.safetensors")
    assert max(float((expected[key] - got[key]).abs().max()) for key in got) < 1e-6
    halves = lora(tmp_path / "halves", modules=modules, alpha_pattern={**alphas, next(iter(alphas)): 4})
    lines = convert_adapter(str(halves), str(tmp_path / "h.safetensors"), "comfyui")
    assert not any("differs" in line for line in lines) and same(merged(halves), merged(tmp_path / "h.safetensors"))


def test_every_layout_becomes_every_other(tmp_path):
    original = lora(tmp_path / "own")
    expected, file = merged(original), original
    for layout in ("kohya", "comfyui", "peft", "lycoris", "comfyui", "kohya", "diffusers"):
        file = converted(file, tmp_path / f"{layout}-{file.stat().st_size}", layout)
        assert same(merged(file), expected)
    assert file.read_bytes() == original.read_bytes()


def test_a_stack_means_in_nvlabs_layout_what_its_parts_mean(tmp_path):
    """ComfyUI's rule, W + alpha / rank * up @ down, on the stacked weight is the stack of diffusers' layers."""
    file = converted(lora(tmp_path / "own"), tmp_path / "comfy", "comfyui")
    stored, base, after = load_file(file), transformer().state_dict(), merged(file)
    stacks = [name.removesuffix(".alpha") for name in stored if name.endswith(".alpha")]
    assert "diffusion_model.blocks.0.attn.qkv" in stacks and len(stacks) == 2 * 5 + 3
    for stem in stacks:
        down, up = stored[f"{stem}.lora_A.weight"], stored[f"{stem}.lora_B.weight"]
        parts = from_nvlabs(stem.removeprefix("diffusion_model."))
        weight = torch.cat([base[f"{part}.weight"] for part in parts])
        delta = (up.flatten(1) @ down.flatten(1)).view(weight.shape)
        expected = weight + stored[f"{stem}.alpha"] / down.shape[0] * delta
        got = torch.cat([after[f"{part}.weight"] for part in parts])
        assert torch.allclose(got, expected, atol=1e-6) and (got - weight).abs().max() > 1e-2
    rank = stored["diffusion_model.blocks.0.attn.qkv.lora_A.weight"].shape[0]
    assert (rank, float(stored["diffusion_model.blocks.0.attn.qkv.alpha"])) == (12, 24.0)
    assert stored["diffusion_model.blocks.0.cross_attn.kv_linear.lora_A.weight"].shape[0] == 6


def test_a_stack_with_a_missing_part_leaves_it_alone(tmp_path):
    modules = {"transformer_blocks.0.attn1.to_q": 4, "transformer_blocks.0.attn1.to_v": 4}
    original = lora(tmp_path / "own", modules=modules)
    file = converted(original, tmp_path / "comfy", "comfyui")
    assert same(merged(file), merged(original))
    assert converted(file, tmp_path / "back", "diffusers").read_bytes() == original.read_bytes()
    dora = lora(tmp_path / "dora", modules=modules, dora=True)
    with pytest.raises(UserError, match=r"DoRA's magnitudes of blocks.0.attn.qkv are needed for all stacked"):
        convert_adapter(str(dora), str(tmp_path / "never"), "comfyui")
    assert not (tmp_path / "never").exists()


def foreign(path, spell, dtype=torch.float32, alpha=None, modules=("attn1.to_q", "attn2.to_out.0")):
    """A file as other tools write it: no metadata of ours. `spell(module)` gives (stem, down, up)."""
    generator, layers = torch.Generator().manual_seed(3), dict(meta_transformer(CONFIG).named_modules())
    tensors = {}
    for module in [f"transformer_blocks.1.{name}" for name in modules]:
        down, up = random_pair(layers[module].weight, 4, generator)
        stem, a, b = spell(module)
        tensors |= {f"{stem}.{a}": down.to(dtype), f"{stem}.{b}": up.to(dtype)}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=dtype)
    save_file(tensors, path, metadata={"ss_network_dim": "4"})
    return path


def flat(prefix):
    return lambda module: (prefix + module.replace(".", "_"), "lora_down.weight", "lora_up.weight")


SPELLED = {
    "kohya": flat("lora_unet_"),
    "older kohya": flat("lora_transformer_"),
    "lycoris": flat("lycoris_"),
    "OneTrainer for Comfy": lambda m: (f"diffusion_model.{m}", "lora_A.weight", "lora_B.weight"),
    "PEFT": lambda m: (f"base_model.model.{m}", "lora_A.weight", "lora_B.weight"),
    "older diffusers": lambda m: (f"transformer.{m}", "lora.down.weight", "lora.up.weight"),
    "bare": lambda m: (m, "lora_A.weight", "lora_B.weight"),
    "NVlabs": lambda m: (f"diffusion_model.{to_nvlabs(m).name}", "lora_A.weight", "lora_B.weight"),
    "kohya of NVlabs": lambda m: flat("lora_unet_")(to_nvlabs(m).name),
}


@pytest.mark.parametrize("name", SPELLED)
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_files_of_other_tools_are_read_and_given_back_byte_for_byte(tmp_path, name, alpha):
    modules = ("attn2.to_out.0", "ff.conv_point") if "NVlabs" in name else ("attn1.to_q", "attn2.to_out.0")
    file = foreign(tmp_path / "f.safetensors", SPELLED[name], torch.bfloat16, alpha, modules)
    found, problems = read_lora(str(file), CONFIG)
    assert problems == [] and set(found.scaling.values()) == {(alpha or 4) / 4}
    layout = open_any_adapter(str(file)).layout
    assert found.layout == layout == {"NVlabs": "comfyui", "OneTrainer for Comfy": "comfyui"}.get(name, layout)
    way = "diffusers" if layout != "diffusers" else "kohya"
    other = converted(file, tmp_path / "other", way)
    assert same(merged(other), merged(file))
    adapter = open_any_adapter(str(other))
    config = settings_of(adapter)
    assert {config["r"], adapter.metadata["ss_network_dim"]} == {4, "4"} and len(adapter.pairs) == 2
    assert config["lora_alpha"] == (alpha or 4)
    back = converted(other, tmp_path / "back", layout)
    assert load_file(back).keys() == load_file(file).keys() and same(load_file(back), load_file(file))
    assert open_any_adapter(str(back)).metadata == open_any_adapter(str(file)).metadata


def test_a_stack_that_was_trained_as_one_is_shared_out(tmp_path):
    """A dense up: query, key and value get the same down, and the way back is the one layer again."""
    generator = torch.Generator().manual_seed(5)
    down, up = torch.randn(6, 32, generator=generator), torch.randn(96, 6, generator=generator)
    stem = "diffusion_model.blocks.0.attn.qkv"
    tensors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up, f"{stem}.alpha": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "dense.safetensors")
    base, after = transformer().state_dict(), merged(tmp_path / "dense.safetensors")
    for index, x in enumerate("qkv"):
        key = f"transformer_blocks.0.attn1.to_{x}.weight"
        expected = base[key] + 0.5 * up[32 * index : 32 * (index + 1)] @ down
        assert torch.allclose(after[key], expected, atol=1e-5)
    own = converted(tmp_path / "dense.safetensors", tmp_path / "own", "diffusers")
    assert same(merged(own), after) and len(load_file(own)) == 6
    back = load_file(converted(own, tmp_path / "back", "comfyui"))
    assert same(back, tensors)


def test_peft_itself_loads_what_is_written_for_it(tmp_path):
    from peft import PeftModel

    for name, kind in (("plain", {}), ("dora", {"dora": True})):
        original = lora(tmp_path / name, **kind)
        convert_adapter(str(original), str(tmp_path / f"{name}-peft"), "peft")
        theirs = PeftModel.from_pretrained(transformer(), tmp_path / f"{name}-peft").merge_and_unload().state_dict()
        ours = merged(original)
        worst = max(float((ours[key] - theirs[key]).abs().max()) for key in ours)
        assert worst < 1e-5 and ours.keys() == theirs.keys()


def lycoris_model(kind, **settings):
    """(peft's own model with LoKr or LoHa layers of random factors, the LyCORIS file of the same factors)."""
    from peft import LoHaConfig, LoKrConfig, get_peft_model

    config = {"LoKr": LoKrConfig, "LoHa": LoHaConfig}[kind]
    model = get_peft_model(transformer(), config(r=2, alpha=4, target_modules=["to_q", "to_v"], **settings))
    generator, tensors = torch.Generator().manual_seed(7), {}
    for name, parameter in model.named_parameters():
        if "hada_" in name or "lokr_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
            module, factor, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
            stem = "lycoris_" + module.replace(".", "_")
            tensors |= {f"{stem}.{factor}": parameter.data.clone(), f"{stem}.alpha": torch.tensor(4.0)}
    return model, tensors


@pytest.mark.parametrize(("kind", "exact"), [("LoKr", True), ("LoHa", True), ("LoKr whole", False)])
def test_lokr_and_loha_are_applied_as_peft_applies_them(tmp_path, kind, exact):
    kind = kind.split()[0]
    settings = {"decompose_factor": 4} if kind == "LoKr" else {}
    model, tensors = lycoris_model(kind, **settings)
    if not exact:  # two whole factors, as LyCORIS writes them for a large rank; their scale is 1
        module = "lycoris_transformer_blocks_0_attn1_to_q"
        first, second = torch.randn(4, 4), torch.randn(8, 8)
        tensors = {f"{module}.lokr_w1": first, f"{module}.lokr_w2": second, f"{module}.alpha": torch.tensor(1e10)}
    save_file(tensors, tmp_path / "l.safetensors")
    found, problems = read_lora(str(tmp_path / "l.safetensors"), CONFIG)
    assert problems == [] and (found.kind, found.layout) == (kind, "lycoris")
    ours = merged(tmp_path / "l.safetensors")
    if exact:
        theirs = model.merge_and_unload().state_dict()
        assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < 1e-5
        own = converted(tmp_path / "l.safetensors", tmp_path / "own", "diffusers")
        again = merged(own)
        assert max(float((ours[key] - again[key]).abs().max()) for key in ours) < 1e-5
    else:
        key = "transformer_blocks.0.attn1.to_q.weight"
        expected = transformer().state_dict()[key] + torch.kron(first, second)
        assert torch.allclose(ours[key], expected, atol=1e-6)
        with pytest.raises(UserError, match="is no LoRA of a smaller rank"):
            convert_adapter(str(tmp_path / "l.safetensors"), str(tmp_path / "own"), "diffusers")


def test_all_that_belongs_nowhere_is_named_at_once(tmp_path):
    original = load_file(lora(tmp_path / "own"))
    names = [f"lora_unet_no_such_layer_{index}.lora_down.weight" for index in range(7)]
    save_file({**{n: torch.ones(4, 4) for n in names}, **original}, tmp_path / "x.safetensors")
    with pytest.raises(UserError) as told:
        convert_adapter(str(tmp_path / "x.safetensors"), str(tmp_path / "out"), "kohya")
    assert len(told.value.problems) == 1
    bad = [n for n in (*names, *original) if n not in str(told.value)]
    assert bad == [] or bad == list(original)
    half = {key: tensor for key, tensor in original.items() if "proj_out.lora_A" not in key}
    save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match="one of the two factors is missing for proj_out"):
        convert_adapter(str(tmp_path / "half.safetensors"), str(tmp_path / "out"), "kohya")
    assert not (tmp_path / "out").exists()


def test_an_alpha_that_was_edited_counts_on_the_way_back(tmp_path):
    there = converted(lora(tmp_path / "own", modules={"proj_out": 4}), tmp_path / "kohya", "kohya")
    with patch_metadata(there) as tensors:
        tensors["lora_unet_proj_out.alpha"] = torch.tensor(2.0)
    back = converted(there, tmp_path / "back", "diffusers")
    config = patch_sana.open_adapter(back).lora_config
    assert (config["r"], config["lora_alpha"], config["alpha_pattern"]) == (4, 2, {})
    assert same(merged(back), merged(there))


class patch_metadata:  # noqa: N801
    """Change the tensors of a file and leave its metadata."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        stored = patch_sana.open_adapter(self.path)
        self.tensors, self.metadata = stored.tensors, stored.metadata
        return self.tensors

    def __exit__(self, *error):
        save_file(self.tensors, self.path, metadata=self.metadata)


def test_several_adapters_add_up(tmp_path):
    first, second = lora(tmp_path / "a", seed=1), lora(tmp_path / "b", seed=2)
    base, one, two, both = transformer().state_dict(), merged(first), merged(second), merged(first, second)
    for key in base:
        assert torch.allclose(both[key] - base[key], (one[key] - base[key]) + (two[key] - base[key]), atol=1e-5)
    apart = transformer()
    loras = [(read_lora(str(path), CONFIG)[0], factor) for path, factor in ((first, 0.5), (second, 2.0))]
    apply_loras(apart, loras, fuse=False)
    fused = transformer()
    apply_loras(fused, loras)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 24, generator=generator),
        "timestep": torch.tensor([300.0, 700.0]),
    }
    with torch.no_grad():
        got, expected, plain = (model(**inputs).sample for model in (apart, fused, transformer()))
    assert torch.allclose(got, expected, atol=2e-4) and not torch.allclose(got, plain, atol=1e-1)


def test_adapters_on_a_command_line(tmp_path):
    odd = tmp_path / "a,b:0.5"
    odd.touch()
    found = parse_adapters([str(odd), "x.safetensors:0.8,y/z", "c:d:-1"])
    assert found[0] == (str(odd), 1.0) and found[-3:] == [("x.safetensors", 0.8), ("y/z", 1.0), ("c:d", -1.0)]
    assert parse_adapters([f"{odd}:-.25"]) == [(str(odd), -0.25)]
    config, given = parse(InferConfig, "", ["--lora_weights", "a:0.8", "b,c", "--lora_weights=d"])
    assert config.lora.lora_weights == ("a:0.8", "b,c", "d") and given == {"lora_weights"}
    with pytest.raises(UserError) as told:
        parse_adapters(["a,,b", "a:strong", "a:nan"])
    assert len(told.value.problems) == 3 and "'strong' behind its colon no number" in str(told.value)


@pytest.mark.parametrize("sprint", [False, True])
def test_the_names_of_all_layers_go_there_and_back(sprint):
    config = {**CONFIG, "guidance_embeds": sprint}
    modules = meta_transformer(config).named_modules()
    layers = [name for name, module in modules if getattr(module, "weight", None) is not None]
    assert len(layers) == 2 * 15 + 8 + 2 * sprint
    for name in layers:
        place = to_nvlabs(name)
        assert from_nvlabs(place.name, sprint)[place.part] == name
        assert unflatten(name.replace(".", "_")) == name and unflatten(place.name.replace(".", "_")) == place.name


def test_sprint_keeps_its_time_embedding(tmp_path):
    """NVlabs calls it as in the other members, diffusers does not."""
    module = "time_embed.timestep_embedder.linear_1"
    tensors = {f"transformer.{module}.lora_A.weight": torch.ones(4, 256)}
    tensors[f"transformer.{module}.lora_B.weight"] = torch.ones(32, 4)
    config = {"r": 4, "lora_alpha": 4, "target_modules": [module]}
    patch_sana.write_adapter(tmp_path / "own", tensors, config, {})
    file = converted(tmp_path / "own", tmp_path / "comfy", "comfyui")
    assert "diffusion_model.t_embedder.mlp.0.lora_A.weight" in load_file(file)
    back = converted(file, tmp_path / "back", "diffusers")
    assert back.read_bytes() == (tmp_path / "own" / patch_sana.ADAPTER_FILE).read_bytes()
    found, problems = read_lora(str(file), {**CONFIG, "guidance_embeds": True})
    assert problems == [] and list(found.rank) == [module]


def test_metadata_tells_the_way_back(tmp_path):
    there = converted(lora(tmp_path / "own"), tmp_path / "comfy", "comfyui")
    metadata = open_any_adapter(str(there)).metadata
    assert metadata["modelspec.title"] == "a title" and "lora_adapter_metadata" in metadata
    note = json.loads(metadata["sana_kit_converted"])
    assert note["first"]["layout"] == "diffusers" and note["stacked"]["blocks.0.cross_attn.kv_linear"] == [4, 2]
