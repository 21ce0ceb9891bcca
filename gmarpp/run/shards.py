"""Explained images in files: the parts that an interrupted run keeps, and the maps that are merged from them."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gmarpp.files import remove_leftovers, sync_disk, write_atomically
from gmarpp.run.content import (
    check_header,
    check_tensors,
    damaged_file,
    parse_json,
    require_file,
    signed_json,
    tensor_digest,
)
from gmarpp.run.folder import MAPS, MAPS_INDEX, PARTS, read_run
from gmarpp.run.memory import return_free_memory

_HEADER = "explanations"


@dataclass(frozen=True)
class Shard:
    """Some explained images.

    Attributes:
        methods: names of the methods, in the order they were asked for.
        metrics: names of the metrics, likewise.
        rows: what is known of each image as JSON values; ``index`` (in the data set) among them.
        tensors: one entry per image along the first dimension, by key: ``<method>`` the maps (n, h, w),
            ``<method>/insertion`` and ``<method>/deletion`` the curves (n, S+1), ``<method>/<metric>`` values (n,).
        fractions: true fractions of the curves' points (S+1,), or None where there are no curves.
    """

    methods: tuple[str, ...]
    metrics: tuple[str, ...]
    rows: Sequence[Mapping[str, Any]]
    tensors: Mapping[str, Tensor]
    fractions: Tensor | None = None

    def select(self, positions: Sequence[int]) -> "Shard":
        """Return the images at some positions, in that order."""
        chosen = torch.as_tensor(positions, dtype=torch.long)
        tensors = {key: tensor[chosen] for key, tensor in self.tensors.items()}
        return replace(self, rows=[self.rows[position] for position in positions], tensors=tensors)

    @staticmethod
    def concatenate(shards: "Sequence[Shard]") -> "Shard":
        """Join shards of the same run, in order."""
        tensors = {key: torch.cat([shard.tensors[key] for shard in shards]) for key in shards[0].tensors}
        return replace(shards[0], rows=[row for shard in shards for row in shard.rows], tensors=tensors)

    @property
    def kind(self) -> Any:
        """What all shards of one run share: methods, metrics, sizes of maps and curves."""
        shapes = {key: tensor.shape[1:] for key, tensor in self.tensors.items()}
        return self.methods, self.metrics, shapes, None if self.fractions is None else self.fractions.tolist()

    def check(self) -> None:
        """Raise `ValueError` unless a reader would take what `write` writes."""
        about = {"methods": [*self.methods], "metrics": [*self.metrics], "rows": self.rows}
        check_header(about)
        check_tensors(about, self._all_tensors())

    def write(self, path: Path, scratch: Path | None = None) -> None:
        """Write the shard atomically as safetensors, the rest and a digest of all as JSON in the file's header."""
        tensors = self._all_tensors()
        about = {"methods": self.methods, "metrics": self.metrics, "rows": self.rows}
        # One entry only: safetensors keeps no order among several, and equal shards must be equal bytes.
        header = _header_text({**about, "sha256": tensor_digest(_header_text(about), tensors)})
        write_atomically(path, save(tensors, metadata={_HEADER: header}), scratch)

    def _all_tensors(self) -> dict[str, Tensor]:
        tensors = {key: tensor.contiguous() for key, tensor in self.tensors.items()}
        tensors["index"] = torch.tensor([row["index"] for row in self.rows], dtype=torch.long)
        if self.fractions is not None:
            tensors["fractions"] = self.fractions.contiguous()
        return tensors


def _header_text(about: Mapping[str, Any]) -> str:
    return json.dumps(about, separators=(",", ":"))


@contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """Open a shard of a run, where nothing but an ordinary file in its folder is opened.

    Raises:
        ValueError: if it is damaged, also if that shows only in the block; the message names it.
    """
    require_file(path, path.parent.parent)
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, ValueError) as error:
        raise damaged_file(path, str(error)) from error


def read_shard(path: Path) -> Shard:
    """Read a whole shard, and compare it with its digest; those of earlier versions have none.

    Raises:
        ValueError: if the file is damaged; the message names it.
    """
    with open_shard(path) as file:
        about = parse_json((file.metadata() or {}).get(_HEADER, "null"))
        check_header(about)
        tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        check_tensors(about, tensors)
        digest = about.pop("sha256", None)
        if digest is not None and digest != tensor_digest(_header_text(about), tensors):
            raise ValueError("its content is not what was written: the digest differs")
    del tensors["index"]
    fractions = tensors.pop("fractions", None)
    return Shard(tuple(about["methods"]), tuple(about["metrics"]), about["rows"], tensors, fractions)


def shard_files(folder: Path) -> list[Path]:
    """List a folder's shards by name; none if the folder does not exist."""
    return sorted(folder.glob("*.safetensors"))


def finished_indices(folder: Path) -> set[int]:
    """Return the data set indices of all images that a run, interrupted or complete, has explained and stored.

    Raises:
        ValueError: naming a file of them that is damaged.
    """
    run = read_run(folder)
    files = shard_files(folder / PARTS)
    if run is not None and run["status"] == "complete":
        files += shard_files(folder / MAPS)
    return {row["index"] for shard in read_shards(files) for row in shard.rows}


def read_shards(files: Iterable[Path]) -> Iterator[Shard]:
    """Yield shards of one run, in order.

    Raises:
        ValueError: if a file is damaged, or of another run than the first; the message names it.
    """
    kind = None
    for file in files:
        shard = read_shard(file)
        if kind not in (None, shard.kind):
            raise damaged_file(file, "its methods, metrics or sizes are not those of the run's other files")
        kind = shard.kind
        yield shard


def reopen_maps(folder: Path) -> None:
    """Turn the shards of a complete run into parts again, so that more images can be merged with them."""
    (folder / MAPS / MAPS_INDEX).unlink(missing_ok=True)
    for file in shard_files(folder / MAPS):
        file.replace(folder / PARTS / f"merged-{file.name}")


def merge_parts(folder: Path, shard_size: int) -> int:
    """Merge the parts of all ranks into shards sorted by index, which do not depend on how the parts came about.

    Args:
        folder: the run's output.
        shard_size: images per shard.

    Returns:
        Number of images. An image that several parts hold counts once.
    """
    located: dict[int, tuple[Path, int]] = {}
    for file, shard in zip(files := shard_files(folder / PARTS), read_shards(files), strict=True):
        for position, row in enumerate(shard.rows):
            located.setdefault(row["index"], (file, position))
    indices = sorted(located)
    stale = {file.name for file in shard_files(folder / MAPS)}
    about: dict[str, Any] = {"images": len(indices), "methods": (), "metrics": (), "shards": []}
    for start in range(0, len(indices), shard_size):
        chunk = indices[start : start + shard_size]
        shard = _gather([located[index] for index in chunk])
        name = f"{len(about['shards']):05d}.safetensors"
        shard.write(folder / MAPS / name, folder / PARTS)
        about["shards"].append({"file": name, "indices": chunk})
        about |= {"methods": shard.methods, "metrics": shard.metrics}
        stale.discard(name)
    for name in stale:
        (folder / MAPS / name).unlink()
    write_atomically(folder / MAPS / MAPS_INDEX, signed_json(about), folder / PARTS)
    return len(indices)


def _gather(places: Sequence[tuple[Path, int]]) -> Shard:
    """Collect images from the parts that hold them, in the given order, reading each part once."""
    positions: dict[Path, list[int]] = {}
    for file, position in places:
        positions.setdefault(file, []).append(position)
    joined = Shard.concatenate([read_shard(file).select(chosen) for file, chosen in positions.items()])
    held = [place for file, chosen in positions.items() for place in ((file, position) for position in chosen)]
    where = {place: position for position, place in enumerate(held)}
    return joined.select([where[place] for place in places])


def remove_parts(folder: Path) -> None:
    """Delete what only an interrupted run needs."""
    parts = folder / PARTS
    if parts.is_dir():
        for file in shard_files(parts):
            file.unlink()
        remove_leftovers(parts)
        parts.rmdir()


def publish(shards: list[Shard], part: Path) -> None:
    """Write the part that vouches for images, once the disk has their pictures."""
    sync_disk()
    Shard.concatenate(shards).write(part)
    shards.clear()
    return_free_memory()
