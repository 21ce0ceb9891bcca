"""A small data set generated offline: real handwritten digits on real photographs, in the layout of Tiny-ImageNet.

Digits: the 1797 handwritten 8×8 digits of scikit-learn (Alpaydin & Kaynak 1998, UCI). Photographs: scikit-learn's two
samples, china.jpg and flower.jpg (CC BY).
"""

import importlib.util
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from gmarpp.data.module import SEEDS
from gmarpp.data.tiny_imagenet import TinyImageNet
from gmarpp.files import expand_path
from gmarpp.options import Range, require_ranges

logger = logging.getLogger(__name__)

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
EDGE = 64
# Minimum difference in luma, of 255, between a digit and the pixels that it covers.
CONTRAST = 110.0
RANGES = {"train_images": Range(1, 100_000), "val_images": Range(1, 100_000), "digits_seed": SEEDS}
LUMA = np.array([0.299, 0.587, 0.114])


class Digits(TinyImageNet):
    """Ten classes of handwritten digits at random places, sizes and colors on crops of photographs, with boxes.

    Written under `root` once, in a few seconds, and reused. No handwritten sample is in both training and validation.

    Args:
        root: folder to write below; `~` and environment variables are expanded.
        train_images: training images per class, `fit`'s selection split included; 1 to 100,000, as the next.
        val_images: validation images per class.
        digits_seed: of the pictures, 0 to 2**32 - 1.
        selection_fraction: see `TinyImageNet`.
        split: what `predict` explains.
        **options: of `ImageDataModule`.
    """

    def __init__(
        self,
        root: str = "data",
        train_images: int = 300,
        val_images: int = 50,
        digits_seed: int = 0,
        selection_fraction: float = 0.05,
        split: Literal["val", "train", "selection"] = "val",
        **options: Any,
    ) -> None:
        options_here = {"train_images": train_images, "val_images": val_images, "digits_seed": digits_seed}
        require_ranges(options_here, RANGES, "data: ")
        # The name holds everything that the pictures depend on, so that other options use other folders.
        folder = expand_path(root) / f"digits-{train_images}-{val_images}-seed{digits_seed}"
        super().__init__(
            str(folder),
            download=False,
            extract_to=None,
            selection_fraction=selection_fraction,
            selection_seed=0,
            split=split,
            **options,
        )
        self.train_images = train_images
        self.val_images = val_images
        self.digits_seed = digits_seed

    def prepare_data(self) -> None:
        """Write the pictures unless they exist.

        Raises:
            ModuleNotFoundError: scikit-learn is not installed.
        """
        if not self.root.is_dir():
            write_digits(self.root, self.train_images, self.val_images, self.digits_seed)


def write_digits(folder: Path, train_images: int = 300, val_images: int = 50, seed: int = 0) -> None:
    """Write the data set to a new folder, which appears complete or not at all.

    `samples.txt` records which handwritten sample (index in scikit-learn's data) each image shows.

    Args:
        folder: must not exist.
        train_images: per class.
        val_images: per class.
        seed: two calls with the same seed write the same pictures.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: a number of images, or the seed, is out of range.
    """
    require_ranges({"train_images": train_images, "val_images": val_images, "digits_seed": seed}, RANGES, "data: ")
    if importlib.util.find_spec("sklearn") is None:
        raise ModuleNotFoundError("the digits data needs scikit-learn: pip install 'gmarpp[demo]'", name="sklearn")
    logger.info("writing handwritten digits to %s", folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        target = Path(temporary) / folder.name
        _write(target, train_images, val_images, np.random.default_rng(seed))
        try:
            target.replace(folder)
        except OSError:
            # Another process has written the same pictures first.
            if not folder.is_dir():
                raise


def _write(folder: Path, train_images: int, val_images: int, generator: np.random.Generator) -> None:
    from sklearn.datasets import load_digits, load_sample_image

    digits = load_digits()
    photographs = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    (folder / "val" / "images").mkdir(parents=True)
    records: list[str] = []
    validation: list[tuple[str, int]] = []

    def picture(path: str, sample: int) -> str:
        image, box = draw_digit(digits.images[sample] / 16, photographs[generator.integers(2)], generator)
        image.save(folder / path, format="JPEG", quality=92)
        records.append(f"{path}\t{sample}\n")
        return "\t".join(str(corner) for corner in box)

    for label in range(10):
        name = f"digit_{label}"
        samples = generator.permutation(np.flatnonzero(digits.target == label))
        held_out = len(samples) // 5
        validation += [(name, int(samples[k % held_out])) for k in range(val_images)]
        (folder / "train" / name / "images").mkdir(parents=True)
        rows = []
        for k in range(train_images):
            file = f"{name}_{k}.JPEG"
            sample = int(samples[held_out + k % (len(samples) - held_out)])
            rows.append(f"{file}\t{picture(f'train/{name}/images/{file}', sample)}\n")
        (folder / "train" / name / f"{name}_boxes.txt").write_text("".join(rows))
    rows = []
    for k, row in enumerate(generator.permutation(len(validation))):
        name, sample = validation[row]
        rows.append(f"val_{k}.JPEG\t{name}\t{picture(f'val/images/val_{k}.JPEG', sample)}\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(rows))
    (folder / "words.txt").write_text("".join(f"digit_{label}\t{name}\n" for label, name in enumerate(NAMES)))
    (folder / "wnids.txt").write_text("".join(f"digit_{label}\n" for label in range(10)))
    (folder / "samples.txt").write_text("".join(records))


def draw_digit(
    strokes: NDArray[np.float64], photograph: Image.Image, generator: np.random.Generator
) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """Draw a digit on a random crop of a photograph.

    Args:
        strokes: (8, 8) in [0, 1], 1 where there is ink.
        photograph: RGB.
        generator: of place, size, color and crop.

    Returns:
        RGB image of 64×64, and the inclusive pixel corners x0, y0, x1, y1 of the digit.
    """
    return draw_on(crop(photograph, generator), strokes, generator)


def crop(photograph: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Return a random square of a photograph, 64×64."""
    side = int(generator.integers(96, min(photograph.size)))
    x, y = (int(generator.integers(edge - side + 1)) for edge in photograph.size)
    return photograph.resize((EDGE, EDGE), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))


def draw_on(
    background: Image.Image,
    strokes: NDArray[np.float64],
    generator: np.random.Generator,
    sizes: tuple[int, int] = (30, 54),
    corner: tuple[int, int] = (0, 0),
    edge: int = EDGE,
) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """Draw a digit on a picture.

    Args:
        background: RGB, 64×64.
        strokes: (8, 8) in [0, 1], 1 where there is ink.
        generator: of place, size and color.
        sizes: smallest size of a digit, and the first one that is too large.
        corner: x and y of the square in which it lies.
        edge: side of that square.

    Returns:
        RGB image, and the inclusive pixel corners x0, y0, x1, y1 of the digit.
    """
    # The samples fill their grid; a margin of one cell lets strokes end smoothly.
    size = int(generator.integers(*sizes))
    small = Image.fromarray((np.pad(strokes, 1) * 255).astype(np.uint8))
    smooth = np.asarray(small.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    ink = np.zeros((EDGE, EDGE))
    x, y = (int(place) for place in np.add(corner, generator.integers(edge - size + 1, size=2)))
    ink[y : y + size, x : x + size] = np.clip((smooth - 0.35) * 3, 0, 1)

    pixels = np.asarray(background, dtype=np.float64)
    covered = float((pixels @ LUMA)[ink > 0.5].mean())
    colors = generator.integers(256, size=(256, 3))
    contrast = np.abs(colors @ LUMA - covered)
    color = colors[np.argmax(contrast if contrast.max() < CONTRAST else contrast >= CONTRAST)]

    # A soft rim of the opposite tone keeps the outline legible on a busy background.
    rim_image = Image.fromarray((ink * 255).astype(np.uint8)).filter(ImageFilter.MaxFilter(3))
    rim = 0.5 * np.asarray(rim_image.filter(ImageFilter.GaussianBlur(1)), dtype=np.float64)[..., None] / 255
    tone = 0.0 if color @ LUMA > covered else 255.0
    pixels = pixels * (1 - rim) + tone * rim
    pixels = pixels * (1 - ink[..., None]) + color * ink[..., None]

    rows, columns = np.flatnonzero((ink > 0.5).any(axis=1)), np.flatnonzero((ink > 0.5).any(axis=0))
    return (
        Image.fromarray(pixels.round().astype(np.uint8)),
        (int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])),
    )
