import pytest
import torch
from own_code import install, install_package
from torchmetrics import Metric

from gmarpp.explainer import Explainer
from gmarpp.labels import metric_label
from gmarpp.metrics import METRICS, MeanOverImages, Sparseness, register_metric
from gmarpp.metrics.functional import sparseness
from gmarpp.metrics.registry import require_metric
from gmarpp.run.summary import higher_is_better


def drop_beside_peak(full, kept, maps, reduction="mean"):
    values = (full - kept) * maps.flatten(1).amax(1)
    return values.mean() if reduction == "mean" else values


class DropBesidePeak(MeanOverImages):
    higher_is_better = False

    def update(self, full, kept, maps):
        self.accumulate(drop_beside_peak(full, kept, maps, reduction="none"))


class Needy(Sparseness):
    def __init__(self, option):
        super().__init__()


class Greedy(MeanOverImages):
    def update(self, maps, logits):
        pass


def test_a_registered_metric_is_known_by_its_name():
    register_metric("drop_beside_peak", DropBesidePeak, drop_beside_peak, label="Drop beside peak")
    register_metric("drop_beside_peak", DropBesidePeak, drop_beside_peak, label="Drop beside peak")
    assert METRICS["drop_beside_peak"] is DropBesidePeak
    assert metric_label("drop_beside_peak") == "Drop beside peak"
    assert higher_is_better("drop_beside_peak") is False
    assert Explainer(metrics=["drop_beside_peak"]).metrics == ("drop_beside_peak",)


def test_another_may_take_its_place_if_asked_to():
    register_metric("mine", DropBesidePeak, drop_beside_peak)
    with pytest.raises(ValueError, match=r"'mine' is the name of another metric.*replace=True"):
        register_metric("mine", Sparseness, sparseness)
    register_metric("mine", Sparseness, sparseness, replace=True)
    assert METRICS["mine"] is Sparseness


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a/b", Sparseness, sparseness), "name of a metric: .* got 'a/b'"),
        (("insertion", Sparseness, sparseness), "none of insertion"),
        (("target_probability", Sparseness, sparseness), "got 'target_probability'"),
        (("sparseness", DropBesidePeak, drop_beside_peak), "'sparseness' is the name of another metric: give .* own$"),
        (("mine", sparseness, sparseness), "mine: expected a subclass of torchmetrics.Metric"),
        (("mine", Needy, sparseness), r"mine: expected that Needy\(\) needs no arguments"),
        (("mine", Greedy, sparseness), r"Greedy\.update: expected some of full, .* got maps, logits"),
        (("mine", Sparseness, drop_beside_peak), "expected a function that takes maps, reduction"),
        (("mine", Metric, sparseness), "mine: Metric.update"),
    ],
)
def test_what_cannot_be_registered_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        register_metric(*arguments, replace=True)
    assert "mine" not in METRICS


def test_labels_are_not_shared():
    with pytest.raises(ValueError, match="mine: 'ROAD' is the label of road"):
        register_metric("mine", Sparseness, sparseness, label="ROAD")


def test_a_packages_metrics_are_imported_when_their_name_is_used(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(install_package(tmp_path, "own_package_of_metrics"))
    with pytest.raises(ValueError, match=r"unknown metric 'valley': choose from .*sparseness, peak"):
        require_metric("valley")
    assert Explainer(metrics=["peak"]).metrics == ("peak",)
    METRICS["peak"]().update(torch.ones(2, 3, 3))


def test_a_package_that_does_not_register_what_it_announces_is_named(tmp_path, monkeypatch):
    install(tmp_path, "own_package_without", "", "[gmarpp.metrics]\nnothing = own_package_without\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="metric 'nothing', but own_package_without does not register it"):
        Explainer(metrics=["nothing"])
