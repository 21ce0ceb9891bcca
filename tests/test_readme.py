import re
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent


def test_python_of_the_readme_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["e"].maps["gmarpp_l1"].shape == (1, 8, 8)
    assert 0 <= names["insertion"].compute() <= 1


def test_files_that_the_readme_links_to_exist():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")):
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
