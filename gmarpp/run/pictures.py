"""Pictures of explained images, drawn and written."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from gmarpp.files import write_atomically
from gmarpp.maps import Array
from gmarpp.run.folder import IMAGES, OVERLAYS, PARTS
from gmarpp.visualize import OVERLAY_SIDE, Backdrop, MapStyle, encode_jpeg, encode_png


def write_pictures(
    folder: Path,
    files: Sequence[str],
    images: Array,
    maps: Mapping[str, Array],
    signed_methods: Collection[str],
    style: MapStyle,
) -> None:
    """Write images as JPEG, and for each method their overlays as PNG.

    The files are not durable before `gmarpp.files.sync_disk`.

    Args:
        folder: of the run.
        files: names without extension, n of them.
        images: uint8 pixels, shape (n, H, W, 3).
        maps: by method, raw, shape (n, h, w).
        signed_methods: names of the methods whose maps are signed.
        style: how maps are drawn.

    Raises:
        OSError: naming the file that cannot be written.
    """
    for position, file in enumerate(files):
        of_image = {method: attributions[position] for method, attributions in maps.items()}
        for name, data in encoded_pictures(file, images[position], of_image, signed_methods, style):
            write_atomically(folder / name, data, folder / PARTS, durable=False)


def encoded_pictures(
    file: str, image: Array, maps: Mapping[str, Array], signed_methods: Collection[str], style: MapStyle
) -> Iterator[tuple[Path, bytes]]:
    """Yield the pictures of one image, each with its path in the run's folder.

    Args:
        file: name without extension.
        image: uint8 pixels, shape (H, W, 3).
        maps: by method, raw, shape (h, w).
        signed_methods: names of the methods whose maps are signed.
        style: how maps are drawn.
    """
    yield Path(IMAGES, f"{file}.jpg"), encode_jpeg(image)
    if maps:
        backdrop = Backdrop(image, style, OVERLAY_SIDE)
        for method, attributions in maps.items():
            overlay = backdrop.overlay(attributions, method in signed_methods)
            yield Path(OVERLAYS, method, f"{file}.png"), encode_png(overlay)
