"""Contents of untrusted files: no code runs, and sizes and checksums are checked before use."""

import errno
import hashlib
import json
import logging
import os
import pickle
import re
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load
from torch import Tensor, nn

from gmarpp.files import damaged, first_line, open_file, sha256

logger = logging.getLogger(__name__)


# Descriptions of networks, with the names of 21,000 classes, take less than 2 MB.
MAX_JSON_BYTES = 16 << 20
MAX_VALUES = 1_000_000
MAX_NESTING = 32
# Weights may be stored under two names, but no checkpoint unfolds to many times its size.
MAX_UNFOLDING = 4


def parse_json(text: str | bytes, source: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: naming `source`; the text is not JSON, too large, nested too deeply, or has a key twice.
    """
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{source}: expected at most {MAX_JSON_BYTES >> 20} MB of JSON, got {len(text) >> 20} MB")
    try:
        return json.loads(text, object_pairs_hook=_with_unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not valid JSON ({first_line(error)}): copy or download it again") from error


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key appears twice")
    return content


def read_json(path: Path) -> tuple[dict[str, Any], str]:
    """Return the JSON object in a file, and the file's SHA-256.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming the file; it holds something else.
    """
    with open_file(path) as file:
        text = file.read(MAX_JSON_BYTES + 1)
    content = parse_json(text, str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(content).__name__}; copy or download it again")
    return content, hashlib.sha256(text).hexdigest()


def load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Return the tensors and the metadata of a safetensors file, and the file's SHA-256, of one read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged; one in the Hub's cache also if its content does not match its name.
    """
    with open_file(path) as file:
        header = int.from_bytes(file.read(8), "little")
        if header > MAX_JSON_BYTES:
            raise damaged(path, f"expected at most {MAX_JSON_BYTES} bytes of header, got {header}")
        file.seek(0)
        content, stored = file.read(), Path(file.name).resolve()
    digest = hashlib.sha256(content).hexdigest()
    if stored.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", stored.name) and digest != stored.name:
        raise damaged(path, "its content has another SHA-256 than the Hub says")
    try:
        # The library checks the header first: its own parser must have accepted what ours then takes the metadata from.
        state = load(content)
    except Exception as error:  # of whatever kind: the file alone decides what goes wrong here
        raise _unreadable(path, error) from error
    return state, parse_json(content[8 : 8 + header], str(path)).get("__metadata__") or {}, digest


def load_tensors(path: str | Path) -> tuple[dict[str, Any], str]:
    """Return the content of a file by `torch.save`, tensors and plain values, and the file's SHA-256.

    The unpickler is always the one that runs no code, whatever the environment asks for. Digest, checksums and content
    are of one open file: what takes its name in between is not mixed with it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds anything but tensors and plain values.
    """
    with open_file(path) as file:
        digest, size = sha256(file), os.fstat(file.fileno()).st_size
        start = file.read(4)
        if start == b"PK\x03\x04":
            _check_records(file, size, path)
        elif not start.startswith(b"\x80"):
            raise damaged(path, "it does not begin as PyTorch's files do")
        else:
            logger.warning("%s is in a format without checksums, of PyTorch before 1.6: damage may go unnoticed", path)
        file.seek(0)
        content = _unpickle(file, path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    _check_values(content, size, path)
    return content, digest


def _unpickle(file: BinaryIO, path: str | Path) -> Any:
    try:
        # Timm's training script stores its options as a Namespace: plain values by name.
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        if re.search("Unsupported|GLOBAL|blocked", str(error)):
            raise ValueError(
                f"{path} holds more than tensors and plain values and is not opened, since unpickling can run code; "
                "save its state dict alone, or as safetensors"
            ) from error
        raise damaged(path, error) from error
    # The file alone decides which kind of error is raised here.
    except Exception as error:
        raise _unreadable(path, error) from error


def _check_records(file: BinaryIO, size: int, path: str | Path) -> None:
    """Compare the checksums of a zip archive's records, which torch.load does not do."""
    try:
        with zipfile.ZipFile(file) as archive:
            wrong = _wrong_record(archive, size)
    except Exception as error:  # of whatever kind: the file alone decides what goes wrong here
        raise _unreadable(path, error) from error
    if wrong is not None:
        raise damaged(path, wrong)


def _wrong_record(archive: zipfile.ZipFile, size: int) -> str | None:
    records = archive.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        return "its records are compressed, which torch.save never does"
    if sum(record.file_size for record in records) > size:
        return "its records are larger than the file"
    if len({record.filename for record in records}) < len(records):
        return "a record appears twice"
    if not any(record.CRC for record in records):
        # Files saved under torch.serialization.set_crc32_options(False) have none.
        logger.warning("%s has no checksums: damage may go unnoticed", archive.filename)
        return None
    wrong = archive.testzip()
    return None if wrong is None else f"the checksum of {wrong} is wrong"


def _unreadable(path: str | Path, error: Exception) -> Exception:
    """Return what to raise for what a reader made of a file: damage, unless it is the disk that fails."""
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return error
    return damaged(path, error)


def _check_values(content: dict[str, Any], size: int, path: str | Path) -> None:
    """Refuse what would unfold to far more than the file: views of a few values as large tensors, nested sharing."""
    known: dict[int, int] = {}
    room = MAX_UNFOLDING * size

    def count(value: Any, depth: int) -> int:
        nonlocal room
        if id(value) in known:
            return known[id(value)]
        if depth > MAX_NESTING:
            raise ValueError(f"{path} nests its values more than {MAX_NESTING} deep, which no checkpoint does")
        total = 1
        if isinstance(value, Tensor):
            _check_tensor(value, path)
            room -= value.nbytes
        elif isinstance(value, dict):
            total += sum(count(key, depth + 1) + count(each, depth + 1) for key, each in value.items())
        elif isinstance(value, (list, tuple, set, frozenset)):
            total += sum(count(each, depth + 1) for each in value)
        if total > MAX_VALUES or room < 0:
            raise ValueError(f"{path} unfolds to far more than it holds, which no checkpoint does")
        known[id(value)] = total
        return total

    count(content, 0)


def _check_tensor(value: Tensor, path: str | Path) -> None:
    plain = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and value.device.type == "cpu"
    if not plain or value.is_quantized:
        raise ValueError(
            f"{path} holds a {value.dtype} tensor that is sparse, quantized, without values or of a custom class; "
            "expected dense tensors: save the network's state dict from a plain copy"
        )
    if value.nbytes > value.untyped_storage().nbytes():
        raise ValueError(f"{path} unfolds to far more than it holds, which no checkpoint does")
