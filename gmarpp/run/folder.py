"""The folder of a run: its description, and the names of what lies in it."""

import errno
import re
import shutil
import unicodedata
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from gmarpp.files import remove_leftovers, write_atomically
from gmarpp.run.content import check_run, damaged_file, read_json, require_file, signed_json

RUN_FILE = "run.json"


MAPS, PARTS, IMAGES, OVERLAYS = "maps", "parts", "images", "overlays"


MAPS_INDEX = "index.json"


REPORT_MAPS = "report_maps"


_RESULTS = ("explanations.csv", "summary.csv", "comparison.*", "curves.*", "report.html")


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
    """Return the name that an image's pictures have: unique by index, safe on any file system, short.

    Examples:
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
