"""Pictures of explained images, drawn and written."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from gmarpp.files import write_atomically
from gmarpp.maps import Array
from gmarpp.run.folder import IMAGES, OVERLAYS, PARTS
from gmarpp.visualize import OVERLAY_SIDE, Backdrop, MapStyle, Region, encode_jpeg, encode_png

Original: TypeAlias = Callable[[int, tuple[int, int]], tuple[Array, Region]]
"""From an image's index and the height and width that its maps cover to the whole picture and their place on it."""


@dataclass(frozen=True)
class Pictures:
    """Draws the pictures of a run.

    Args:
        folder: of the run.
        signed_methods: names of the methods whose maps are signed.
        style: how maps are drawn.
        original: finds the picture that an image was made of; by default maps are laid on the image itself.
    """

    folder: Path
    signed_methods: Collection[str]
    style: MapStyle
    original: Original | None = None

    def write(self, files: Sequence[str], indices: Sequence[int], images: Array, maps: Mapping[str, Array]) -> None:
        """Write images as JPEG, and for each method their overlays as PNG.

        The files are not durable before `gmarpp.files.sync_disk`.

        Args:
            files: names without extension, n of them.
            indices: positions of the images in the data set.
            images: uint8 pixels, shape (n, H, W, 3).
            maps: by method, raw, shape (n, h, w).

        Raises:
            OSError: naming the file that cannot be written.
            ValueError: an original cannot be read.
        """
        for position, (file, index) in enumerate(zip(files, indices, strict=True)):
            of_image = {method: attributions[position] for method, attributions in maps.items()}
            for name, data in self.encoded(file, index, images[position], of_image):
                write_atomically(self.folder / name, data, self.folder / PARTS, durable=False)

    def encoded(self, file: str, index: int, image: Array, maps: Mapping[str, Array]) -> Iterator[tuple[Path, bytes]]:
        """Yield the pictures of one image, each with its path in the run's folder.

        Args:
            file: name without extension.
            index: position in the data set.
            image: uint8 pixels, shape (H, W, 3).
            maps: by method, raw, shape (h, w).
        """
        yield Path(IMAGES, f"{file}.jpg"), encode_jpeg(image)
        if not maps:
            return
        height, width = image.shape[:2]
        picture, region = (image, None) if self.original is None else self.original(index, (height, width))
        backdrop = Backdrop(picture, self.style, OVERLAY_SIDE, region)
        for method, attributions in maps.items():
            overlay = backdrop.overlay(attributions, method in self.signed_methods)
            yield Path(OVERLAYS, method, f"{file}.png"), encode_png(overlay)
