import pytest
import torch

from gmarpp.metrics import ROAD, DeletionAUC, InsertionAUC, InsertionDeletionGap
from gmarpp.metrics.functional import deletion_auc, insertion_auc, insertion_deletion_gap, road

FRACTIONS = torch.tensor([0.0, 0.25, 0.75, 1.0])
# Trapezoids over steps of 1/4, 1/2, 1/4: (0+4)/8 + (4+9)/4 + (9+10)/8 and (10+6)/8 + (6+1)/4 + (1+0)/8.
INSERTION = torch.tensor([[0.0, 4.0, 9.0, 10.0]])
DELETION = torch.tensor([[10.0, 6.0, 1.0, 0.0]])


def test_areas_by_hand_over_uneven_steps():
    assert insertion_auc(FRACTIONS, INSERTION).item() == 0.5 + 3.25 + 2.375
    assert deletion_auc(FRACTIONS, DELETION).item() == 2 + 1.75 + 0.125
    assert insertion_deletion_gap(FRACTIONS, INSERTION, DELETION).item() == 6.125 - 3.875


def test_metrics_average_over_images():
    insertion, deletion = torch.cat([INSERTION, 0 * INSERTION]), torch.cat([DELETION, 2 * DELETION])
    for metric, given, value in (
        (InsertionAUC(), (insertion,), 6.125 / 2),
        (DeletionAUC(), (deletion,), 3.875 * 1.5),
        (InsertionDeletionGap(), (insertion, deletion), (6.125 - 3 * 3.875) / 2),
    ):
        metric.update(FRACTIONS, *given)
        assert metric.compute().item() == pytest.approx(value)


def test_undefined_curves_do_not_count():
    insertion = torch.cat([INSERTION, torch.full((1, 4), torch.nan)])
    assert insertion_auc(FRACTIONS, insertion, "none").isnan().tolist() == [False, True]
    assert insertion_auc(FRACTIONS, insertion).item() == 6.125
    metric = InsertionAUC()
    metric.update(FRACTIONS, insertion)
    assert metric.compute().item() == 6.125


@pytest.mark.parametrize(
    ("fractions", "scores"),
    [(FRACTIONS, torch.rand(4)), (FRACTIONS, torch.rand(1, 3)), (FRACTIONS[:1], torch.rand(1, 1))],
)
def test_curve_shapes(fractions, scores):
    with pytest.raises(ValueError, match=r"expected fractions of shape \(S \+ 1,\)"):
        deletion_auc(fractions, scores)


def test_road_by_hand():
    most, least = torch.tensor([[0.5, 0.25], [0.5, 0.5]]), torch.tensor([[1.0, 0.75], [0.5, 0.0]])
    assert road(most, least, "most_relevant_first", "none").tolist() == [0.375, 0.5]
    assert road(most, least, "least_relevant_first", "none").tolist() == [0.875, 0.25]
    assert road(most, least, reduction="none").tolist() == [0.25, -0.125]
    for order, value in (("combined", 0.0625), ("most_relevant_first", 0.4375), ("least_relevant_first", 0.5625)):
        metric = ROAD(order)
        metric.update(most, least)
        assert metric.compute().item() == value
        assert metric.higher_is_better is (order != "most_relevant_first")


def test_road_input():
    with pytest.raises(ValueError, match="expected most_relevant_first and least_relevant_first of one shape"):
        road(torch.rand(2, 3), torch.rand(2, 4))
    with pytest.raises(ValueError, match="unknown order"):
        road(torch.rand(2, 3), torch.rand(2, 3), "worst_first")
