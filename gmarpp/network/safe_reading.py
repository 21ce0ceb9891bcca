"""Contents of untrusted files: no code runs, and sizes and checksums are checked before use."""

import errno
import json
import logging
import pickle
import re
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from gmarpp.files import damaged, find_file, first_line, sha256

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


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming the file; it holds something else.
    """
    with find_file(path).open("rb") as file:
        content = parse_json(file.read(MAX_JSON_BYTES + 1), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(content).__name__}; copy or download it again")
    return content


def load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged; one in the Hub's cache also if its content does not match its name.
    """
    source = find_file(path)
    with source.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > MAX_JSON_BYTES:
        raise damaged(path, f"expected at most {MAX_JSON_BYTES} bytes of header, got {header}")
    stored = source.resolve()
    if stored.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", stored.name) and sha256(stored) != stored.name:
        raise damaged(path, "its SHA-256 differs from the one on the Hub")
    try:
        with safe_open(source, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    # The file alone decides which kind of error is raised here.
    except Exception as error:
        raise _unreadable(path, error) from error


def load_tensors(path: Path) -> dict[str, Any]:
    """Return the content of a file by `torch.save`: tensors and plain values; large files are mapped, not read.

    The unpickler is always the one that runs no code, whatever the environment says. A file in the current format
    is first read once to compare its checksums.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds anything but tensors and plain values.
    """
    source = find_file(path)
    with source.open("rb") as file:
        start = file.read(4)
    zipped = start == b"PK\x03\x04"
    if zipped:
        _check_records(source, path)
    elif not start.startswith(b"\x80"):
        raise damaged(path, "it does not begin as PyTorch's files do")
    else:
        logger.warning("%s is in a format without checksums, of PyTorch before 1.6: damage may go unnoticed", path)
    try:
        # The training script of timm stores its options as a Namespace: plain values by name.
        with torch.serialization.safe_globals([Namespace]):
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=zipped)
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
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    _check_values(content, source)
    return content


def _check_records(source: Path, path: Path) -> None:
    """Compare the checksums of a zip archive's records, which torch.load does not do."""
    try:
        with zipfile.ZipFile(source) as archive:
            wrong = _wrong_record(archive, source.stat().st_size)
    # The file alone decides which kind of error is raised here.
    except Exception as error:
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


def _unreadable(path: Path, error: Exception) -> Exception:
    """Return the error to raise when a reader failed: damage, unless the disk failed."""
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return error
    return damaged(path, error)


def _check_values(content: dict[str, Any], path: Path) -> None:
    """Refuse content that would unfold to far more than the file: large views of few values, nested sharing."""
    known: dict[int, int] = {}
    room = MAX_UNFOLDING * path.stat().st_size

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


def _check_tensor(value: Tensor, path: Path) -> None:
    plain = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and value.device.type == "cpu"
    if not plain or value.is_quantized:
        raise ValueError(
            f"{path} holds a {value.dtype} tensor that is sparse, quantized, without values or of a custom class; "
            "expected dense tensors: save the network's state dict from a plain copy"
        )
    if value.nbytes > value.untyped_storage().nbytes():
        raise ValueError(f"{path} unfolds to far more than it holds, which no checkpoint does")
