"""The notebook, executed cell by cell as a kernel does, without one."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gmarpp.metrics.functional import insertion_auc

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples/first_look.ipynb"


def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_no_outputs_are_kept():
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)


def test_it_runs_from_its_own_folder_and_saves_what_it_shows(tmp_path, monkeypatch, capsys):
    data = pytest.importorskip("skimage.data")
    (tmp_path / "examples").mkdir()
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path / "examples")
    plt.switch_backend("Agg")
    names = {}
    for number, cell in enumerate(cells()):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)

    printed = capsys.readouterr().out.splitlines()
    insertion = {}
    for method, curves in names["curves"].items():
        insertion[method] = insertion_auc(curves.fractions, curves.insertion).item()
        assert any(f"insertion {insertion[method]:.3f}" in line for line in printed), method
    assert len(printed) == len(insertion) == 5
    with torch.no_grad():
        logits = names["model"](names["images"])
    cat, coffee = (names["model"].class_names.index(name) for name in ("Egyptian cat", "espresso"))
    torch.testing.assert_close(names["versus"].scores, logits[:, cat] - logits[:, coffee], rtol=1e-3, atol=1e-3)

    folder = tmp_path / "results/first_look"
    assert load_file(folder / "maps.safetensors")["maps/legrad"].shape == (2, 8, 8)
    photos = [data.chelsea(), data.coffee()]
    for index, photo in enumerate(photos):
        with Image.open(folder / f"overlays/gmarpp_l1/000{index}.png") as drawn:
            assert np.asarray(drawn).shape == photo.shape
    assert (folder / "methods.png").stat().st_size > 10_000
    plt.close("all")
