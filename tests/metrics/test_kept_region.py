import pytest
import torch

from gmarpp.metrics import AverageDrop, AverageGain, AverageIncrease
from gmarpp.metrics.functional import average_drop, average_gain, average_increase

FULL = torch.tensor([0.8, 0.5, 0.2, 0.4])
KEPT = torch.tensor([0.2, 0.75, 0.2, 0.0])


def test_values_by_hand():
    # Drops 3/4, 0, 0, 1; rises in one image of four, by half of what was missing.
    torch.testing.assert_close(average_drop(FULL, KEPT, "none"), torch.tensor([75.0, 0.0, 0.0, 100.0]))
    torch.testing.assert_close(average_increase(FULL, KEPT, "none"), torch.tensor([0.0, 100.0, 0.0, 0.0]))
    torch.testing.assert_close(average_gain(FULL, KEPT, "none"), torch.tensor([0.0, 50.0, 0.0, 0.0]))
    assert average_drop(FULL, KEPT).item() == pytest.approx(43.75)
    assert average_increase(FULL, KEPT).item() == 25
    assert average_gain(FULL, KEPT).item() == 12.5


def test_accumulates_over_batches_of_different_size():
    for metric, value in ((AverageDrop(), 43.75), (AverageIncrease(), 25), (AverageGain(), 12.5)):
        metric.update(FULL[:1], KEPT[:1])
        metric.update(FULL[1:], KEPT[1:])
        assert metric.compute().item() == pytest.approx(value)


def test_probabilities_of_0_and_1():
    full, kept = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 0.5, 1.0, 0.5])
    assert average_drop(full, kept, "none").tolist() == [0, 0, 0, 50]
    assert average_gain(full, kept, "none").tolist() == [0, 50, 0, 0]
    assert average_increase(full, kept, "none").tolist() == [0, 100, 0, 0]


def test_logits_out_of_range_do_not_count():
    full, kept = torch.tensor([-1.0, 2.0, 0.5]), torch.tensor([-2.0, 1.0, 0.25])
    assert average_drop(full, kept, "none").isnan().tolist() == [True, False, False]
    assert average_drop(full, kept).item() == 50
    assert average_gain(full, kept, "none").isnan().tolist() == [False, True, False]
    metric = AverageDrop()
    metric.update(full, kept)
    assert metric.compute().item() == 50


def test_nan_scores_do_not_count():
    full = torch.tensor([torch.nan, 0.5, 0.5, 0.0, 1.0])
    kept = torch.tensor([0.1, torch.nan, 0.6, torch.nan, torch.nan])
    for function in (average_drop, average_increase, average_gain):
        assert function(full, kept, "none").isnan().tolist() == [True, True, False, True, True]
    assert average_increase(full, kept).item() == 100


@pytest.mark.parametrize("kept", [torch.rand(3), torch.rand(4, 1), torch.tensor(0.5)])
def test_shapes(kept):
    with pytest.raises(ValueError, match=r"expected full and kept of one shape \(B,\)"):
        average_drop(FULL, kept)


def test_unknown_reduction():
    with pytest.raises(ValueError, match="unknown reduction"):
        average_drop(FULL, KEPT, "sum")


@pytest.mark.parametrize(("function", "full"), [(average_drop, [0.0, 0.5]), (average_gain, [1.0, 0.5])])
def test_gradients_are_finite_where_the_value_is_0_by_definition(function, full):
    scores = torch.tensor(full, requires_grad=True)
    function(scores, torch.tensor([0.4, 0.7 if function is average_gain else 0.2])).backward()
    assert scores.grad[0] == 0
    assert scores.grad[1].abs() > 0
