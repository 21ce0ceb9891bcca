import dataclasses

import numpy as np
import pytest

from gmarpp.labels import METRIC_LABELS, metric_label
from gmarpp.metrics import METRICS
from gmarpp.run.summary import CurveSum, bootstrap, higher_is_better, leaders, paired_difference


def test_bootstrap_interval_is_that_of_the_normal_approximation_for_many_images():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=(2000, 1))
    interval = bootstrap(values)[0]
    half = 1.96 * values.std() / np.sqrt(2000)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.012)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.012)
    assert interval.n == 2000


def test_bootstrap_of_two_values_by_hand():
    # A resample of (0, 1) has mean 0 with probability 1/4, 1/2 with 1/2 and 1 with 1/4.
    interval = bootstrap(np.array([[0.0], [1.0]]))[0]
    assert (interval.mean, interval.low, interval.high) == (0.5, 0.0, 1.0)
    narrow = bootstrap(np.array([[0.0], [1.0]]), confidence=0.4)[0]
    assert (narrow.low, narrow.high) == (0.5, 0.5)


def test_bootstrap_is_reproducible_and_its_columns_share_resamples():
    values = np.random.default_rng(1).random((300, 2))
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values, seed=1) != bootstrap(values)
    assert dataclasses.astuple(bootstrap(values)[1]) == pytest.approx(dataclasses.astuple(bootstrap(values[:, 1:])[0]))


def test_bootstrap_leaves_undefined_values_out():
    values = np.array([[1.0, np.nan, np.nan], [3.0, 5.0, np.nan], [2.0, np.nan, np.nan]])
    full, one, none = bootstrap(values)
    assert full.n == 3
    assert (one.mean, one.low, one.high, one.n) == (5.0, 5.0, 5.0, 1)
    assert np.isnan([none.mean, none.low, none.high]).all()
    assert none.n == 0


@pytest.mark.parametrize("values", [np.empty((0, 2)), np.full((3, 2), np.nan)])
def test_bootstrap_of_nothing_is_undefined(values):
    assert [(np.isnan(interval.mean), interval.n) for interval in bootstrap(values)] == [(True, 0)] * 2


def test_paired_difference_sees_what_single_intervals_hide():
    generator = np.random.default_rng(2)
    difficulty = generator.normal(0, 10, 400)
    first = difficulty + 0.5 + generator.normal(0, 0.5, 400)
    one, other = bootstrap(np.stack([first, difficulty], axis=1))
    assert one.low < other.mean < one.high
    difference = paired_difference(first, difficulty)
    assert 0.4 < difference.low < difference.mean < difference.high < 0.6


def test_leaders_are_one_where_the_interval_says_so_and_ties_elsewhere():
    generator = np.random.default_rng(3)
    base = generator.normal(0, 1, 500)
    values = {"best": base + 1, "same": base + 1 + generator.normal(0, 1, 500), "worst": base}
    assert leaders(values, higher=True) == ["best", "same"] or leaders(values, higher=True) == ["same", "best"]
    assert leaders(values, higher=False) == ["worst"]
    assert leaders({"a": base, "b": base}, higher=True) == ["a", "b"]
    assert leaders({"a": np.full(30, np.nan), "b": np.ones(30)}, higher=True) == ["b"]
    assert leaders({"a": np.full(3, np.nan)}, higher=True) == []


def test_few_images_have_no_leaders():
    base = np.random.default_rng(0).normal(0, 1, 40)
    values = {"far": base + 100, "behind": base}
    assert leaders({method: column[:30] for method, column in values.items()}, higher=True) == ["far"]
    assert leaders({method: column[:29] for method, column in values.items()}, higher=True) == []
    values["behind"][:11] = np.nan
    assert leaders(values, higher=True) == [], "29 images have values of both"


def test_every_metric_has_a_label_and_a_direction():
    assert set(METRIC_LABELS) == set(METRICS)
    assert metric_label("deletion_auc") == "Deletion AUC"
    lower = {metric for metric in METRICS if higher_is_better(metric) is False}
    assert lower == {"average_drop", "deletion_auc", "max_sensitivity", "infidelity"}
    assert higher_is_better("sparseness") is None
    assert higher_is_better("of_my_own") is None


def test_curve_sum_gives_the_mean_over_all_batches():
    curves = np.random.default_rng(4).random((7, 5))
    total = CurveSum(np.linspace(0, 1, 5))
    total.add(curves[:3])
    total.add(curves[3:])
    mean = total.mean()
    half = 1.96 * curves.std(axis=0, ddof=1) / np.sqrt(7)
    np.testing.assert_allclose(mean.mean, curves.mean(axis=0))
    np.testing.assert_allclose(mean.high - mean.mean, half)
    np.testing.assert_allclose(mean.low, mean.mean - half)


def test_a_curve_that_is_not_defined_is_left_out_of_the_mean():
    curves = np.array([[0.0, 0.5, 1.0], [np.nan, np.nan, np.nan], [0.2, 0.7, 0.8]])
    total, rest = CurveSum(np.linspace(0, 1, 3)), CurveSum(np.linspace(0, 1, 3))
    total.add(curves)
    rest.add(curves[[0, 2]])
    assert total.n == 2
    for name in ("mean", "low", "high"):
        np.testing.assert_array_equal(getattr(total.mean(), name), getattr(rest.mean(), name))
    none = CurveSum(np.linspace(0, 1, 3))
    none.add(curves[1:2])
    assert np.isnan(none.mean().auc)


def test_area_under_a_mean_curve_by_hand():
    total = CurveSum(np.array([0.0, 0.25, 1.0]))
    total.add(np.array([[0.0, 1.0, 1.0]]))
    assert total.mean().auc == pytest.approx(0.125 + 0.75)
