"""The scores that a target stands for: one per column of classes, each a function of the network's output."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gmarpp.attribution.target import (
    NO_CLASS,
    ClassTarget,
    Contrast,
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
        logits: (B, C), or the scores (B, 1) where the target is a function.
        indices: class explained, long, (B,) or (B, K); -1 where the target is a function.
        functions: one for each of the K classes.
        margins: what the balanced gradient is of, likewise: the class's margin, or a function or `Contrast` as it is.
        values: what they return, float32, in the shape of `indices`.
    """

    logits: Tensor
    indices: Tensor
    functions: tuple[Score, ...]
    margins: tuple[Score, ...]
    values: Tensor

    @staticmethod
    def of(output: Any, target: Target, model: nn.Module, batch: int) -> "Scores":
        """Return the scores of a network's output for a batch.

        Raises:
            ValueError: for unusable targets, or logits or scores that are not finite.
        """
        functions: tuple[Score, ...]
        margins: tuple[Score, ...]
        if callable(target):
            logits, functions = _own_scores(output, target, batch)[:, None], (target,)
            margins = functions
            check_finite(logits, "scores")
            indices = torch.full((batch,), NO_CLASS, device=logits.device)
        else:
            logits = logits_of(output)
            check_finite(logits)
            indices, functions, margins = _of_classes(target, logits, model)
        values = torch.stack([function(output).detach().float() for function in functions], dim=1)
        return Scores(logits.detach(), indices, functions, margins, values.view(indices.shape))


def _of_classes(
    target: "ClassTarget | Contrast", logits: Tensor, model: nn.Module
) -> tuple[Tensor, tuple[Score, ...], tuple[Score, ...]]:
    if isinstance(target, Contrast):
        indices, other = (resolve_target(each, logits, model) for each in (target.target, target.other))
        if indices.dim() != 1 or other.dim() != 1:
            shapes = f"{tuple(indices.shape)} and {tuple(other.shape)}"
            raise ValueError(f"contrast: expected one class per image on either side, got shapes {shapes}")
        plus, minus = class_score(indices), class_score(other)
        difference = (lambda output: plus(output) - minus(output),)
        return indices, difference, difference
    indices = resolve_target(target, logits, model)
    columns = (indices[:, None] if indices.dim() == 1 else indices).unbind(dim=1)
    return indices, tuple(map(class_score, columns)), tuple(map(margin_score, columns))


def _own_scores(output: Any, target: Score, batch: int) -> Tensor:
    scores = target(output)
    if not isinstance(scores, Tensor) or scores.shape != (batch,):
        raise ValueError(
            f"target function: expected one score per image, shape ({batch},), got "
            f"{tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__}"
        )
    return scores
