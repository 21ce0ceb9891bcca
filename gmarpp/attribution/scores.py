"""The scores that a target stands for: one per column of classes, each a function of the network's output."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gmarpp.attribution.target import Contrast, Score, Target, check_finite, class_score, logits_of, resolve_target


@dataclass(frozen=True)
class Scores:
    """What is explained of a batch.

    Attributes:
        logits: (B, C), or the scores (B, 1) where the target is a function.
        indices: class explained, long, (B,) or (B, K); 0 where the target is a function.
        functions: one for each of the K classes.
        of_classes: whether the scores are logits of classes.
    """

    logits: Tensor
    indices: Tensor
    functions: tuple[Score, ...]
    of_classes: bool

    @staticmethod
    def of(output: Any, target: Target, model: nn.Module, batch: int) -> "Scores":
        """Return the scores of a network's output for a batch.

        Raises:
            ValueError: for unusable targets, or logits or scores that are not finite.
        """
        if callable(target):
            scores = _own_scores(output, target, batch)
            check_finite(scores[:, None], "scores")
            indices = torch.zeros(batch, dtype=torch.long, device=scores.device)
            return Scores(scores[:, None], indices, (target,), of_classes=False)
        logits = logits_of(output)
        check_finite(logits)
        if isinstance(target, Contrast):
            indices, other = (resolve_target(each, logits, model) for each in (target.target, target.other))
            if indices.dim() != 1 or other.dim() != 1:
                raise ValueError("a contrast takes one class per image on either side")
            plus, minus = class_score(indices), class_score(other)
            return Scores(logits, indices, (lambda output: plus(output) - minus(output),), of_classes=True)
        indices = resolve_target(target, logits, model)
        columns = indices[:, None] if indices.dim() == 1 else indices
        return Scores(logits, indices, tuple(map(class_score, columns.unbind(dim=1))), of_classes=True)


def _own_scores(output: Any, target: Score, batch: int) -> Tensor:
    scores = target(output)
    if not isinstance(scores, Tensor) or scores.shape != (batch,):
        raise ValueError(
            f"the target function must give one score per image, shape ({batch},), and gave "
            f"{tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__}"
        )
    return scores
