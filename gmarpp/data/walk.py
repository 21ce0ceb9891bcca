"""Image files below a folder: links are followed, and nothing is left out without saying so."""

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

SUFFIXES = (
    *(".avif", ".bmp", ".dib", ".gif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".sgi", ".tga", ".tif", ".tiff", ".webp"),
)
_KINDS = {stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}


def require_regular_file(path: Path) -> None:
    """Check that a path leads to a regular file: opening a named pipe or a device could wait for ever.

    Raises:
        FileNotFoundError: nothing is there, or a link leads nowhere.
        ValueError: it is something else.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise FileNotFoundError(f"{path} is a link to {path.readlink()}, which does not exist") from None
        raise
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else _KINDS.get(stat.S_IFMT(mode), "special file")
        raise ValueError(f"{path} is a {kind}, expected a file: remove or rename it")


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what a folder holds, by name.

    Raises:
        OSError: the folder cannot be read; the message names it.
    """
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise type(error)(
            error.errno,
            f"folder cannot be read ({error.strerror}): change its permissions or take it away",
            str(folder),
        ) from error


def image_files(folder: Path, besides: Path | None = None) -> list[str]:
    """Return the relative paths of all images below a folder, sorted.

    Linked folders are followed. Left out are hidden files and folders, links that lead back to a folder above them, and
    results of predict runs; for the latter two a message says so.

    Args:
        folder: where to look.
        besides: a folder to leave out.

    Raises:
        OSError: a folder cannot be read.
        FileNotFoundError: an image is a link that leads nowhere.
        ValueError: `folder` holds the results of a run, or what is named like an image is a pipe, device or folder.
    """
    if _is_run(folder):
        raise ValueError(f"{folder} holds the results of a predict run, not images to explain: choose another root")
    excluded = None if besides is None else besides.resolve()
    found = _walk(folder, excluded, {_identity(folder): folder})
    return sorted(path.relative_to(folder).as_posix() for path in found)


def linked_folder(folder: Path) -> Path | None:
    """Return a linked folder at or below another one, or None if there is none."""
    for entry in entries(folder):
        if entry.is_dir():
            if entry.is_symlink():
                return Path(entry.path)
            if (linked := linked_folder(Path(entry.path))) is not None:
                return linked
    return None


def _walk(folder: Path, excluded: Path | None, above: dict[tuple[int, int], Path]) -> Iterator[Path]:
    for entry in entries(folder):
        path = Path(entry.path)
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            if path.suffix.lower() in SUFFIXES:
                require_regular_file(path)
                yield path
        elif path.resolve() == excluded:
            continue
        elif (identity := _identity(path)) in above:
            logger.warning("%s leads back to %s, which is above it: this link is left out", path, above[identity])
        elif _is_run(path):
            logger.warning("%s holds the results of a predict run: it is left out", path)
        else:
            yield from _walk(path, excluded, {**above, identity: path})


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_run(folder: Path) -> bool:
    return (folder / "run.json").is_file() and (folder / "maps").is_dir()
