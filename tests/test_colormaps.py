import numpy as np
import pytest

from gmarpp.colormaps import COLORMAPS, ZERO_LEVEL, colormap_table, diverging_cover, diverging_levels, diverging_table


def cielab(colors):
    """CIELAB of uint8 sRGB for daylight D65, by the definitions of IEC 61966-2-1 and CIE 1976."""
    encoded = np.asarray(colors, dtype=float) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    t = xyz / [0.9505, 1.0, 1.089]
    x, y, z = np.where(t > (6 / 29) ** 3, np.cbrt(t), t * (29 / 6) ** 2 / 3 + 4 / 29).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def test_color_maps_have_a_table_each():
    for name in COLORMAPS:
        assert colormap_table(name).shape == (256, 3)
    with pytest.raises(ValueError, match=r"unknown colormap 'rainbow': choose from inferno, .*jet"):
        colormap_table("rainbow")


# Colors of 8 bits are up to about 0.2 of lightness, and more of hue, away from the straight lines.
def test_both_arms_of_the_diverging_map_are_perceptually_uniform():
    lab = cielab(diverging_table())
    against, zero, for_the_class = lab[ZERO_LEVEL:0:-1], lab[ZERO_LEVEL], lab[ZERO_LEVEL:]
    assert len(against) == len(for_the_class) == 128
    assert zero == pytest.approx([95, 0, 0], abs=0.3)
    for arm, hue in ((against, -64), (for_the_class, 39)):
        share = np.linspace(0, 1, 128)
        assert np.abs(arm[:, 0] - (95 - 55 * share)).max() < 0.3, "equal steps of lightness"
        assert (np.diff(arm[:, 0]) < 0).all()
        distance = np.linalg.norm(arm - arm[0], axis=1)
        assert np.abs(distance - np.hypot(55, 83) * share).max() < 1, "equal steps of color difference"
        strong = arm[share > 0.25]
        assert np.degrees(np.arctan2(strong[:, 2], strong[:, 1])) == pytest.approx(hue, abs=1.5)
    assert np.abs(against[:, 0] - for_the_class[:, 0]).max() < 0.5, "both signs weigh the same"


def test_zero_is_exactly_the_middle_and_covers_nothing():
    levels = diverging_levels(np.array([-1, -0.25, 0, 1 / 254 - 1e-6, 0.25, 1]))
    assert levels.tolist() == [1, 96, 128, 128, 160, 255]
    cover = diverging_cover()
    assert cover[128] == 0
    assert cover[[1, 64, 96, 160, 192, 255]] == pytest.approx([1, 1, 0.504, 0.504, 1, 1], abs=1e-3)
    red, _, blue = diverging_table()[levels].T.astype(int)
    assert (red - blue).tolist()[0] < -150 < 0 < 150 < (red - blue).tolist()[-1]
