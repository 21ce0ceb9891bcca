import pytest
from fake_run import contents, predict


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """All files of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    predict(folder)
    return contents(folder)
