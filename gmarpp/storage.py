"""What a predict run leaves on disk: atomic files, shards of explained images, and the merge of interrupted parts."""

import errno
import io
import json
import os
import re
import secrets
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

if sys.platform != "win32":
    import fcntl

RUN_FILE = "run.json"
MAPS, PARTS, IMAGES, OVERLAYS = "maps", "parts", "images", "overlays"
MAPS_INDEX = "index.json"


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Have errors of writing name the file that could not be written."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"can't write: {error.strerror}", str(path)) from error


class _Output(io.FileIO):
    """An open file whose errors name the path that it is to have."""

    def __init__(self, handle: int, path: Path) -> None:
        super().__init__(handle, "wb")
        self._path = path

    def write(self, data: Any, /) -> int:
        with _write_errors(self._path):
            return super().write(data)


def _sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder, where the system can say so."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems have names on the server at once and refuse to synchronise folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def sync_disk() -> None:
    """Wait until the disk has all that was written so far, where the system can say so (not on Windows)."""
    if hasattr(os, "sync"):
        os.sync()


def _open_temporary(folder: Path) -> tuple[Path, int]:
    """Create a temporary file that is locked for as long as it is open, so that others can tell it from a leftover."""
    while True:
        temporary = folder / f".{secrets.token_hex(4)}.tmp"
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        _lock(handle)
        # Between the two calls another process may have taken it for a leftover.
        if temporary.exists():
            return temporary, handle
        os.close(handle)


def _lock(handle: int) -> bool:
    """Lock an open file unless another process has; on Windows an open file can't be deleted and needs no lock."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network file systems have no locks: there nobody can tell, and what is found is left alone.
        if error.errno not in (errno.EWOULDBLOCK, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
        return False
    return True


@contextmanager
def atomic_file(path: Path, scratch: Path | None = None, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a file to write whose final name never shows a part of its content.

    Args:
        path: final name, taken when the block ends without an error.
        scratch: folder of the temporary file, on the same file system; the file's own folder by default.
        durable: wait until the disk has the content and the name, so that they also survive a power cut. Many files
            that are not durable become so together by `sync_disk`.

    Raises:
        OSError: naming the file, when it can't be written; nothing is left behind. Other errors of the block pass.
    """
    with _write_errors(path):
        temporary, handle = _open_temporary(scratch or path.parent)
    try:
        with io.BufferedWriter(_Output(handle, path)) as file:
            yield file
            if durable:
                file.flush()
                with _write_errors(path):
                    os.fsync(handle)
        with _write_errors(path):
            temporary.replace(path)
            if durable:
                _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, data: bytes, scratch: Path | None = None, durable: bool = True) -> None:
    """Write a whole file by `atomic_file`."""
    with atomic_file(path, scratch, durable) as file:
        file.write(data)


def remove_leftovers(folder: Path, pattern: str = "**/.????????.tmp") -> None:
    """Delete the temporary files that killed processes left in a folder, never those that a process still writes.

    Args:
        folder: where to look.
        pattern: of the files, for `Path.glob`; by default those of `atomic_file` in the folder and in those below it.
    """
    for leftover in folder.glob(pattern):
        try:
            handle = os.open(leftover, os.O_RDONLY)
        except (FileNotFoundError, PermissionError):
            # Another process was faster, or it is another user's.
            continue
        try:
            if _lock(handle):
                leftover.unlink(missing_ok=True)
        finally:
            os.close(handle)


def file_stem(index: int, path: str) -> str:
    """Give the name that an image's pictures have: unique by index, safe on any file system, short.

    Example:
        >>> file_stem(7, 'photos/Größe "<b>".jpg')
        '000007-Grosse-b'
    """
    stem = PurePosixPath(path.replace("\\", "/")).stem.replace("ß", "ss")
    plain = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9._]+", "-", plain).strip("-._")[:60]
    return f"{index:06d}-{slug}" if slug else f"{index:06d}"


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
        """Give the images at some positions, in that order."""
        chosen = torch.as_tensor(positions, dtype=torch.long)
        tensors = {key: tensor[chosen] for key, tensor in self.tensors.items()}
        return replace(self, rows=[self.rows[position] for position in positions], tensors=tensors)

    @staticmethod
    def concatenate(shards: "Sequence[Shard]") -> "Shard":
        """Join shards of the same run, in order."""
        tensors = {key: torch.cat([shard.tensors[key] for shard in shards]) for key in shards[0].tensors}
        return replace(shards[0], rows=[row for shard in shards for row in shard.rows], tensors=tensors)

    def write(self, path: Path, scratch: Path | None = None) -> None:
        """Write the shard atomically as safetensors, the rest as JSON in the file's header."""
        tensors = {key: tensor.contiguous() for key, tensor in self.tensors.items()}
        tensors["index"] = torch.tensor([row["index"] for row in self.rows], dtype=torch.long)
        if self.fractions is not None:
            tensors["fractions"] = self.fractions.contiguous()
        # One entry only: safetensors keeps no order among several, and equal shards must be equal bytes.
        about = {"methods": self.methods, "metrics": self.metrics, "rows": self.rows}
        header = json.dumps(about, separators=(",", ":"))
        write_atomically(path, save(tensors, metadata={"explanations": header}), scratch)


@contextmanager
def _open_shard(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and run again with resume") from error


def read_shard(path: Path) -> Shard:
    """Read a whole shard.

    Raises:
        ValueError: if the file is damaged; the message names it.
    """
    with _open_shard(path) as file:
        about = json.loads(file.metadata()["explanations"])
        tensors = {key: file.get_tensor(key) for key in file.keys() if key != "index"}  # noqa: SIM118
    fractions = tensors.pop("fractions", None)
    return Shard(tuple(about["methods"]), tuple(about["metrics"]), about["rows"], tensors, fractions)


def read_indices(path: Path) -> list[int]:
    """Read the data set indices of a shard's images without the rest of it.

    Raises:
        ValueError: if the file is damaged; the message names it.
    """
    with _open_shard(path) as file:
        return list(file.get_tensor("index").tolist())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read what is known of each image of a shard, without its tensors.

    Raises:
        ValueError: if the file is damaged; the message names it.
    """
    with _open_shard(path) as file:
        return list(json.loads(file.metadata()["explanations"])["rows"])


def read_run(folder: Path) -> dict[str, Any] | None:
    """Read the description of the run a folder holds; None if it holds none.

    Raises:
        ValueError: if ``run.json`` is something else.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        return None
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        run = None
    if not isinstance(run, dict) or "status" not in run:
        raise ValueError(f"{path} does not describe a run of explain.py predict: choose another output folder")
    return run


def write_run(folder: Path, run: Mapping[str, Any]) -> None:
    """Write the description of a run."""
    write_atomically(folder / RUN_FILE, (json.dumps(run, indent=2) + "\n").encode())


def shard_files(folder: Path) -> list[Path]:
    """List a folder's shards by name; none if the folder does not exist."""
    return sorted(folder.glob("*.safetensors"))


def finished_indices(folder: Path) -> set[int]:
    """Data set indices of all images that a run, interrupted or complete, has explained and stored."""
    run = read_run(folder)
    files = shard_files(folder / PARTS)
    if run is not None and run["status"] == "complete":
        files += shard_files(folder / MAPS)
    return {index for file in files for index in read_indices(file)}


def reopen_maps(folder: Path) -> None:
    """Turn the shards of a complete run into parts again, so that more images can be merged with them."""
    (folder / MAPS / MAPS_INDEX).unlink(missing_ok=True)
    for file in shard_files(folder / MAPS):
        file.replace(folder / PARTS / f"merged-{file.name}")


def merge_parts(folder: Path, shard_size: int) -> int:
    """Merge the parts of all ranks into shards sorted by index, which don't depend on how the parts came about.

    Args:
        folder: the run's output.
        shard_size: images per shard.

    Returns:
        Number of images. An image that several parts hold counts once.
    """
    located: dict[int, tuple[Path, int]] = {}
    for file in shard_files(folder / PARTS):
        for position, index in enumerate(read_indices(file)):
            located.setdefault(index, (file, position))
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
    write_atomically(folder / MAPS / MAPS_INDEX, (json.dumps(about) + "\n").encode(), folder / PARTS)
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
        for file in parts.iterdir():
            file.unlink()
        parts.rmdir()


def iterate_shards(folder: Path) -> Iterator[Shard]:
    """Yield the shards of a complete run in the order of their images."""
    for file in shard_files(folder / MAPS):
        yield read_shard(file)
