import subprocess
import sys

import pytest

import gmarpp

HEAVY = ("torch", "timm", "lightning", "datasets", "matplotlib", "numpy", "jsonargparse")


def imported_by(code, folder):
    """Which heavy packages a new Python imports by running some code."""
    print_them = f"import sys; print('imported', *(name for name in {HEAVY} if name in sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\n{print_them}"], cwd=folder, check=True, capture_output=True, text=True
    )
    return run.stdout.splitlines()[-1].split()[1:]


def test_import_needs_no_torch(tmp_path):
    assert not imported_by("import gmarpp; dir(gmarpp); import gmarpp.cli", tmp_path)
    assert "torch" in imported_by("import gmarpp; gmarpp.explain", tmp_path)


@pytest.mark.parametrize("name", [*gmarpp.__all__, "__version__", "callbacks", "data", "metrics"])
def test_every_public_name_is_listed_and_there(name):
    assert name in dir(gmarpp)
    assert getattr(gmarpp, name) is not None


def test_a_misspelled_name_is_not_there():
    assert not hasattr(gmarpp, "explian")
