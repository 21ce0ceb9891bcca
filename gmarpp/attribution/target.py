"""Targets: which score of the network's output is explained."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gmarpp.attribution.decisions import decide
from gmarpp.network.output import class_index, logits_of

Score = Callable[[Any], Tensor]
"""Takes the network's output and returns one score per image, shape (B,), or K of them, (B, K)."""


NO_CLASS = -1
"""Target of an explanation of a function, which explains no class."""


class ImageScore(ABC):
    """A score that knows which image is which, so that images can be scored in any number and order.

    Attributes:
        images: number of images that it was made for; `None` if it is the same for all.
        names: of the K scores, for people; empty if they have none.
    """

    images: int | None = None
    names: tuple[str, ...] = ()

    def __call__(self, output: Any) -> Tensor:
        """Return the scores of all images, (B,) or (B, K)."""
        return self.of(output, slice(None))

    @abstractmethod
    def of(self, output: Any, rows: "Tensor | slice") -> Tensor:
        """Return the scores, (n,) or (n, K), of the output for n images at some positions of the batch."""

    def require(self, images: int) -> None:
        """Raise `ValueError` unless it can score so many images."""
        if self.images not in (None, images):
            raise ValueError(
                f"{type(self).__name__}: expected {self.images} images, as it has masks or indices, got {images}"
            )


@dataclass(frozen=True)
class Contrast:
    """What speaks for one target and against another: the difference of their scores, of logits for classes.

    Args:
        target: what is explained, as a target of `gmarpp.explain` for one class or score per image.
        other: what it is compared with, likewise.
    """

    target: "ClassTarget | Score"
    other: "ClassTarget | Score"

    def __str__(self) -> str:
        return f"{_named(self.target)} against {_named(self.other)}"


def _named(side: "ClassTarget | Score") -> str:
    if callable(side):
        return str(getattr(side, "__qualname__", type(side).__qualname__))
    return "predicted" if side is None else str(side)


ClassTarget: TypeAlias = "int | str | Tensor | Sequence[Any] | None"


Target: TypeAlias = "ClassTarget | Contrast | Score"


def resolve_target(target: ClassTarget, logits: Tensor, model: nn.Module) -> Tensor:
    """Return class indices for every image.

    Args:
        target: `None` for the predicted class; an index or a name for all images; or indices or names per image, of
            shape (B,) or (B, K).
        logits: shape (B, C).
        model: the network, for class names.

    Returns:
        long, shape (B,) or (B, K).

    Raises:
        ValueError: for a wrong shape, an index out of range or an unknown name.
    """
    batch, classes = logits.shape
    if target is None:
        return logits.argmax(dim=1)
    try:
        indices = torch.as_tensor(class_indices(target, model))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"targets: expected classes, by index or name, got {target!r:.80}") from error
    if indices.numel() == 0:
        raise ValueError("targets: expected a class for every image, got none")
    if indices.dtype == torch.bool or indices.is_floating_point() or indices.is_complex():
        raise ValueError(f"targets: expected class indices of an integer type, got {indices.dtype}")
    if indices.dim() == 0:
        indices = indices.expand(batch)
    if indices.dim() not in (1, 2) or len(indices) != batch or indices.numel() == 0:
        raise ValueError(
            f"targets: expected shape ({batch},), or ({batch}, K) for K classes per image, got {tuple(indices.shape)}"
        )
    if not decide(((indices >= 0) & (indices < classes)).all())[0]:
        raise ValueError(
            f"targets: expected 0 to {classes - 1} for {classes} classes, got {indices.min().item()} to "
            f"{indices.max().item()}"
        )
    # Copied because autograd cannot save indices that were made in inference mode.
    return indices.long().clone().to(logits.device, non_blocking=True)


def class_indices(target: Any, model: nn.Module) -> Any:
    """Replace names of classes, also in sequences, by their indices.

    Raises:
        ValueError: for a name that the network does not know, or that names several classes.
    """
    if isinstance(target, str):
        return class_index(target, model)
    if isinstance(target, Sequence):
        return [class_indices(each, model) for each in target]
    return target


def class_score(indices: Tensor) -> Score:
    """Score each image by the logit of its class; indices of shape (B,)."""
    return lambda output: logits_of(output).gather(1, indices[:, None]).squeeze(1)


def margin_score(indices: Tensor) -> Score:
    """Score each image by the logit of its class less the log-sum-exp of the others; indices of shape (B,).

    It is the log-odds of the class, in float32. The logit of a network with one class has no margin, and stays.
    """

    def score(output: Any) -> Tensor:
        logits = logits_of(output).float()
        logit = logits.gather(1, indices[:, None])
        if logits.shape[1] == 1:
            return logit.squeeze(1)
        others = logits.scatter(1, indices[:, None], float("-inf"))
        return logit.squeeze(1) - others.logsumexp(dim=1)

    return score
