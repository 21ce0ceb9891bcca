import pytest
from fake_run import contents, predict

from gmarpp import labels
from gmarpp.attribution import registry as methods
from gmarpp.metrics import registry as metrics

KNOWN = (
    *(labels.METHOD_LABELS, labels.METRIC_LABELS, labels._METHOD_COLORS),
    *(methods._OWN, metrics.METRICS, metrics._FUNCTIONS),
)


@pytest.fixture(autouse=True)
def _own_code_is_forgotten():
    """What a test registers, no other test knows."""
    before = [dict(each) for each in KNOWN]
    yield
    for each, kept in zip(KNOWN, before, strict=True):
        each.clear()
        each.update(kept)


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """All files of an uninterrupted run of `fake_run`."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    predict(folder)
    return contents(folder)
