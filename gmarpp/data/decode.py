"""Decoding: any readable image becomes 8-bit RGB, any mask becomes boolean."""

import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from gmarpp.data.walk import require_regular_file

logger = logging.getLogger(__name__)

# Pillow raises these on damaged files, besides its own subclasses of OSError.
_DAMAGED = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError),
    *(EOFError, MemoryError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError),
)
_BITS_PER_SAMPLE, _PHOTOMETRIC_INTERPRETATION, _MAX_SAMPLE_VALUE = 258, 262, 281
# A longer strip would have millions of pixels once its short edge is resized to a network's input.
_MAX_ASPECT_RATIO = 100
_TWELVE_BITS = 4095


def read_image(source: str | Path | BinaryIO, name: str | None = None) -> Tensor:
    """Read an image as uint8 RGB (3, H, W), upright, transparency composited on white.

    Gray, palette, CMYK, 16-bit and floating-point images are converted with their full range kept. The range of
    integers is what a TIFF says (BitsPerSample, MaxSampleValue), else 16 bits; if values use only 12 of them, a
    warning is logged.

    Args:
        source: a file's path, or an open binary file.
        name: its name in messages; the path by default.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, not an image or not a regular file, has more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS`, or is a strip more than 100 times as long as wide.
    """
    with _opened(source, name, "image") as image:
        return to_tensor(image)


def read_mask(source: str | Path | BinaryIO, name: str | None = None) -> Tensor:
    """Read a segmentation mask as bool (H, W): true wherever the picture is not black, or not of palette index 0.

    JPEG compression blurs black into near-black, so there the threshold is half of the range.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or not an image.
    """
    with _opened(source, name, "mask") as image:
        threshold = 127 if image.format == "JPEG" else 0
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data and upright.mode != "P":
            upright = upright.convert("RGB")
        values = np.array(upright)
    return torch.from_numpy((values if values.ndim == 2 else values.max(axis=2)) > threshold)


def to_tensor(image: Image.Image) -> Tensor:
    """Convert a Pillow image to uint8 RGB (3, H, W); see `to_rgb`."""
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a Pillow image to upright 8-bit RGB.

    Integers of more than 8 bits are divided by their largest value, floating-point values are taken in [0, 1] or else
    in [0, 255].

    Raises:
        ValueError: the values of a 32-bit image are outside these ranges, or 16-bit colors use fewer bits: only their
            high 8 bits can be read.
    """
    largest = _largest_value(image)
    inverted = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC_INTERPRETATION) == 0
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = _integers_to_gray(image, largest, inverted)
    elif image.mode == "F":
        image = _float_to_gray(image)
    elif largest < 65535:
        raise ValueError(f"of 16-bit colors only the high 8 bits can be read, but these end at {largest}: scale them")
    elif image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image if image.mode == "RGB" else image.convert("RGB")


def _largest_value(image: Image.Image) -> int:
    """Return the value of white: what a TIFF's tags say, else that of 16 bits."""
    tags = getattr(image, "tag_v2", {})
    stated, bits = (int(np.max(tags.get(tag, 0))) for tag in (_MAX_SAMPLE_VALUE, _BITS_PER_SAMPLE))
    in_sixteen_bits = stated if bits >= 16 and 255 < stated <= 65535 else 65535
    return (1 << bits) - 1 if 8 < bits < 16 else in_sixteen_bits


def _integers_to_gray(image: Image.Image, largest: int, inverted: bool) -> Image.Image:
    """Scale integers to 8 bits, and invert those of a TIFF whose zero is white, which Pillow does not."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > largest:
        raise ValueError(f"integers outside 0 to {largest} have no defined brightness")
    if largest == 65535 and 255 < values.max() <= _TWELVE_BITS:
        _warn_of_twelve_bits()
    values = largest - values if inverted else values
    return Image.fromarray(((values * 255 + largest // 2) // largest).astype(np.uint8))


@cache
def _warn_of_twelve_bits() -> None:
    logger.warning(
        "a 16-bit image holds no value above %d, as if it had 12 bits, and will look nearly black: if its range is "
        "12 bits, record that in the file (TIFF's MaxSampleValue), or scale the values",
        _TWELVE_BITS,
    )


def _float_to_gray(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if not (values.min() >= 0 and values.max() <= 255):
        raise ValueError("floating-point values outside 0 to 255 have no defined brightness")
    return Image.fromarray((values * (255 if values.max() <= 1 else 1)).round().astype(np.uint8))


@contextmanager
def _opened(source: str | Path | BinaryIO, name: str | None, kind: str) -> Iterator[Image.Image]:
    """Open a picture; errors within the block name it."""
    called = name or source
    try:
        if isinstance(source, str | Path):
            require_regular_file(Path(source))
        with warnings.catch_warnings():
            # Images that Pillow warns about are refused below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(source)
        with image:
            _require_safe(image)
            yield image
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{kind} {called} does not exist") from error
    except _DAMAGED as error:
        raise ValueError(
            f"{kind} {called} cannot be read ({error or type(error).__name__}): replace or remove it, or leave such "
            "images out with --data.on_error skip"
        ) from error


def _require_safe(image: Image.Image) -> None:
    limit, size = Image.MAX_IMAGE_PIXELS, f"{image.width} x {image.height} pixels"
    if limit is not None and image.width * image.height > limit:
        raise ValueError(f"expected at most {limit} pixels (PIL.Image.MAX_IMAGE_PIXELS), got {size}")
    if max(image.size) > _MAX_ASPECT_RATIO * min(image.size):
        raise ValueError(f"expected an aspect ratio of at most {_MAX_ASPECT_RATIO}, got {size}")
    if image.format == "EPS":
        raise ValueError("Encapsulated PostScript is a program, which is not run")
