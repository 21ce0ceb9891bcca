"""Figures for people: images beside their maps, and curves."""

import io
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from unicodedata import east_asian_width

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath
from torch import Tensor

from gmarpp.colormaps import diverging_table
from gmarpp.labels import method_label
from gmarpp.maps import Array
from gmarpp.visualize import DEFAULT_STYLE, OVERLAY_SIDE, Backdrop, MapStyle, pixels

FIGURE_FORMATS = ("png", "pdf", "svg")


_LABEL_POINTS, _TITLE_COLUMNS = 8.5, 17
_CELL, _GAP, _BAR_SPACE, _LONGEST_BAR = 1.24, 0.05, 0.7, 3.2


@dataclass(frozen=True)
class _Scale:
    """What the colors of a map mean: a color map, and the words at some places of it, 0 to 1."""

    colormap: Colormap
    ticks: tuple[tuple[float, str], ...]
    label: str = ""


def _scale(style: MapStyle, signed: bool) -> _Scale:
    if signed and style.signed_maps == "diverging":
        colors = ListedColormap(diverging_table()[1:] / 255)
        return _Scale(colors, ((0, "against\nthe class"), (0.5, "0"), (1, "for the\nclass")))
    words = ("0", "max", "for the class") if signed else ("min", "max", "attribution")
    return _Scale(matplotlib.colormaps[style.colormap], ((0, words[0]), (1, words[1])), words[2])


def first_name(name: str) -> str:
    """Return the first synonym in a class name.

    Examples:
        >>> first_name("German shepherd, German shepherd dog, alsatian")
        'German shepherd'
    """
    return name.split(",")[0].strip() or name


def wrapped(name: str) -> str:
    r"""Wrap a class name for a title, in at most two lines.

    Examples:
        >>> wrapped("Saccharomyces_cerevisiae_strain_288")
        'Saccharomyces_cer\nevisiae_strain_2…'
    """
    lines = [""]
    for word in name.split():
        if lines[-1] and _columns(f"{lines[-1]} {word}") <= _TITLE_COLUMNS:
            lines[-1] += f" {word}"
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if _columns(lines[-1] + letter) > _TITLE_COLUMNS:
                lines.append("")
            lines[-1] += letter
    if len(lines) > 2:
        while _columns(lines[1]) >= _TITLE_COLUMNS:
            lines[1] = lines[1][:-1]
        lines[1] += "…"
    return "\n".join(lines[:2])


def _columns(text: str) -> int:
    """Return how many letters' room a text takes: those of Chinese, Japanese and Korean are twice as wide."""
    return sum(1 + (east_asian_width(letter) in "WF") for letter in text)


def _inches(text: str, points: float) -> float:
    """Return the width of a text in inches, in matplotlib's default font."""
    return float(TextPath((0, 0), text.replace("$", r"\$"), size=points).get_extents().width) / 72


class _Sheet:
    """A figure with a column per image and a row per method below the row of the images.

    All cells share one pair of axes, in inches, because making axes takes longer than drawing their content. Rows are
    equally high, and columns as wide as their images, so that a wide picture does not shrink to a strip.

    Args:
        shapes: height and width of each column's image.
        headings: text above each column, of one or more lines.
        labels: text beside each row.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], headings: Sequence[str], labels: Sequence[str]) -> None:
        self.left = 0.18 + max(_inches(label, _LABEL_POINTS) for label in labels)
        self.widths = [_CELL * min(max(width / height, 0.5), 2.2) for height, width in shapes]
        self.lefts = [self.left + sum(self.widths[:column]) + column * _GAP for column in range(len(shapes))]
        self.top = 0.1 + 0.16 * (max(heading.count("\n") for heading in headings) + 2)
        self.right = self.lefts[-1] + self.widths[-1] + _GAP
        self.size = self.right + _BAR_SPACE, self.top + len(labels) * (_CELL + _GAP) + 0.05
        self.figure = Figure(figsize=self.size, dpi=200, facecolor="white")
        FigureCanvasAgg(self.figure)
        width, height = self.size
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height), autoscale_on=False)
        self.axes.set_axis_off()
        for line, label in enumerate(labels):
            at = self.left - 0.1, self._upper_edge(line) - _CELL / 2
            self.axes.text(*at, label, ha="right", va="center", fontsize=_LABEL_POINTS, parse_math=False)

    def _upper_edge(self, line: int) -> float:
        return self.size[1] - self.top - line * (_CELL + _GAP)

    def head(self, column: int, heading: str, probability: float | None) -> None:
        """Write a column's class and its probability, if that is known, above it."""
        known = probability is not None and probability == probability
        lines = [f"{probability:.1%}" if known else "", *reversed(heading.split("\n"))]
        for line, words in enumerate(lines):
            x, y = self.lefts[column] + self.widths[column] / 2, self._upper_edge(0) + 0.07 + 0.15 * line
            size, color = (8.0, "black") if line else (7.5, "#555555")
            self.axes.text(x, y, words, ha="center", va="baseline", fontsize=size, color=color, parse_math=False)

    def show(self, picture: Array, line: int, column: int, box: Sequence[float] | None = None) -> None:
        """Draw a picture in the center of its cell, and an outline (x0, y0, x1, y1) in its pixels."""
        height, width = picture.shape[:2]
        scale = min(self.widths[column] / width, _CELL / height)
        x = self.lefts[column] + (self.widths[column] - width * scale) / 2
        y = self._upper_edge(line) - (_CELL - height * scale) / 2
        extent = (x, x + width * scale, y - height * scale, y)
        self.axes.imshow(picture, extent=extent, aspect="auto", interpolation="antialiased" if line else "bicubic")
        if box is not None:
            x0, y0, x1, y1 = (edge * scale for edge in box)
            for line_width, color in ((1.8, "black"), (0.8, "white")):
                outline = Rectangle((x + x0, y - y1), x1 - x0, y1 - y0, fill=False, lw=line_width, ec=color)
                self.axes.add_patch(outline)

    def explain_colors(self, scale: _Scale, first: int, rows: int) -> None:
        """Draw the bar of a scale beside so many rows from the first one down."""
        width, height = self.size
        span = min(rows * (_CELL + _GAP) - _GAP, _LONGEST_BAR)
        below = self._upper_edge(first) - span
        bar = self.figure.add_axes(((self.right + 0.06) / width, below / height, 0.09 / width, span / height))
        self.figure.colorbar(ScalarMappable(cmap=scale.colormap), cax=bar, ticks=[at for at, _ in scale.ticks])
        bar.set_yticklabels([words for _, words in scale.ticks], fontsize=7)
        # The words at the ends stay within the bar, where nothing cuts them or is in their way.
        low, *_, high = bar.get_yticklabels()
        low.set_verticalalignment("bottom")
        high.set_verticalalignment("top")
        bar.set_ylabel(scale.label, fontsize=7, labelpad=-8)
        bar.tick_params(length=0, pad=2)
        bar.spines[:].set_visible(False)


def comparison_figure(
    images: Sequence[Tensor | Array],
    maps: Mapping[str, Sequence[Tensor | Array]],
    names: Sequence[str],
    probabilities: Sequence[float | None],
    boxes: Sequence[Sequence[float] | None] | None = None,
    signed_methods: Collection[str] = (),
    style: MapStyle = DEFAULT_STYLE,
) -> Figure:
    """Draw images across and methods down, each column headed by its class and probability.

    Args:
        images: one image (3, H, W) in [0, 1], or uint8 pixels (H, W, 3), per column; shapes may differ.
        maps: for each method, one raw map (h, w) per column; each is scaled by itself.
        names: name of the explained class of each column; the first of its synonyms is shown, wrapped, where it is no
            other class's.
        probabilities: the network's probability of that class, 0 to 1; None or NaN leaves it out.
        boxes: for each column, the object's box (x0, y0, x1, y1) in pixels of the image, or None.
        signed_methods: names of the methods whose maps are signed.
        style: how the maps are drawn.

    Returns:
        A figure outside matplotlib's global state; save it with `figure_bytes`.
    """
    columns = [image if image.dtype == np.uint8 else pixels(image) for image in map(np.asarray, images)]
    firsts = Counter(first_name(name) for name in set(names))
    headings = [wrapped(name if firsts[first_name(name)] > 1 else first_name(name)) for name in names]
    sheet = _Sheet([image.shape[:2] for image in columns], headings, ["Image", *map(method_label, maps)])
    for column, image in enumerate(columns):
        sheet.head(column, headings[column], probabilities[column])
        sheet.show(image, 0, column, boxes[column] if boxes is not None else None)
        backdrop = Backdrop(image, style, OVERLAY_SIDE)
        for line, (method, attributions) in enumerate(maps.items(), start=1):
            sheet.show(backdrop.overlay(attributions[column], method in signed_methods), line, column)
    line = 1
    for signed, methods in groupby(maps, key=lambda method: method in signed_methods):
        rows = len(list(methods))
        sheet.explain_colors(_scale(style, signed), line, rows)
        line += rows
    return sheet.figure


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
    by_format: dict[str, dict[str, Any]] = {
        # Deflating more would take most of the figure's time, and save a sixth of its size.
        "png": {"pil_kwargs": {"compress_level": 2}},
        "pdf": {"metadata": {"CreationDate": None}},
        "svg": {"metadata": {"Date": None}},
    }
    # Pictures are not joined either: joined ones would take the low resolution of a vector figure.
    with (
        matplotlib.rc_context({"svg.hashsalt": "gmarpp", "image.composite_image": False}),
        warnings.catch_warnings(),
    ):
        # The report shows such names, and nobody can do anything about a font that is not there.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(stream, format=extension, **by_format[extension])
    return stream.getvalue()
