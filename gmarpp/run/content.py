"""What the files of a run folder may hold: all that is read from one, which anybody may have made, is checked here."""

import hashlib
import json
import math
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FILE_STEM = re.compile(r"[0-9]{6,16}(-[A-Za-z0-9._-]{1,60})?")
_SHARD_NAME = re.compile(r"[0-9]{5,16}\.safetensors")
_LARGEST_INDEX = 2**53
_RUN_FIELDS: Mapping[str, tuple[type, ...]] = {
    "created": (str,),
    "versions": (dict,),
    "checkpoint.path": (str, type(None)),
    "checkpoint.sha256": (str, type(None)),
    "model.name": (str,),
    "model.architecture": (str, type(None)),
    "model.parameters": (int,),
    "explainer": (dict,),
    "data.name": (str, type(None)),
    "data.images": (int,),
    "writer.overlays": (bool, str),
}
_OPTIONAL_FIELDS: Mapping[str, tuple[type, ...]] = {
    "explained": (int,),
    "skipped": (int,),
    "rows_per_image": (int,),
    "finished": (str,),
    "trainer": (dict,),
    "data.options": (dict,),
    "data.paths_sha256": (str, type(None)),
    "explainer.target": (str, int, list),
    "explainer.score": (str,),
}


def damaged_file(path: Path, fault: str, remedy: str = "delete it and run again with --resume") -> ValueError:
    """Return the error for a file of a run that does not hold what it should."""
    return ValueError(f"{path} is damaged ({fault:.300}): {remedy}")


def require_file(path: Path, folder: Path) -> Path:
    """Return the path of an ordinary file of a run, before anything opens it: reading a pipe would wait forever.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is something else, or a link leads out of the folder.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise damaged_file(path, "expected an ordinary file")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise damaged_file(path, f"a link that leads out of {folder}")
    return path


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object whose numbers are finite, and compare it with the digest that `signed_json` put in.

    Objects of earlier versions, without a digest, are taken as they are.

    Raises:
        ValueError: naming the file, what is wrong with it and the remedy.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise damaged_file(path, str(error), remedy) from error
    if not isinstance(content, dict):
        raise damaged_file(path, f"expected an object, got {type(content).__name__}", remedy)
    digest = content.pop("sha256", None)
    if digest is not None and digest != _digest(content):
        raise damaged_file(path, "its content is not what was written: the digest differs", remedy)
    return content


def signed_json(content: Mapping[str, Any], indent: int | None = None) -> bytes:
    """Return an object as JSON with a digest of its content under ``sha256``."""
    plain = json.loads(json.dumps(content))
    return (json.dumps({**plain, "sha256": _digest(plain)}, indent=indent) + "\n").encode()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def parse_json(text: str) -> Any:
    """Parse JSON whose numbers are all finite.

    Raises:
        ValueError: saying what is wrong.
    """
    try:
        return json.loads(text, parse_float=_finite, parse_constant=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {text}")
    return number


def tensor_digest(about: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a text and of tensors with their names, types and shapes, whatever their order."""
    digest = hashlib.sha256(about.encode())
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"\0{key} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def check_run(run: Mapping[str, Any]) -> None:
    """Check the description of a run.

    Raises:
        ValueError: naming the entry that is missing or of a wrong type; the caller adds the file.
    """
    for fields, optional in ((_RUN_FIELDS, False), (_OPTIONAL_FIELDS, True)):
        for name, kinds in fields.items():
            present, value = _entry(run, name.split("."))
            _require(present or optional, f"{name} is missing")
            _require(not present or _is_a(value, kinds), f"{name}: expected {_names(kinds)}, got {value!r:.80}")
    _require(run.get("rows_per_image", 1) > 0, f"rows_per_image: expected at least 1, got {run.get('rows_per_image')}")
    for name in ("classes", "class_names"):
        _require(_are_texts(run.get(name)), f"{name}: expected a list of texts, got {run.get(name)!r:.80}")
    signed = run.get("signed_methods", [])
    _require(_are_texts(signed), f"signed_methods: expected a list of texts, got {signed!r:.80}")


def _entry(content: Any, names: Sequence[str]) -> tuple[bool, Any]:
    for name in names:
        if not isinstance(content, Mapping) or name not in content:
            return False, None
        content = content[name]
    return True, content


def _is_a(value: Any, kinds: tuple[type, ...]) -> bool:
    # Python takes True for an integer.
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _names(kinds: tuple[type, ...]) -> str:
    words = {
        str: "a text",
        int: "an integer",
        list: "a list",
        dict: "an object",
        bool: "true or false",
        type(None): "null",
    }
    return " or ".join(words.get(kind, "null") for kind in kinds)


def check_index(about: Mapping[str, Any]) -> None:
    """Check the index of the maps: ``methods``, ``metrics`` and ``shards`` with their files and ascending indices.

    Raises:
        ValueError: saying what is wrong; the caller adds the file.
    """
    _check_names(about)
    shards = about.get("shards")
    _require(isinstance(shards, list) and bool(shards), "shards: expected a list with an entry for each file")
    assert isinstance(shards, list)
    indices: list[int] = []
    for number, shard in enumerate(shards):
        _require(
            isinstance(shard, dict) and _matches(shard.get("file"), _SHARD_NAME),
            f"shards[{number}].file: expected a name such as 00000.safetensors",
        )
        _require(
            _are_all(shard.get("indices"), _is_index) and bool(shard["indices"]),
            f"shards[{number}].indices: expected a list of integers from 0",
        )
        indices += shard["indices"]
    _require(all(a < b for a, b in pairwise(indices)), "the indices do not ascend")
    _require(
        about.get("images") == len(indices), f"images is {about.get('images')!r:.80}, but {len(indices)} are listed"
    )


def check_header(about: Any) -> None:
    """Check what a shard says of its images: ``methods``, ``metrics`` and ``rows``.

    Raises:
        ValueError: saying what is wrong; the caller adds the file.
    """
    _require(isinstance(about, dict), "expected an object in its header")
    _check_names(about)
    rows = about.get("rows")
    _require(isinstance(rows, list) and bool(rows), "rows: expected a list with an entry for each image")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"rows[{number}]: expected an object, got {row!r:.80}")
        for name, (accepts, expected) in _ROW.items():
            if not accepts(row.get(name)):
                raise ValueError(f"rows[{number}].{name}: expected {expected}, got {row.get(name)!r:.80}")
        if "box" in row and not _is_box(row["box"]):
            raise ValueError(f"rows[{number}].box: expected four finite numbers, got {row['box']!r:.80}")
        if int(row["file"].partition("-")[0]) != row["index"]:
            raise ValueError(f"rows[{number}].file: expected a name that begins with its index, got {row['file']!r}")
    _require(len({row["index"] for row in rows}) == len(rows), "an image occurs twice")


def _check_names(about: Mapping[str, Any]) -> None:
    for name, least in (("methods", 1), ("metrics", 0)):
        names = about.get(name)
        _require(
            isinstance(names, list)
            and all(map(is_plain_name, names))
            and len(set(names)) == len(names)
            and len(names) >= least,
            f"{name}: expected a list of names, got {names!r:.80}",
        )


def check_tensors(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Check the tensors of a shard, ``index`` and ``fractions`` among them, against its header.

    Raises:
        ValueError: saying what is wrong; the caller adds the file.
    """
    images, methods = len(about["rows"]), about["methods"]
    index, fractions = tensors.get("index"), tensors.get("fractions")
    _require(
        index is not None and index.dtype == torch.long and index.tolist() == [row["index"] for row in about["rows"]],
        "index: expected those of its rows",
    )
    _require(
        all(tensor.dtype == torch.float32 for key, tensor in tensors.items() if key != "index"),
        "expected tensors of float32",
    )
    expected: dict[str, tuple[int, ...]] = {}
    grid = tuple(tensors[methods[0]].shape[1:]) if methods[0] in tensors else ()
    _require(len(grid) == 2 and min(grid) > 0, f"expected maps of {methods[0]} of shape ({images}, h, w)")
    points: tuple[int, ...] | None = None
    if fractions is not None:
        points = tuple(fractions.shape)
        _require(len(points) == 1 and bool(fractions.isfinite().all()), "fractions: expected finite numbers in a row")
    for method in methods:
        expected[method] = (images, *grid)
        expected |= {f"{method}/{metric}": (images,) for metric in about["metrics"]}
        if points is not None:
            expected |= {f"{method}/{curve}": (images, *points) for curve in ("insertion", "deletion")}
    given = {key: tuple(tensor.shape) for key, tensor in tensors.items() if key not in ("index", "fractions")}
    _require(given == expected, f"expected tensors {expected!r:.200}, got {given!r:.200}")


def is_plain_name(name: Any) -> bool:
    """Return whether a text can be the name of a folder and leads nowhere else."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= 100
        and name.isprintable()
        and name[0] != "."
        and not {*name} & {*"/\\"}
    )


def _is_index(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST_INDEX


def _is_label(value: Any) -> bool:
    return _is_index(value) or (type(value) is int and value == -1)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_probability(value: Any) -> bool:
    return value is None or _is_number(value)


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _matches(value: Any, pattern: re.Pattern[str]) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _are_all(values: Any, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(values, list) and all(map(accepts, values))


def _are_texts(values: Any) -> bool:
    return _are_all(values, _is_text)


_ROW: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "index": (_is_index, "an integer from 0"),
    "path": (_is_text, "a text"),
    "file": (lambda value: _matches(value, _FILE_STEM), "a plain file name"),
    "label": (_is_label, "a class or -1"),
    "target": (_is_label, "a class or -1"),
    "predicted": (_is_label, "a class or -1"),
    "target_probability": (_is_probability, "a finite number or null"),
    "predicted_probability": (_is_probability, "a finite number or null"),
}


def check_classes(rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Check that rows name classes that a run knows, where it knows names.

    Raises:
        ValueError: naming the image and its class; the caller adds the file.
    """
    for row in rows if names else ():
        for role in ("label", "target", "predicted"):
            if row[role] >= len(names):
                raise ValueError(f"image {row['index']}: {role} is {row[role]}, but there are {len(names)} classes")


def _require(condition: bool, fault: str) -> None:
    if not condition:
        raise ValueError(fault)
