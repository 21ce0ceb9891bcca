import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

import gmarpp

ROOT = Path(__file__).parents[1]
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


SUBPACKAGES = ("attribution", "callbacks", "data", "metrics", "perturbation")


@pytest.mark.parametrize("name", [*gmarpp.__all__, *SUBPACKAGES, "__version__"])
def test_every_public_name_is_listed_and_there(name):
    assert name in dir(gmarpp)
    assert getattr(gmarpp, name) is not None


def test_a_misspelled_name_is_not_there():
    assert not hasattr(gmarpp, "explanation")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this tree, unpacked as it would be installed."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, ROOT]
    run = subprocess.run(build, cwd=folder, capture_output=True, text=True)
    if run.returncode and "No matching distribution found for hatchling" in run.stderr:
        pytest.skip("hatchling, which builds the wheel, cannot be downloaded here")
    assert run.returncode == 0, run.stderr
    (path,) = folder.glob("*.whl")
    ZipFile(path).extractall(folder / "installed")
    return folder / "installed"


def test_wheel_holds_the_package_and_its_configurations_and_nothing_else(wheel):
    files = {path.relative_to(wheel) for path in wheel.rglob("*") if path.is_file()}
    inside = {path for path in files if path.parts[0] == "gmarpp"}
    expected = {path.relative_to(ROOT) for path in (ROOT / "gmarpp").rglob("*") if path.is_file()}
    expected |= {"gmarpp" / path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*") if path.is_file()}
    assert inside == {path for path in expected if path.suffix != ".pyc"}
    assert inside >= {Path("gmarpp/run/report.html"), Path("gmarpp/py.typed"), Path("gmarpp/configs/trainer/cpu.yaml")}
    assert {path.parts[0].rpartition(".")[2] for path in files - inside} == {"dist-info"}
    (entry_points,) = wheel.glob("*.dist-info/entry_points.txt")
    assert "gmarpp = gmarpp.cli:main" in entry_points.read_text().splitlines()


def test_wheel_brings_its_own_configurations(wheel, tmp_path):
    code = "import gmarpp.cli; print(gmarpp.__file__); gmarpp.cli.main(['configs', 'mine'])"
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert run.stdout.splitlines()[0] == str(wheel / "gmarpp" / "__init__.py")
    copied = sorted(path.relative_to(tmp_path / "mine") for path in (tmp_path / "mine").rglob("*.*"))
    assert copied == sorted(path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.*"))
