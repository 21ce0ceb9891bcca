import pytest
import torch

from gmarpp.metrics.functional import sparseness


def test_gini_by_hand():
    maps = torch.tensor(
        [[[0.0, 0.0, 0.0, 3.0]], [[2.0] * 4], [[1.0, 2.0, 3.0, 4.0]], [[-4.0, 3.0, -2.0, 1.0]], [[0.0] * 4]]
    )
    # One patch of four: 3/4. For 1, 2, 3, 4: (-3·1 - 1·2 + 1·3 + 3·4) / (4·10).
    torch.testing.assert_close(sparseness(maps, "none"), torch.tensor([0.75, 0.0, 0.25, 0.25, 0.0]))


def test_is_half_the_relative_mean_difference_and_ignores_scale():
    torch.manual_seed(0)
    maps = torch.rand(2, 5, 6)
    values = maps.flatten(1)
    expected = (values[:, :, None] - values[:, None]).abs().mean((1, 2)) / (2 * values.mean(1))
    torch.testing.assert_close(sparseness(maps, "none"), expected)
    torch.testing.assert_close(sparseness(1000 * maps, "none"), expected)


def test_nan():
    maps = torch.zeros(2, 2, 2)
    maps[1] = torch.nan
    with pytest.raises(ValueError, match=r"images \[1\]"):
        sparseness(maps)
