import re
import shlex
from pathlib import Path

import numpy as np
from PIL import Image

from gmarpp.cli.explain import explain_main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_first_predict_command_and_all_python_run(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    (tmp_path / "photos").mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8))
    for path in ("photo.jpg", "photos/photo.jpg"):
        picture.save(tmp_path / path)
    monkeypatch.chdir(tmp_path)

    command = next(block for block in blocks("bash") if "explain.py predict" in block)
    arguments = shlex.split(command.replace("\\\n", ""))[2:]
    explain_main([*arguments, "--trainer.accelerator", "cpu", "--data.num_workers", "0", "--explain.steps", "2"])
    names = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert 0 <= names["insertion"].compute() <= 1
    assert len(names["e"].rows) == 1


def test_linked_files_exist():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")):
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
