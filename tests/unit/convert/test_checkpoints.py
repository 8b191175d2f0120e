"""Checkpoints of every member: diffusers' model computes what NVlabs' tensors say, and the way back is byte-equal.

python -m pytest tests/unit/convert/test_checkpoints.py
"""

import json
import shutil

import pytest
import torch
from helpers.nvlabs import NVlabsSana
from safetensors.torch import load_file, save_file

from sana_kit.convert import checkpoints
from sana_kit.convert.__main__ import convert, main
from sana_kit.convert.checkpoints import Options, config_of, from_diffusers, meta_model, position_table
from sana_kit.errors import UserError

# The published configs, with fewer layers and narrower: heads of 32, the cross-attention's of another width, and every
# special of the member. name -> (layers, heads, cross heads, pixels, changes)
MEMBERS = {
    "0.6B": (3, 3, 2, 1024, {}),
    "1.6B": (2, 5, 2, 512, {}),
    "1.6B 2K": (2, 2, 4, 2048, {"interpolation_scale": 1.0}),
    "1.6B 4K": (2, 2, 4, 4096, {"interpolation_scale": 2.0}),
    "1.5 1.6B": (2, 5, 2, 1024, {"qk_norm": "rms_norm_across_heads"}),
    "1.5 4.8B": (6, 5, 2, 1024, {"qk_norm": "rms_norm_across_heads"}),
    "Sprint 0.6B": (3, 3, 2, 1024, {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True}),
    "Sprint 1.6B": (2, 5, 2, 1024, {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True}),
}


def config_for(name):
    layers, heads, cross, pixels, changes = MEMBERS[name]
    return {
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": 32,
        "num_cross_attention_heads": cross,
        "cross_attention_head_dim": heads * 32 // cross,
        "cross_attention_dim": heads * 32,
        "caption_channels": 48,
        "in_channels": 8,
        "out_channels": 8,
        "sample_size": pixels // 32,
        **changes,
    }


def random_model(config, seed=0, kind="SanaTransformer2DModel"):
    import diffusers

    torch.manual_seed(seed)
    model = getattr(diffusers, kind)(**config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():  # no zeros, no ones: each tensor has a part in the output
        parameter.data = torch.randn(parameter.shape, generator=generator) * (
            0.7 / max(1, parameter[0].numel()) ** 0.5
        )
        parameter.data += 1.0 if parameter.ndim == 1 and parameter.numel() == config["cross_attention_dim"] else 0.0
    return model


def inputs(config, guidance):
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(2, 8, 6, 4, generator=generator)
    y = torch.randn(2, 7, 48, generator=generator)
    t = torch.tensor([0.31, 0.74]) if guidance else torch.tensor([251.0, 803.0])
    return x, t, y, torch.tensor([0.45, 0.3]) if guidance else None


def positions_of(model, x):
    """What diffusers adds to the patches of `x`, None without."""
    embed = model.patch_embed
    if embed.pos_embed is None:
        return None
    with_positions, bias = embed(torch.zeros_like(x)), embed.proj.bias
    return with_positions - bias


def run(model, x, t, y, guidance):
    with torch.no_grad():
        return model(hidden_states=x, timestep=t, encoder_hidden_states=y, guidance=guidance).sample


def folder_of(model, path):
    model.save_pretrained(path / "transformer")
    return path / "transformer"


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_both_layouts_compute_the_same_and_go_back_to_the_same_bytes(tmp_path, name, suffix):
    config = config_for(name)
    model = random_model(config)
    source = folder_of(model, tmp_path / "first")
    nvlabs = tmp_path / "one" / f"sana{suffix}"
    convert(str(source), str(nvlabs), "nvlabs")
    state = load_file(nvlabs) if suffix == ".safetensors" else torch.load(nvlabs, weights_only=True)["state_dict"]
    x, t, y, guidance = inputs(config, config.get("guidance_embeds"))
    positions = positions_of(model, x)
    expected = run(model, x, t, y, guidance)
    with torch.no_grad():
        # diffusers' small numbers in denominators and norms; NVlabs' own are another test
        reference = NVlabsSana(
            state, config["num_cross_attention_heads"], eps=(1e-15, 1e-5, 1e-5), positions=positions
        )
        got = reference(x, t, y, guidance)
    assert torch.allclose(got, expected, atol=2e-5 * float(expected.abs().max())) and float(expected.std()) > 0.1

    convert(str(nvlabs), str(tmp_path / "back"), "diffusers", config=str(source / "config.json"))
    back = tmp_path / "back" / "transformer"
    weights = "diffusion_pytorch_model.safetensors"
    assert (back / weights).read_bytes() == (source / weights).read_bytes()
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (source, back))
    assert {k: v for k, v in one.items() if k[0] != "_"} == {k: v for k, v in other.items() if k[0] != "_"}
    again = tmp_path / "two" / nvlabs.name
    again.parent.mkdir()
    convert(str(back), str(again), "nvlabs")
    assert again.read_bytes() == nvlabs.read_bytes()
    from diffusers import SanaTransformer2DModel

    assert torch.equal(run(SanaTransformer2DModel.from_pretrained(back).eval(), x, t, y, guidance), expected)


def test_what_nvlabs_own_small_numbers_change(tmp_path):
    """Its denominators have 1e-8 (diffusers: 1e-15), its cross-attention's norms 1e-6 (diffusers: 1e-5)."""
    config = config_for("1.5 1.6B")
    model = random_model(config)
    state = from_diffusers(model.state_dict())
    x, t, y, guidance = inputs(config, False)
    with torch.no_grad():
        theirs = NVlabsSana(state, 2)(x, t, y, guidance)
    expected = run(model, x, t, y, guidance)
    assert 0 < float((theirs - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def control_pair(tmp_path, seed=0):
    config = config_for("1.6B") | {"num_layers": 4}
    model = random_model(config, seed)
    control_config = {k: v for k, v in config.items() if k not in ("qk_norm", "guidance_embeds")} | {"num_layers": 2}
    control = random_model(control_config, seed + 1, "SanaControlNetModel")
    shared = {k: v for k, v in model.state_dict().items() if not k.startswith(("transformer_blocks.", "proj_out"))}
    control.load_state_dict({k: v for k, v in shared.items() if k != "scale_shift_table"}, strict=False)
    model.save_pretrained(tmp_path / "first" / "transformer")
    control.save_pretrained(tmp_path / "first" / "controlnet")
    return model, control


def test_a_controlnet_goes_with_its_base_and_back(tmp_path):
    model, control = control_pair(tmp_path)
    convert(str(tmp_path / "first"), str(tmp_path / "c.safetensors"), "nvlabs")
    state = load_file(tmp_path / "c.safetensors")
    assert sum(name.startswith("controlnet.") for name in state) == 2 * (15 + 2) + 2
    x, t, y, _ = inputs(config_for("1.6B"), False)
    hint = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        words = {"hidden_states": x, "timestep": t, "encoder_hidden_states": y}
        samples = control(**words, controlnet_cond=hint).controlnet_block_samples
        expected = model(**words, controlnet_block_samples=tuple(samples)).sample
        reference = NVlabsSana(state, 2, eps=(1e-15, 1e-5, 1e-5))
        got, plain = reference(x, t, y, control=hint, as_diffusers=True), run(model, x, t, y, None)
        own = reference(x, t, y, control=hint)
    most = float(expected.abs().max())
    assert torch.allclose(got, expected, atol=2e-5 * most) and float((expected - plain).abs().max()) > 0.05 * most
    # the tensors are the same; how diffusers wires them is not (docs/formats.md)
    assert float((own - expected).abs().max()) > 0.01 * most

    config = str(tmp_path / "first/transformer/config.json")
    lines = convert(str(tmp_path / "c.safetensors"), str(tmp_path / "back"), "diffusers", config=config)
    assert any("SanaControlNetModel, 2 layers" in line for line in lines)
    for part in ("transformer", "controlnet"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    convert(str(tmp_path / "back"), str(tmp_path / "again.safetensors"), "nvlabs")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


def test_a_controlnet_alone_needs_its_own_base(tmp_path):
    control_pair(tmp_path)
    source = str(tmp_path / "first" / "controlnet")
    with pytest.raises(UserError, match="base: needed: it is a ControlNet"):
        convert(source, str(tmp_path / "c.pth"), "nvlabs")
    convert(source, str(tmp_path / "c.pth"), "nvlabs", base=str(tmp_path / "first"))
    output = tmp_path / "output"  # of a training: controlnet/ without a transformer/
    shutil.copytree(source, output / "controlnet")
    with pytest.raises(UserError, match="base: needed: it is a ControlNet"):
        convert(str(output), str(tmp_path / "e.pth"), "nvlabs")
    convert(str(output), str(tmp_path / "e.pth"), "nvlabs", base=str(tmp_path / "first"))
    assert (tmp_path / "e.pth").read_bytes() == (tmp_path / "c.pth").read_bytes()
    random_model(config_for("1.6B"), 5).save_pretrained(tmp_path / "other" / "transformer")
    with pytest.raises(UserError, match="differs from the base in .*x_embedder.proj.weight.*room for one of them"):
        convert(source, str(tmp_path / "d.pth"), "nvlabs", base=str(tmp_path / "other"))
    assert not (tmp_path / "d.pth").exists()


def test_a_conversion_is_whole_or_not_there(tmp_path, monkeypatch):
    """Nothing that looks done is left by one that was cut off; what is wrong with --config and OUT is told at once."""
    save_file(nvlabs_state(), tmp_path / "x.safetensors")
    source, out = str(tmp_path / "x.safetensors"), tmp_path / "out"
    config = tmp_path / "config.json"
    for text, told in ((None, "cannot be read"), ("[1", "cannot be read"), ("{}", "lacks num_attention_heads")):
        if text is not None:
            config.write_text(text)
        with pytest.raises(UserError, match=f"config=.*{told}"):
            convert(source, str(out), "diffusers", config=str(config))
    folder = tmp_path / "folder"
    random_model(config_for("1.5 1.6B"), 0).save_pretrained(folder)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="out=.*file: is a file"):
        convert(source, str(tmp_path / "file" / "below"), "diffusers", config=str(folder))
    monkeypatch.setattr(checkpoints, "write_tensors", lambda *_: 1 / 0)
    monkeypatch.setattr(checkpoints, "_EXTRA", ("final_layer.linear.bias",))
    with pytest.raises(ZeroDivisionError):
        convert(source, str(out), "diffusers", config=str(folder))
    assert not out.exists() and {p.name for p in tmp_path.iterdir()} == {
        "x.safetensors",
        *("config.json", "folder", "file"),
    }
    monkeypatch.undo()
    lines = convert(source, str(out), "diffusers", config=str(folder))
    assert f"--model_path={out} --base_model=PIPELINE" in lines[-1]
    with pytest.raises(UserError, match="Its names are diffusers': name the folder"):
        convert(str(out / "transformer/diffusion_pytorch_model.safetensors"), str(tmp_path / "y"), "diffusers")


def nvlabs_state(name="1.5 1.6B"):
    return from_diffusers(random_model(config_for(name)).state_dict())


def test_nvlabs_own_extras_come_back(tmp_path):
    """y_embedding, pos_embed, logvar_linear are kept beside the transformer; what else it holds is left, and told."""
    extra = {"y_embedder.y_embedding": torch.randn(300, 48), "pos_embed": torch.randn(1, 1024, 160)}
    extra |= {"logvar_linear.weight": torch.randn(1, 160), "logvar_linear.bias": torch.randn(1)}
    state = dict(sorted({**nvlabs_state(), **extra}.items()))
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "x.pth")
    (tmp_path / "config.json").write_text(json.dumps({**config_for("1.5 1.6B"), "interpolation_scale": None}))
    lines = convert(str(tmp_path / "x.pth"), str(tmp_path / "d"), "diffusers", config=str(tmp_path / "config.json"))
    assert any("no place for it: epoch" in line for line in lines)
    convert(str(tmp_path / "d" / "transformer"), str(tmp_path / "y.safetensors"), "nvlabs")
    back = load_file(tmp_path / "y.safetensors")
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


def test_the_table_of_positions_is_the_one_that_diffusers_adds():
    for name in ("1.6B 2K", "1.6B 4K"):
        config = config_for(name)
        model = random_model(config)
        side = config["sample_size"]
        theirs = positions_of(model, torch.zeros(1, 8, side, side))
        made = position_table(64, side, config["interpolation_scale"])
        assert torch.allclose(made, theirs, atol=1e-5) and float(theirs.std()) > 0.1


def test_every_strange_or_missing_tensor_is_named(tmp_path):
    state = nvlabs_state()
    strange = {f"video_head.{index}.weight": torch.ones(2) for index in range(6)}
    lost = ["blocks.1.attn.q_norm.weight", "t_block.1.bias"]
    kept = {name: tensor for name, tensor in state.items() if name not in lost}
    kept["final_layer.linear.bias"] = torch.ones(3)
    save_file({**kept, **strange}, tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**config_for("1.5 1.6B"), "interpolation_scale": None}))
    with pytest.raises(UserError) as told:
        convert(
            str(tmp_path / "x.safetensors"), str(tmp_path / "d"), "diffusers", config=str(tmp_path / "config.json")
        )
    text = str(told.value)
    assert all(name in text for name in (*strange, *lost, "final_layer.linear.bias (3,)"))
    assert not (tmp_path / "d").exists()
    model = random_model(config_for("1.5 1.6B"))
    model.register_buffer("extra", torch.ones(1))
    with pytest.raises(UserError, match="extra"):
        from_diffusers(model.state_dict())


class Trap:
    """A pickle that runs a program when it is opened by plain pickle."""

    def __reduce__(self):
        return (print, ("opened",))


def test_a_pickle_that_holds_more_than_tensors_is_not_opened(tmp_path, capsys):
    torch.save({"state_dict": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(UserError, match="cannot be read as tensors alone.*not opened"):
        convert(str(tmp_path / "trap.pth"), str(tmp_path / "d"), "diffusers")
    assert "opened\n" not in capsys.readouterr().out


def test_the_published_widths_are_known_by_their_shapes():
    """600M and 1600M, 1.5 and Sprint: the config out of tensors without memory is the published one."""
    for width, layers, heads, cross in ((1152, 28, 36, 16), (2240, 20, 70, 20), (2240, 60, 70, 20)):
        published = {
            "num_layers": layers,
            "num_attention_heads": heads,
            "attention_head_dim": 32,
            "num_cross_attention_heads": cross,
            "cross_attention_head_dim": width // cross,
            "cross_attention_dim": width,
            "qk_norm": "rms_norm_across_heads" if layers == 60 else None,
            "guidance_embeds": layers == 28,
        }
        model = meta_model("SanaTransformer2DModel", published)
        found = config_of(from_diffusers(model.state_dict()), Options())
        assert {key: found[key] for key in published} == published
        assert (found["caption_channels"], found["mlp_ratio"], found["sample_size"]) == (2304, 2.5, 32)


def test_the_command_tells_all_that_is_wrong_at_once(tmp_path, capsys):
    source = folder_of(random_model(config_for("0.6B")), tmp_path / "m")
    (tmp_path / "there.txt").touch()
    with pytest.raises(UserError) as told:
        main([str(source), str(tmp_path / "there.txt"), "--to", "kohya"])
    assert "to=kohya" in str(told.value) and "is there already" in str(told.value)
    assert main([str(source), str(tmp_path / "n.pth"), "--to", "nvlabs"]) == 0
    said = capsys.readouterr().out
    assert "NVlabs' layout, " in said and "Made again: pos_embed" in said and "zeros" in said
    with pytest.raises(UserError, match="is 96 wide, which no published member is"):
        main([str(tmp_path / "n.pth"), str(tmp_path / "d"), "--to", "diffusers"])
    with pytest.raises(UserError, match="2048 px were asked for, and its pos_embed is of 1024 px"):
        config = str(source / "config.json")
        main([str(tmp_path / "n.pth"), str(tmp_path / "d"), "--to=diffusers", "--config", config, "--image_size=2048"])
