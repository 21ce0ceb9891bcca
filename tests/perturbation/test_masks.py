import pytest
import torch
import torch.nn.functional as F
from small_networks import vit
from torch import nn

import gmarpp
from gmarpp.network.extent import grid_extent
from gmarpp.perturbation import step_counts
from gmarpp.perturbation.masks import patch_extent, pixel_to_patch


def test_counts_reach_both_ends_and_are_capped_at_a_patch_per_step():
    assert step_counts(196, 28) == list(range(0, 197, 7))
    assert step_counts(64, 28)[0] == 0
    assert step_counts(64, 28)[-1] == 64
    assert len(set(step_counts(64, 28))) == 29
    assert step_counts(4, 28) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("grid", "size"), [((4, 4), (32, 32)), ((3, 5), (8, 7)), ((2, 3), (10, 11))])
def test_pixels_follow_nearest_upsampling(grid, size):
    patches = torch.arange(grid[0] * grid[1], dtype=torch.float32).view(1, 1, *grid)
    expected = F.interpolate(patches, size=size, mode="nearest").flatten().long()
    found = pixel_to_patch(grid, size, torch.device("cpu"))
    assert torch.equal(found, expected)
    assert set(found.tolist()) == set(range(grid[0] * grid[1]))


@pytest.mark.parametrize("side", [30, 31])
def test_pixels_belong_to_the_patches_that_the_network_cuts(side):
    model = vit(img_size=side)
    assert patch_extent(model, (side, side), (3, 3)) == (24, 24)
    found = pixel_to_patch((3, 3), (side, side), torch.device("cpu"), (24, 24)).view(side, side)
    seen = torch.arange(9).view(3, 3).repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert torch.equal(found[:24, :24], seen)


def test_padded_patches():
    model = vit(dynamic_img_size=True, dynamic_img_pad=True)
    assert patch_extent(model, (30, 30), (4, 4)) == (32, 32)
    assert patch_extent(model, (9, 30), (2, 4)) == (16, 32)
    found = pixel_to_patch((4, 4), (30, 30), torch.device("cpu"), (32, 32)).view(30, 30)
    seen = torch.arange(16).view(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1)[:30, :30]
    assert torch.equal(found, seen)
    explained = gmarpp.explain(model, torch.rand(1, 3, 30, 30), "rollout")
    assert explained.images.shape == (1, 3, 32, 32)


def test_maps_of_other_networks_and_grids_span_the_image():
    assert patch_extent(vit(), (32, 32), (3, 3)) == (32, 32)
    assert patch_extent(nn.Identity(), (30, 30), (3, 3)) == (30, 30)
    layout = gmarpp.Architecture(grid=lambda height, width: (3, 3), prefix_tokens=1)
    assert grid_extent(layout, 30, 30) == (30, 30)
