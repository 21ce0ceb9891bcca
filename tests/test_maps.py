import torch

from gmarpp.maps import minmax, rank_patches


def test_most_relevant_first_and_ties_by_index():
    maps = torch.tensor([[[0.0, 5.0, 5.0], [-1.0, 5.0, 7.0]], [[2.0] * 3] * 2])
    assert rank_patches(maps).tolist() == [[4, 1, 2, 5, 3, 0], [0, 1, 2, 3, 4, 5]]


def test_ties_stay_stable_on_large_constant_maps():
    assert rank_patches(torch.zeros(1, 40, 40)).tolist() == [list(range(1600))]


def test_minmax_of_constant_is_zero():
    assert minmax(torch.tensor([[[2.0, 2.0]], [[1.0, 3.0]]])).tolist() == [[[0, 0]], [[0, 1]]]
