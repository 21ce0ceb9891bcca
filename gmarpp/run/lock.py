"""A lock on a folder, so that no two runs write into it."""

import errno
import os
import socket
import stat
import sys
import warnings
from pathlib import Path

if sys.platform != "win32":
    import fcntl

LOCK_FILE = ".lock"

_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
_held: set[int] = set()


class FolderLock:
    """Holds a folder from when it is made until `release` or the end of the process, however that ends.

    The system forgets the lock of a killed process by itself, so that the next one takes over. File systems
    without locks give a warning instead, and on Windows nothing is locked.

    Args:
        folder: an existing folder.

    Raises:
        BlockingIOError: if another process holds the folder; the message names its host and number.
        OSError: naming the file, if it cannot be made or is not an ordinary file.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_FILE
        self._handle: int | None = None
        if sys.platform == "win32":
            return
        while self._handle is None:
            handle = self._open()
            try:
                locked = self._lock(handle)
                # The process that held it before may have deleted the file: this lock is then on a file without a name.
                if locked and _is_still_named(handle, self._path):
                    self._handle = handle
            finally:
                if self._handle is None:
                    os.close(handle)
            if not locked:
                self._path.unlink(missing_ok=True)
                return
        _held.add(self._handle)
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Leave the folder to others, and nothing of the lock in it."""
        if self._handle is not None:
            self._path.unlink(missing_ok=True)
            _held.discard(self._handle)
            os.close(self._handle)
            self._handle = None

    def _open(self) -> int:
        # Neither a link that leads elsewhere nor a pipe that waits for a reader is taken for the file.
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError(errno.EINVAL, "expected an ordinary file: delete this one", str(self._path))
        return handle

    def _lock(self, handle: int) -> bool:
        """Return whether the file is locked now; not where the file system knows no locks."""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
            known = holder if holder and holder.isprintable() else "another process"
            raise BlockingIOError(
                f"folder {self._path.parent} is in use by {known}: wait for its end, or choose another folder"
            ) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            warnings.warn(f"{self._path.parent} cannot be locked: start no second run in it", stacklevel=4)
            return False
        return True


def _is_still_named(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False


def _forget_in_child() -> None:
    """Close the locks that a forked process shares: it would hold them after the death of its parent."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
