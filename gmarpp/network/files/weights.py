"""What a file of weights says about the network that it fits, checked field by field."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gmarpp.network.expected import MAX_OPTION, check_preprocessing, expect, expect_integer, is_plain
from gmarpp.network.task import TASKS

DIGEST = "content_sha256"
# Names the digest a second time, so that damage to its own name does not hide it.
DIGEST_NAME = "digest"
MAX_CLASSES = 1_000_000


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
        expect(other is None, f"state dict's {other}", "a tensor", self.state.get(other or ""))
        named = self.architecture is None or (isinstance(self.architecture, str) and len(self.architecture) < 200)
        expect(named, "architecture", "timm's name of a network", self.architecture)
        if self.num_classes is not None:
            expect_integer("num_classes", self.num_classes, 0, MAX_CLASSES)
        plain = isinstance(self.model_args, dict) and is_plain(self.model_args)
        expect(plain, "model_args", f"options by name, of plain values up to {MAX_OPTION}", self.model_args)
        expect(self.task in TASKS, "task", f"one of {', '.join(TASKS)}", self.task)
        self._check_classes()
        expect(isinstance(self.preprocessing, dict), "preprocessing", "options by name", self.preprocessing)
        for key, value in self.preprocessing.items():
            check_preprocessing(key, value)

    def _check_classes(self) -> None:
        for name, values in (("classes", self.classes), ("class_names", self.class_names)):
            expect(all(isinstance(value, str) for value in values), name, "strings", values)
            count = self.num_classes if self.num_classes is not None else len(values)
            expect(len(values) in (0, count), name, f"{count} of them, as many as the network's outputs", len(values))
        expect(len(set(self.classes)) == len(self.classes), "classes", "each one once", self.classes)


def content_digest(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 of a file's content: names, types, shapes and values of its tensors, and its metadata."""
    digest = hashlib.sha256(json.dumps({key: metadata[key] for key in sorted(metadata) if key != DIGEST}).encode())
    for key in sorted(state):
        value = state[key].contiguous()
        digest.update(json.dumps([key, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
