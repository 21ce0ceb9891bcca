import pytest
import torch

from gmarpp.metrics import Infidelity, MaxSensitivity
from gmarpp.metrics.functional import infidelity, max_sensitivity


def test_the_largest_change_counts():
    changes = torch.tensor([[0.1, 0.4, 0.2], [0.3, 0.3, 0.0], [0.1, torch.nan, 0.2]])
    values = max_sensitivity(changes, reduction="none")
    assert values[:2].tolist() == pytest.approx([0.4, 0.3])
    assert values[2].isnan()
    metric = MaxSensitivity()
    metric.update(changes[:1])
    metric.update(changes[1:])
    assert metric.compute().item() == pytest.approx(0.35)


def test_relevance_is_scaled_before_it_is_compared():
    drops = torch.tensor([[1.0, 3.0], [0.1, 0.3], [2.0, 2.0], [1.0, 3.0]])
    removed = torch.tensor([[1.0, 2.0], [1e-5, 3e-5], [0.0, 0.0], [-1.0, -2.0]])
    # Factors 7/5, 1e4, none, and none as it has no sign: (0.4² + 0.2²) / 2, 0, (2² + 2²) / 2, (1² + 3²) / 2
    expected = [0.1, 0.0, 4.0, 5.0]
    assert infidelity(removed, drops, reduction="none").tolist() == pytest.approx(expected, abs=1e-7)
    assert infidelity(1000 * removed, drops, reduction="none").tolist() == pytest.approx(expected, abs=1e-7)
    metric = Infidelity()
    metric.update(removed, drops)
    assert metric.compute().item() == pytest.approx(9.1 / 4)


def test_shapes_are_named():
    with pytest.raises(ValueError, match=r"map_changes of one shape \(images, samples\), got \(3,\)"):
        max_sensitivity(torch.rand(3))
    with pytest.raises(ValueError, match=r"removed_relevance and score_drops of .* got \(2, 3\) and \(2, 4\)"):
        infidelity(torch.rand(2, 3), torch.rand(2, 4))
