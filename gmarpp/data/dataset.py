"""The map-style dataset behind every data module: samples by index, held in compact arrays."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from gmarpp.data.decode import read_image, read_mask
from gmarpp.data.transforms import EvaluationTransform, Transform

Sample: TypeAlias = dict[str, Any]


class Record(NamedTuple):
    """A decoded sample: image, uint8 (3, H, W); path as shown to people; box, float (4,); mask, bool (H, W)."""

    image: Tensor
    path: str
    box: Tensor | None = None
    mask: Tensor | None = None


class Source(Protocol):
    """Where samples are read from, row by row."""

    def read(self, row: int) -> Record:
        """Read and decode one row."""
        ...


class Files:
    """Image files below a folder, with boxes or masks where there are any.

    Paths are fixed-width byte strings in one array: a list of str would be copied into every loader process, page by
    page, as reference counts are touched.

    Args:
        root: folder that the paths start from.
        paths: relative paths of the images.
        boxes: (n, 4), inclusive pixel corners x0, y0, x1, y1; converted to exclusive right and bottom edges.
        masks: paths of the masks, one per image.
    """

    def __init__(
        self,
        root: Path,
        paths: list[str],
        boxes: NDArray[np.integer[Any]] | None = None,
        masks: list[str] | None = None,
    ) -> None:
        self.root = root
        self.paths = _packed(paths)
        self.boxes = boxes
        self.masks = None if masks is None else _packed(masks)

    def path(self, row: int) -> str:
        """Return the path of a row relative to the root."""
        return os.fsdecode(self.paths[row])

    def read(self, row: int) -> Record:
        """Read one image with its box and mask.

        Raises:
            FileNotFoundError: the image or mask does not exist.
            ValueError: the image or mask is damaged, the mask has another aspect ratio than the image, or the box lies
                outside the image.
        """
        path = self.path(row)
        image = read_image(self.root / path)
        box = None if self.boxes is None else torch.from_numpy(self.boxes[row].astype(np.float32)) + _INCLUSIVE_TO_EDGES
        height, width = image.shape[-2:]
        if box is not None and self.boxes is not None and (box < 0).any() | (box[2] > width) | (box[3] > height):
            raise ValueError(
                f"the box of {self.root / path} has corners {self.boxes[row].tolist()}, expected x0, y0, x1, y1 in its "
                f"{width}x{height} pixels: correct its annotation"
            )
        mask = None if self.masks is None else _fitted_mask(os.fsdecode(self.masks[row]), image, path)
        return Record(image, path, box, mask)


_INCLUSIVE_TO_EDGES = torch.tensor([0.0, 0.0, 1.0, 1.0])


class ImageDataset(Dataset[Sample]):
    """Samples of a source as dictionaries, ready for torch's default collate function.

    A key is an index, or an index and an epoch. All random numbers of the transform follow from seed, epoch and
    index, so neither the number of processes nor an interruption changes a sample.

    Args:
        source: where the samples come from.
        labels: (n,), one per row of the source; -1 where unknown.
        transform: from decoded sample to tensors.
        seed: of the transform's random numbers.
        rows: rows of the source to keep, in this order; all by default.
    """

    def __init__(
        self,
        source: Source,
        labels: NDArray[np.int64],
        transform: Transform,
        seed: int = 0,
        rows: NDArray[np.int64] | None = None,
    ) -> None:
        self.source = source
        self.rows = np.arange(len(labels)) if rows is None else rows
        self.labels = labels[self.rows]
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        label = int(self.labels[index])
        record = self.source.read(int(self.rows[index]))
        with drawing_from(hash((self.seed, epoch, index))):
            tensors = self.transform(record.image, record.box, record.mask)
        return {**tensors, "label": label, "index": index, "path": record.path}


@dataclass(frozen=True)
class Originals:
    """The pictures of a data set before preprocessing.

    Raises:
        ValueError: the data set does not tell them.
    """

    dataset: Any

    def __post_init__(self) -> None:
        if not isinstance(getattr(self.dataset, "transform", None), EvaluationTransform):
            raise ValueError(
                "write.overlays original: expected the images of one of this project's data modules, got a "
                f"{type(self.dataset).__name__}, whose pictures before preprocessing are not known: set it to true"
            )

    def __call__(
        self, index: int, extent: tuple[int, int]
    ) -> tuple[NDArray[np.uint8], tuple[float, float, float, float]]:
        """Read the picture of a sample.

        Args:
            index: of the sample.
            extent: height and width of the part of its image that counts, from the top left corner.

        Returns:
            uint8 pixels (H, W, 3), and the edges x0, y0, x1, y1 of that part in the picture's pixels.
        """
        record = self.dataset.source.read(int(self.dataset.rows[index]))
        picture = record.image.movedim(0, -1).contiguous().numpy()
        height, width = picture.shape[:2]
        return picture, self.dataset.transform.preprocessing.region(height, width, extent)


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Seed torch's global CPU generator with the low 32 bits of `seed`, and restore it afterward."""
    generator = torch.default_generator
    state = generator.get_state()
    # Unlike this method, torch.manual_seed would also queue a seed for every accelerator, at each sample.
    generator.manual_seed(seed & 0xFFFFFFFF)
    try:
        yield
    finally:
        generator.set_state(state)


def _packed(paths: list[str]) -> NDArray[np.bytes_]:
    return np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)


def _fitted_mask(path: str, image: Tensor, name: str) -> Tensor:
    mask = read_mask(path)
    (mask_height, mask_width), (height, width) = mask.shape, image.shape[-2:]
    # This allows for half a pixel of rounding in a mask stored at another scale.
    if abs(mask_height * width - mask_width * height) > max(mask_height, mask_width, height, width):
        raise ValueError(
            f"mask {path}: expected the aspect ratio of image {name}, {width}x{height}, got {mask_width}x{mask_height}"
        )
    if mask.shape == image.shape[-2:]:
        return mask
    resized = torch.nn.functional.interpolate(mask[None, None].to(torch.uint8), size=(height, width), mode="nearest")
    return resized[0, 0].bool()
