"""Pictures of attribution maps: overlays and the comparison figure."""

import io
import struct
import textwrap
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from isal import isal_zlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath
from PIL import Image
from torch import Tensor

from gmarpp.attribution.methods import METHOD_LABELS

COLORMAPS = ("inferno", "magma", "plasma", "viridis", "cividis", "turbo", "jet")
"""Colour maps on offer; all but the last two are perceptually uniform."""
FIGURE_FORMATS = ("png", "pdf", "svg")

_METHOD_COLORS = {
    "gmarpp_l1": "#d7263d",
    "gmarpp_l2": "#f0851f",
    "gmarpp_sum": "#8c1c13",
    "gmar_l1": "#2a62c9",
    "gmar_l2": "#4fa8e0",
    "rollout": "#239160",
    "legrad": "#8a56cf",
    "chefer": "#a87434",
    "attention": "#dd6fb0",
    "random": "#8a8f98",
}
_SPARE_COLORS = ("#17a2a2", "#7a8b1f", "#b0413e", "#5b6ee1", "#c99a00")
OVERLAY_SIDE = 112
"""Least pixels of the short side of a saved overlay."""

_LABEL_POINTS = 8.5

Array = npt.NDArray[Any]


def method_label(method: str) -> str:
    """Name of a method for people; a method of one's own keeps its name."""
    return METHOD_LABELS.get(method, method)


def method_color(method: str) -> str:
    """Colour of a method, the same in every figure and report, as ``#rrggbb``."""
    return _METHOD_COLORS.get(method) or _SPARE_COLORS[zlib.crc32(method.encode()) % len(_SPARE_COLORS)]


def method_dashes(method: str) -> str:
    """Line style of a method (``solid``, ``dashed``, ``dotted``), so that colour is not the only difference."""
    return "dotted" if method == "random" else "dashed" if method.endswith("_l2") else "solid"


def normalise_map(attribution: Tensor | Array) -> Array:
    """Scale each map to [0, 1] by its minimum and maximum.

    Args:
        attribution: maps, shape (..., h, w), any range.

    Returns:
        float32 array of the same shape. A constant map gives zeros; values that are not finite count as the minimum.

    Example:
        >>> normalise_map(np.array([[1.0, 3.0], [2.0, 5.0]])).tolist()
        [[0.0, 0.5], [0.25, 1.0]]
    """
    values = np.asarray(attribution, dtype=np.float64)  # no range of float32 overflows
    finite = np.isfinite(values)
    low = np.where(finite, values, np.inf).min(axis=(-2, -1), keepdims=True)
    span = np.where(finite, values, -np.inf).max(axis=(-2, -1), keepdims=True) - low
    usable = np.isfinite(span) & (span > 0)
    scaled = (np.where(finite, values, low) - np.where(usable, low, 0)) / np.where(usable, span, 1)
    return np.asarray(np.where(usable, scaled, 0), dtype=np.float32)


@lru_cache(maxsize=16)
def colormap_table(name: str) -> Array:
    """Give the 256 colours of a colour map, uint8, shape (256, 3).

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
    """Bicubic interpolation from ``length`` samples to ``size`` as a matrix (size, length)."""
    unit = Image.fromarray(np.eye(length, dtype=np.float32))
    return np.asarray(unit.resize((length, size), Image.Resampling.BICUBIC))


def upsample_map(attribution: Tensor | Array, height: int, width: int) -> Array:
    """Scale one map (h, w) to [0, 1] and interpolate it bicubically to (height, width), float32 in [0, 1]."""
    normalised = normalise_map(attribution)
    rows, columns = _interpolation(height, normalised.shape[0]), _interpolation(width, normalised.shape[1])
    return np.asarray((rows @ normalised @ columns.T).clip(0, 1))


@lru_cache(maxsize=16)
def _dimmed_levels(opacity: float) -> list[int]:
    return [int(level * (1 - opacity)) for level in range(256)]


def backdrop(image: Array, opacity: float, short_side: int = 1) -> Array:
    """Dim pixels to the share ``1 - opacity`` that a map leaves them, and take their colour away.

    From an opacity of 0.5 on the picture is grey: on a colour picture, red peppers would look like relevance.

    Args:
        image: uint8 pixels (H, W, 3).
        opacity: share of the map's colours, 0 to 1.
        short_side: pixels that the short side must have; smaller images are enlarged by a whole factor.

    Returns:
        uint8 pixels, three channels, of the image's size or a multiple of it.
    """
    picture, color = Image.fromarray(image), max(0.0, 1 - 2 * opacity)
    grey = picture.convert("L")
    mixed = Image.blend(grey.convert("RGB"), picture, color) if color else grey
    factor = -(-short_side // min(mixed.size))
    if factor > 1:
        mixed = mixed.resize((mixed.width * factor, mixed.height * factor), Image.Resampling.BICUBIC)
    # Dimmed last: interpolation overshoots at edges, and what exceeds the picture's share would wrap in `add_colors`.
    dimmed = mixed.point(_dimmed_levels(opacity) * len(mixed.getbands()))
    return np.asarray(dimmed.convert("RGB"))


def add_colors(ground: Array, attribution: Tensor | Array, colormap: str, opacity: float) -> Array:
    """Add the colours of one raw map (h, w), weighted by the opacity, to pixels from `backdrop`; uint8 (H, W, 3)."""
    levels = (upsample_map(attribution, *ground.shape[:2]) * 255 + 0.5).astype(np.uint8)
    colors = (colormap_table(colormap) * opacity + 0.5).astype(np.uint8)
    mapped = Image.fromarray(levels)
    mapped.putpalette(colors.tobytes())
    return np.asarray(ground + np.asarray(mapped.convert("RGB")))


def overlay(
    image: Tensor | Array, attribution: Tensor | Array, colormap: str = "inferno", opacity: float = 0.5
) -> Array:
    """Lay one map over its image, whose colour fades as the map's opacity grows to 0.5.

    Args:
        image: shape (3, H, W), in [0, 1].
        attribution: raw map, shape (h, w); scaled by its own minimum and maximum, interpolated bicubically.
        colormap: one of `COLORMAPS`.
        opacity: share of the map's colours, 0 to 1.

    Returns:
        uint8 array (H, W, 3).

    Raises:
        ValueError: for an unknown colour map.
    """
    return add_colors(backdrop(pixels(image), opacity), attribution, colormap, opacity)


def encode_png(image: Array) -> bytes:
    """Encode uint8 pixels (H, W, 3) as PNG, for overlays, which are smooth and written by the ten thousand.

    One row filter for the whole picture and fast deflation take most of what there is to gain.
    """
    height, width = image.shape[:2]
    rows = np.empty((height, 1 + 3 * width), dtype=np.uint8)
    rows[:, 0] = 2  # filter "up": differences to the row above
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


def short_name(name: str, width: int = 17, lines: int = 2) -> str:
    """Shorten a class name for a title: the first of its synonyms, wrapped.

    Example:
        >>> short_name("German shepherd, German shepherd dog, alsatian")
        'German shepherd'
    """
    first = name.split(",")[0].strip() or name
    return "\n".join(textwrap.wrap(first, width, max_lines=lines, placeholder="…"))


def _inches(text: str, points: float) -> float:
    """Width of a text in matplotlib's own font."""
    return float(TextPath((0, 0), text.replace("$", r"\$"), size=points).get_extents().width) / 72


def comparison_figure(
    images: Sequence[Tensor | Array],
    maps: Mapping[str, Sequence[Tensor | Array]],
    names: Sequence[str],
    probabilities: Sequence[float | None],
    boxes: Sequence[Sequence[float] | None] | None = None,
    colormap: str = "inferno",
    opacity: float = 0.5,
) -> Figure:
    """Draw images across and methods down, each column headed by its class and probability.

    Args:
        images: one image (3, H, W) in [0, 1], or uint8 pixels (H, W, 3), per column; shapes may differ.
        maps: for each method, one raw map (h, w) per column.
        names: name of the explained class of each column; of synonyms the first is shown, wrapped.
        probabilities: the network's probability of that class, 0 to 1; None or NaN leaves it out.
        boxes: for each column, the object's box (x0, y0, x1, y1) in pixels of the image, or None.
        colormap: one of `COLORMAPS`.
        opacity: share of the maps' colours, 0 to 1.

    Returns:
        A figure of its own, outside matplotlib's global state; save it with `figure_bytes`.
    """
    columns = [image if image.dtype == np.uint8 else pixels(image) for image in map(np.asarray, images)]
    headings = [short_name(name) for name in names]
    labels = ["Image", *map(method_label, maps)]
    cell, gap, left, right = 1.24, 0.05, 0.18 + max(_inches(label, _LABEL_POINTS) for label in labels), 0.5
    # Rows are equally high, and columns as wide as their images: a wide picture is not shrunk to a strip.
    cells = [cell * min(max(image.shape[1] / image.shape[0], 0.5), 2.2) for image in columns]
    lefts = [left + sum(cells[:column]) + column * gap for column in range(len(cells))]
    row = cell
    top = 0.1 + 0.16 * (max(heading.count("\n") for heading in headings) + 2)
    width = lefts[-1] + cells[-1] + gap + right
    height = top + (len(maps) + 1) * (row + gap) + 0.05
    figure = Figure(figsize=(width, height), dpi=200, facecolor="white")
    FigureCanvasAgg(figure)
    # One pair of axes, in inches, for all cells: making one takes longer than drawing what it shows.
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height), autoscale_on=False)
    axes.set_axis_off()

    def show(picture: Array, line: int, column: int, interpolation: str) -> tuple[float, float, float]:
        """Draw a picture in the middle of its cell; give its left and upper edge, and inches per pixel."""
        picture_height, picture_width = picture.shape[:2]
        scale = min(cells[column] / picture_width, row / picture_height)
        x = lefts[column] + (cells[column] - picture_width * scale) / 2
        y = height - top - line * (row + gap) - (row - picture_height * scale) / 2
        extent = (x, x + picture_width * scale, y - picture_height * scale, y)
        axes.imshow(picture, extent=extent, aspect="auto", interpolation=interpolation)
        return x, y, scale

    for column, image in enumerate(columns):
        x, y, scale = show(image, 0, column, "bicubic")
        if boxes is not None and (box := boxes[column]) is not None:
            x0, y0, x1, y1 = (edge * scale for edge in box)
            for line_width, color in ((1.8, "black"), (0.8, "white")):
                axes.add_patch(Rectangle((x + x0, y - y1), x1 - x0, y1 - y0, fill=False, lw=line_width, ec=color))
        probability = probabilities[column]
        known = probability is not None and probability == probability
        lines = [f"{probability:.1%}" if known else "", *reversed(headings[column].split("\n"))]
        for line, words in enumerate(lines):
            x, y = lefts[column] + cells[column] / 2, height - top + 0.07 + 0.15 * line
            size, color = (8.0, "black") if line else (7.5, "#555555")
            axes.text(x, y, words, ha="center", va="baseline", fontsize=size, color=color, parse_math=False)
        ground = backdrop(image, opacity, OVERLAY_SIDE)
        for line, attributions in enumerate(maps.values(), start=1):
            show(add_colors(ground, attributions[column], colormap, opacity), line, column, "antialiased")
    for line, label in enumerate(labels):
        y = height - top - line * (row + gap) - row / 2
        axes.text(left - 0.1, y, label, ha="right", va="center", fontsize=_LABEL_POINTS, parse_math=False)
    if maps:
        span = min(len(maps) * (row + gap) - gap, 3.2)
        bar = figure.add_axes(((width - right + 0.06) / width, (0.05 + gap) / height, 0.09 / width, span / height))
        figure.colorbar(ScalarMappable(cmap=matplotlib.colormaps[colormap]), cax=bar, ticks=[0, 1])
        bar.set_yticklabels(["min", "max"], fontsize=7)
        bar.set_ylabel("attribution", fontsize=7, labelpad=-8)
        bar.tick_params(length=0, pad=2)
        bar.spines[:].set_visible(False)
    return figure


def figure_bytes(figure: Figure, extension: str = "png") -> bytes:
    """Render a figure.

    Args:
        figure: a figure of matplotlib's.
        extension: ``png``, ``pdf`` or ``svg``.

    Raises:
        ValueError: for another format.
    """
    if extension not in FIGURE_FORMATS:
        raise ValueError(f"unknown figure format {extension!r}: choose from {', '.join(FIGURE_FORMATS)}")
    stream = io.BytesIO()
    # Without dates and random identifiers, equal figures are equal bytes.
    metadata = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[extension]
    # Each picture by itself, too: joined ones would take a vector figure's low resolution.
    with matplotlib.rc_context({"svg.hashsalt": "gmarpp", "image.composite_image": False}):
        figure.savefig(stream, format=extension, metadata=metadata)
    return stream.getvalue()
