"""Draw the strip of each method's page: the demo's photographs, the pair once for each of its classes.

    python docs/method_pictures.py

The photographs are scikit-image's `chelsea` (Stefan van der Walt) and `coffee` (Rachel Michetti), both CC0.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import gmarpp
from gmarpp.data import EvaluationTransform, Preprocessing
from gmarpp.visualize import overlay

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from demo import CHECKPOINT, PAIR, write_photographs  # noqa: E402

NAMES = ("cat", "coffee", PAIR, PAIR)
TARGETS = ["Egyptian cat", "espresso", "Egyptian cat", "espresso"]
HEIGHT, GAP = 224, 6


def main() -> None:
    """Write docs/methods/<method>.jpg for every method."""
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder))
        pictures = [TF.pil_to_tensor(Image.open(Path(folder) / f"{name}.png")) for name in NAMES]
    model = gmarpp.load_model(ROOT / CHECKPOINT)
    transform = EvaluationTransform(Preprocessing.of(model))
    # The network takes squares: the pair is squeezed for it, and shown as it is.
    images = torch.stack([transform(TF.resize(picture, [448, 448], antialias=True))["image"] for picture in pictures])
    explanation = gmarpp.explain(model, images, [*gmarpp.METHODS, *gmarpp.VARIANTS], TARGETS)
    shown = [TF.resize(picture, [HEIGHT, HEIGHT * picture.shape[2] // picture.shape[1]]) / 255 for picture in pictures]
    (ROOT / "docs" / "methods").mkdir(exist_ok=True)
    gap = np.full((HEIGHT, GAP, 3), 255, np.uint8)
    for method, maps in explanation.maps.items():
        signed_maps = "diverging" if method in explanation.signed_methods else None
        columns = [overlay(image, each, signed_maps=signed_maps) for image, each in zip(shown, maps, strict=True)]
        strip = np.concatenate([part for column in columns for part in (column, gap)][:-1], axis=1)
        Image.fromarray(strip).save(ROOT / "docs" / "methods" / f"{method}.jpg", quality=85)


if __name__ == "__main__":
    main()
