"""Figures for people: images beside their maps, and curves."""

import io
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath
from torch import Tensor

from gmarpp.labels import method_label
from gmarpp.maps import Array
from gmarpp.visualize import OVERLAY_SIDE, add_colors, backdrop, pixels

FIGURE_FORMATS = ("png", "pdf", "svg")


_LABEL_POINTS = 8.5


def short_name(name: str, width: int = 17, lines: int = 2) -> str:
    """Shorten a class name for a title: the first of its synonyms, wrapped.

    Examples:
        >>> short_name("German shepherd, German shepherd dog, alsatian")
        'German shepherd'
    """
    first = name.split(",")[0].strip() or name
    return "\n".join(textwrap.wrap(first, width, max_lines=lines, placeholder="…"))


def _inches(text: str, points: float) -> float:
    """Return the width of a text in inches, in matplotlib's default font."""
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
        names: name of the explained class of each column; the first of its synonyms is shown, wrapped.
        probabilities: the network's probability of that class, 0 to 1; None or NaN leaves it out.
        boxes: for each column, the object's box (x0, y0, x1, y1) in pixels of the image, or None.
        colormap: one of `COLORMAPS`.
        opacity: share of the maps' colors, 0 to 1.

    Returns:
        A figure outside matplotlib's global state; save it with `figure_bytes`.
    """
    columns = [image if image.dtype == np.uint8 else pixels(image) for image in map(np.asarray, images)]
    headings = [short_name(name) for name in names]
    labels = ["Image", *map(method_label, maps)]
    cell, gap, left, right = 1.24, 0.05, 0.18 + max(_inches(label, _LABEL_POINTS) for label in labels), 0.5
    # Rows are equally high, and columns as wide as their images, so that a wide picture does not shrink to a strip.
    cells = [cell * min(max(image.shape[1] / image.shape[0], 0.5), 2.2) for image in columns]
    lefts = [left + sum(cells[:column]) + column * gap for column in range(len(cells))]
    row = cell
    top = 0.1 + 0.16 * (max(heading.count("\n") for heading in headings) + 2)
    width = lefts[-1] + cells[-1] + gap + right
    height = top + (len(maps) + 1) * (row + gap) + 0.05
    figure = Figure(figsize=(width, height), dpi=200, facecolor="white")
    FigureCanvasAgg(figure)
    # All cells share one pair of axes, in inches, because making axes takes longer than drawing their content.
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height), autoscale_on=False)
    axes.set_axis_off()

    def show(picture: Array, line: int, column: int, interpolation: str) -> tuple[float, float, float]:
        """Draw a picture in the center of its cell; return its left and upper edge, and inches per pixel."""
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
        figure: a matplotlib figure.
        extension: `png`, `pdf` or `svg`.

    Raises:
        ValueError: for another format.
    """
    if extension not in FIGURE_FORMATS:
        raise ValueError(f"unknown figure format {extension!r}: choose from {', '.join(FIGURE_FORMATS)}")
    stream = io.BytesIO()
    # Without dates and random identifiers, equal figures yield equal bytes.
    metadata = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[extension]
    # Pictures are not joined either: joined ones would take the low resolution of a vector figure.
    with matplotlib.rc_context({"svg.hashsalt": "gmarpp", "image.composite_image": False}):
        figure.savefig(stream, format=extension, metadata=metadata)
    return stream.getvalue()
