"""The fused SANA block against diffusers' own: forward, every gradient, choice, and what may not change."""

import copy
import itertools
import math
import statistics

import pytest
import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from peft import LoraConfig, get_peft_model_state_dict
from torch.autograd import gradcheck

from sana_kit.models.attention import set_attention
from sana_kit.models.fused import FusedSanaBlock, fuse_blocks, one_timestep, packed, unfuse_blocks
from sana_kit.models.fused_ops import (
    GatedConvolution,
    GatedResidual,
    LinearAttention,
    LoraProjection,
    ModulatedNorm,
    Part,
)

HEIGHT, WIDTH, CAPTION = 6, 4, 5


def make_model(*, train="lora", qk_norm=None, layers=2, heads=2, width=16, guidance=False, **adapter):
    """A random transformer in float32 with LoRA (B not zero), all weights trained, or nothing trained."""
    torch.manual_seed(0)
    model = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=width,
        num_cross_attention_heads=2,
        cross_attention_head_dim=heads * width // 2,
        cross_attention_dim=heads * width,
        caption_channels=12,
        sample_size=8,
        qk_norm=qk_norm,
        guidance_embeds=guidance,
    )
    for name, parameter in model.named_parameters():
        if ".norm_" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.requires_grad_(train == "full")
    if train == "lora":
        settings = {"r": 3, "lora_alpha": 2, "target_modules": ["to_q", "to_k", "to_v"]} | adapter
        model.add_adapter(LoraConfig(**settings))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs_of(model, batch=2):
    """Latents, captions of different lengths, and one time step each."""
    generator = torch.Generator().manual_seed(1)
    dtype = model.dtype
    mask = torch.ones(batch, CAPTION, dtype=torch.bool)
    mask[-1, 3:] = False
    inputs = {
        "hidden_states": torch.randn(batch, 4, HEIGHT, WIDTH, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, CAPTION, 12, generator=generator).to(dtype),
        "timestep": torch.linspace(100, 700, batch),
        "encoder_attention_mask": mask,
    }
    if model.config.guidance_embeds:
        inputs["guidance"] = torch.tensor([4.5, 3.0]).to(dtype)
    return inputs


def run(model, seed=None):
    """(prediction, gradients by name) of one step; the mask's hook of the kit is used where it is set."""
    inputs = inputs_of(model)
    if seed is not None:
        torch.manual_seed(seed)
    with torch.set_grad_enabled(any(p.requires_grad for p in model.parameters())):
        out = model(**inputs, return_dict=False)[0]
    if out.requires_grad:
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
        (out * weight).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def fused_of(model):
    """A copy of the model with the kit's attention and the fused block."""
    fused = copy.deepcopy(model)
    set_attention(fused, "auto", torch.device("cpu"))
    assert fuse_blocks(fused).startswith("fused")
    return fused


def apart(one, other):
    """Largest difference as a share of the other's largest value."""
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())


CASES = {
    "lora": {},
    "lora16, alpha 16": {"r": 16, "lora_alpha": 16},
    "dropout": {"lora_dropout": 0.3},
    "two layers": {"target_modules": ["to_q", "to_v"]},
    "every linear layer": {"target_modules": ["to_q", "to_k", "to_v", "to_out.0"]},
    "rank pattern": {"rank_pattern": {"attn1.to_k": 5, "attn2.to_q": 1}, "alpha_pattern": {"attn1.to_v": 9}},
    "one scale of several": {"alpha_pattern": {"attn1": 9, "attn2": 3}},
    "qk-norm": {"qk_norm": "rms_norm_across_heads"},
    "qk-norm, guidance embedding": {"qk_norm": "rms_norm_across_heads", "guidance": True},
    "full": {"train": "full"},
    "full, qk-norm": {"train": "full", "qk_norm": "rms_norm_across_heads"},
    "inference": {"train": "none"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", ["last", "first"])
def test_equals_diffusers(case, layout):
    """Prediction and every gradient in float32, within 1e-5 of the largest value of diffusers' block."""
    model = make_model(**CASES[case]).train()
    # dropout draws its mask in the order of memory, and diffusers' residual stream lies channels first
    model.patch_embed.register_forward_hook(lambda module, args, out: out.contiguous())
    fused = fused_of(model)
    for block in fused.transformer_blocks:
        block.channels_last = layout == "last"
    expected, gradients = run(model, seed=3)
    found, own = run(fused, seed=3)
    assert apart(found, expected) < 1e-5
    assert own.keys() == gradients.keys()
    if "inference" not in case:
        assert gradients
    for name, gradient in gradients.items():
        assert own[name].dtype == gradient.dtype
        # a gradient that is zero but for rounding has no scale of its own
        scale = max(float(gradient.abs().max()), 1e-3 * max(float(g.abs().max()) for g in gradients.values()))
        assert float((own[name] - gradient).abs().max()) < 1e-5 * scale, name


@pytest.mark.parametrize("batch", [2, 4])  # 48 and 96 tokens for an inner width of 80: the gate in the weight, or not
@pytest.mark.parametrize(("layout", "image_by_image"), [("last", True), ("last", False), ("first", False)])
def test_one_time_step_for_all_images(batch, layout, image_by_image):
    """A denoising step: norm and modulation in one pass, the gate in the last product; float32, within 1e-5."""
    model = make_model(train="none", qk_norm="rms_norm_across_heads").eval()
    fused = fused_of(model)
    for block in fused.transformer_blocks:
        block.channels_last, block.image_by_image = layout == "last", image_by_image
    assert one_timestep(fused) and not one_timestep(model)
    inputs = inputs_of(model, batch)
    with torch.no_grad():
        expected = model(**inputs | {"timestep": torch.full((batch,), 300.0)}, return_dict=False)[0]
        found = fused(**inputs | {"timestep": torch.full((1,), 300.0)}, return_dict=False)[0]
    assert apart(found, expected) < 1e-5


def test_dropout_drops():
    """Another seed gives another prediction while training, the same one in evaluation."""
    fused = fused_of(make_model(lora_dropout=0.5)).train()
    assert not torch.equal(run(fused, seed=1)[0], run(fused, seed=2)[0])
    fused.eval()
    assert torch.equal(run(fused, seed=1)[0], run(fused, seed=2)[0])


def test_adapter_switched_off_or_merged():
    """disable_adapters gives the base's prediction; a merged adapter is not added twice."""
    model = make_model().eval()
    fused = fused_of(model)
    with_adapter = run(fused)[0]
    for one in (model, fused):
        one.disable_adapters()
    assert apart(run(fused)[0], run(model)[0]) < 1e-5
    assert apart(run(fused)[0], with_adapter) > 1e-3
    for one in (model, fused):
        one.enable_adapters()
        one.fuse_lora()
    assert apart(run(fused)[0], with_adapter) < 1e-5


def test_float32_adapter_on_a_bf16_base():
    """As the trainer has it without DeepSpeed: gradients come back in float32."""
    model = make_model().bfloat16()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    gradients = run(fused_of(model))[1]
    assert len(gradients) == 24
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}


def draw_block_inputs(width, seed):
    """(x, captions, modulation, weight of the output) in bf16; features of x differ, with a mean not 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    x = draw(2, 256, width) * draw(1, 1, width).abs() + 0.5 * draw(1, 1, width)
    return x, draw(2, 20, width), 0.3 * draw(2, 6 * width), draw(2, 256, width)


def run_block(block, mask, inputs):
    """{name: output, gradient of the input and of each trained parameter} in the block's dtype."""
    dtype = block.scale_shift_table.dtype
    x, captions, modulation, weight = (tensor.to(dtype, copy=True) for tensor in inputs)
    x.requires_grad_()
    out = block(x, None, captions, mask, modulation, 16, 16)
    block.zero_grad()
    out.backward(weight)
    gradients = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "input": x.grad, **gradients}


@pytest.mark.parametrize("qk_norm", [None, "rms_norm_across_heads"])
def test_bf16_is_as_exact_as_diffusers(qk_norm):
    """Output and gradients at most 1.2 times as far from float32 as diffusers' block, in the geometric mean of draws.

    A draw in which one token's denominator is nearly zero has errors of its own size, for both blocks, so one draw of
    to_v's A varies by a third: a mean may be above by two of its standard errors. The largest of 64 draws was 1.16
    (to_v's B).
    """
    model = make_model(qk_norm=qk_norm, layers=1, heads=8, width=32).bfloat16()
    exact, theirs = (copy.deepcopy(model).to(dtype).transformer_blocks[0] for dtype in (torch.float32, torch.bfloat16))
    ours = fused_of(model).transformer_blocks[0]
    mask = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    mask[1, ..., 9:] = False
    bias = (~mask[:, 0]).bfloat16() * -10000.0  # as diffusers' forward makes it
    logs = {}
    for seed in range(16):
        inputs = draw_block_inputs(256, seed)
        results = (
            run_block(exact, bias.float(), inputs),
            run_block(theirs, bias, inputs),
            run_block(ours, mask, inputs),
        )
        for name, value in results[0].items():
            errors = [float((one[name].float() - value).norm()) for one in results[1:]]
            logs.setdefault(name, []).append(math.log(errors[1] / errors[0]))
    assert len(logs) == 14
    for name, values in logs.items():
        assert surely_below(values), name
    # of all gradients together, where chance is small
    assert statistics.mean(itertools.chain(*logs.values())) < math.log(1.1)


def surely_below(logs, bound=1.2):
    """Whether the geometric mean of ratios is below a bound, but for two standard errors of the mean."""
    return statistics.mean(logs) - 2 * statistics.stdev(logs) / math.sqrt(len(logs)) < math.log(bound)


@pytest.mark.parametrize("batch", [2, 6])  # 512 and 1536 tokens for an inner width of 640
def test_bf16_drawing_is_as_exact_as_diffusers(batch):
    """One time step for all: at most 1.2 times as far from float32 as diffusers' block, in the mean of draws."""
    model = make_model(train="none", layers=1, heads=8, width=32).bfloat16()
    exact, theirs = (copy.deepcopy(model).to(dtype).transformer_blocks[0] for dtype in (torch.float32, torch.bfloat16))
    ours = fused_of(model).transformer_blocks[0]
    logs = []
    for seed in range(8):
        x, captions, modulation, _ = draw_block_inputs(256, seed)
        x, captions = (tensor.repeat(batch // 2, 1, 1) for tensor in (x, captions))
        with torch.no_grad():
            one = modulation[:1]
            value = exact(x.float(), None, captions.float(), None, one.float().expand(batch, -1), 16, 16)
            other = theirs(x, None, captions, None, one.expand(batch, -1), 16, 16)
            found = ours(x, None, captions, None, one, 16, 16)
        logs.append(math.log(float((found.float() - value).norm() / (other.float() - value).norm())))
    assert surely_below(logs)


def doubles(*shape, seed=0):
    """A float64 tensor that wants a gradient, no value near the kink of relu."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values + 0.1 * values.sign()).requires_grad_()


def test_gradcheck_norm_and_residual():
    x, factor, shift = doubles(2, 3, 5), doubles(2, 1, 5, seed=1), doubles(2, 1, 5, seed=2)
    assert gradcheck(ModulatedNorm.apply, (x, factor, shift, 1e-6))
    assert gradcheck(GatedResidual.apply, (x, factor, doubles(2, 3, 5, seed=3)))


def test_gradcheck_projection():
    parts = [Part(0, 4, 0.5), Part(4, 8, 2.0)]
    x, weight, bias = doubles(6, 5), doubles(8, 5, seed=1).detach(), doubles(8, seed=2).detach()
    downs, ups = [doubles(2, 5, seed=3), doubles(3, 5, seed=4)], [doubles(4, 2, seed=5), doubles(4, 3, seed=6)]
    for passes in (False, True):
        function = lambda x, *ms, p=passes: LoraProjection.apply(x, None, weight, bias, parts, p, *ms)  # noqa: E731
        assert gradcheck(function, (x, *downs, *ups))
    alike, same = [Part(0, 4, 0.5), Part(4, 8, 0.5)], [doubles(3, 5, seed=3), downs[1]]  # one batched product
    function = lambda x, *ms: LoraProjection.apply(x, None, weight, bias, alike, True, *ms)  # noqa: E731
    assert gradcheck(function, (x, *same, doubles(4, 3, seed=5), ups[1]))
    low = doubles(6, 5, seed=7)
    function = lambda x, low, *ms: LoraProjection.apply(x, low, weight, None, parts, False, *ms)  # noqa: E731
    assert gradcheck(function, (x, low, *ups))


def test_gradcheck_linear_attention():
    apply = LinearAttention.apply
    assert gradcheck(lambda qkv: apply(2, qkv, None, None), (doubles(2, 5, 3 * 6),))
    three = [doubles(2, 5, 6, seed=seed) for seed in range(3)]
    assert gradcheck(lambda q, k, v: apply(2, q, k, v), three)


@pytest.mark.parametrize("channels_last", [True, False])
def test_gradcheck_gated_convolution(channels_last):
    x = doubles(2, 12, 4) if channels_last else doubles(2, 4, 3, 4)
    weight, bias = doubles(4, 1, 3, 3, seed=1), doubles(4, seed=2)
    assert gradcheck(lambda x, w, b: GatedConvolution.apply(x, w, b, (3, 4), channels_last), (x, weight, bias))


def test_tokens_without_a_positive_query():
    """Where relu leaves nothing of Q the output is zero and the gradients finite, as diffusers' epsilon has it."""
    qkv = torch.randn(1, 4, 3 * 8)
    qkv[:, 1, :8] = -1
    qkv.requires_grad_()
    out = LinearAttention.apply(2, qkv, None, None)
    assert torch.equal(out[:, 1], torch.zeros(1, 8))
    out.sum().backward()
    assert torch.isfinite(qkv.grad).all()


def test_names_weights_and_memory_stay():
    """The state dict has the same names and values, the adapter's too, and no weight lies in memory twice."""
    model = make_model()
    before, adapter = copy.deepcopy(model.state_dict()), copy.deepcopy(get_peft_model_state_dict(model))
    set_attention(model, "auto", torch.device("cpu"))
    fuse_blocks(model)
    run(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert get_peft_model_state_dict(model).keys() == adapter.keys()
    attn = model.transformer_blocks[0].attn1
    bases = [module.base_layer for module in (attn.to_q, attn.to_k, attn.to_v)]
    weight = packed(bases)[0]
    assert weight.data_ptr() == bases[0].weight.data_ptr()
    assert weight.untyped_storage().nbytes() == sum(base.weight.nbytes for base in bases)
    assert all(base.weight.is_contiguous() for base in bases)


def test_moved_weights_still_give_the_same():
    """`.to()` and deepcopy take the joined weights apart; the block then makes three products."""
    fused = fused_of(make_model())
    expected = run(fused)[0]
    moved = copy.deepcopy(fused).double()
    attn = moved.transformer_blocks[0].attn1
    assert packed([module.base_layer for module in (attn.to_q, attn.to_k, attn.to_v)])[0] is None
    assert apart(run(moved)[0], expected) < 1e-5
    assert fuse_blocks(moved).startswith("fused")
    assert packed([module.base_layer for module in (attn.to_q, attn.to_k, attn.to_v)])[0] is not None


def test_recomputed_blocks_give_the_same_bits():
    """Under gradient checkpointing the gradients are those of kept activations, dropout's mask included."""
    fused = fused_of(make_model(lora_dropout=0.3)).train()
    expected = run(fused, seed=4)[1]
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    fused.zero_grad()
    fused.enable_gradient_checkpointing()
    again = run(fused, seed=4)[1]
    assert all(torch.equal(again[name], gradient) for name, gradient in expected.items())


def test_keeps_half_of_what_diffusers_keeps():
    """Bytes that autograd keeps, counted by hooks on real tensors."""
    from sana_kit.roofline import KeptBytes

    kept = []
    for model in (make_model(heads=8, width=16), fused_of(make_model(heads=8, width=16))):
        counter = KeptBytes([*model.parameters(), *model.buffers()])
        with counter.hooks():
            model(**inputs_of(model), return_dict=False)
        kept.append(counter.total)
    assert kept[1] < 0.75 * kept[0]


DIFFUSERS_OWN = {
    "switched off": ({}, {"choice": "off"}),
    "autocast": ({}, {"autocast": True}),
    "torch.compile": ({"train": "full"}, {"compiled": True}),
    "graphs": ({}, {"graphs": True}),
    "DoRA": ({"use_dora": True}, {}),
    "bias": ({"lora_bias": True}, {}),
    "convolutions": ({"target_modules": ["to_q", "conv_inverted"]}, {}),
}


@pytest.mark.parametrize("word", DIFFUSERS_OWN)
def test_diffusers_block_where_the_fused_cannot_be(word):
    """The choice names its reason, and blocks that were fused become diffusers' again."""
    adapter, arguments = DIFFUSERS_OWN[word]
    model = make_model(**adapter)
    for block in model.transformer_blocks if not adapter else []:
        block.__class__, block.channels_last, block.image_by_image = FusedSanaBlock, True, True
    chosen = fuse_blocks(model, **arguments)
    assert chosen.startswith("diffusers' block")
    assert word in chosen
    assert {type(block) for block in model.transformer_blocks} == {SanaTransformerBlock}


def test_other_dtypes_partitions_and_choices():
    assert "float16" in fuse_blocks(make_model(train="none").half())
    model = make_model(train="none")
    next(model.transformer_blocks[1].parameters()).ds_id = 7
    assert "ZeRO-3" in fuse_blocks(model)
    with pytest.raises(ValueError, match="not among auto, off"):
        fuse_blocks(model, "on")


def test_unfused_weights_have_memory_of_their_own(tmp_path):
    """save_pretrained refuses tensors that share memory; after unfuse_blocks it saves them."""
    model = make_model(train="none")
    expected = copy.deepcopy(model.state_dict())
    fuse_blocks(model)
    unfuse_blocks(model)
    model.save_pretrained(tmp_path / "saved")
    loaded = SanaTransformer2DModel.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in expected.items())
