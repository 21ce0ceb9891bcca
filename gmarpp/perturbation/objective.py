"""What is scored on a perturbed image: a class, a class against another one, or a function of the network's output."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from gmarpp.attribution.target import ClassTarget, Contrast, Target, class_indices
from gmarpp.network.output import logits_of

Score = Literal["probability", "sigmoid", "logit"]
SCORES: tuple[str, ...] = get_args(Score)


def class_scores(logits: Tensor, score: str) -> Tensor:
    """Return the scores (B, C), float32, of all classes in one unit.

    Args:
        logits: (B, C).
        score: `probability` (softmax over the classes), `sigmoid` (of each logit) or `logit`.

    Raises:
        ValueError: for a softmax over a single column, which is always 1.
    """
    if score == "probability":
        if logits.shape[1] == 1:
            raise ValueError(
                "score 'probability' is a softmax over the classes, which is always 1 for a network with one output: "
                "use score 'sigmoid' or 'logit'"
            )
        return logits.float().softmax(-1)
    return logits.float().sigmoid() if score == "sigmoid" else logits.float()


@dataclass(frozen=True)
class ClassObjective:
    """The score of each image's class, minus that of another class if there is one; float32.

    Args:
        score: unit, one of `SCORES`.
        target: (B,) long.
        other: (B,) long, or None.
    """

    score: str
    target: Tensor
    other: Tensor | None = None
    in_order: ClassVar[bool] = False

    @cached_property
    def highest(self) -> int:
        """Largest class index."""
        return max(int(classes.max()) for classes in (self.target, self.other) if classes is not None)

    def __call__(self, output: Any, image: Tensor) -> Tensor:
        """Return the scores (n,) of the network's output for the images at positions (n,)."""
        logits = logits_of(output)
        if logits.shape[1] <= self.highest:
            raise ValueError(
                f"target class {self.highest}: expected logits of more than {self.highest} classes, got shape "
                f"{tuple(logits.shape)}"
            )
        values = self._of(self.target, logits, image)
        return values if self.other is None else values - self._of(self.other, logits, image)

    def _of(self, classes: Tensor, logits: Tensor, image: Tensor) -> Tensor:
        return class_scores(logits, self.score).gather(1, classes[image, None]).squeeze(1)


@dataclass(frozen=True)
class FunctionObjective:
    """A function of the network's output, which may know which image is in which row.

    It therefore always gets all images in their order, perturbed alike.
    """

    function: Callable[[Any], Tensor]
    in_order: ClassVar[bool] = True

    def __call__(self, output: Any, image: Tensor) -> Tensor:
        """Return the function's values (B,), float32."""
        values = self.function(output)
        if not isinstance(values, Tensor) or values.shape != image.shape:
            given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"target function: expected one score per image, shape ({len(image)},), got {given}")
        return values.float()


Objective: TypeAlias = ClassObjective | FunctionObjective


def objective_of(model: nn.Module, images: Tensor, target: Target, score: str, batch_size: int) -> Objective:
    """Return what is scored for a target of `gmarpp.explain`.

    The network runs only where the target is the predicted class.

    Args:
        model: any network from images to logits, in eval mode.
        images: (B, C, H, W).
        target: of one class per image or of one score per image.
        score: unit, one of `SCORES`.
        batch_size: most images per forward pass.

    Raises:
        ValueError: for an unknown score or class name, a batch size of 0, several classes per image, or a negative
            class index.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if score not in SCORES:
        raise ValueError(f"unknown score {score!r}: choose from {', '.join(SCORES)}")
    if callable(target):
        if score == "sigmoid":
            raise ValueError(
                "a target that is a function is scored by its own value: leave score out, and apply the sigmoid in the "
                "function"
            )
        return FunctionObjective(target)

    def classes(of: ClassTarget) -> Tensor:
        if of is None:
            parts = torch.split(images, batch_size)
            return torch.cat([logits_of(model(part)).argmax(1) for part in parts])
        return _one_class_per_image(class_indices(of, model), images)

    if isinstance(target, Contrast):
        return ClassObjective(score, classes(target.target), classes(target.other))
    return ClassObjective(score, classes(target))


def _one_class_per_image(given: Any, images: Tensor) -> Tensor:
    indices = torch.as_tensor(given, device=images.device)
    if indices.dim() == 0:
        indices = indices.expand(len(images))
    if indices.dim() == 2:
        raise ValueError(
            f"target: expected one class index per image, shape ({len(images)},), got {tuple(indices.shape)}: for "
            "several classes per image, score each alone, with target[:, k] and maps[:, k]"
        )
    if indices.shape != images.shape[:1] or indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(
            f"target: expected one class index per image, shape ({len(images)},), got {tuple(indices.shape)}, "
            f"{indices.dtype}"
        )
    if int(indices.min()) < 0:
        raise ValueError(
            f"target: expected class indices of 0 or more, got {int(indices.min())}, which stands for an "
            "unknown label, or for a target of gmarpp.explain that was a function: pass the function itself"
        )
    return indices.long()
