"""Class folders of noise: images for tests that read files and care only about which ones."""

import numpy as np
from PIL import Image


def write_noise(root):
    """Writes three classes with 8 images each for training and one each for validation, 40x40 pixels."""
    for split, count in (("train", 8), ("val", 1)):
        for seed, name in enumerate("abc"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.random.default_rng([seed, index]).integers(256, size=(40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root
