"""Image files below a folder: links are followed, and nothing is left out without saying so."""

import logging
import os
import stat
from collections import Counter
from collections.abc import Collection
from functools import cache
from pathlib import Path

from gmarpp.files import kind_of_file

logger = logging.getLogger(__name__)

SUFFIXES = (
    *(".avif", ".bmp", ".dib", ".gif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".sgi", ".tga", ".tif", ".tiff", ".webp"),
)
# Only a folder of results holds these files together: of a predict run, or of the sanity check.
_RESULTS = {
    "predict run": ({"run.json", "maps"}, {"run.json", "parts"}, {"run.json", "overlays"}),
    "sanity check": ({"sanity.csv", "sanity.png"},),
}
# Links among folders multiply the ways to each of them; more ways than this come from circular links.
MAX_WAYS = 64


def require_regular_file(path: Path) -> None:
    """Check that a path leads to a regular file, because opening a pipe or a device may wait forever.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: it is something else, which the message names.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is {kind_of_file(mode)}, expected a file: remove or rename it")


def files_in(folder: Path, suffixes: Collection[str]) -> list[str]:
    """Return the names, sorted, of the files in a folder that have one of some suffixes; see `files_below`."""
    kinds = ((entry, _kind(entry)) for entry in _visible_entries(str(folder)))
    return sorted(entry.name for entry, kind in kinds if _is_wanted(entry, kind, suffixes))


def files_below(
    folder: Path, suffixes: Collection[str] | None, besides: Path | None = None, strict: bool = False
) -> list[str]:
    """Return the relative paths, sorted, of the files below a folder that have one of some suffixes.

    Links are followed. Hidden entries are left out; so are, with a warning, folders of this project's own results, and
    links back to a folder on the way to them, whose files are listed anyway.

    Args:
        folder: where to begin.
        suffixes: in lower case, or None for files of any name.
        besides: a folder to leave out.
        strict: linked folders and results are errors, for readers that would treat them differently.

    Raises:
        OSError: a folder cannot be read, or a link leads nowhere.
        ValueError: a pipe, socket or device has such a suffix, the folder itself holds results, or links among folders
            multiply without end.
    """
    excluded = None if besides is None or not besides.exists() else _identity(str(besides))
    base = str(folder)
    found: list[str] = []
    ways: Counter[tuple[int, int]] = Counter()
    pending = [(base, {_identity(base): base})]
    while pending:
        parent, above = pending.pop()
        entries = _visible_entries(parent)
        if _holds_results({entry.name for entry in entries}, parent, refused=strict or parent == base):
            continue
        for entry in entries:
            kind = _kind(entry)
            if kind == stat.S_IFDIR:
                identity = _identity(entry.path)
                if identity == excluded or _leads_back(entry, identity, above, strict):
                    continue
                ways[identity] += 1
                if ways[identity] > MAX_WAYS:
                    raise ValueError(
                        f"{entry.path} is way {MAX_WAYS + 1} to the same folder: remove links among folders"
                    )
                pending.append((entry.path, {**above, identity: entry.path}))
            elif _is_wanted(entry, kind, suffixes):
                found.append(entry.path[len(base) :].lstrip(os.sep))
    return sorted(found)


def _visible_entries(folder: str) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise type(error)(
            error.errno,
            f"folder cannot be read ({error.strerror}): change its permissions or move it",
            folder,
        ) from error


def _kind(entry: "os.DirEntry[str]") -> int:
    """Return the type bits of what an entry is or leads to; only links cost a system call."""
    try:
        if not entry.is_symlink():
            if entry.is_file(follow_symlinks=False):
                return stat.S_IFREG
            if entry.is_dir(follow_symlinks=False):
                return stat.S_IFDIR
        return stat.S_IFMT(entry.stat().st_mode)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        why = "does not exist" if missing else f"cannot be reached ({error.strerror})"
        target = os.readlink(entry.path)  # noqa: PTH115
        raise type(error)(
            f"{entry.path} is a link to {target}, which {why}: restore that, or remove the link"
        ) from error


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)  # noqa: PTH116
    return status.st_dev, status.st_ino


def _leads_back(
    entry: "os.DirEntry[str]", identity: tuple[int, int], above: dict[tuple[int, int], str], strict: bool
) -> bool:
    if strict and entry.is_symlink():
        raise ValueError(
            f"{entry.path} is a linked folder, which `datasets` leaves out: use --data ImageFolder, or move it"
        )
    if identity not in above:
        return False
    _warn_once(
        f"{entry.path} leads back to {above[identity]}, a folder on the way to it: its images are listed once, below "
        "that"
    )
    return True


def _is_wanted(entry: "os.DirEntry[str]", kind: int, suffixes: Collection[str] | None) -> bool:
    if suffixes is not None and os.path.splitext(entry.name)[1].lower() not in suffixes:  # noqa: PTH122
        return False
    if kind not in (stat.S_IFREG, stat.S_IFDIR):
        require_regular_file(Path(entry.path))
    return kind == stat.S_IFREG


def _holds_results(names: set[str], folder: str, refused: bool) -> bool:
    kinds = [kind for kind, marks in _RESULTS.items() if any(mark <= names for mark in marks)]
    if not kinds:
        return False
    message = f"{folder} holds the results of a {kinds[0]}"
    if refused:
        raise ValueError(f"{message}, not images to explain: choose another folder, or move the results out of it")
    _warn_once(f"{message}: it is left out")
    return True


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)
