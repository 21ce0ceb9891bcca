"""Files: finding them by path, writing them complete or not at all, and their digests."""

import errno
import hashlib
import io
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

if sys.platform != "win32":
    import fcntl


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def kind_of_file(mode: int) -> str:
    """Return what a path that is no regular file leads to, with its article.

    Args:
        mode: of the path, `st_mode`.
    """
    return _KINDS.get(stat.S_IFMT(mode), "a special file")


def find_path(path: str | Path) -> Path:
    """Return the existing file or folder that a path means, with `~` and environment variables expanded.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the path is an address, or names a pipe, a socket or a device, which is not opened.
    """
    text = os.fspath(path)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise ValueError(f"{text} is an address, expected a file: download it, and give the path of the download")
    source = Path(text) if "\0" not in text and os.path.lexists(text) else Path(os.path.expandvars(text)).expanduser()
    try:
        mode = source.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise FileNotFoundError(f"there is no checkpoint {path}") from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{path} is {kind_of_file(mode)}, expected a file: not opened")
    return source


@contextmanager
def open_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open the existing, non-empty file that a path means, as `find_path` does, at its beginning.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the path names something else, or a file without content.
    """
    source = find_path(path)
    if source.is_dir():
        raise ValueError(f"{path} is a folder, expected a file: give the path of the checkpoint in it")
    with source.open("rb") as file:
        start = file.read(24)
        if not start:
            raise damaged(source, "it is empty")
        if start == b"version https://git-lfs.":
            raise ValueError(f"{path} is a pointer of Git LFS, not the file itself: get it with `git lfs pull`")
        file.seek(0)
        yield file


def damaged(path: str | Path, reason: Exception | str) -> ValueError:
    """Return the error that says that a file is damaged, and why, in one line."""
    why = reason if isinstance(reason, str) else first_line(reason)
    return ValueError(f"{path} is damaged or incomplete ({why}); copy or download it again")


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def sha256(file: BinaryIO) -> str:
    """Return the hexadecimal SHA-256 digest of an open file, which is at its beginning then and afterwards."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    file.seek(0)
    return digest.hexdigest()


def expand_path(path: str | Path) -> Path:
    """Return a path with `~` and environment variables expanded.

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
    """Name the file in errors of writing it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error


class _Output(io.FileIO):
    """An open file whose errors name its final path."""

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
        # Some network file systems store names on the server at once and refuse to synchronize folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def sync_disk() -> None:
    """Wait until the disk has everything written so far, where the system can say so (not on Windows)."""
    if hasattr(os, "sync"):
        os.sync()


def _open_temporary(folder: Path) -> tuple[Path, int]:
    """Create a temporary file that is locked for as long as it is open, so that it is not taken for a leftover."""
    while True:
        temporary = folder / f".{secrets.token_hex(4)}.tmp"
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        _lock(handle)
        # Before it was locked, another process may have removed it as a leftover.
        if temporary.exists():
            return temporary, handle
        os.close(handle)


def _lock(handle: int) -> bool:
    """Lock an open file unless another process has; on Windows an open file cannot be deleted and needs no lock."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network file systems have no locks, so files there count as in use.
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
        OSError: naming the file, when it cannot be written; nothing is left behind. Errors of the block propagate.
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
    """Delete the temporary files that killed processes left in a folder, never those that a process is still writing.

    Args:
        folder: where to look.
        pattern: of the files, for `Path.glob`; by default those of `atomic_file` in the folder and in those below it.
    """
    for leftover in folder.glob(pattern):
        try:
            handle = os.open(leftover, os.O_RDONLY)
        except (FileNotFoundError, PermissionError):
            # Another process has removed it, or it belongs to another user.
            continue
        try:
            if _lock(handle):
                leftover.unlink(missing_ok=True)
        finally:
            os.close(handle)
