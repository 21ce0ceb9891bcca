"""Files of a run on disk: written atomically, described in ``run.json``, removed when the next begins."""

import errno
import io
import os
import re
import secrets
import shutil
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from gmarpp.run_content import check_run, damaged_file, read_json, require_file, signed_json

if sys.platform != "win32":
    import fcntl

RUN_FILE = "run.json"
MAPS, PARTS, IMAGES, OVERLAYS = "maps", "parts", "images", "overlays"
MAPS_INDEX = "index.json"
REPORT_MAPS = "report_maps"
_RESULTS = ("explanations.csv", "summary.csv", "comparison.*", "curves.*", "report.html")


def expand_path(path: str | Path) -> Path:
    """Return a path with ``~`` and environment variables replaced by what they stand for.

    Raises:
        ValueError: if there is no such user or variable.
    """
    expanded = os.path.expandvars(os.path.expanduser(path))  # noqa: PTH111, an unknown user is named below
    if expanded.startswith("~"):
        raise ValueError(f"path {path} begins with ~, but there is no such user: write it out")
    if unknown := re.search(r"\$(\w+|\{\w+\})", expanded):
        raise ValueError(f"path {path} names the environment variable {unknown[0]}, which is not set: set it")
    return Path(expanded)


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


def make_folder(path: Path) -> None:
    """Make a folder of a run; where it is a link, files would be written or deleted elsewhere.

    Raises:
        OSError: naming the folder, if it cannot be made or is a link.
    """
    _refuse_link(path)
    path.mkdir(parents=True, exist_ok=True)


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, "expected a folder, not a link", str(path))


def remove_run(folder: Path) -> None:
    """Delete the files of a run and nothing else; ``run.json`` last, so that a kill leaves a folder that is known.

    Raises:
        OSError: naming what cannot be deleted.
    """
    for name in (MAPS, PARTS, IMAGES, OVERLAYS, REPORT_MAPS):
        _refuse_link(folder / name)
        if (folder / name).exists():
            shutil.rmtree(folder / name)
    for pattern in (*_RESULTS, RUN_FILE):
        for path in folder.glob(pattern):
            path.unlink()
    remove_leftovers(folder)


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


def read_run(folder: Path) -> dict[str, Any] | None:
    """Read the description of the run a folder holds; None if it holds none.

    Raises:
        ValueError: if ``run.json`` is something else or damaged.
    """
    path = folder / RUN_FILE
    if not path.exists():
        return None
    require_file(path, folder)
    remedy = "restore it from a copy, or choose another output folder"
    run = read_json(path, remedy)
    if run.get("status") not in ("running", "complete"):
        raise ValueError(f"{path} does not describe a run of explain.py predict: choose another output folder")
    try:
        check_run(run)
    except ValueError as error:
        raise damaged_file(path, str(error), remedy) from error
    return run


def write_run(folder: Path, run: Mapping[str, Any]) -> None:
    """Write the description of a run with its digest."""
    write_atomically(folder / RUN_FILE, signed_json(run, indent=2))
