"""Archives: verified download, and extraction that is complete or leaves nothing."""

import errno
import hashlib
import logging
import lzma
import os
import shutil
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from tempfile import TemporaryDirectory

import torch

from gmarpp.data.walk import require_regular_file

logger = logging.getLogger(__name__)

CHUNK = 1 << 20
# An extracted folder holds the fingerprint of its archive in this file.
_RECORD = ".archive"
_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, NotImplementedError, RuntimeError),
    *(ValueError, LookupError, OverflowError),
)
# Errors of names that cannot be files, or are file and folder at once; decompressors raise some without a number.
_ERRORS_OF_NAMES = (None, errno.EINVAL, errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT)
# Tiny-ImageNet has 120,000 files of 0.24 GiB in total; archives that unfold to far more are refused.
MAX_FILES, MAX_BYTES = 1 << 20, 32 << 30


def download(url: str, target: Path, md5: str) -> None:
    """Download a file unless it exists already, and verify its md5 in both cases.

    Raises:
        OSError: the download failed; nothing is left of it.
        ValueError: the md5 differs. A file just downloaded is removed, one that existed before is left alone.
    """
    if target.exists():
        digest = _md5(target)
        if digest != md5:
            raise ValueError(
                f"{target} is damaged or another file: expected md5 {md5}, got {digest}. "
                "Delete it to download it again, or give its path to use it as it is"
            )
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        try:
            torch.hub.download_url_to_file(url, str(part))
        except (OSError, EOFError) as error:
            raise OSError(f"downloading {url} to {target.parent} failed: {error}") from error
        digest = _md5(part)
        if digest != md5:
            raise ValueError(f"{url} arrived damaged and was removed: expected md5 {md5}, got {digest}. Try again")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def fingerprint(archive: Path) -> str:
    """Return a digest of a zip file's table of contents: names, sizes and checksums of its files.

    Raises:
        ValueError: the archive is damaged or not a zip file.
    """
    members = sorted((member.filename, member.file_size, member.CRC) for member in _members(archive))
    return hashlib.sha256(repr(members).encode()).hexdigest()


def require_same_archive(archive: Path, folder: Path) -> None:
    """Check that an extracted folder came from an archive in its current state, if the archive still exists.

    A folder without a record of its archive is used with a warning.

    Raises:
        ValueError: the archive no longer holds what was extracted.
    """
    record = folder / _RECORD
    if not archive.is_file():
        logger.info("%s was extracted before, and %s is gone", folder, archive)
    elif not record.is_file():
        logger.warning("%s has no record of its archive and is used as it is: delete it to extract %s", folder, archive)
    elif record.read_text(encoding="utf-8", errors="replace").strip() != fingerprint(archive):
        raise ValueError(
            f"{folder} was extracted from another archive than the current {archive}: delete the folder to extract "
            "it again"
        )


def extract(archive: Path, target: Path, find: Callable[[Path], Path]) -> None:
    """Extract a zip file's data folder so that `target` appears complete or not at all.

    Args:
        archive: the zip file; never changed.
        target: the folder to make. One made by another process in the meantime, from the same archive, is accepted.
        find: finds the data folder among the extracted files, or raises FileNotFoundError.

    Raises:
        FileNotFoundError: there is no such archive, or no data folder in it.
        OSError: the disk has no room for it, or the folder is not writable.
        ValueError: the archive is damaged or too large, or a path in it leads outside it.
    """
    if not archive.exists():
        raise FileNotFoundError(f"{archive} does not exist")
    require_regular_file(archive)
    logger.info("extracting %s to %s", archive, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
            _extract_all(archive, Path(temporary))
            try:
                found = find(Path(temporary))
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{archive} does not hold a folder like {target.name}") from error
            (found / _RECORD).write_text(f"{fingerprint(archive)}\n", encoding="utf-8")
            try:
                found.replace(target)
            except OSError:
                if not target.is_dir():
                    raise
                require_same_archive(archive, target)
    except PermissionError as error:
        raise PermissionError(f"{archive} cannot be extracted to {target} ({error}): choose another folder") from error


def _extract_all(archive: Path, folder: Path) -> None:
    members = _members(archive)
    for member in members:
        path = PurePosixPath(member.filename)
        if path.is_absolute() or PureWindowsPath(member.filename).drive or ".." in path.parts:
            raise ValueError(f"{archive} is not safe to extract: {member.filename!r} leads outside its folder")
    twice = [name for name, times in Counter(member.filename for member in members).items() if times > 1]
    if twice:
        raise ValueError(f"{archive} holds {twice[0]!r} twice: expected every file once")
    size, free = sum(member.file_size for member in members), shutil.disk_usage(folder).free
    if len(members) > MAX_FILES or size > MAX_BYTES:
        raise ValueError(
            f"{archive} holds {len(members)} files of {size >> 20} MiB, expected at most {MAX_FILES} of "
            f"{MAX_BYTES >> 20} MiB: extract it yourself, and give the folder as root"
        )
    if size > free:
        raise OSError(f"{archive} needs {size >> 20} MiB in {folder.parent}, but {free >> 20} MiB are free")
    with _named_if_damaged(archive), zipfile.ZipFile(archive) as file:
        file.extractall(folder)


def _members(archive: Path) -> list[zipfile.ZipInfo]:
    with _named_if_damaged(archive), zipfile.ZipFile(archive) as file:
        return file.infolist()


@contextmanager
def _named_if_damaged(archive: Path) -> Iterator[None]:
    try:
        yield
    except (*_DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _ERRORS_OF_NAMES:
            raise
        raise ValueError(f"{archive} is damaged or not a zip file ({error}): get it again") from error


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
