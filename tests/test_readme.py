import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gmarpp
from gmarpp.cli.explain import explain_main

ROOT = Path(__file__).parent.parent


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with the shipped checkpoint and the photographs that the demo leaves."""
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    (tmp_path / "results/demo/photographs").mkdir(parents=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8))
    picture.save(tmp_path / "results/demo/photographs/cat.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_that_explains_a_folder_runs(clone):
    command = next(block for block in blocks("README.md", "bash") if "explain.py predict" in block)
    arguments = shlex.split(command.replace("\\\n", ""))[2:]
    explain_main([*arguments, "--trainer.accelerator", "cpu", "--data.num_workers", "0", "--explain.steps", "2"])
    assert len(gmarpp.load_explanations(clone / "results/photos").rows) == 1


@pytest.mark.parametrize(
    "page", ["README.md", "docs/index.md", "docs/own_code.md", "docs/networks.md", "docs/measure.md"]
)
def test_python_on_the_pages_runs(clone, page):
    names = {}
    for block in blocks(page, "python"):
        exec(compile(block.replace('"vit_small_patch16_224"', '"vit_tiny_patch16_224", depth=2'), page, "exec"), names)
    assert names["e"].maps["gmarpp_l1"].isfinite().all()


def test_linked_files_exist():
    for page in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("*/README.md"),
    ):
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
