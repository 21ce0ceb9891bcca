"""Decoding of pictures: any readable image becomes 8-bit RGB, any mask becomes boolean."""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# what Pillow raises on damaged files, besides its own subclasses of OSError
_DAMAGED = (OSError, SyntaxError, ValueError, TypeError, IndexError, EOFError, struct.error, zlib.error)


def read_image(source: str | Path | BinaryIO, name: str | None = None) -> Tensor:
    """Reads an image as uint8 RGB (3, H, W), upright, transparency composited on white.

    Grey, palette, CMYK, 16-bit and floating-point images are converted with their full range kept.

    Args:
        source: a file's path, or an open binary file.
        name: what messages call it; the path by default.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or not an image.
    """
    with _naming(source, name, "image"), Image.open(source) as image:
        return to_tensor(image)


def read_mask(source: str | Path | BinaryIO, name: str | None = None) -> Tensor:
    """Reads a segmentation mask as bool (H, W): true wherever the picture is not black, or not of palette index 0.

    JPEG compression blurs black into near-black, so there the threshold is half of the range.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or not an image.
    """
    with _naming(source, name, "mask"), Image.open(source) as image:
        threshold = 127 if image.format == "JPEG" else 0
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data and upright.mode != "P":
            upright = upright.convert("RGB")
        values = np.array(upright)
    return torch.from_numpy((values if values.ndim == 2 else values.max(axis=2)) > threshold)


def to_tensor(image: Image.Image) -> Tensor:
    """Converts a Pillow image to uint8 RGB (3, H, W); see `to_rgb`."""
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts a Pillow image to upright 8-bit RGB.

    16-bit values are divided by 257, floating-point values are taken in [0, 1] or else in [0, 255].

    Raises:
        ValueError: the values of a 32-bit image are outside these ranges.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = _sixteen_bit_to_grey(image)
    elif image.mode == "F":
        image = _float_to_grey(image)
    elif image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image if image.mode == "RGB" else image.convert("RGB")


def _sixteen_bit_to_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("integers outside 0 to 65535 have no defined brightness")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _float_to_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if not (values.min() >= 0 and values.max() <= 255):
        raise ValueError("floating-point values outside 0 to 255 have no defined brightness")
    return Image.fromarray((values * (255 if values.max() <= 1 else 1)).round().astype(np.uint8))


@contextmanager
def _naming(source: str | Path | BinaryIO, name: str | None, kind: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{kind} {name or source} does not exist") from error
    except (*_DAMAGED, Image.DecompressionBombError) as error:
        raise ValueError(f"{kind} {name or source} cannot be read ({error}): replace or remove it") from error
