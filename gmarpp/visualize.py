"""Pictures of maps: overlays, and their encodings."""

import io
import struct
from functools import lru_cache

import matplotlib
import numpy as np
import torch
from isal import isal_zlib
from PIL import Image
from torch import Tensor

from gmarpp.maps import Array, normalize_map

COLORMAPS = ("inferno", "magma", "plasma", "viridis", "cividis", "turbo", "jet")
"""The available color maps; all but the last two are perceptually uniform."""

OVERLAY_SIDE = 112
"""Minimum number of pixels along the short side of a saved overlay."""


@lru_cache(maxsize=16)
def colormap_table(name: str) -> Array:
    """Return the 256 colors of a color map, uint8, shape (256, 3).

    Raises:
        ValueError: if the name is not in `COLORMAPS`.
    """
    if name not in COLORMAPS:
        raise ValueError(f"unknown colormap {name!r}: choose from {', '.join(COLORMAPS)}")
    return np.asarray(matplotlib.colormaps[name](np.arange(256), bytes=True)[:, :3])


def pixels(image: Tensor | Array) -> Array:
    """Turn images (..., 3, H, W) in [0, 1] into uint8 pixels (..., H, W, 3)."""
    values = torch.as_tensor(image, dtype=torch.float32).movedim(-3, -1).clamp(0, 1)
    return values.mul_(255).add_(0.5).to(torch.uint8).contiguous().numpy()


@lru_cache(maxsize=32)
def _interpolation(size: int, length: int) -> Array:
    """Return bicubic interpolation from `length` samples to `size` as a matrix (size, length)."""
    unit = Image.fromarray(np.eye(length, dtype=np.float32))
    return np.asarray(unit.resize((length, size), Image.Resampling.BICUBIC))


def upsample_map(attribution: Tensor | Array, height: int, width: int) -> Array:
    """Scale one map (h, w) to [0, 1] and interpolate it bicubically to (height, width), float32 in [0, 1]."""
    normalized = normalize_map(attribution)
    rows, columns = _interpolation(height, normalized.shape[0]), _interpolation(width, normalized.shape[1])
    return np.asarray((rows @ normalized @ columns.T).clip(0, 1))


@lru_cache(maxsize=16)
def _dimmed_levels(opacity: float) -> list[int]:
    return [int(level * (1 - opacity)) for level in range(256)]


def backdrop(image: Array, opacity: float, short_side: int = 1) -> Array:
    """Dim pixels to the share `1 - opacity` that a map leaves them, and remove their color.

    At opacities of 0.5 and above the picture is gray: in color, red peppers would look like relevance.

    Args:
        image: uint8 pixels (H, W, 3).
        opacity: share of the map's colors, 0 to 1.
        short_side: pixels that the short side must have; smaller images are enlarged by a whole factor.

    Returns:
        uint8 pixels, three channels, of the image's size or a multiple of it.
    """
    picture, color = Image.fromarray(image), max(0.0, 1 - 2 * opacity)
    gray = picture.convert("L")
    mixed = Image.blend(gray.convert("RGB"), picture, color) if color else gray
    factor = -(-short_side // min(mixed.size))
    if factor > 1:
        mixed = mixed.resize((mixed.width * factor, mixed.height * factor), Image.Resampling.BICUBIC)
    # Dimming comes last because interpolation overshoots at edges: values beyond the picture's share would wrap in
    # `add_colors`.
    dimmed = mixed.point(_dimmed_levels(opacity) * len(mixed.getbands()))
    return np.asarray(dimmed.convert("RGB"))


def add_colors(ground: Array, attribution: Tensor | Array, colormap: str, opacity: float) -> Array:
    """Add the colors of one raw map (h, w), weighted by the opacity, to pixels from `backdrop`; uint8 (H, W, 3)."""
    levels = (upsample_map(attribution, *ground.shape[:2]) * 255 + 0.5).astype(np.uint8)
    colors = (colormap_table(colormap) * opacity + 0.5).astype(np.uint8)
    mapped = Image.fromarray(levels)
    mapped.putpalette(colors.tobytes())
    return np.asarray(ground + np.asarray(mapped.convert("RGB")))


def overlay(
    image: Tensor | Array, attribution: Tensor | Array, colormap: str = "inferno", opacity: float = 0.5
) -> Array:
    """Lay one map over its image, whose color fades as the map's opacity grows to 0.5.

    Args:
        image: shape (3, H, W), in [0, 1].
        attribution: raw map, shape (h, w); scaled by its own minimum and maximum, interpolated bicubically.
        colormap: one of `COLORMAPS`.
        opacity: share of the map's colors, 0 to 1.

    Returns:
        uint8 array (H, W, 3).

    Raises:
        ValueError: for an unknown color map.
    """
    return add_colors(backdrop(pixels(image), opacity), attribution, colormap, opacity)


def encode_png(image: Array) -> bytes:
    """Encode uint8 pixels (H, W, 3) as PNG, quickly, because overlays are smooth and written in large numbers.

    A single row filter and fast deflation achieve most of the possible gain.
    """
    height, width = image.shape[:2]
    rows = np.empty((height, 1 + 3 * width), dtype=np.uint8)
    # Filter 2, "up", stores differences to the row above.
    rows[:, 0] = 2
    flat = image.reshape(height, 3 * width)
    rows[0, 1:] = flat[0]
    np.subtract(flat[1:], flat[:-1], out=rows[1:, 1:])
    data = isal_zlib.compress(rows.data)
    parts = (b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")
    chunks = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", isal_zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def encode_jpeg(image: Array) -> bytes:
    """Encode uint8 pixels (H, W, 3) as JPEG without chroma subsampling, visually lossless."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=93, subsampling=0)
    return stream.getvalue()
