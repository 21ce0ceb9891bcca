import numpy as np

from gmarpp.data.probe import spread_over_classes


def test_probe_is_spread_over_classes():
    labels = np.array([3, 3, 3, 1, 1, 0, 7, 7, 7, 7])
    assert spread_over_classes(labels, 4).tolist() == [5, 3, 0, 6]
    assert spread_over_classes(labels, 6).tolist() == [5, 3, 0, 6, 4, 1]
    assert spread_over_classes(labels, 2).tolist() == [5, 0]
    assert sorted(spread_over_classes(labels, 99).tolist()) == list(range(10))
