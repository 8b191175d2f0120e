"""Outlines of an image, white on black: control images for a ControlNet.

By hand, to draw along the outlines of an image:

    python -m sana_kit.data.outlines photo.png outlines.png --width 1024 --height 1024

The morphological gradient (dilation minus erosion, 3 x 3) of the slightly blurred image, the strongest of the three
channels, brightened by a fixed factor: soft lines of two to three pixels without a threshold that would have to be
chosen for each image. Pillow does all of it. Canny's thin lines (OpenCV, scikit-image) or the lines of a network (HED)
are other control images; make them beforehand and name their folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageChops, ImageFilter, ImageOps

from sana_kit.data.decode import decode_image
from sana_kit.flags import Parser

VERSION = 1  # raise it when the same image gives other outlines
BLUR, GAIN = 1.0, 2.0


def outlines(image: Image.Image) -> Image.Image:
    """The outlines of an RGB image as an RGB image of its size, three equal channels."""
    smooth = image.filter(ImageFilter.GaussianBlur(BLUR))
    steps = ImageChops.subtract(smooth.filter(ImageFilter.MaxFilter(3)), smooth.filter(ImageFilter.MinFilter(3)))
    red, green, blue = steps.split()
    strongest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    return Image.merge("RGB", [strongest.point(lambda step: min(255, round(GAIN * step)))] * 3)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m sana_kit.data.outlines", description=__doc__.splitlines()[0])
    parser.add_argument("image", help="image file")
    parser.add_argument("outlines", help="file to write")
    parser.add_argument("--width", type=int, help="of the outlines, in pixels; default the image's")
    parser.add_argument("--height", type=int, help="of the outlines, in pixels; default the image's")
    options = parser.parse_args(argv)
    image = decode_image(Path(options.image).read_bytes(), options.image)
    size = (options.width or image.width, options.height or image.height)
    # cut as the drawing scripts cut a control image: at the centre
    outlines(ImageOps.fit(image, size, Image.Resampling.LANCZOS)).save(options.outlines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
