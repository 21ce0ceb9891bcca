"""A batch of images that are explained and measured."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from gmarpp.perturbation import Curves

_CURVES = ("insertion", "deletion")


@dataclass(frozen=True)
class ExplainedBatch:
    """Everything known about a batch of explained images; all tensors are on the CPU.

    Where several outputs of an image are explained, such as its labels, each is an image of the batch by itself.

    Attributes:
        index: (B,) long, positions in the data set, or `rows_per_image` times that, and the row among the image's.
        path: of each image, relative to the data's root.
        label: (B,) long, -1 where unknown. Of labels that do not exclude each other, the target or -1, where the image
            does not have it.
        target: (B,) long, class explained; -1 where a function was explained instead of a class.
        predicted: (B,) long; likewise, the target or -1, where it is not predicted.
        target_probability: (B,), by the sigmoid where that is the score; NaN for values, for functions, and for one
            output scored by its logit.
        predicted_probability: (B,), likewise; of labels that do not exclude each other, the target's.
        maps: by method, float32 (B, h, w), raw.
        values: by method and metric, float32 (B,); NaN where a value is undefined, as without a box.
        inputs: by method, the keyword arguments that update a `torchmetrics.MetricCollection` of the metrics.
        curves: by method; empty if no metric asked for them.
        images: float32 (B, 3, H, W) in [0, 1], the part that the network's patches cover; each is stretched to that
            range where the network does not tell its normalization.
        boxes: float32 (B, 4), x0, y0, x1, y1 in pixels of that part, or `None`.
        masks: bool (B, H, W), or `None`.
        rows_per_image: how many outputs of an image are explained at most.
    """

    index: Tensor
    path: list[str]
    label: Tensor
    target: Tensor
    predicted: Tensor
    target_probability: Tensor
    predicted_probability: Tensor
    maps: dict[str, Tensor]
    values: dict[str, dict[str, Tensor]]
    inputs: dict[str, dict[str, Tensor]]
    curves: dict[str, Curves]
    images: Tensor
    boxes: Tensor | None = None
    masks: Tensor | None = None
    rows_per_image: int = 1

    def to(self, device: torch.device | str, **_: Any) -> Self:
        """Return the batch as it is: Lightning moves the predictions that it gathers to the CPU, and it is there."""
        return self

    @property
    def positions(self) -> list[int]:
        """Positions of the images in the data set, each once."""
        return list(dict.fromkeys((self.index // self.rows_per_image).tolist()))

    @staticmethod
    def concatenate(parts: "Sequence[ExplainedBatch]") -> "ExplainedBatch":
        """Return one batch of several, explained alike."""
        names = [each.name for each in fields(ExplainedBatch)]
        return ExplainedBatch(**{name: _joined([getattr(part, name) for part in parts]) for name in names})


def _joined(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    if isinstance(first, list):
        return [each for value in values for each in value]
    if isinstance(first, dict):
        return {key: _joined_value(key, [value[key] for value in values]) for key in first}
    return first


def _joined_value(key: str, values: Sequence[Any]) -> Any:
    if isinstance(values[0], Curves):
        return Curves(values[0].fractions, *(torch.cat([getattr(each, name) for each in values]) for name in _CURVES))
    # Of all images alike.
    return values[0] if key == "fractions" else _joined(values)
