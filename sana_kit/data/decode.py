"""Encoded bytes to an upright 8-bit RGB image: formats, EXIF orientation, palettes, alpha, 16 bits, CMYK."""

from __future__ import annotations

import hashlib
import io
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sana_kit.errors import ImageError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")


# Only these decoders are offered a file: PIL also has readers that start other programs (EPS) or follow references.
IMAGE_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "AVIF")


ORIENTATION_TAG = 0x0112


TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(data: bytes, name: str) -> Image.Image:
    """Open encoded bytes without decoding the pixels.

    Raises:
        ImageError: no image of a known format, broken header, or more pixels than PIL's limit (178,956,970).
    """
    if not data:
        raise ImageError(f"{name}: the file is empty (0 bytes).")
    if data.startswith(b"version https://git-lfs"):
        raise ImageError(f"{name}: this is a Git LFS pointer, not the image; run `git lfs pull` in the data set.")
    Image.init()
    try:
        with warnings.catch_warnings():
            # PIL warns at half its limit; the limit itself is an error below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=[f for f in IMAGE_FORMATS if f in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: too many pixels for an image ({error}). Scale it down or leave it out.") from None
    except Image.UnidentifiedImageError:
        known = ", ".join(f for f in IMAGE_FORMATS if f in Image.OPEN)
        raise ImageError(
            f"{name}: not an image of a known format ({known}), or its header is broken ({len(data)} bytes)."
        ) from None
    except Exception as error:  # decoders raise whatever they like on broken headers
        raise ImageError(f"{name}: the header cannot be read ({type(error).__name__}: {error}).") from None


def orientation(image: Image.Image, data: bytes) -> int:
    """The EXIF orientation 1 to 8 (1 where there is none or the EXIF block is unreadable, as viewers do)."""
    try:
        if image.format == "PNG":
            # PIL decodes the whole image to find a late eXIf chunk, so the chunks are walked here.
            block = image.info.get("exif") or _png_exif(data)
            if block is None and "Raw profile type exif" not in image.info:
                return 1
            if block is not None:
                exif = Image.Exif()
                exif.load(block)
            else:
                exif = image.getexif()
        else:
            exif = image.getexif()
        value = exif.get(ORIENTATION_TAG, 1)
    except Exception:  # broken EXIF is common and harmless
        return 1
    return value if value in TRANSPOSITIONS else 1


def _png_exif(data: bytes) -> bytes | None:
    """The eXIf chunk of a PNG file with the header that PIL's parser expects."""
    position = 8
    while position + 8 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] == b"eXIf":
            return b"Exif\x00\x00" + data[position + 8 : position + 8 + length]
        position += 12 + length
    return None


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode encoded bytes to an 8-bit RGB image, upright; of an animation the first frame.

    Transparency is laid over white; 16-bit grey is scaled to 8 bits; CMYK goes through PIL's conversion. ICC profiles
    are not applied, as in diffusers.

    Raises:
        ImageError: corrupt or truncated data, or pixels without a known range (float, 32-bit integer).
    """
    image = open_image(data, name)
    try:
        image.load()
    except Exception as error:  # OSError for truncation, but also SyntaxError, struct.error, ValueError ...
        raise ImageError(f"{name}: corrupt or truncated image ({type(error).__name__}: {error}).") from None
    turn = TRANSPOSITIONS.get(orientation(image, data))
    if turn is not None:
        image = image.transpose(turn)
    try:
        return to_rgb(image, png=image.format == "PNG" or data.startswith(b"\x89PNG"))
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"{name}: mode {image.mode} cannot be turned into RGB ({error}).") from None


def to_rgb(image: Image.Image, png: bool = False) -> Image.Image:
    """RGB, 8 bits: alpha over white, 16 bits divided by 257. `png`: mode I holds 16 bits (older PIL opens PNG so)."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and png):
        pixels = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((pixels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have no known range; save it with 8 or 16 bits a channel")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class ImageFacts:
    """What an image's header says.

    Attributes:
        sha256: of the encoded bytes.
        width, height: in pixels, when upright.
        open_ended: a PNG file without its last chunk, whose pixels are whole all the same.
    """

    sha256: bytes
    width: int
    height: int
    animated: bool
    open_ended: bool = False


def _lacks_only_its_end(data: bytes) -> bool:
    """Whether a PNG file ends after a whole chunk, or within the last one, IEND; all checksums before are right."""
    position, pixels = 8, False
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        end = position + 12 + length
        if end > len(data):
            return False
        kind = data[position + 4 : position + 8]
        if zlib.crc32(data[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            return False
        if kind == b"IEND":
            return False
        pixels = pixels or kind == b"IDAT"
        position = end
    return pixels


def inspect_image(data: bytes, name: str) -> ImageFacts:
    """Hash, size and kind of an image, from the header alone.

    Raises:
        ImageError: as `open_image`, and for PNG files whose chunks fail their checksums.
    """
    image = open_image(data, name)
    animated = bool(getattr(image, "is_animated", False)) and image.format != "MPO"
    open_ended = False
    if image.format == "TIFF":
        # Whether PIL turns a TIFF by itself, and when, differs between its versions; the decoded image tells.
        width, height = decode_image(data, name).size
    else:
        width, height = image.size
        if orientation(image, data) >= 5:
            width, height = height, width
    if image.format == "PNG":
        try:
            image.verify()  # checksums of all chunks, without decompressing them
        except Exception as error:
            if not _lacks_only_its_end(data):
                raise ImageError(f"{name}: corrupt or truncated image ({type(error).__name__}: {error}).") from None
            decode_image(data, name)  # PIL loads it whole, or says why not
            open_ended = True
    return ImageFacts(hashlib.sha256(data).digest(), width, height, animated, open_ended)
