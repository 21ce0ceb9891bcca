import math

import pytest
import torch
from sklearn.metrics import average_precision_score
from torchmetrics.functional.classification import binary_jaccard_index

from gmarpp.metrics import EnergyInside, IoU, PointingGame
from gmarpp.metrics.functional import (
    average_precision,
    boxes_to_masks,
    energy_inside,
    iou,
    pixel_accuracy,
    pointing_game,
)

FUNCTIONS = (pointing_game, energy_inside, iou, pixel_accuracy, average_precision)
# Min-max 0, 1/4, 3/4, 1 of mean 1/2: the bottom row is highlighted.
MAP = torch.tensor([[[2.0, 3.0], [5.0, 6.0]]])


def masks(*rows):
    return torch.tensor([rows], dtype=torch.bool)


@pytest.mark.parametrize(
    ("mask", "pointing", "energy", "overlap", "accuracy", "precision"),
    [
        (masks([0, 0], [1, 1]), 1, 7 / 8, 1, 1, 1),
        (masks([0, 0], [0, 1]), 1, 1 / 2, 1 / 2, 3 / 4, 1),
        (masks([1, 1], [0, 0]), 0, 1 / 8, 0, 0, (1 / 3 + 2 / 4) / 2),
        (masks([0, 1], [1, 0]), 0, 1 / 2, 1 / 3, 1 / 2, (1 / 2 + 2 / 3) / 2),
        (masks([1, 1], [1, 1]), 1, 1, 1 / 2, 1 / 2, 1),
    ],
)
def test_values_by_hand(mask, pointing, energy, overlap, accuracy, precision):
    for function, value in zip(FUNCTIONS, (pointing, energy, overlap, accuracy, precision), strict=True):
        assert function(MAP, mask).item() == pytest.approx(value), function.__name__


def test_thresholds_apply_to_the_minmax_map():
    mask = masks([0, 1], [1, 1])
    assert iou(MAP, mask, threshold=0.2).item() == 1
    assert iou(MAP, mask, threshold=0.8).item() == pytest.approx(1 / 3)
    assert pixel_accuracy(MAP, mask, threshold=0.8).item() == 0.5
    metric = IoU(threshold=0.8)
    metric.update(MAP, mask)
    assert metric.compute().item() == pytest.approx(1 / 3)


def test_against_other_implementations_on_upsampled_maps():
    torch.manual_seed(0)
    maps, mask = torch.rand(3, 4, 4), torch.rand(3, 16, 20) > 0.7
    upsampled = torch.nn.functional.interpolate(maps[:, None].double(), size=(16, 20), mode="bilinear")[:, 0]
    for position, (relevance, truth) in enumerate(zip(upsampled, mask, strict=True)):
        expected = average_precision_score(truth.flatten(), relevance.flatten().round(decimals=6))
        assert average_precision(maps, mask, "none")[position].item() == pytest.approx(expected, abs=1e-6)
        expected = binary_jaccard_index((relevance > relevance.mean()).int(), truth.int())
        torch.testing.assert_close(iou(maps, mask, reduction="none")[position], expected)


def test_images_without_an_object_do_not_count():
    maps, mask = MAP.expand(3, 2, 2), torch.cat([masks([0, 0], [1, 1]), masks([0, 0], [0, 0]), masks([1, 1], [0, 0])])
    for function in FUNCTIONS:
        values = function(maps, mask, reduction="none")
        assert values.isnan().tolist() == [False, True, False]
        assert function(maps, mask).item() == pytest.approx(values[[0, 2]].mean().item())
        assert math.isnan(function(maps[1:2], mask[1:2]).item())
    metric = PointingGame()
    metric.update(maps, mask)
    metric.update(maps[1:2], mask[1:2])
    assert metric.compute().item() == 0.5


def test_constant_map_highlights_nothing_and_points_at_the_first_pixel():
    maps, mask = torch.full((1, 2, 2), 7.0), masks([1, 0], [0, 0])
    values = [function(maps, mask).item() for function in FUNCTIONS]
    assert values == [1, 0, 0, 0.75, 0.25]


@pytest.mark.parametrize("value", [0.150035, 1 / 3, -2.7, 1e-30, 3e38])
def test_constant_maps_are_zero_on_every_grid(value):
    for side in range(7, 38):
        mask = torch.zeros(1, 3 * side + 2, 5 * side, dtype=torch.bool)
        mask[:, :side, side:] = True
        share = mask.float().mean().item()
        values = [function(torch.full((1, side, side), value), mask).item() for function in FUNCTIONS]
        assert values == pytest.approx([0, 0, 0, 1 - share, share]), side


def test_the_largest_and_the_smallest_ranges_are_scaled_alike():
    mask = masks([0, 1], [1, 0])
    for scale in (1e-38, 1.0, 8e37):
        assert energy_inside(scale * (MAP - 4), mask).item() == pytest.approx(1 / 3)
        assert iou(scale * (MAP - 4), mask).item() == pytest.approx(1 / 3)


def test_relevance_against_the_class_by_hand():
    maps = torch.tensor([[[-6.0, 0.0], [1.0, 3.0]]])
    left, right = masks([1, 0], [1, 0]), masks([0, 1], [0, 1])
    # The patch against the class is neither energy nor the most relevant pixel, and ranks behind the one without any.
    assert [energy_inside(maps, mask).item() for mask in (left, right)] == [0.25, 0.75]
    assert [pointing_game(maps, mask).item() for mask in (left, right)] == [0, 1]
    assert [average_precision(maps, mask).item() for mask in (left, right)] == pytest.approx([1 / 2, 5 / 6])
    # Min-max 0, 2/3, 7/9, 1 of mean 11/18.
    assert [iou(maps, mask).item() for mask in (left, right)] == pytest.approx([1 / 4, 2 / 3])
    assert [pixel_accuracy(maps, mask).item() for mask in (left, right)] == [0.25, 0.75]


def test_without_relevance_for_the_class_there_is_no_energy():
    assert energy_inside(-MAP, masks([1, 1], [1, 1])).item() == 0
    assert pointing_game(-MAP, masks([1, 0], [0, 0])).item() == 1


@pytest.mark.parametrize("side", [7, 14, 37])
def test_the_pointing_game_takes_the_first_of_equal_pixels(side):
    # Two peaks inside the map, equal before interpolation and apart from each other by an ulp after it.
    maps = torch.zeros(1, side, side)
    maps[0, 2, 4] = maps[0, 4, 1] = 0.150035
    for scale in (3, 5, 11):
        mask = torch.zeros(1, scale * side, scale * side, dtype=torch.bool)
        mask[:, 2 * scale + scale // 2, 4 * scale + scale // 2] = True
        assert pointing_game(maps, mask).item() == 1
        assert pointing_game(maps, ~mask).item() == 0


def test_pixels_that_equal_the_mean_are_not_highlighted():
    # A ramp along the rows: its middle column is its mean, whatever the interpolation leaves in the last bit.
    for width in range(7, 38, 2):
        ramp = torch.arange(width).float().expand(1, width, width).contiguous()
        mask = torch.zeros(1, 3 * width, 3 * width, dtype=torch.bool)
        mask[:, :, (3 * width + 1) // 2 :] = True
        assert iou(ramp, mask).item() == 1, width


def test_maps_that_are_not_finite():
    maps = torch.rand(3, 2, 2)
    maps[1, 0, 0] = torch.nan
    for function in FUNCTIONS:
        with pytest.raises(ValueError, match=r"NaN or infinite values in the maps of images \[1\]"):
            function(maps, torch.ones(3, 4, 4))


def test_shapes():
    with pytest.raises(ValueError, match=r"masks: expected shape \(1, H, W\)"):
        iou(MAP, torch.ones(2, 2, 2))
    with pytest.raises(ValueError, match="maps: expected floating point"):
        iou(MAP[None], torch.ones(1, 2, 2))
    with pytest.raises(ValueError, match="maps: expected floating point"):
        iou(MAP.long(), torch.ones(1, 2, 2))


class TestBoxes:
    def test_pixels_whose_center_is_inside(self):
        mask = boxes_to_masks(torch.tensor([[1.0, 0.0, 3.0, 2.0], [0.6, 1.4, 2.5, 3.0]]), (3, 4))
        assert mask[0].int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
        assert mask[1].int().tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]]

    def test_area_of_boxes_with_whole_edges(self):
        torch.manual_seed(0)
        low = torch.randint(0, 20, (50, 2))
        boxes = torch.cat([low, low + torch.randint(1, 12, (50, 2))], dim=1)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        assert torch.equal(boxes_to_masks(boxes, (32, 32)).sum((1, 2)), area)

    def test_empty_boxes_give_empty_masks_which_do_not_count(self):
        empty = torch.tensor([[2.0, 0.0, 2.0, 4.0], [3.0, 0.0, 1.0, 4.0], [torch.nan] * 4, [9.0, 9.0, 12.0, 12.0]])
        mask = boxes_to_masks(empty, (4, 4))
        assert not mask.any()
        assert energy_inside(MAP.expand(4, 2, 2), mask, "none").isnan().all()
        metric = EnergyInside()
        metric.update(MAP.expand(4, 2, 2), mask)
        assert metric.compute().isnan()

    def test_shape(self):
        with pytest.raises(ValueError, match=r"boxes: expected shape \(B, 4\)"):
            boxes_to_masks(torch.rand(4), (2, 2))


def test_average_precision_does_not_depend_on_the_default_dtype():
    generator = torch.Generator().manual_seed(0)
    maps, masks = torch.rand(4, 8, 8, generator=generator), torch.rand(4, 32, 32, generator=generator) > 0.6
    expected = average_precision(maps, masks, reduction="none")
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = average_precision(maps, masks, reduction="none")
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("value", [255.0, -1.0, math.nan, 0.3])
def test_masks_of_other_values_than_0_and_1_are_refused(value):
    masks = torch.tensor([[[1.0, value], [0.0, 0.0]]])
    with pytest.raises(ValueError, match="masks: expected true or 1 on the object"):
        pointing_game(torch.eye(2)[None], masks)


@pytest.mark.parametrize("threshold", [2.0, -0.1, math.nan])
def test_thresholds_are_shares_of_the_minmax_map(threshold):
    with pytest.raises(ValueError, match=r"threshold: expected a number in \[0, 1\]"):
        iou(torch.eye(2)[None], torch.eye(2)[None], threshold=threshold)


@pytest.mark.parametrize("metric", [pointing_game, energy_inside, iou, pixel_accuracy, average_precision])
def test_no_images_have_no_values(metric):
    maps, masks = torch.zeros(0, 4, 4), torch.zeros(0, 8, 8, dtype=torch.bool)
    assert metric(maps, masks, reduction="none").shape == (0,)
    assert metric(maps, masks).isnan()
