import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_clean_keeps_what_users_made(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    kept = [tmp_path / name / "file" for name in ("logs", "results", "data", "checkpoints")]
    made = [tmp_path / name / "file" for name in (".venv", "build", "dist", ".ruff_cache", "gmarpp/__pycache__")]
    for path in kept + made:
        path.parent.mkdir(parents=True)
        path.touch()

    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)

    assert all(path.is_file() for path in kept)
    assert not any(path.parent.exists() for path in made)


def test_a_clone_beside_a_script_does_not_shadow_the_package(tmp_path):
    """A clone's folder is named like the package and holds no __init__.py of its own."""
    (tmp_path / "gmarpp").mkdir()
    script = tmp_path / "script.py"
    script.write_text("import importlib.util; print(importlib.util.find_spec('gmarpp').origin)")

    run = subprocess.run([sys.executable, script], cwd=tmp_path, check=True, capture_output=True, text=True)

    assert Path(run.stdout.strip()).name == "__init__.py"
