"""The images of a data set's rows: embedded bytes, or files that are the data set's own."""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
from torch import Tensor

from gmarpp.data.dataset import Record
from gmarpp.data.decode import read_image


class RowImages:
    """Reads images of rows. A file that a row names is read only if it lies below the data set itself.

    Args:
        roots: the data set's own folders, and beginnings of its addresses (`hf://datasets/owner/name@`).
        listed: whether rows were made by listing the folders, whose links are then followed; paths written in a data
            file must lie below a root with all links resolved.
    """

    def __init__(self, roots: Sequence[str], listed: bool) -> None:
        self.roots = tuple(roots)
        self.listed = listed

    def read(self, image: Any, name: str) -> Record:
        """Read and decode one row's image.

        Raises:
            FileNotFoundError: the file that the row names does not exist.
            ValueError: the row has no image, names a file that is not the data set's, or the image is damaged.
        """
        content, path = (image.get("bytes"), image.get("path")) if isinstance(image, Mapping) else (None, None)
        if content is not None:
            return Record(read_image(io.BytesIO(content), path or name), path or name)
        if not path:
            raise ValueError(f"row {name}: expected an image, as bytes or the path of a file, got none")
        return Record(self._read_remote(path, name) if "://" in path else self._read_file(path, name), path)

    def _read_file(self, path: str, name: str) -> Tensor:
        found = self._own_files(path)
        if not found:
            raise self._foreign(path, name)
        return read_image(next((file for file in found if os.path.exists(file)), found[0]), path)  # noqa: PTH110

    def _read_remote(self, path: str, name: str) -> Tensor:
        """Read an address that `datasets` made: a file, or one in a zip file, `zip://inside::where`."""
        *archives, source = path.split("::")
        own = self._own_files(source) if "://" not in source else any(map(source.startswith, self.roots))
        if not own or ".." in source.split("/") or any(not archive.startswith("zip://") for archive in archives):
            raise self._foreign(path, name)
        try:
            with fsspec.open(path, "rb") as file:
                content = file.read()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"image {path} does not exist") from error
        return read_image(io.BytesIO(content), path)

    def _own_files(self, path: str) -> list[str]:
        """Return the files that a path means, one for each root that it stays below."""
        resolve = os.path.abspath if self.listed else os.path.realpath
        pairs = ((resolve(root), resolve(Path(root) / path)) for root in self.roots if "://" not in root)
        try:
            return [file for root, file in pairs if Path(file).is_relative_to(root)]
        except ValueError:
            # No file system allows such a name.
            return []

    def _foreign(self, path: str, name: str) -> ValueError:
        return ValueError(
            f"row {name} names {path!r}, which is outside the data: store the images in the data files, or "
            "below a folder that is given as path"
        )
