"""The map-style dataset behind every data module: samples by index, held in compact arrays."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from gmarpp.data.decode import read_image, read_mask
from gmarpp.data.numbering import Labels
from gmarpp.data.transforms import EvaluationTransform, Transform

logger = logging.getLogger(__name__)

Sample: TypeAlias = dict[str, Any]
Unreadable: TypeAlias = Literal["raise", "replace", "unlabel", "drop"]


class Record(NamedTuple):
    """A decoded sample: uint8 (3, H, W); path as shown to people; box, float (4,) or (C, 4); mask, bool (H, W)."""

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
        boxes: (n, 4), or (n, C, 4) of labels: x0, y0, x1, y1 in pixels. Integers are inclusive corners; others have
            exclusive right and bottom edges, and an area of zero where there is no box.
        masks: paths of the masks, one per image.
    """

    def __init__(
        self,
        root: Path,
        paths: list[str],
        boxes: NDArray[Any] | None = None,
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
        box = None if self.boxes is None else self._box(row, image)
        mask = None if self.masks is None else _fitted_mask(os.fsdecode(self.masks[row]), image, path)
        return Record(image, path, box, mask)

    def _box(self, row: int, image: Tensor) -> Tensor:
        """Return x0, y0, x1, y1, (4,), or (C, 4) of labels, with exclusive right and bottom edges."""
        assert self.boxes is not None
        corners, (height, width) = self.boxes[row], image.shape[-2:]
        box = torch.from_numpy(corners.astype(np.float32))
        if np.issubdtype(corners.dtype, np.integer):
            box = box + _INCLUSIVE_TO_EDGES
        if (box < 0).any() | (box[..., 2] > width).any() | (box[..., 3] > height).any():
            raise ValueError(
                f"the box of {self.root / self.path(row)} has corners {corners.tolist()}, expected x0, y0, x1, y1 in "
                f"its {width}x{height} pixels: correct its annotation"
            )
        return box


_INCLUSIVE_TO_EDGES = torch.tensor([0.0, 0.0, 1.0, 1.0])


class ImageDataset(Dataset[Sample | None]):
    """Samples of a source as dictionaries, ready for torch's default collate function.

    A key is an index, or an index and an epoch. All random numbers of the transform follow from seed, epoch and
    index, so neither the number of processes nor an interruption changes a sample.

    Args:
        source: where the samples come from.
        labels: (n,) or (n, C), one row per row of the source.
        transform: from decoded sample to tensors.
        seed: of the transform's random numbers.
        rows: rows of the source to keep, in this order; all by default.
        unreadable: what becomes of a sample that cannot be read: an error; the next one in its place, with its label
            or without any; or None.
    """

    def __init__(
        self,
        source: Source,
        labels: Labels,
        transform: Transform,
        seed: int = 0,
        rows: NDArray[np.int64] | None = None,
        unreadable: Unreadable = "raise",
    ) -> None:
        self.source = source
        self.rows = np.arange(len(labels)) if rows is None else rows
        self.labels = labels[self.rows]
        self.transform = transform
        self.seed = seed
        self.unreadable = unreadable
        self._told: set[int] = set()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample | None:
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        record, found = self._read(index)
        if record is None:
            return None
        label = self.labels[found]
        if found != index and self.unreadable == "unlabel":
            label = np.full_like(label, np.nan if np.issubdtype(label.dtype, np.floating) else -1)
        with drawing_from(hash((self.seed, epoch, index))):
            tensors = self.transform(record.image, record.box, record.mask)
        return {**tensors, "label": _as_collated(label), "index": index, "path": record.path}

    def _read(self, index: int) -> tuple[Record | None, int]:
        """Return a sample's record, or the first readable one after it, and where it was found."""
        if self.unreadable == "raise":
            return self.source.read(int(self.rows[index])), index
        tries = 1 if self.unreadable == "drop" else len(self)
        for found in ((index + step) % len(self) for step in range(tries)):
            try:
                return self.source.read(int(self.rows[found])), found
            except (FileNotFoundError, ValueError) as error:  # noqa: PERF203, one is rarely more
                if found not in self._told:
                    self._told.add(found)
                    logger.warning("skipped: %s", error)
        if self.unreadable == "drop":
            return None, index
        raise ValueError(f"expected an image that can be read, got none among {len(self)}: look at the data's root")


def collate_readable(samples: list[Sample | None]) -> Any:
    """Return a batch of those samples that could be read, None if there are none."""
    readable = [sample for sample in samples if sample is not None]
    return default_collate(readable) if readable else None


def _as_collated(label: Any) -> int | Tensor:
    """Return a label as torch's collate function takes it."""
    if np.ndim(label) == 0:
        return int(label)
    return torch.as_tensor(label, dtype=torch.float32 if np.issubdtype(label.dtype, np.floating) else torch.long)


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
    pixels = mask[None, None].to(torch.uint8)
    resized = torch.nn.functional.interpolate(pixels, size=(height, width), mode="nearest-exact")
    return resized[0, 0].bool()
