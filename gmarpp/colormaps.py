"""Color maps: matplotlib's for relevance without a sign, and a diverging one for relevance with a sign."""

from functools import lru_cache

import matplotlib
import numpy as np

from gmarpp.maps import Array

COLORMAPS = ("inferno", "magma", "plasma", "viridis", "cividis", "turbo", "jet")
"""The available color maps; all but the last two are perceptually uniform."""

ZERO_LEVEL = 128
"""Level of zero in the diverging color map; the others, 1 to 255, lie symmetrically around it."""

_SCALE = 127
_LEVEL_VALUES = ((np.arange(256) - ZERO_LEVEL) / _SCALE).clip(-1, 1)
_OPAQUE_FROM = 0.5
_ZERO_LIGHTNESS = 95.0
_END_LIGHTNESS, _END_CHROMA = 40.0, 83.0
_AGAINST_HUE, _FOR_HUE = -64.0, 39.0
# CIE 1976 for daylight D65, and the primaries of sRGB, IEC 61966-2-1.
_WHITE = np.array([0.95047, 1.0, 1.08883])
_TO_LINEAR = np.array(
    [
        [3.2404542, -1.5371385, -0.4985314],
        [-0.9692660, 1.8760108, 0.0415560],
        [0.0556434, -0.2040259, 1.0572252],
    ]
)


@lru_cache(maxsize=16)
def colormap_table(name: str) -> Array:
    """Return the 256 colors of a color map, uint8, shape (256, 3).

    Raises:
        ValueError: if the name is not in `COLORMAPS`.
    """
    if name not in COLORMAPS:
        raise ValueError(f"unknown colormap {name!r}: choose from {', '.join(COLORMAPS)}")
    return np.asarray(matplotlib.colormaps[name](np.arange(256), bytes=True)[:, :3])


@lru_cache(maxsize=1)
def diverging_table() -> Array:
    """Return the 256 colors from blue, against the class, over white, zero, to red, for the class; uint8 (256, 3).

    Each arm is a straight line in CIELAB between the colors of the map D1, `diverging_bwr_40-95_c42`, of
    Kovesi 2015, arXiv 1509.03700: equal steps of relevance are equal steps of lightness, and of color difference, and
    relevance of one size is equally light on both sides. Level 0, which would make one side longer than the other,
    repeats level 1.
    """
    size = np.abs(_LEVEL_VALUES)
    hue = np.radians(np.where(_LEVEL_VALUES < 0, _AGAINST_HUE, _FOR_HUE))
    lightness = _ZERO_LIGHTNESS + (_END_LIGHTNESS - _ZERO_LIGHTNESS) * size
    chroma = _END_CHROMA * size
    colors = _lab_to_srgb(np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=1))
    return np.asarray((255 * colors + 0.5).astype(np.uint8))


@lru_cache(maxsize=1)
def diverging_cover() -> Array:
    """Return how much of a picture each level of the diverging color map may cover, in [0, 1], shape (256,).

    Zero covers nothing, relevance from half of the largest on covers all that the opacity allows.
    """
    return np.asarray(np.minimum(1.0, np.abs(_LEVEL_VALUES) / _OPAQUE_FROM))


def diverging_levels(scaled: Array) -> Array:
    """Return the levels in `diverging_table`, uint8, of values in [-1, 1]."""
    return np.asarray(np.rint(ZERO_LEVEL + _SCALE * scaled).astype(np.uint8))


def _lab_to_srgb(lab: Array) -> Array:
    """Convert CIELAB (n, 3) to sRGB (n, 3) in [0, 1]."""
    y = (lab[:, 0] + 16) / 116
    roots = np.stack([y + lab[:, 1] / 500, y, y - lab[:, 2] / 200], axis=1)
    xyz = _WHITE * np.where(roots > 6 / 29, roots**3, 3 * (6 / 29) ** 2 * (roots - 4 / 29))
    linear = (xyz @ _TO_LINEAR.T).clip(0, 1)
    return np.asarray(np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055))
