import io
import itertools

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from gmarpp.attribution import METHODS, VARIANTS, Explanation
from gmarpp.colormaps import colormap_table, diverging_table
from gmarpp.figures import comparison_figure, figure_bytes, first_name, wrapped
from gmarpp.labels import method_color, method_dashes, method_label
from gmarpp.maps import normalize_map, normalize_signed_map
from gmarpp.run.curve_figure import curves_figure
from gmarpp.run.summary import MeanCurve
from gmarpp.visualize import (
    DEFAULT_STYLE,
    Backdrop,
    MapStyle,
    encode_jpeg,
    encode_png,
    overlay,
    pixels,
    upsample_map,
)


def test_normalize_map_scales_every_map_by_itself():
    maps = torch.tensor([[[1.0, 3.0], [2.0, 5.0]], [[-1.0, 0.0], [0.0, 0.0]]])
    assert normalize_map(maps).tolist() == [[[0.0, 0.5], [0.25, 1.0]], [[0.0, 1.0], [1.0, 1.0]]]


def test_normalize_map_of_a_constant_map_is_zero():
    assert normalize_map(torch.full((2, 3), 7.0)).tolist() == [[0.0] * 3] * 2


def test_normalize_map_takes_what_is_not_finite_as_the_minimum():
    values = torch.tensor([[torch.nan, 2.0], [torch.inf, 4.0]])
    assert normalize_map(values).tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert normalize_map(torch.full((2, 2), torch.nan)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_upsample_map_keeps_rows_and_columns_apart_on_grids_that_are_not_square():
    attribution = np.zeros((2, 4), dtype=np.float32)
    attribution[1, 3] = 1
    upsampled = upsample_map(normalize_map(attribution), 40, 120)
    assert upsampled.shape == (40, 120)
    row, column = np.unravel_index(upsampled.argmax(), upsampled.shape)
    assert row > 20
    assert column > 90
    assert upsampled[:10].max() < 0.02
    assert upsampled.min() >= 0
    assert upsampled.max() <= 1


def test_overlay_of_full_opacity_is_the_color_map_and_of_none_the_image():
    image = torch.rand(3, 8, 12)
    attribution = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    assert (
        overlay(image, attribution, opacity=1) == np.array(matplotlib.colormaps["inferno"](0, bytes=True)[:3])
    ).all()
    expected = (image.permute(1, 2, 0) * 255).round().numpy()
    assert np.abs(overlay(image, attribution, opacity=0).astype(int) - expected).max() <= 1


def test_overlay_adds_half_the_color_to_half_the_gray_picture():
    image = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 4, 4)
    attribution = torch.zeros(2, 2)
    gray = 0.299 * 255
    expected = gray / 2 + np.array(matplotlib.colormaps["viridis"](0, bytes=True)[:3]) / 2
    assert np.abs(overlay(image, attribution, "viridis", 0.5) - expected).max() <= 1.5


def test_overlay_keeps_the_shape_of_the_image():
    picture = overlay(torch.rand(3, 30, 70), torch.rand(3, 7))
    assert picture.shape == (30, 70, 3)
    assert picture.dtype == np.uint8


def test_overlay_names_the_color_maps_there_are():
    with pytest.raises(ValueError, match=r"rainbow.*inferno.*jet"):
        overlay(torch.rand(3, 4, 4), torch.rand(2, 2), colormap="rainbow")


@pytest.mark.parametrize(
    ("shape", "expected"), [((64, 64), (256, 256)), ((96, 160), (288, 480)), ((224, 300), (224, 300))]
)
def test_backdrop_enlarges_small_images_by_a_whole_factor(shape, expected):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    enlarged = Backdrop(image, DEFAULT_STYLE, 224).overlay(np.zeros((2, 2)), signed=True)
    assert enlarged.shape == (*expected, 3)
    assert (enlarged[..., 0] == enlarged[..., 2]).all()
    assert abs(enlarged.mean() - (image @ [0.299, 0.587, 0.114]).mean()) < 1.5


@pytest.mark.parametrize("opacity", [0.0, 0.3, 0.5, 0.8])
def test_bright_colors_on_bright_edges_do_not_wrap(opacity):
    board = np.kron(np.indices((4, 4)).sum(0) % 2, np.full((4, 4), 255)).astype(np.uint8)
    backdrop = Backdrop(np.stack([board] * 3, axis=-1), MapStyle("viridis", opacity), 64)
    attribution = np.array([[0.0, 1.0], [1.0, 1.0]])
    levels = (upsample_map(attribution, 64, 64) * 255 + 0.5).astype(int)
    enlarged = backdrop.overlay(np.zeros((2, 2)), signed=True).astype(int)
    expected = (enlarged * (1 - opacity)).astype(int) + colormap_table("viridis")[levels] * opacity
    assert np.abs(backdrop.overlay(attribution, signed=False) - expected).max() <= 1.5


@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (64, 48)])
def test_encode_png_is_read_back_exactly(shape):
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(encode_png(image))) as decoded:
        decoded.load()
        assert decoded.mode == "RGB"
        assert (np.asarray(decoded) == image).all()


def test_encode_jpeg_is_close_to_the_image():
    ramp = np.broadcast_to(np.linspace(0, 255, 48).astype(np.uint8)[None, :, None], (32, 48, 3))
    with Image.open(io.BytesIO(encode_jpeg(np.ascontiguousarray(ramp)))) as decoded:
        assert np.abs(np.asarray(decoded).astype(int) - ramp).mean() < 2


def test_every_method_looks_different():
    looks = {(method_color(method), method_dashes(method)) for method in METHODS}
    assert len(looks) == len({method_color(method) for method in METHODS}) == len(METHODS)
    assert method_color("my_own") == method_color("my_own")
    assert method_label("gmarpp_l1") == "GMAR++ (L1)"
    assert method_label("my_own") == "my_own"


def test_class_names_are_their_first_synonym_wrapped():
    assert first_name("projectile, missile") == "projectile"
    assert wrapped("Egyptian cat") == "Egyptian cat"
    assert wrapped("a very long name of a class with no end in sight").count("\n") == 1
    assert wrapped("a very long name of a class with no end in sight").endswith("…")
    for name in ("Saccharomyces_cerevisiae_strain_288", "とても長い犬の名前ですからここで切ります"):
        assert all(len(line) <= 17 for line in wrapped(name).split("\n"))
        assert wrapped(name).replace("\n", "").rstrip("…") == name[: len(wrapped(name).replace("\n", "").rstrip("…"))]


@pytest.mark.parametrize("extension", ["png", "pdf", "svg"])
def test_comparison_figure_has_a_cell_per_image_and_method(extension):
    maps = {"gmarpp_l1": torch.rand(3, 4, 6), "rollout": torch.rand(3, 4, 6)}
    names = ["cat $\\frac$", "<b>dog</b>", "x" * 300]
    figure = comparison_figure(torch.rand(3, 3, 40, 60), maps, names, [0.5, 0.25, 1.0], [[0, 0, 10, 10], None, None])
    cells = [image.get_window_extent() for image in figure.axes[0].images]
    assert len(cells) == 9
    for cell in cells:
        assert cell.width / cell.height == pytest.approx(1.5, rel=1e-6)
    for one, other in itertools.combinations(cells, 2):
        assert not one.overlaps(other)
    words = {text.get_text() for text in figure.axes[0].texts}
    assert {"Image", "GMAR++ (L1)", "Rollout", "50.0%", "25.0%", "100.0%", "<b>dog</b>", "cat $\\frac$"} <= words
    assert figure_bytes(figure, extension) == figure_bytes(figure, extension)


def test_labels_of_every_method_fit_beside_the_pictures():
    methods = (*METHODS, *VARIANTS, "a_method_of_my_own_with_a_long_name", "cost_in_$")
    figure = comparison_figure(
        [torch.rand(3, 16, 16)], {method: [torch.rand(2, 2)] for method in methods}, ["cat"], [0.5]
    )
    figure_bytes(figure)
    pictures = min(image.get_window_extent().x0 for image in figure.axes[0].images)
    labels = [text for text in figure.axes[0].texts if text.get_ha() == "right"]
    assert len(labels) == len(methods) + 1
    for label in labels:
        assert 0 < label.get_window_extent().x0 < label.get_window_extent().x1 < pictures, label.get_text()


def test_an_undefined_probability_is_left_out():
    figure = comparison_figure([torch.rand(3, 16, 16)], {}, ["cat"], [float("nan")])
    assert {text.get_text() for text in figure.axes[0].texts} == {"cat", "", "Image"}


def test_pictures_of_extreme_shapes_keep_it_and_their_boxes():
    images, maps = [torch.rand(3, 10, 50), torch.rand(3, 60, 12)], {"rollout": [torch.rand(2, 2)] * 2}
    boxes = [[0, 0, 50, 10], [3, 15, 9, 30]]
    axes = comparison_figure(images, maps, ["cat", "dog"], [None, None], boxes).axes[0]
    for column, (image, (x0, y0, x1, y1)) in enumerate(zip(images, boxes, strict=True)):
        picture, overlaid = (axes.images[number].get_window_extent() for number in (2 * column, 2 * column + 1))
        height, width = image.shape[1:]
        for cell in (picture, overlaid):
            assert cell.width / cell.height == pytest.approx(width / height, rel=1e-6)
        scale = picture.width / width
        expected = (picture.x0 + x0 * scale, picture.y1 - y1 * scale, picture.x0 + x1 * scale, picture.y1 - y0 * scale)
        for outline in axes.patches[2 * column : 2 * column + 2]:
            corners = outline.get_transform().transform([(0, 0), (1, 1)])
            assert corners.ravel() == pytest.approx(expected)


def test_figures_stay_out_of_the_global_state():
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    figure = comparison_figure([torch.rand(3, 16, 16)], {"rollout": [torch.rand(2, 2)]}, ["cat"], [0.5])
    assert isinstance(figure.canvas, FigureCanvasAgg)
    assert pyplot.get_fignums() == before


def test_curves_figure_states_the_areas():
    fractions = np.linspace(0, 1, 5)
    rising = MeanCurve(fractions, fractions, fractions - 0.1, fractions + 0.1)
    falling = MeanCurve(fractions, 1 - fractions / 2, 1 - fractions / 2, 1 - fractions / 2)
    figure = curves_figure({"gmarpp_l1": rising, "rollout": falling}, {"gmarpp_l1": falling, "rollout": rising})
    left, right = figure.axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["Rollout   0.750", "GMAR++ (L1)   0.500"]
    assert {line.get_color() for line in left.lines} == {line.get_color() for line in right.lines}
    assert figure_bytes(figure).startswith(b"\x89PNG")
    assert left.get_ylim() == right.get_ylim() == (0, 1)
    logits, normalized = (curves_figure({"a": rising}, {"a": rising}, *of) for of in (("logit",), ("sigmoid", True)))
    assert logits.axes[0].get_ylim()[0] < -0.1 < 1.1 < logits.axes[0].get_ylim()[1]
    assert normalized.axes[0].get_ylim()[0] < -0.1
    assert normalized.axes[0].get_ylabel() == "sigmoid, normalized"


def test_figure_bytes_names_the_formats_there_are():
    with pytest.raises(ValueError, match=r"bmp.*png, pdf, svg"):
        figure_bytes(comparison_figure([torch.rand(3, 16, 16)], {}, ["cat"], [0.5]), "bmp")


GRAY = torch.full((3, 40, 40), 0.4)
SIGNED = np.kron([[-4.0, 0.0], [0.0, 2.0]], np.ones((4, 4))).astype(np.float32)


def corners(picture):
    return [picture[y, x].astype(int) for y, x in ((0, 0), (0, -1), (-1, -1))]


def test_signed_maps_are_scaled_by_their_largest_size():
    maps = torch.tensor([[[1.0, -4.0], [2.0, torch.nan]], [[0.5, 0.25], [0.0, 0.125]], [[0.0] * 2] * 2])
    assert normalize_signed_map(maps).tolist() == [
        [[0.25, -1.0], [0.5, 0.0]],
        [[1.0, 0.5], [0.0, 0.25]],
        [[0.0, 0.0], [0.0, 0.0]],
    ]


@pytest.mark.parametrize("opacity", [0.25, 0.5, 1.0])
def test_a_signed_overlay_mixes_the_colors_of_its_sign_and_leaves_zero_alone(opacity):
    against, zero, for_the_class = corners(overlay(GRAY, SIGNED, opacity=opacity, signed_maps="diverging"))
    share = 1 - (1 - opacity) ** 2
    # One scale for both signs: the largest size, 4, makes 2 a half, which covers as much as the largest.
    for color, value in ((against, -1), (for_the_class, 0.5)):
        expected = (1 - share) * 102 + share * diverging_table()[128 + round(127 * value)]
        assert np.abs(color - expected).max() <= 2
    assert zero.tolist() == [102, 102, 102]


def test_the_positive_part_alone_is_drawn_from_zero_in_the_colors_of_other_maps():
    positive = overlay(GRAY, SIGNED, "viridis", 0.5, "positive")
    assert (positive == overlay(GRAY, SIGNED.clip(0), "viridis", 0.5)).all()
    against, zero, for_the_class = corners(positive)
    low, high = colormap_table("viridis")[[0, 255]] / 2
    assert np.abs(against - (51 + low)).max() <= 1
    assert np.abs(zero - (51 + low)).max() <= 1
    assert np.abs(for_the_class - (51 + high)).max() <= 1
    # Without a map's minimum being taken for zero, even relevance for the class is drawn as such.
    even = overlay(GRAY, np.full((2, 2), 3.0), "viridis", 0.5, "positive")
    assert np.abs(even - (51 + high)).max() <= 1


def test_interpolation_shows_no_relevance_against_the_class_that_the_map_does_not_have():
    peak = np.zeros((5, 5))
    peak[2, 2] = 1
    picture = overlay(GRAY, peak, signed_maps="diverging").astype(int)
    assert (picture[..., 0] - picture[..., 2]).min() >= 0
    assert (picture[..., 0] - picture[..., 2]).max() > 100


def test_ways_to_draw_are_checked():
    with pytest.raises(ValueError, match="unknown signed_maps 'both': choose from diverging, positive"):
        overlay(GRAY, SIGNED, signed_maps="both")
    with pytest.raises(ValueError, match="opacity: expected 0 to 1, got 50"):
        MapStyle(opacity=50)


@pytest.mark.parametrize(
    ("signed_maps", "words"),
    [
        ("diverging", [["min", "max"], ["against\nthe class", "0", "for the\nclass"]]),
        ("positive", [["min", "max"], ["0", "max"]]),
    ],
)
def test_the_comparison_draws_signed_methods_as_such_and_says_what_colors_mean(signed_maps, words):
    maps = {"rollout": [SIGNED], "mine": [SIGNED]}
    style = MapStyle(signed_maps=signed_maps)
    figure = comparison_figure([GRAY], maps, ["cat"], [0.5], signed_methods=["mine"], style=style)
    figure_bytes(figure)
    unsigned, signed = (np.asarray(image.get_array()) for image in figure.axes[0].images[1:])
    assert (unsigned == Backdrop(pixels(GRAY), style, 112).overlay(SIGNED, signed=False)).all()
    assert (signed == Backdrop(pixels(GRAY), style, 112).overlay(SIGNED, signed=True)).all()
    bars = figure.axes[1:]
    assert sorted([text.get_text() for text in bar.get_yticklabels()] for bar in bars) == sorted(words)
    above, below = sorted((bar.get_tightbbox() for bar in bars), key=lambda box: -box.y0)
    assert above.y0 > below.y1
    assert min(below.x0, below.y0) >= 0
    assert max(above.x1, below.x1) <= figure.bbox.width


def test_an_explanation_draws_signed_maps_as_such():
    explanation = Explanation(
        {"mine": torch.from_numpy(SIGNED)[None], "rollout": torch.from_numpy(SIGNED)[None]},
        torch.tensor([0]),
        torch.zeros(1, 2),
        torch.zeros(1),
        GRAY[None],
        signed_methods=("mine",),
    )
    drawn = {
        choice: np.asarray(explanation.overlay(0, "mine", signed_maps=choice)) for choice in ("diverging", "positive")
    }
    assert (drawn["diverging"] == overlay(GRAY, SIGNED, signed_maps="diverging")).all()
    assert (drawn["positive"] == overlay(GRAY, SIGNED, signed_maps="positive")).all()
    assert (np.asarray(explanation.overlay(0, "rollout")) == overlay(GRAY, SIGNED)).all()
    assert len(explanation.show().axes) == 3
