"""Miniature data sets in the true layouts, and a trainer's stand-in."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from gmarpp.data import Preprocessing

WNIDS = ("n02124075", "n01443537", "n07920052")  # not sorted, as in the official file
PLAIN = Preprocessing((16, 16), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=(*size[::-1], 3), dtype=np.uint8))


def tiny_imagenet(folder: Path, train: int = 4, val: int = 2) -> Path:
    """Writes `folder/tiny-imagenet-200`. Boxes: of the k-th image of a class, corners k, k + 1, k + 10, k + 20."""
    root = folder / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    (root / "test" / "images").mkdir(parents=True)
    annotations = []
    for label, wnid in enumerate(WNIDS):
        images = root / "train" / wnid / "images"
        images.mkdir(parents=True)
        rows = []
        for k in range(train):
            picture(100 * label + k).save(images / f"{wnid}_{k}.JPEG")
            rows.append(f"{wnid}_{k}.JPEG\t{k}\t{k + 1}\t{k + 10}\t{k + 20}\n")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("".join(rows))
        for k in range(val):
            name = f"val_{k * len(WNIDS) + label}.JPEG"
            picture(1000 + 100 * label + k).convert("L").save(root / "val" / "images" / name)
            annotations.append((k * len(WNIDS) + label, f"{name}\t{wnid}\t0\t32\t44\t62\n"))
    picture(7).save(root / "test" / "images" / "test_0.JPEG")
    (root / "val" / "val_annotations.txt").write_text("".join(row for _, row in sorted(annotations)))
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (root / "words.txt").write_text(
        "n01443537\tgoldfish, Carassius auratus\nn02124075\tEgyptian cat\nn07920052\tespresso\nn00001740\tentity\n"
    )
    return root


def trainer(world_size: int = 1, rank: int = 0, **module: object) -> SimpleNamespace:
    """What a data module asks of a trainer."""
    return SimpleNamespace(
        world_size=world_size,
        global_rank=rank,
        num_devices=world_size,
        current_epoch=0,
        limit_train_batches=1.0,
        max_steps=-1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=None)),
        lightning_module=SimpleNamespace(**module) if module else None,
    )
