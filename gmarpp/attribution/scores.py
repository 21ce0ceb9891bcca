"""The scores that a target stands for: one per column of classes, each a function of the network's output."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gmarpp.attribution.decisions import decide
from gmarpp.attribution.target import (
    NO_CLASS,
    ClassTarget,
    Contrast,
    ImageScore,
    Score,
    Target,
    class_score,
    margin_score,
    resolve_target,
)
from gmarpp.network.output import check_finite, logits_of


@dataclass(frozen=True)
class Scores:
    """What is explained of a batch.

    Attributes:
        logits: (B, C), or the scores, (B, 1) or (B, K), where the target is a function.
        indices: class explained, long, (B,) or (B, K); -1 where the target is a function.
        functions: one for each of the K classes or scores.
        margins: what the balanced gradient is of, likewise: the class's margin, or a function or `Contrast` as it is.
        values: what they return, float32, in the shape of `indices`.
        of_classes: whether classes are explained.
    """

    logits: Tensor
    indices: Tensor
    functions: tuple[Score, ...]
    margins: tuple[Score, ...]
    values: Tensor
    of_classes: bool

    @staticmethod
    def of(output: Any, target: Target, model: nn.Module, batch: int) -> "Scores":
        """Return the scores of a network's output for a batch, which may not be finite.

        Raises:
            ValueError: for unusable targets.
        """
        if isinstance(target, Contrast):
            indices, functions = _of_contrast(output, target, model, batch)
            margins = functions
        elif callable(target):
            indices, functions = _of_function(output, target, batch)
            margins = functions
        else:
            indices, functions = _of_classes(output, target, model)
            margins = tuple(map(margin_score, _columns(indices)))
        values = torch.stack([function(output).detach().float() for function in functions], dim=1)
        of_classes = not callable(target.target if isinstance(target, Contrast) else target)
        logits = logits_of(output).detach() if of_classes else values
        return Scores(logits, indices, functions, margins, values.view(indices.shape), of_classes)

    def are_finite(self) -> Tensor:
        """Return whether all are."""
        return self.logits.isfinite().all() & self.values.isfinite().all()

    def require_finite(self) -> None:
        """Raise `ValueError`, naming the images, unless all are."""
        if decide(self.are_finite())[0]:
            return
        check_finite(self.logits, "logits" if self.of_classes else "scores")
        check_finite(self.values.flatten(1) if self.values.dim() > 1 else self.values[:, None], "scores")


def _columns(indices: Tensor) -> tuple[Tensor, ...]:
    return (indices[:, None] if indices.dim() == 1 else indices).unbind(dim=1)


def _of_classes(output: Any, target: ClassTarget, model: nn.Module) -> tuple[Tensor, tuple[Score, ...]]:
    indices = resolve_target(target, logits_of(output), model)
    return indices, tuple(map(class_score, _columns(indices)))


def _of_contrast(output: Any, target: Contrast, model: nn.Module, batch: int) -> tuple[Tensor, tuple[Score, ...]]:
    sides = [
        _of_function(output, each, batch) if callable(each) else _of_classes(output, each, model)
        for each in (target.target, target.other)
    ]
    (indices, (plus, *_)), (other, (minus, *_)) = sides
    if indices.dim() != 1 or other.dim() != 1:
        shapes = f"{tuple(indices.shape)} and {tuple(other.shape)}"
        raise ValueError(f"contrast: expected one class or score per image on either side, got shapes {shapes}")
    return indices, (lambda output: plus(output) - minus(output),)


def _of_function(output: Any, target: Score, batch: int) -> tuple[Tensor, tuple[Score, ...]]:
    if isinstance(target, ImageScore):
        target.require(batch)
    scores = target(output)
    if not isinstance(scores, Tensor) or scores.dim() not in (1, 2) or len(scores) != batch or not scores.numel():
        raise ValueError(
            f"target function: expected one score per image, shape ({batch},), or ({batch}, K) for K of them, got "
            f"{tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__}"
        )
    indices = torch.full(scores.shape, NO_CLASS, device=scores.device)
    if scores.dim() == 1:
        return indices, (target,)
    return indices, tuple(_column(target, position) for position in range(scores.shape[1]))


def _column(target: Score, position: int) -> Score:
    return lambda output: target(output)[:, position]
