"""Archives: verified download, and extraction that is complete or leaves nothing."""

import hashlib
import logging
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from tempfile import TemporaryDirectory

import torch

logger = logging.getLogger(__name__)

CHUNK = 1 << 20
# Lies in an extracted folder: the fingerprint of the archive that it came from.
_RECORD = ".archive"
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error)


def download(url: str, target: Path, md5: str) -> None:
    """Downloads a file, unless it is there already, and verifies its md5 in both cases.

    Raises:
        OSError: the download failed; nothing is left of it.
        ValueError: the md5 is another. A file just downloaded is removed, one that was there before is left alone.
    """
    if target.exists():
        digest = _md5(target)
        if digest != md5:
            raise ValueError(
                f"{target} is damaged or another file: its md5 is {digest}, not {md5}. "
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
            raise ValueError(f"{url} arrived damaged and was removed: its md5 is {digest}, not {md5}. Try again")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def fingerprint(archive: Path) -> str:
    """Return a digest of what a zip file says that it holds: names, sizes and checksums of its files.

    Raises:
        ValueError: the archive is damaged, or no zip file.
    """
    members = sorted((member.filename, member.file_size, member.CRC) for member in _members(archive))
    return hashlib.sha256(repr(members).encode()).hexdigest()


def require_same_archive(archive: Path, folder: Path) -> None:
    """Check that an extracted folder came from an archive as it is now, where the folder or the archive can tell.

    Raises:
        ValueError: the archive holds something else than what was extracted.
    """
    record = folder / _RECORD
    if not record.is_file() or not archive.is_file():
        logger.info("%s was extracted before: delete it to extract %s again", folder, archive)
    elif record.read_text(encoding="utf-8").strip() != fingerprint(archive):
        raise ValueError(
            f"{folder} was extracted from another archive than {archive} is now: delete the folder to extract it again"
        )


def extract(archive: Path, target: Path, find: Callable[[Path], Path]) -> None:
    """Extracts a zip file's data folder, so that `target` appears complete or not at all.

    Args:
        archive: the zip file; never changed.
        target: the folder to make. One made by another process in the meantime is accepted.
        find: finds the data folder among what was extracted; raises FileNotFoundError.

    Raises:
        FileNotFoundError: there is no such archive, or no data folder in it.
        OSError: no room for it, or no right to write.
        ValueError: the archive is damaged, or a path in it leads outside.
    """
    if not archive.is_file():
        raise FileNotFoundError(f"{archive} does not exist")
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
    except PermissionError as error:
        raise PermissionError(f"{archive} cannot be extracted to {target} ({error}): choose another folder") from error


def _extract_all(archive: Path, folder: Path) -> None:
    members = _members(archive)
    for member in members:
        path = PurePosixPath(member.filename)
        if path.is_absolute() or PureWindowsPath(member.filename).drive or ".." in path.parts:
            raise ValueError(f"{archive} is not safe to extract: {member.filename!r} leads outside of its folder")
    size, free = sum(member.file_size for member in members), shutil.disk_usage(folder).free
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
    except _DAMAGED as error:
        raise ValueError(f"{archive} is damaged or not a zip file ({error}): get it again") from error


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
