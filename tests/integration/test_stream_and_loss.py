"""The stream of samples, and the loss beside the transformer's own in float32."""

import math

import pytest
import tiny
import torch

from sana_kit.models.attention import LinearAttentionProcessor, set_attention
from sana_kit.training.order import PermutationOrder
from sana_kit.training.recipes import FlowMatching
from sana_kit.training.stream import SampleStream, StreamBatchSampler, collate


class _Encoded:
    """Stands for EncodedDataset: sample i is a constant i."""

    def __getitem__(self, i):
        return {"latents": torch.full((4, 2, 2), float(i)), "prompt_embeds": torch.full((3 + i % 2, 8), float(i))}


def make_stream(images=7, classes=0, seed=1):
    order = PermutationOrder(images, seed)
    return SampleStream(_Encoded(), order, classes, seed=seed, recipe=FlowMatching(flow_shift=3.0))


@pytest.mark.parametrize("world_size, batch_size, accumulation", [(1, 1, 1), (2, 2, 1), (3, 1, 2), (2, 5, 3)])
def test_each_epoch_holds_each_image_once_on_any_number_of_ranks(world_size, batch_size, accumulation):
    stream, steps = make_stream(), 21
    positions = []
    for rank in range(world_size):
        batches = StreamBatchSampler(0, steps, batch_size, accumulation, rank, world_size)
        assert len(list(batches)) == len(batches) == steps * accumulation
        positions += [p for batch in batches for p in batch]
    assert sorted(positions) == list(range(steps * accumulation * batch_size * world_size))
    order = [stream.image_index(p) for p in range(14)]
    assert sorted(order[:7]) == sorted(order[7:]) == list(range(7)) and order[:7] != order[7:]


def test_a_resumed_stream_goes_on_where_it_was_on_another_number_of_ranks():
    whole = [p for b in StreamBatchSampler(0, 4, 2, 1, 0, 1) for p in b]
    first = [p for rank in range(2) for b in StreamBatchSampler(0, 1, 2, 1, rank, 2) for p in b]
    rest = [p for b in StreamBatchSampler(len(first), 2, 2, 1, 0, 1) for p in b]
    assert sorted(first) + rest == whole


def test_collate_keeps_each_caption_with_its_image_and_pads_with_a_mask():
    stream = make_stream(images=5, classes=2)
    batch = collate([stream[position] for position in range(4)])
    assert batch["latents"].shape == (8, 4, 2, 2) and batch["noise"].dtype == torch.float32
    for row in range(8):
        index = batch["latents"][row, 0, 0, 0]
        kept = batch["prompt_mask"][row].bool()
        assert kept.sum() == 3 + int(index) % 2
        assert (batch["prompt_embeds"][row][kept] == index).all() and not batch["prompt_embeds"][row][~kept].any()
    assert (batch["latents"][:4] < 5).all() and (batch["latents"][4:] >= 5).all()  # instance first, class after


def gradients(transformer):
    """Output and all gradients of one backward pass on fixed inputs, in float32."""
    generator = torch.Generator().manual_seed(3)
    dtype = transformer.dtype
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[0, 5:] = False
    out = transformer(
        torch.randn(2, 4, 8, 8, generator=generator).to(dtype),
        torch.randn(2, 16, 32, generator=generator).to(dtype),
        torch.tensor([300.0, 700.0]),
        encoder_attention_mask=mask,
        return_dict=False,
    )[0]
    (out.float() * torch.randn(out.shape, generator=generator)).sum().backward()
    found = {name: p.grad.float() for name, p in transformer.named_parameters() if p.grad is not None}
    return out.detach().float(), found


def relative(difference, reference):
    return ((difference - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("qk_norm", [None, "rms_norm_across_heads"])
def test_the_kits_attention_is_diffusers_own_forward_and_backward(tmp_path, qk_norm):
    """In float32 to rounding; in bf16 no farther from that than diffusers' own processors are."""
    from diffusers import SanaTransformer2DModel

    folder = tiny.make_tiny_pipeline(tmp_path / "model", qk_norm=qk_norm)

    def of(dtype, kit):
        transformer = SanaTransformer2DModel.from_pretrained(folder, subfolder="transformer").to(dtype)
        if kit:
            set_attention(transformer, "auto", torch.device("cpu"))
            processor = transformer.transformer_blocks[0].attn1.processor
            assert isinstance(processor, LinearAttentionProcessor)
        return gradients(transformer)

    exact, exact_gradients = of(torch.float32, kit=False)
    ours, our_gradients = of(torch.float32, kit=True)
    assert exact_gradients.keys() == our_gradients.keys()
    assert relative(ours, exact) < 1e-5
    for name, gradient in exact_gradients.items():
        assert (our_gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-5, name
    theirs_bf16, _ = of(torch.bfloat16, kit=False)
    ours_bf16, _ = of(torch.bfloat16, kit=True)
    assert relative(ours_bf16, exact) < 1.2 * relative(theirs_bf16, exact)


def test_the_loss_is_the_transformers_own_in_float32(tiny_model):
    """The whole loss of a micro-batch, written down once more from the definition, with diffusers' own attention."""
    from diffusers import SanaTransformer2DModel

    transformer = SanaTransformer2DModel.from_pretrained(tiny_model, subfolder="transformer")
    plain = SanaTransformer2DModel.from_pretrained(tiny_model, subfolder="transformer")
    set_attention(transformer, "auto", torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    batch = {
        "latents": torch.randn(2, 4, 8, 8, generator=generator),
        "noise": torch.randn(2, 4, 8, 8, generator=generator),
        "u": torch.tensor([0.3, 0.8]),
        "prompt_embeds": torch.randn(2, 16, 32, generator=generator),
        "prompt_mask": torch.ones(2, 16, dtype=torch.bool),
    }
    batch["prompt_mask"][0, 5:] = False
    loss = FlowMatching(flow_shift=3.0).loss(transformer, batch, torch.float32)
    expected = []
    for row in range(2):
        sigma0 = 1 - math.floor(batch["u"][row].item() * 1000) / 1000
        sigma = 3 * sigma0 / (1 + 2 * sigma0)
        noisy = (1 - sigma) * batch["latents"][row] + sigma * batch["noise"][row]
        valid = int(batch["prompt_mask"][row].sum())
        prediction = plain(
            noisy[None],
            batch["prompt_embeds"][row : row + 1, :valid],
            torch.tensor([sigma * 1000]),
            encoder_attention_mask=torch.ones(1, valid),
            return_dict=False,
        )[0][0]
        expected.append(((prediction - (batch["noise"][row] - batch["latents"][row])) ** 2).mean())
    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)
