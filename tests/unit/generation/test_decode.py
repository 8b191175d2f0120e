"""Latents to images: tiles, their seams, memory.

python -m pytest tests/unit/generation/test_decode.py
"""

import itertools
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import KIT
from helpers.drawing import encode_few, load_plain
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from sana_kit.arithmetic import AUTOENCODER, total_flops, vae_decode_ops
from sana_kit.data.discover import load_images
from sana_kit.generation.decode import MAX_TILE_PIXELS, check_decodable, decode_latents, decode_tiles, plan_tiles


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    return load_plain(tiny_model)


@pytest.fixture(scope="module")
def embeds(pipeline):
    return encode_few(pipeline)


def test_blend_is_bit_equal_to_diffusers_with_the_same_tiles(pipeline):
    """Same tile and stride, corners and clipped last tiles included, in float32 and bf16."""
    from diffusers import AutoencoderDC

    latents = torch.randn(1, 4, 21, 27, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        vae = AutoencoderDC.from_config(pipeline.vae.config)
        vae.load_state_dict(pipeline.vae.state_dict())
        vae.to(dtype).enable_tiling(96, 88, 64, 56)
        rows = [(start, min(start + 12, 21)) for start in range(0, 21, 8)]
        columns = [(start, min(start + 11, 27)) for start in range(0, 27, 7)]
        with torch.no_grad():
            theirs = vae.tiled_decode(latents.to(dtype)).sample
            ours = decode_tiles(vae.decoder, latents.to(dtype), rows, columns, 8)
        assert torch.equal(ours, theirs) and ours.dtype == dtype


@pytest.mark.parametrize(
    ("height", "width"), [(4096, 4096), (2304, 2304), (8192, 2048), (2048, 8192), (4352, 3840), (16384, 16384)]
)
@pytest.mark.parametrize("limit", sorted(MAX_TILE_PIXELS.values()))
def test_tiles_cover_the_image_with_the_overlap_and_little_waste(height, width, limit):
    rows, columns = plan_tiles(height, width, 32, limit)
    for tiles, size in ((rows, height // 32), (columns, width // 32)):
        assert tiles[0][0] == 0 and tiles[-1][1] == size
        assert len({stop - start for start, stop in tiles}) == 1  # one shape
        for before, after in zip(tiles, tiles[1:], strict=False):
            assert 8 <= before[1] - after[0] <= 16  # 256 px shared, at most twice that
    pixels = (rows[0][1] * columns[0][1]) * 32**2
    assert pixels <= limit
    assert pixels * len(rows) * len(columns) <= 1.4 * height * width


@pytest.mark.parametrize("size", [(1024, 1024), (2048, 2048), (1536, 2560)])
def test_images_that_fit_are_decoded_whole(size):
    assert [len(axis) for axis in plan_tiles(*size, 32, MAX_TILE_PIXELS[2])] == [1, 1]


def test_sizes_that_no_grid_covers_are_refused():
    with pytest.raises(ValueError, match="too large"):
        check_decodable(131072, 131072, factor=32)


class PeakMemory(TorchDispatchMode):
    """Bytes of all storages alive at once, and the largest tensor's elements, on meta tensors too."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.seen = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                storage = tensor.untyped_storage()
                if storage not in self.seen:
                    size = self.seen[storage] = storage.nbytes()
                    self.live += size
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._free, size)
        return result

    def _free(self, size):
        self.live -= size


@pytest.fixture(scope="module")
def dc_ae():
    """The VAE of the SANA checkpoints (DC-AE f32c32) on the meta device: shapes and FLOPs, no memory."""
    from diffusers import AutoencoderDC

    with torch.device("meta"):
        return AutoencoderDC(**AUTOENCODER, decoder_norm_types="rms_norm", decoder_act_fns="silu").eval()


def flops(function):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def storages_are_objects():
    """Whether a tensor's storage stays one Python object, by which its memory can be followed; not in torch 2.1."""
    tensor = torch.empty(1)
    return tensor.untyped_storage() is tensor.untyped_storage()


def whole(height, width):
    """FLOPs of decoding latents of (height, width) as one; test_flops.py holds the closed form against the counter."""
    return total_flops(vae_decode_ops(AUTOENCODER, height * 32, width * 32))


@pytest.mark.skipif(not storages_are_objects(), reason="this torch gives no lasting storage object to count by")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [(4096, 4096), (2048, 8192), (2048, 2048)])
def test_decoding_4096_px_takes_under_10_gb_and_little_more_than_the_whole(dc_ae, dtype, size):
    vae = dc_ae.to(dtype)
    latents = torch.empty(1, 32, size[0] // 32, size[1] // 32, device="meta")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, PeakMemory() as memory:
        image = decode_latents(vae, latents)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in vae.parameters())
    assert image.shape == (1, 3, *size)
    assert memory.largest < 2**31
    assert memory.peak + weights < 10e9
    assert whole(*latents.shape[-2:]) <= 1.001 * counter.get_total_flops()
    assert counter.get_total_flops() <= 1.2 * whole(*latents.shape[-2:])


def test_the_reference_tiling_costs_nearly_four_times_as_much(dc_ae):
    """What the kit's tiles are measured against: tile 1024 with diffusers' stride of 448 at 4096 px."""
    lengths = Counter(min(start + 32, 128) - start for start in range(0, 128, 14))
    reference = sum(
        count_h * count_w * whole(h, w) for (h, count_h), (w, count_w) in itertools.product(lengths.items(), repeat=2)
    )
    latents = torch.empty(1, 32, 128, 128, device="meta", dtype=torch.bfloat16)
    assert reference > 3.9 * flops(lambda: decode_latents(dc_ae.to(torch.bfloat16), latents))


QUICKSTART = KIT / "sana_kit" / "quickstart_assets"


@pytest.mark.skipif(not (QUICKSTART / "model/vae").is_dir(), reason="the quick start's trained model is not here")
def test_seams_are_invisible_and_bf16_is_as_good_on_a_trained_vae(monkeypatch):
    """512 px of drawings through the quick start's DC-AE: tiles and bf16 against a whole float32 decode."""
    from diffusers import AutoencoderDC
    from PIL import Image

    drawings = load_images(dataset_name=str(QUICKSTART / "style_dataset"), caption_column="text")
    mosaic = Image.new("RGB", (512, 512))
    for place in range(64):
        mosaic.paste(drawings.load(place % len(drawings)).resize((64, 64)), (place % 8 * 64, place // 8 * 64))
    pixels = torch.from_numpy(np.asarray(mosaic).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    vae = AutoencoderDC.from_pretrained(QUICKSTART / "model/vae", torch_dtype=torch.float32).eval()
    half = AutoencoderDC.from_pretrained(QUICKSTART / "model/vae", torch_dtype=torch.bfloat16).eval()

    def steps(image):  # 8-bit steps, unrounded
        return (image.clamp(-1, 1) + 1) * 127.5

    with torch.no_grad():
        latents = vae.encode(pixels).latent * vae.config.scaling_factor
        whole = steps(decode_latents(vae, latents))
        rounded = steps(decode_latents(half, latents))
        monkeypatch.setattr("sana_kit.generation.decode.MAX_TILE_PIXELS", {2: 320 * 320, 4: 320 * 320})
        monkeypatch.setattr("sana_kit.generation.decode.TILE_OVERLAP", 8 * 8)  # in latents as at 4096 px
        rows, columns = plan_tiles(512, 512, 8, 320 * 320)
        tiled = steps(decode_latents(vae, latents))
    assert len(rows) == len(columns) == 2
    assert (rounded - whole).abs().mean() < 1.0
    assert (tiled - whole).abs().mean() < 0.5
    slope, wanted = tiled.diff(dim=-1), whole.diff(dim=-1)
    for edge in (columns[1][0] * 8, columns[0][1] * 8):  # where a tile begins and ends
        assert (slope - wanted)[..., edge - 1].abs().mean() < 0.15 * wanted.abs().mean()
