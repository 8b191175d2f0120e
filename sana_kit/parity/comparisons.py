"""The comparisons of `python -m sana_kit.parity`: each gives rows of its table.

What is held against NVlabs is its published configs and formulas, written here as numbers; no code of it runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from sana_kit.devices import empty_cache
from sana_kit.encodings.encode_images import encode_pixels
from sana_kit.encodings.prompts import collate_prompt_embeds, encode_prompts, parse_instruction, tokenize_prompts
from sana_kit.models.attention import set_attention
from sana_kit.models.folder import Model, read_flow_shift
from sana_kit.models.loading import load_scheduler, load_text_encoder, load_transformer, load_vae
from sana_kit.training.recipes import NUM_TRAIN_TIMESTEPS, FlowMatching, add_noise, shifted_sigma
from sana_kit.training.settings import FlowConfig

EQUAL, PURPOSE, DIFFERS = "equal", "on purpose", "DIFFERS"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # the names of __main__'s DTYPES
# Largest relative difference that rounding explains: matrix products in another order, over all layers.
LIMITS = {"fp32": 2e-5, "bf16": 0.04}

NVLABS_SCALING = 0.41407  # of its DC-AE, which has one latent of 32 channels for 32 x 32 pixels
NVLABS_SHIFT = {128: 6.0}  # by sample_size; 3.0 for all others
NVLABS_LOGIT = (0.0, 1.0)  # mean and standard deviation of its logit-normal time steps
NVLABS_TOKENS = 300
# SHA-256 of the instruction in its configs, lines joined, every double quote a single one
NVLABS_INSTRUCTION = "48290080bb4fd4a264bdc81d0647ac0221359a36506e2b3e954616d6cb48c3da"
DRAWS = 2000  # of time steps; two equal distributions then differ by 0.03 or less
PROMPTS = ("a red square on white", "a photo of a small dog, " * 60)  # within the tokens that count, and beyond them


@dataclasses.dataclass
class Row:
    """One comparison.

    Attributes:
        what: is compared; other: with whom.
        found: dtype's name, or "" where there is none -> difference, or a short text.
        verdict: EQUAL, PURPOSE or DIFFERS; note: the reason, or what the number is.
    """

    what: str
    other: str
    found: Mapping[str, float | str]
    verdict: str
    note: str = ""


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over the largest value; inf where the shapes differ."""
    if ours.shape != theirs.shape:
        return math.inf
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max().clamp(min=1e-30))


def judge(found: dict[str, float]) -> str:
    """EQUAL where all differences are within what rounding explains."""
    return EQUAL if all(value <= LIMITS.get(name, 0.0) for name, value in found.items()) else DIFFERS


def compare(model: Model, dtypes: Sequence[str], device: torch.device) -> list[Row]:
    """All lines for a checkpoint; loads one part of it at a time, in each of the dtypes."""
    rows = list(_forward(model, dtypes, device))
    rows += _latents(model, dtypes, device)
    rows += _texts(model, dtypes, device)
    if model.member.sprint:
        note = "SANA-Sprint is drawn with, not trained: it has no flow shift, time steps or noised samples here"
        return [*rows, Row("training", "NVlabs", {"": "none"}, PURPOSE, note)]
    rows += _time_steps(model)
    rows += _noised(model, dtypes)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Forward


def _inputs(model: Model, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Random latents, captions of 5 and 12 tokens, time steps and guidance, as the transformer takes them."""
    config, generator = model.transformer_config, torch.Generator().manual_seed(0)
    side = 8 * (config.get("patch_size") or 1)
    latents = torch.randn(2, config["in_channels"], side, side, generator=generator)
    captions = [torch.randn(count, config["caption_channels"], generator=generator).to(dtype) for count in (5, 12)]
    sprint = model.member.sprint
    steps = torch.tensor([0.31, 0.74] if sprint else [251.3, 803.7], device=device)
    inputs = {"hidden_states": latents.to(device, dtype), "captions": captions, "timestep": steps}
    if sprint:
        scale = config.get("guidance_embeds_scale") or 0.1
        inputs["guidance"] = torch.full((2,), 4.5 * scale, device=device, dtype=dtype)
    return inputs


def _run(transformer: torch.nn.Module, inputs: dict[str, Any], captions: tuple[torch.Tensor, torch.Tensor]) -> Any:
    arguments = {key: value for key, value in inputs.items() if key != "captions"}
    embeds, mask = (tensor.to(inputs["hidden_states"].device) for tensor in captions)
    with torch.no_grad():
        return transformer(**arguments, encoder_hidden_states=embeds, encoder_attention_mask=mask).sample.float().cpu()


def _forward(model: Model, dtypes: Sequence[str], device: torch.device) -> Iterator[Row]:
    """The transformer as the kit calls it (short captions, boolean mask) beside diffusers' (300 tokens)."""
    kit, whole, own = {}, {}, {}
    for name in dtypes:
        inputs = _inputs(model, DTYPES[name], device)
        transformer = load_transformer(model, device=device, dtype=DTYPES[name])
        captions = inputs["captions"]
        padded = collate_prompt_embeds(captions, multiple=NVLABS_TOKENS)
        theirs = _run(transformer, inputs, (padded[0], padded[1].long()))
        if not model.member.sprint:
            floored = {**inputs, "timestep": inputs["timestep"].floor()}
            whole[name] = relative(_run(transformer, floored, (padded[0], padded[1].long())), theirs)
        own.update(
            {name: relative(_with_norms(transformer, inputs, padded), theirs)} if _has_norms(transformer) else {}
        )
        set_attention(transformer, "auto", device)
        kit[name] = relative(_run(transformer, inputs, collate_prompt_embeds(captions)), theirs)
        del transformer
        empty_cache(device)
    note = "relative; random latents, captions of 5 and 12 tokens, cut to the longest here, padded to 300 there"
    yield Row("transformer's forward", "diffusers", kit, judge(kit), note)
    if whole:
        note = (
            "relative, what it changes: NVlabs gives its network whole time steps; here, as in diffusers, 1000 sigma"
        )
        yield Row("time step's fraction", "NVlabs", whole, PURPOSE, note)
    if own:
        note = "relative, what it changes: 1e-5 beneath the root here and in diffusers, 1e-6 at NVlabs"
        yield Row("cross-attention's norms", "NVlabs", own, PURPOSE, note)


def _has_norms(transformer: torch.nn.Module) -> bool:
    return transformer.transformer_blocks[0].attn2.norm_q is not None


def _with_norms(transformer: torch.nn.Module, inputs: dict[str, Any], padded: tuple) -> torch.Tensor:
    """The output with NVlabs' small number in the norms of the cross-attention."""
    norms = [norm for block in transformer.transformer_blocks for norm in (block.attn2.norm_q, block.attn2.norm_k)]
    kept = [norm.eps for norm in norms]
    try:
        for norm in norms:
            norm.eps = 1e-6
        return _run(transformer, inputs, (padded[0], padded[1].long()))
    finally:
        for norm, eps in zip(norms, kept, strict=True):
            norm.eps = eps


# ---------------------------------------------------------------------------------------------------------------------
# Latents, texts


def _latents(model: Model, dtypes: Sequence[str], device: torch.device) -> list[Row]:
    """Latents as the encodings hold them beside those of diffusers' AutoencoderDC."""
    found, scale = {}, model.vae_config.get("scaling_factor")
    for name in dtypes:
        vae = load_vae(model, device=device, dtype=DTYPES[name])
        side = 8 * model.vae_factor
        pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
        with torch.no_grad():
            ours = encode_pixels(vae, pixels)
            theirs = vae.encode(pixels.to(device, DTYPES[name])).latent * vae.config.scaling_factor
        found[name] = relative(ours, theirs.cpu())
        del vae
        empty_cache(device)
    return [
        Row("latents x scale", "diffusers", found, judge(found), f"relative; a random image of {side} px"),
        _scale(scale, model.vae_factor, model.vae_config.get("latent_channels")),
    ]


def _scale(scale: float | None, factor: int, channels: int | None) -> Row:
    """The latents' scale beside NVlabs', which is that of its own autoencoder."""
    verdict, note = DIFFERS, ""
    if scale is not None and math.isclose(scale, NVLABS_SCALING):
        verdict = EQUAL
    elif (factor, channels) != (32, 32):
        verdict = PURPOSE
        note = f"another autoencoder: {channels} channels for {factor} x {factor} pixels, there 32 for 32 x 32"
    return Row("latents' scale", "NVlabs", {"": f"{scale}, {NVLABS_SCALING}"}, verdict, note)


def _pipeline_texts(model: Model, tokenizer: Any, encoder: Any, lines: list[str], device: torch.device) -> list:
    """[(T, D) of the tokens that count] of PROMPTS, by the pipeline's own encode_prompt."""
    import diffusers

    kind = getattr(diffusers, "SanaSprintPipeline" if model.member.sprint else "SanaPipeline")
    pipeline = kind(tokenizer=tokenizer, text_encoder=encoder, vae=None, transformer=None, scheduler=None)
    words: dict[str, Any] = {"device": device, "complex_human_instruction": lines}
    if "do_classifier_free_guidance" in inspect.signature(pipeline.encode_prompt).parameters:
        words["do_classifier_free_guidance"] = False
    with torch.no_grad():
        embeds, mask = pipeline.encode_prompt(list(PROMPTS), **words)[:2]
    return [row[keep.bool()].float().cpu() for row, keep in zip(embeds, mask, strict=True)]


def _default_instruction(model: Model) -> list[str]:
    """The instruction that diffusers' pipeline of the checkpoint puts before prompts."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, model.pipeline_class).__call__).parameters
    return list(parameters["complex_human_instruction"].default)


def _texts(model: Model, dtypes: Sequence[str], device: torch.device) -> list[Row]:
    """Instruction, choice of tokens, prompt embeddings."""
    lines, theirs = parse_instruction("default") or [], _default_instruction(model)
    found, counts = {}, ""
    for name in dtypes:
        tokenizer, encoder = load_text_encoder(model, device=device, dtype=DTYPES[name])
        ours = encode_prompts(tokenizer, encoder, list(PROMPTS), lines, NVLABS_TOKENS, device)
        pairs = zip(ours, _pipeline_texts(model, tokenizer, encoder, lines, device), strict=True)
        found[name] = max(relative(one, other) for one, other in pairs)
        counts = _token_counts(tokenizer, lines)
        del encoder
        empty_cache(device)
    text = "\n".join(lines).replace('"', "'")
    same = hashlib.sha256(text.encode()).hexdigest() == NVLABS_INSTRUCTION
    note = "the same words; its configs quote two of them with \", diffusers' pipeline and this kit with '"
    return [
        Row("instruction", "diffusers", {"": f"{len(lines)} lines"}, EQUAL if lines == theirs else DIFFERS),
        Row("instruction", "NVlabs", {"": f"{len(lines)} lines"}, PURPOSE if same else DIFFERS, note if same else ""),
        Row("prompt embeddings", "diffusers", found, judge(found), "relative; a short prompt, and one that is cut"),
        Row("choice of tokens", "NVlabs", {"": counts}, *_token_choice(tokenizer, lines)),
    ]


def _token_counts(tokenizer: Any, lines: list[str]) -> str:
    return " and ".join(str(len(kept)) for _, kept in tokenize_prompts(tokenizer, list(PROMPTS), lines, NVLABS_TOKENS))


def _token_choice(tokenizer: Any, lines: list[str]) -> tuple[str, str]:
    """NVlabs pads to the instruction's tokens + 298 and takes the first and the last 299 of them."""
    length = len(tokenizer.encode("\n".join(lines))) + NVLABS_TOKENS - 2
    chosen = [0, *range(length - NVLABS_TOKENS + 1, length)]
    rows = tokenize_prompts(tokenizer, list(PROMPTS), lines, NVLABS_TOKENS)
    same = all(kept == [place for place in chosen if place < len(ids)] for ids, kept in rows)
    return (EQUAL if same else DIFFERS), "tokens that count: the first, and the last 299 of the padded text"


# ---------------------------------------------------------------------------------------------------------------------
# Training


def _time_steps(model: Model) -> list[Row]:
    """Flow shift, the grid of sigmas, and how often each is drawn."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = load_scheduler(model).config
    shift, stated = read_flow_shift(config), config.get("flow_shift") or config.get("shift")
    published = NVLABS_SHIFT.get(model.transformer_config["sample_size"], 3.0)
    count = NUM_TRAIN_TIMESTEPS
    ours = shifted_sigma((torch.arange(count) + 0.5) / count, shift)
    grid = {"fp32": float((ours - FlowMatchEulerDiscreteScheduler(shift=shift).sigmas[:count]).abs().max())}
    even = torch.arange(count, dtype=torch.float32) / count
    theirs = shift * even / (1 + (shift - 1) * even)
    apart = float((ours.flip(0)[:-1] - theirs[1:]).abs().max())
    usual = FlowConfig()
    plain = _distance(FlowMatching(shift, usual.weighting_scheme))
    normal = _distance(FlowMatching(shift, "logit_normal", *NVLABS_LOGIT))
    ends = "the same grid but for its ends: this kit and diffusers draw 1 and never 0, NVlabs 0 and never 1"
    logit = f"largest gap of the two distributions ({DRAWS:,} draws)"
    return [
        Row("flow shift", "diffusers", {"": f"{shift:g}, {stated:g}"}, EQUAL if shift == stated else DIFFERS),
        Row("flow shift", "NVlabs", {"": f"{shift:g}, {published:g}"}, EQUAL if shift == published else DIFFERS),
        Row("sigmas", "diffusers", grid, EQUAL if grid["fp32"] < 1e-6 else DIFFERS, "FlowMatchEuler with that shift"),
        Row("sigmas", "NVlabs", {"fp32": apart}, PURPOSE if apart < 1e-6 else DIFFERS, ends),
        Row(
            f"time steps, {usual.weighting_scheme}",
            "NVlabs",
            {"": f"{plain:.3f}"},
            PURPOSE,
            f"{logit}: as diffusers' trainer, even steps unless --weighting_scheme logit_normal is given",
        ),
        Row("time steps, logit_normal", "NVlabs", {"": f"{normal:.3f}"}, EQUAL if normal < 0.04 else DIFFERS, logit),
    ]


def _distance(recipe: FlowMatching) -> float:
    """Kolmogorov's distance between the unshifted sigmas that a recipe draws and NVlabs' logit-normal ones."""
    draws = [float(recipe.draw((1,), 0, position)[1]) for position in range(DRAWS)]
    sigmas = shifted_sigma(torch.tensor(draws), 1.0).double().sort().values.clamp(1e-6, 1 - 1e-6)
    mean, deviation = NVLABS_LOGIT
    expected = 0.5 * (1 + torch.erf((sigmas.logit() - mean) / deviation / math.sqrt(2)))
    steps = torch.arange(1, DRAWS + 1) / DRAWS
    return float((steps - expected).abs().max())


def _noised(model: Model, dtypes: Sequence[str]) -> list[Row]:
    """The noised sample and its target beside diffusers' scheduler and NVlabs' formula."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    shift = read_flow_shift(load_scheduler(model).config)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    generator = torch.Generator().manual_seed(2)
    latents, noise = (torch.randn(3, model.transformer_config["in_channels"], 8, 8, generator=generator) for _ in "12")
    chosen = torch.tensor([20, 500, 930])
    sigma = scheduler.sigmas[chosen]
    ours, target = add_noise(latents, noise, sigma)
    found, formula = {}, {}
    for name in dtypes:
        dtype = DTYPES[name]
        theirs = scheduler.scale_noise(latents.to(dtype), scheduler.timesteps[chosen], noise.to(dtype))
        found[name] = relative(ours.to(dtype), theirs)
        mixed = (1 - sigma.view(-1, 1, 1, 1)) * latents + sigma.view(-1, 1, 1, 1) * noise
        formula[name] = max(relative(ours.to(dtype), mixed.to(dtype)), relative(target, noise - latents))
    exact = found.get("fp32", 0.0) <= LIMITS["fp32"] and found.get("bf16", 0.0) <= LIMITS["bf16"]
    note = "relative; mixed in float32 and rounded once here, in bf16 by diffusers" if "bf16" in dtypes else "relative"
    verdict = PURPOSE if exact and found.get("bf16", 0.0) > 0 else EQUAL if exact else DIFFERS
    return [
        Row("noised sample", "diffusers", found, verdict, note),
        Row(
            "noised sample, target", "NVlabs", formula, judge(formula), "relative; (1 - sigma) x0 + sigma x1, x1 - x0"
        ),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The table


def table(rows: Sequence[Row], dtypes: Sequence[str]) -> str:
    """The rows as a Markdown table."""

    def shown(value: float | str) -> str:
        return value if isinstance(value, str) else "0" if value == 0 else f"{value:.1e}"

    lines = [f"| | beside | {' | '.join(dtypes)} | | |", "|" + "---|" * (len(dtypes) + 4)]
    for row in rows:
        common = row.found.get("")
        cells = [
            shown(common if common is not None and name == dtypes[0] else row.found.get(name, "")) for name in dtypes
        ]
        lines.append(f"| {row.what} | {row.other} | {' | '.join(cells)} | {row.verdict} | {row.note} |")
    return "\n".join(lines)
