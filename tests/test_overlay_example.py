import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gmarpp.network.build import build_model
from gmarpp.network.files.save import save_weights

SCRIPT = Path(__file__).parents[1] / "examples" / "overlay_on_photo.py"


def test_the_example_lays_maps_on_a_whole_photograph(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = build_model("vit_tiny_patch16_224", 3, 32, {"patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2})
    save_weights(model, tmp_path / "vit.safetensors")
    x, y = np.meshgrid(np.arange(120) * 2, np.arange(80) * 3)
    photo = np.stack([x, y, 255 - x], axis=-1).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    monkeypatch.setattr(
        sys, "argv", ["", *(str(tmp_path / name) for name in ("photo.png", "vit.safetensors", "explained"))]
    )
    runpy.run_path(str(SCRIPT), run_name="__main__")
    folder = tmp_path / "explained"
    assert load_file(folder / "maps.safetensors")["maps/rollout"].shape == (1, 4, 4)
    assert (folder / "figure.pdf").read_bytes().startswith(b"%PDF")
    with Image.open(folder / "overlays" / "gmarpp_l1" / "0000.png") as drawn:
        changed = (np.asarray(drawn) != photo).any(axis=2)
    assert drawn.size == (120, 80)
    # Timm's crop of 0.9 of the short side, in whole pixels of the resized picture: a square in the middle.
    rows, columns = np.nonzero(changed)
    edges = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    assert edges == pytest.approx((24, 4, 96, 76), abs=2)
    assert changed[6:74, 26:94].mean() > 0.9
