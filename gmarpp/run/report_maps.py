"""The maps of a report, as bytes that the page colors."""

import base64
import math
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from gmarpp.colormaps import diverging_levels
from gmarpp.files import write_atomically
from gmarpp.maps import Array, normalize_map, normalize_signed_map
from gmarpp.run.folder import REPORT_MAPS, make_folder
from gmarpp.run.shards import Shard

_CHUNK_BYTES = 750_000
_EMBEDDED_BYTES = 8_000_000


class ReportMaps:
    """Maps as base64 of bytes (image, method, row, column), so many images at a time, in the order of the shards added.

    A byte is a level of a color map: from a map's minimum, 0, to its maximum, 255; for a signed map zero is 128. Those
    of a small run are kept for the page; those of a large one are written to files as they come.

    Args:
        folder: of the run.
        images: how many there will be.
        signed_methods: names of the methods whose maps are signed.

    Attributes:
        grid: rows and columns of each map, after the first shard.
        chunk: images per piece, after the first shard.
        embedded: the pieces of a small run.
        files: the files of a large one, by their paths in the run's folder.
    """

    def __init__(self, folder: Path, images: int, signed_methods: Collection[str] = ()) -> None:
        self.grid: tuple[int, ...] = ()
        self.chunk = 0
        self.embedded: list[str] = []
        self.files: list[str] = []
        self._folder = folder
        self._left = self._images = images
        self._in_files = False
        self._signed_methods = signed_methods
        self._waiting: list[Array] = []

    def add(self, shard: Shard) -> None:
        """Add the images of the next shard."""
        if not self.chunk:
            self._begin(shard)
        self._waiting.extend(np.stack([self._levels(method, shard) for method in shard.methods], axis=1))
        self._left -= len(shard.rows)
        while len(self._waiting) >= self.chunk or (self._waiting and not self._left):
            self._put(self._waiting[: self.chunk])
            del self._waiting[: self.chunk]

    def _levels(self, method: str, shard: Shard) -> Array:
        maps = shard.tensors[method]
        if method in self._signed_methods:
            return diverging_levels(normalize_signed_map(maps))
        return (normalize_map(maps) * 255 + 0.5).astype(np.uint8)

    def _begin(self, shard: Shard) -> None:
        self.grid = tuple(shard.tensors[shard.methods[0]].shape[-2:])
        map_bytes = len(shard.methods) * math.prod(self.grid)
        self.chunk = max(1, _CHUNK_BYTES // map_bytes)
        self._in_files = self._images * map_bytes > _EMBEDDED_BYTES
        if self._in_files:
            make_folder(self._folder / REPORT_MAPS)

    def _put(self, maps: Sequence[Array]) -> None:
        encoded = base64.b64encode(np.stack(maps).tobytes()).decode()
        if not self._in_files:
            self.embedded.append(encoded)
            return
        number = len(self.files)
        self.files.append(f"{REPORT_MAPS}/{number:05d}.js")
        script = f'receiveMaps({number},"{encoded}")\n'.encode()
        write_atomically(self._folder / self.files[-1], script, durable=False)
