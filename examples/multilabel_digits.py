"""Several handwritten digits in a picture: a multi-label network, trained from a table and explained label by label.

    python examples/multilabel_digits.py data/several_digits

Needs scikit-learn (`pip install 'gmarpp[demo]'`); seven and a half minutes on two CPU cores, no network.
"""

import csv
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

import gmarpp
from gmarpp.cli import explain_main, train_main
from gmarpp.data.digits import EDGE, NAMES, crop, draw_on

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "vit_small_patch14_112.tiny_imagenet.safetensors"
MODEL = ["--model.architecture=vit_small_patch14_dinov2", f"--model.weights={CHECKPOINT}", "--model.optimizer.lr=4e-4"]
METHODS = ("gmarpp_l1", "gmarpp_balanced", "rollout", "random")


def write_pictures(folder: Path, train: int, val: int, seed: int = 0) -> Path:
    """Write pictures of one to three different digits, and a table with a row for each digit and its box."""
    digits, generator = load_digits(), np.random.default_rng(seed)
    photographs = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    held_out = np.arange(len(digits.target)) % 5 == 0  # no handwritten sample is in both splits
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "digits.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "label", "x0", "y0", "x1", "y1", "split"])
        for number in range(train + val):
            split = "train" if number < train else "val"
            picture = crop(photographs[generator.integers(2)], generator)
            labels = generator.permutation(10)[: generator.integers(1, 4)]
            for label, quadrant in zip(labels, generator.permutation(4), strict=False):
                sample = generator.choice(np.flatnonzero((digits.target == label) & (held_out == (split == "val"))))
                corner = (int(quadrant % 2) * EDGE // 2, int(quadrant // 2) * EDGE // 2)
                strokes = digits.images[sample] / 16
                picture, (x0, y0, x1, y1) = draw_on(picture, strokes, generator, (24, EDGE // 2 + 1), corner, EDGE // 2)
                table.writerow([f"{number:05}.png", NAMES[label], x0, y0, x1 + 1, y1 + 1, split])
            picture.save(folder / f"{number:05}.png")
    return folder / "digits.csv"


def main(folder: Path, train: int = 1600, val: int = 200, options: list[str] = MODEL) -> None:
    """Write the pictures, train on them, and print the pointing game of every label."""
    table = write_pictures(folder / "pictures", train, val)
    data = ["--data=Table", f"--data.table={table}", "--data.box_columns=[x0,y0,x1,y1]", f"--data.classes={[*NAMES]}"]
    quiet = ["--trainer.logger=false", f"--trainer.default_root_dir={folder}"]
    task = ["--model.task=multilabel", "--model.num_classes=10", "--data.augmentation.horizontal_flip=0"]
    scale = ["--data.augmentation.scale=[0.8,1.0]", "--trainer.max_epochs=3", "--trainer.gradient_clip_val=1.0"]
    train_main(["fit", *data, *quiet, *task, *scale, *options])
    metrics = "--explain.metrics=[pointing_game,energy_inside]"
    explained = ["--explain.target=label", f"--explain.methods=[{','.join(METHODS)}]", metrics]
    best, output = f"--ckpt_path={folder}/checkpoints/best.ckpt", f"--output={folder}/explained"
    explain_main(["predict", best, *data, *explained, output])
    print_pointing_game(folder / "explained")


def print_pointing_game(folder: Path) -> None:
    """Print the share of a label's maps whose most relevant pixel lies on its digit."""
    run = gmarpp.load_explanations(folder)
    target = np.array([row["target"] for row in run.rows])
    print(f"{'label':<8}{'maps':>6}" + "".join(f"{method:>17}" for method in run.methods))
    for label in [*np.unique(target), slice(None)]:
        rows = slice(None) if isinstance(label, slice) else target == label
        shares = [np.nanmean(run.values[method]["pointing_game"][rows]) for method in run.methods]
        name = "all" if isinstance(label, slice) else run.class_name(label)
        print(f"{name:<8}{len(target[rows]):>6}" + "".join(f"{share:>17.2f}" for share in shares))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data/several_digits"))
