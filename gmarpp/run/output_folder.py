"""The folder of a predict run: whether the run may write into it, and from when on it is the run's alone."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gmarpp.files import remove_leftovers
from gmarpp.run.folder import PARTS, make_folder, read_run, remove_run, write_run
from gmarpp.run.lock import FolderLock
from gmarpp.run.shards import finished_indices, shard_files


class OutputFolder:
    """A folder that is checked before anything is computed, and touched only when there is something to write.

    Args:
        path: of the folder.
        resume: go on with the run that it holds.
        overwrite: remove the run that it holds.
    """

    def __init__(self, path: Path, resume: bool, overwrite: bool) -> None:
        if resume and overwrite:
            raise ValueError("resume continues the run in the output folder and overwrite removes it: choose one")
        self.path = path
        self.resume = resume
        self.overwrite = overwrite
        self._lock: FolderLock | None = None

    def check(self) -> None:
        """Refuse a folder that holds something else, or a run that is neither to be resumed nor overwritten.

        An interrupted run without a finished image counts as none.

        Raises:
            OSError: naming the folder, what it holds and the remedy; also if nothing can be written there.
            ValueError: if its ``run.json`` is damaged.
        """
        existing = self._existing()
        if not existing.is_dir():
            raise NotADirectoryError(f"output {self.path} cannot be a folder, {existing} is a file: choose a folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(f"output {self.path} cannot be written, {existing} is protected: choose another one")
        if not self.path.is_dir() or all(path.name.startswith(".") for path in self.path.iterdir()):
            return
        run = read_run(self.path)
        if run is None:
            raise FileExistsError(f"output folder {self.path} is not empty and holds no run: choose another one")
        begun = run["status"] == "complete" or shard_files(self.path / PARTS)
        if begun and not (self.resume or self.overwrite):
            is_complete = run["status"] == "complete"
            state, goes_on = (
                ("a complete", "read again what it skipped") if is_complete else ("an interrupted", "go on")
            )
            raise FileExistsError(
                f"output folder {self.path} holds {state} run: replace it with --overwrite, {goes_on} with --resume, "
                "or choose another folder"
            )

    def lock(self) -> None:
        """Lock the folder if it exists, before what it holds is believed.

        Raises:
            BlockingIOError: if another run writes into it.
        """
        if self._lock is None and self.path.is_dir():
            self._lock = FolderLock(self.path)

    def resumed(self) -> tuple[dict[str, Any] | None, set[int]]:
        """Return the run that is to be continued, None for a new one, and the indices of its finished images.

        Raises:
            ValueError: naming a file of the run that is damaged.
        """
        run = read_run(self.path) if self.resume else None
        finished = finished_indices(self.path) if run is not None else set()
        return (run, finished) if run is not None and (finished or run["status"] == "complete") else (None, set())

    def require_space(self, needed: int) -> None:
        """Check that a number of bytes is free where the folder is or is to be.

        Raises:
            OSError: naming the folder, the bytes needed and the bytes free.
        """
        free = shutil.disk_usage(self._existing()).free
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"the results need about {needed / 1e9:.3g} GB and {free / 1e9:.3g} GB are free: choose another folder "
                "or fewer images, or leave out overlays",
                str(self.path),
            )

    def _existing(self) -> Path:
        """Return the folder itself, or the deepest of those above it that there is."""
        path = self.path.absolute()
        return next(each for each in (path, *path.parents) if each.exists())

    def open(self, run: Mapping[str, Any], new: bool, subfolders: Iterable[str]) -> None:
        """Make the folder ready to be written, without what another run left there if the run is new.

        Raises:
            OSError: naming what cannot be made or removed; a folder that was not there is then not there either.
            FileExistsError: if another run was faster.
        """
        made = not self.path.exists()
        try:
            if made:
                make_folder(self.path)
            if self._lock is None:
                self.lock()
                if read_run(self.path) is not None:
                    raise FileExistsError(f"output folder {self.path} was taken by another run: choose another folder")
            if new:
                if read_run(self.path) is not None:
                    remove_run(self.path)
                write_run(self.path, run)
            for name in subfolders:
                make_folder(self.path / name)
            remove_leftovers(self.path)
        except BaseException:
            self.release()
            if made:
                with contextlib.suppress(OSError):  # It is not empty: another process was faster.
                    self.path.rmdir()
            raise

    def release(self) -> None:
        """Leave the folder to other runs."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
