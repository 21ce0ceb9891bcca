"""Pictures of explained images, drawn and written."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from gmarpp.files import write_atomically
from gmarpp.maps import Array
from gmarpp.run.folder import IMAGES, OVERLAYS, PARTS
from gmarpp.visualize import OVERLAY_SIDE, add_colors, backdrop, encode_jpeg, encode_png


def write_pictures(
    folder: Path, files: Sequence[str], images: Array, maps: Mapping[str, Array], colormap: str, opacity: float
) -> None:
    """Write images as JPEG, and for each method their overlays as PNG.

    The files are not durable before `gmarpp.files.sync_disk`.

    Args:
        folder: of the run.
        files: names without extension, n of them.
        images: uint8 pixels, shape (n, H, W, 3).
        maps: by method, raw, shape (n, h, w).
        colormap: one of `gmarpp.visualize.COLORMAPS`.
        opacity: share of the map's colors, 0 to 1.

    Raises:
        OSError: naming the file that cannot be written.
    """
    for position, file in enumerate(files):
        of_image = {method: attributions[position] for method, attributions in maps.items()}
        for name, data in encoded_pictures(file, images[position], of_image, colormap, opacity):
            write_atomically(folder / name, data, folder / PARTS, durable=False)


def encoded_pictures(
    file: str, image: Array, maps: Mapping[str, Array], colormap: str, opacity: float
) -> Iterator[tuple[Path, bytes]]:
    """Yield the pictures of one image, each with its path in the run's folder.

    Args:
        file: name without extension.
        image: uint8 pixels, shape (H, W, 3).
        maps: by method, raw, shape (h, w).
        colormap: one of `gmarpp.visualize.COLORMAPS`.
        opacity: share of the map's colors, 0 to 1.
    """
    yield Path(IMAGES, f"{file}.jpg"), encode_jpeg(image)
    ground = backdrop(image, opacity, OVERLAY_SIDE) if maps else image
    for method, attributions in maps.items():
        yield (
            Path(OVERLAYS, method, f"{file}.png"),
            encode_png(add_colors(ground, attributions, colormap, opacity)),
        )
