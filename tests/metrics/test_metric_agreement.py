import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def agreement(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("metric_agreement", BENCHMARKS / "metric_agreement.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_every_metric_agrees_with_independent_code_on_edge_cases(agreement):
    table = agreement.compare(rounds=1, seed=7, grids=(7, 12, 16))
    assert len(table.cases) == 18
    assert {metric for metric, deviation in table.deviation.items() if not deviation < 1e-6} == set()


def test_the_comparison_sees_a_value_that_only_one_side_defines(agreement):
    table = agreement.Table()
    table.add("equal", [1.0, float("nan")], [1.0, float("nan")])
    table.add("undefined", [1.0], [float("nan")])
    table.add("off", [2.0, 1.0], [2.0, 1.5])
    assert table.deviation == {"equal": 0, "undefined": float("inf"), "off": pytest.approx(1 / 3)}
