"""What a file of weights says about the network that it fits, checked field by field."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gmarpp.network.task import TASKS

PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
DIGEST = "content_sha256"
# Names the digest a second time, so that damage to its own name does not hide it.
DIGEST_NAME = "digest"
# All that files name; what images can be prepared with here is a part of them.
TIMM_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming", "random")
TIMM_CROP_MODES = ("center", "squash", "border")
MAX_CLASSES = 1_000_000
MAX_PIXELS_PER_SIDE = 16_384
# No option of a network is larger; a number of layers that the weights do not have is found while building.
MAX_OPTION = 1 << 16


@dataclass(frozen=True)
class Weights:
    """A state dict in its network's own naming, and what its file says about the network that it fits.

    `None` or empty means that the file does not say. `preprocessing` holds any of `PREPROCESSING`; `model_args` are
    options of `build_model` beyond the architecture's own; `training` are all options of the training that wrote the
    file, and `hyper_parameters` those of another project's LightningModule. `configuration` is transformers', of a
    classifier that it builds; `task` is one of `TASKS`. `path` is the file as it was asked for, `sha256` the digest of
    what was read from it; of a folder, the digest of the lines that `sha256sum` prints for the files that were read, by
    name.

    Raises:
        ValueError: a field is of the wrong type or out of range; the message names it.
    """

    state: Mapping[str, Tensor]
    architecture: str | None = None
    image_size: tuple[int, int] | None = None
    num_classes: int | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    preprocessing: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    hyper_parameters: dict[str, Any] = field(default_factory=dict)
    configuration: dict[str, Any] = field(default_factory=dict)
    task: str = "multiclass"
    path: str | None = None
    sha256: str | None = None

    @property
    def origin(self) -> str:
        """The file's path, for messages."""
        return self.path or "the state dict"

    def require_timm(self) -> None:
        """Require the weights of a network that can be fine-tuned and exported, as timm's can.

        Raises:
            ValueError: they are those of a classifier that transformers builds.
        """
        if self.configuration:
            kind = self.configuration.get("architectures") or [self.configuration.get("model_type")]
            raise ValueError(
                f"{self.origin} holds a {kind[0]} of transformers, which is explained and evaluated as it is, but not "
                "fine-tuned or exported: that takes weights of timm's architectures"
            )

    def __post_init__(self) -> None:
        other = next((key for key, value in self.state.items() if not isinstance(value, Tensor)), None)
        _expect(other is None, f"state dict's {other}", "a tensor", self.state.get(other or ""))
        named = self.architecture is None or (isinstance(self.architecture, str) and len(self.architecture) < 200)
        _expect(named, "architecture", "timm's name of a network", self.architecture)
        if self.num_classes is not None:
            expect_integer("num_classes", self.num_classes, 0, MAX_CLASSES)
        plain = isinstance(self.model_args, dict) and _is_plain(self.model_args)
        _expect(plain, "model_args", f"options by name, of plain values up to {MAX_OPTION}", self.model_args)
        _expect(self.task in TASKS, "task", f"one of {', '.join(TASKS)}", self.task)
        self._check_classes()
        _expect(isinstance(self.preprocessing, dict), "preprocessing", "options by name", self.preprocessing)
        for key, value in self.preprocessing.items():
            check_preprocessing(key, value)

    def _check_classes(self) -> None:
        for name, values in (("classes", self.classes), ("class_names", self.class_names)):
            _expect(all(isinstance(value, str) for value in values), name, "strings", values)
            count = self.num_classes if self.num_classes is not None else len(values)
            _expect(len(values) in (0, count), name, f"{count} of them, as many as the network's outputs", len(values))
        _expect(len(set(self.classes)) == len(self.classes), "classes", "each one once", self.classes)


def check_preprocessing(key: str, value: Any) -> None:
    """Require that one of `PREPROCESSING` has a value that images can be prepared with.

    Raises:
        ValueError: unknown key, or a value of the wrong type or out of range.
    """
    if key in ("mean", "std"):
        triple = isinstance(value, (list, tuple)) and len(value) == 3 and all(map(_is_number, value))
        fits = triple and (key == "mean" or min(value) > 0)
        _expect(fits, key, f"three {'positive ' if key == 'std' else ''}numbers, one per channel", value)
    elif key == "interpolation":
        _expect(value in TIMM_INTERPOLATIONS, key, f"one of {', '.join(TIMM_INTERPOLATIONS)}", value)
    elif key == "crop_pct":
        _expect(_is_number(value) and 0 < value <= 1, key, "a number in (0, 1]", value)
    elif key == "crop_mode":
        _expect(value in TIMM_CROP_MODES, key, f"one of {', '.join(TIMM_CROP_MODES)}", value)
    else:
        raise ValueError(f"unknown preprocessing {key!r}: choose from {', '.join(PREPROCESSING)}")


def expect_integer(name: str, value: Any, lowest: int, highest: int) -> int:
    """Return an integer of a range.

    Raises:
        ValueError: the value is something else; the message names it.
    """
    _expect(type(value) is int and lowest <= value <= highest, name, f"an integer from {lowest} to {highest}", value)
    return int(value)


def expect_pair(name: str, value: Any) -> tuple[int, int]:
    """Return (height, width) in pixels of a side or a pair of them.

    Raises:
        ValueError: the value is something else; the message names it.
    """
    sides = list(value) if isinstance(value, (list, tuple)) else [value, value]
    fits = len(sides) == 2 and all(type(side) is int and 0 < side <= MAX_PIXELS_PER_SIDE for side in sides)
    _expect(fits, name, f"one or two sides of 1 to {MAX_PIXELS_PER_SIDE} pixels", value)
    return sides[0], sides[1]


def expect_names(name: str, value: Any) -> tuple[str, ...]:
    """Return the names in a list.

    Raises:
        ValueError: the value is something else; the message names it.
    """
    _expect(isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value), name, "a list", value)
    return tuple(value)


def expect_mapping(name: str, value: Any) -> dict[str, Any]:
    """Return a dict with strings as keys.

    Raises:
        ValueError: the value is something else; the message names it.
    """
    _expect(isinstance(value, dict) and all(isinstance(key, str) for key in value), name, "values by name", value)
    return dict(value)


def _expect(condition: bool, name: str, expected: str, got: Any) -> None:
    if not condition:
        text = repr(got)
        raise ValueError(f"{name}: expected {expected}, got {text if len(text) <= 80 else text[:77] + '...'}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= MAX_OPTION


def _is_plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, dict):
        return depth < 4 and all(isinstance(key, str) and _is_plain(each, depth + 1) for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return depth < 4 and all(_is_plain(each, depth + 1) for each in value)
    return value is None or isinstance(value, (bool, str)) or _is_number(value)


def content_digest(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 of a file's content: names, types, shapes and values of its tensors, and its metadata."""
    digest = hashlib.sha256(json.dumps({key: metadata[key] for key in sorted(metadata) if key != DIGEST}).encode())
    for key in sorted(state):
        value = state[key].contiguous()
        digest.update(json.dumps([key, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
