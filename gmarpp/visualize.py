"""Pictures of maps: overlays, and their encodings."""

import io
import struct
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from isal import isal_zlib
from PIL import Image
from torch import Tensor

from gmarpp.colormaps import COLORMAPS, colormap_table, diverging_cover, diverging_levels, diverging_table
from gmarpp.maps import Array, normalize_map, normalize_signed_map

SignedMaps = Literal["diverging", "positive"]
"""How signed maps are drawn: both signs in a diverging color map centered on zero, or the positive part alone."""

OVERLAY_SIDE = 112
"""Minimum number of pixels along the short side of a saved overlay."""

Region: TypeAlias = tuple[float, float, float, float]
"""Edges x0, y0, x1, y1 of a part of a picture, in its pixels."""


_COARSE = (32, 32)
_SAME_PICTURE = 0.99


@dataclass(frozen=True)
class MapStyle:
    """How maps are drawn.

    Args:
        colormap: one of `gmarpp.colormaps.COLORMAPS`, for all maps but those that are drawn diverging.
        opacity: share of the map's colors, 0 to 1.
        signed_maps: `diverging` draws signed maps in blue, against the class, and red, for it, and leaves the picture
            as it is near zero; `positive` draws their positive part alone, in the color map of the others.

    Raises:
        ValueError: for an unknown color map or way to draw signed maps, or an opacity out of range.
    """

    colormap: str = "inferno"
    opacity: float = 0.5
    signed_maps: SignedMaps = "diverging"

    def __post_init__(self) -> None:
        for option, value, choices in (
            ("colormap", self.colormap, COLORMAPS),
            ("signed_maps", self.signed_maps, get_args(SignedMaps)),
        ):
            if value not in choices:
                raise ValueError(f"unknown {option} {value!r}: choose from {', '.join(choices)}")
        if not 0 <= self.opacity <= 1:
            raise ValueError(f"opacity: expected 0 to 1, got {self.opacity}")


DEFAULT_STYLE = MapStyle()


def pixels(image: Tensor | Array) -> Array:
    """Turn images (..., 3, H, W) in [0, 1] into uint8 pixels (..., H, W, 3)."""
    values = torch.as_tensor(image, dtype=torch.float32).movedim(-3, -1).clamp(0, 1)
    return values.mul_(255).add_(0.5).to(torch.uint8).contiguous().numpy()


@lru_cache(maxsize=32)
def _interpolation(size: int, length: int) -> Array:
    """Return bicubic interpolation from `length` samples to `size` as a matrix (size, length)."""
    unit = Image.fromarray(np.eye(length, dtype=np.float32))
    return np.asarray(unit.resize((length, size), Image.Resampling.BICUBIC))


def upsample_map(scaled: Array, height: int, width: int) -> Array:
    """Interpolate one map (h, w) bicubically to (height, width), without leaving its range."""
    rows, columns = _interpolation(height, scaled.shape[0]), _interpolation(width, scaled.shape[1])
    return np.asarray((rows @ scaled @ columns.T).clip(scaled.min(), scaled.max()))


@lru_cache(maxsize=16)
def _dimmed_levels(opacity: float) -> list[int]:
    return [int(level * (1 - opacity)) for level in range(256)]


class Backdrop:
    """An image on which any number of maps are laid.

    At opacities of 0.5 and above the picture is gray: in color, red peppers would look like relevance.

    Args:
        image: uint8 pixels (H, W, 3).
        style: how maps are drawn.
        short_side: pixels that the short side must have; smaller images are enlarged by a whole factor.
        region: the part of the image that maps cover, all of it by default. The rest, which the network did not see,
            keeps its colors.
    """

    def __init__(self, image: Array, style: MapStyle, short_side: int = 1, region: Region | None = None) -> None:
        picture, color = Image.fromarray(image), max(0.0, 1 - 2 * style.opacity)
        factor = max(1, -(-short_side // min(picture.size)))
        gray = picture.convert("L")
        mixed = _enlarged(Image.blend(gray.convert("RGB"), picture, color) if color else gray, factor)
        self._around: Image.Image | None = None
        if region is not None:
            x0, y0, x1, y1 = (round(edge * factor) for edge in region)
            self._around, self._corner = _enlarged(picture, factor), (x0, y0)
            mixed = mixed.crop((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)))
        self._picture = mixed
        self._style = style

    def overlay(self, attribution: Tensor | Array, signed: bool) -> Array:
        """Lay one raw map (h, w) over the image, scaled by its minimum and maximum or, if signed, by its largest size.

        Returns:
            uint8 pixels (H, W, 3), of the image's size or a multiple of it.
        """
        drawn = self._drawn(attribution, signed)
        if self._around is None:
            return drawn
        whole = self._around.copy()
        whole.paste(Image.fromarray(drawn), self._corner)
        return np.asarray(whole)

    def _drawn(self, attribution: Tensor | Array, signed: bool) -> Array:
        if not signed:
            return self._covered(normalize_map(attribution))
        if self._style.signed_maps == "positive":
            return self._covered(normalize_signed_map(torch.as_tensor(attribution).clamp(min=0)))
        return self._tinted(normalize_signed_map(attribution))

    @cached_property
    def _dimmed(self) -> Array:
        # Dimming comes last because interpolation overshoots at edges: values beyond the picture's share would wrap in
        # `_covered`.
        dimmed = self._picture.point(_dimmed_levels(self._style.opacity) * len(self._picture.getbands()))
        return np.asarray(dimmed.convert("RGB"))

    def _covered(self, scaled: Array) -> Array:
        """Add the colors of a map in [0, 1], weighted by the opacity, to the dimmed picture."""
        levels = (upsample_map(scaled, *self._dimmed.shape[:2]) * 255 + 0.5).astype(np.uint8)
        colors = (colormap_table(self._style.colormap) * self._style.opacity + 0.5).astype(np.uint8)
        return np.asarray(self._dimmed + np.asarray(_painted(levels, colors)))

    def _tinted(self, scaled: Array) -> Array:
        """Mix the picture with the colors of a map in [-1, 1], the more of them the larger its values are."""
        levels = diverging_levels(upsample_map(scaled, self._picture.height, self._picture.width))
        # The picture is not dimmed here, so that colors as clear as those of other maps need a larger share.
        share = self._style.opacity * (2 - self._style.opacity)
        cover = (255 * share * diverging_cover() + 0.5).astype(np.uint8)
        mask = Image.fromarray(cover[levels])
        return np.asarray(Image.composite(_painted(levels, diverging_table()), self._picture.convert("RGB"), mask))


def _enlarged(picture: Image.Image, factor: int) -> Image.Image:
    if factor == 1:
        return picture
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)


def _painted(levels: Array, colors: Array) -> Image.Image:
    """Return levels (H, W) in the colors of a table (256, 3), both uint8."""
    picture = Image.fromarray(levels)
    picture.putpalette(colors.tobytes())
    return picture.convert("RGB")


def overlay(
    image: Tensor | Array,
    attribution: Tensor | Array,
    colormap: str = "inferno",
    opacity: float = 0.5,
    signed_maps: SignedMaps | None = None,
    region: Region | None = None,
) -> Array:
    """Lay one map over its image, whose color fades as the map's opacity grows to 0.5.

    Args:
        image: shape (3, H, W), in [0, 1].
        attribution: raw map, shape (h, w), interpolated bicubically.
        colormap: one of `gmarpp.colormaps.COLORMAPS`.
        opacity: share of the map's colors, 0 to 1.
        signed_maps: None for a map without a sign, which is scaled by its minimum and maximum. `diverging` draws a
            signed map, scaled by its largest absolute value, in blue against the class and red for it; `positive` draws
            its positive part alone.
        region: the part of the image that the map covers, all of it by default.

    Returns:
        uint8 array (H, W, 3).

    Raises:
        ValueError: for an unknown color map or way to draw signed maps, or an opacity out of range.
    """
    style = MapStyle(colormap, opacity, signed_maps or "diverging")
    return Backdrop(pixels(image), style, region=region).overlay(attribution, signed=signed_maps is not None)


def laid_over(
    image: Tensor,
    attribution: Tensor,
    signed_maps: SignedMaps | None,
    original: Image.Image | None = None,
    region: Region | None = None,
) -> Image.Image:
    """Lay one map over its image, or over the picture that the image was made of.

    Args:
        image: shape (3, H, W), in [0, 1].
        attribution: raw map, shape (h, w).
        signed_maps: as for `overlay`.
        original: the picture before it was resized and cropped.
        region: the part of it that the image shows, all of it by default.

    Raises:
        ValueError: that part does not look like the image.
    """
    style = MapStyle(signed_maps=signed_maps or "diverging")
    if original is None:
        backdrop = Backdrop(pixels(image), style)
    else:
        picture = original.convert("RGB")
        _require_same_picture(image, picture, region or (0, 0, *picture.size))
        backdrop = Backdrop(np.asarray(picture), style, region=region)
    return Image.fromarray(backdrop.overlay(attribution, signed=signed_maps is not None))


def _require_same_picture(image: Tensor, picture: Image.Image, region: Region) -> None:
    """Compare a coarse gray version of the image with that part of the picture, whatever contrast either has."""
    seen = Image.fromarray(pixels(image)).convert("L").resize(_COARSE, Image.Resampling.BOX)
    # In the image's own size first: what is finer is lost in both, and not averaged in one of them.
    part = picture.convert("L").resize(
        (image.shape[2], image.shape[1]), Image.Resampling.BICUBIC, box=_within(region, picture.size)
    )
    part = part.resize(_COARSE, Image.Resampling.BOX)
    values = np.stack([np.asarray(each, dtype=float).ravel() for each in (seen, part)])
    if values.std(axis=1).min() < 1:
        return
    alike = np.corrcoef(values)[0, 1]
    if alike < _SAME_PICTURE:
        raise ValueError(
            f"region: expected the part of the original, {picture.width}x{picture.height} pixels, that the image "
            f"shows, got {tuple(round(edge, 1) for edge in region)}, which looks otherwise (correlation {alike:.2f}): "
            "give the edges x0, y0, x1, y1 of the crop; Preprocessing.of(model).region(height, width) has timm's"
        )


def _within(region: Region, size: tuple[int, int]) -> Region:
    x0, y0, x1, y1 = region
    return max(x0, 0), max(y0, 0), min(x1, size[0]), min(y1, size[1])


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
