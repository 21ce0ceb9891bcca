"""How much of a balanced gradient should go on to queries and keys? The shares compared on training images.

    python benchmarks/share.py --ckpt_path checkpoints/X --data TinyImageNet --data.root data --output results/share

The product's constant, `gmarpp.attribution.balanced.QUERY_KEY_SHARE`, is set for the call; everything else is the
product's. The class explained is the predicted one; images are spread evenly over the classes of the training split,
so that validation images are left for reporting. Differences are paired by image.

Writes `scores.csv` (a row per image, baseline and share; a second run adds what is missing) and `share.md`.
"""

from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import lightning as L
import torch
from jsonargparse import auto_cli
from score_table import CRITERION, ScoreTable, cell, fill, markdown_table, open_images, verdict
from torch import Tensor, nn

import gmarpp
from gmarpp.attribution import balanced
from gmarpp.data.dataset import ImageDataset
from gmarpp.data.probe import spread_over_classes
from gmarpp.files import write_atomically
from gmarpp.labels import METHOD_LABELS

SHARES = {"0": 0.0, "1/4": 0.25, "1/2": 0.5, "1": 1.0}
CHOSEN = "1/4"
METHODS = ("token_relevance", "gmarpp_balanced")
BASELINES = ("blur", "drop")


def explain(model: nn.Module, images: Tensor, names: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
    """Compute maps (B, h, w) by names such as `token_relevance, 1/4`, and the predicted classes (B,)."""
    maps: dict[str, Tensor] = {}
    for label, share in SHARES.items():
        methods = [method for method in METHODS if f"{method}, {label}" in names]
        if methods:
            with patch.object(balanced, "QUERY_KEY_SHARE", share):
                explanation = gmarpp.explain(model, images, methods)
            maps |= {f"{method}, {label}": values for method, values in explanation.maps.items()}
    return maps, explanation.target


def compare(
    data: L.LightningDataModule,
    ckpt_path: str = "checkpoints/vit_small_patch14_112.tiny_imagenet.safetensors",
    output: str = "results/share",
    images: int = 200,
    device: str = "cpu",
) -> None:
    """Score the balanced methods with every share, and write the table.

    Args:
        data: data module with a training split.
        ckpt_path: checkpoint of a Vision Transformer, as for `explain.py`.
        output: folder of the results.
        images: number of training images.
        device: that computes, for example `cpu` or `cuda:0`.
    """
    model, _ = open_images(ckpt_path, data, torch.device(device))
    source, labels = data.read_split("train")
    dataset = ImageDataset(source, labels, data.transform("predict"))
    indices = spread_over_classes(dataset.labels, images).tolist()
    table = ScoreTable(Path(output), {"ckpt_path": Path(ckpt_path).name, "steps": 8, "precision": "bfloat16"})
    names = [f"{method}, {label}" for method in METHODS for label in SHARES]
    fill(table, model, dataset, dict.fromkeys(BASELINES, indices), names, explain, steps=8, precision="bfloat16")

    rows = []
    for method in METHODS:
        for label in SHARES:
            row = [METHOD_LABELS[method], label]
            for baseline in BASELINES:
                row.append(f"{table.values(indices, baseline, f'{method}, {label}', CRITERION).mean():.3f}")
                pair = f"{method}, {label}", f"{method}, {CHOSEN}"
                difference = table.difference(indices, baseline, *pair, CRITERION)
                compared = f"{cell(difference, CRITERION, signed=True)} {verdict(difference, CRITERION)}"
                row.append("" if label == CHOSEN else compared)
            rows.append(row)
    heads = [head for baseline in BASELINES for head in (baseline, f"minus {CHOSEN}")]
    written = markdown_table(["method", "share", *heads], rows)
    write_atomically(Path(output) / "share.md", f"{images} training images\n\n{written}\n".encode())
    print(written)


if __name__ == "__main__":
    auto_cli(compare, as_positional=False)
