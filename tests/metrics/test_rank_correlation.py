import pytest
import torch
from scipy.stats import spearmanr

from gmarpp.metrics.functional import rank_correlation


def test_rank_correlation_is_spearmans():
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 5, (6, 3, 4), generator=generator).float()
    second = torch.randint(0, 5, (6, 3, 4), generator=generator).float()
    second[5] = 1
    found = rank_correlation(first, second)
    for image in range(5):
        expected = spearmanr(first[image].flatten(), second[image].flatten()).statistic
        assert found[image].item() == pytest.approx(expected, abs=1e-6)
    assert found[5] == 0
    assert rank_correlation(first[:1], -first[:1]).item() == pytest.approx(-1)
    first[2, 0, 0] = torch.nan
    assert rank_correlation(first, second).isnan().tolist() == [False, False, True, False, False, False]
