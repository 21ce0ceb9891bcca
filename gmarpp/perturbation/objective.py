"""What is scored on a perturbed image: a class, a class against another one, or a function of the network's output."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from gmarpp.attribution.target import ClassTarget, Contrast, ImageScore, Target, class_indices
from gmarpp.network.bound import BoundNetwork
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
    """The score of each image's class, float32.

    Args:
        score: unit, one of `SCORES`.
        target: (B,) long.
    """

    score: str
    target: Tensor
    in_order: ClassVar[bool] = False

    @cached_property
    def highest(self) -> int:
        """Largest class index."""
        return int(self.target.max())

    def __call__(self, output: Any, image: Tensor) -> Tensor:
        """Return the scores (n,) of the network's output for the images at positions (n,)."""
        logits = logits_of(output)
        if logits.shape[1] <= self.highest:
            raise ValueError(
                f"target class {self.highest}: expected logits of more than {self.highest} classes, got shape "
                f"{tuple(logits.shape)}"
            )
        return class_scores(logits, self.score).gather(1, self.target[image, None]).squeeze(1)


@dataclass(frozen=True)
class FunctionObjective:
    """A function of the network's output, by its own value.

    One that is no `ImageScore` may know which image is in which row: it always gets all images in their order,
    perturbed alike.
    """

    function: Callable[[Any], Tensor]

    @property
    def in_order(self) -> bool:
        """Whether all images must come at a time, in their order."""
        return not isinstance(self.function, ImageScore)

    def __call__(self, output: Any, image: Tensor) -> Tensor:
        """Return the function's values (n,), float32."""
        function = self.function
        values = function.of(output, image) if isinstance(function, ImageScore) else function(output)
        if not isinstance(values, Tensor) or values.shape != image.shape:
            given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"target function: expected one score per image, shape ({len(image)},), got {given}: score each of "
                "several alone"
            )
        return values.float()


@dataclass(frozen=True)
class ContrastObjective:
    """The score of one target less that of another."""

    target: ClassObjective | FunctionObjective
    other: ClassObjective | FunctionObjective

    @property
    def in_order(self) -> bool:
        """Whether all images must come at a time, in their order."""
        return self.target.in_order or self.other.in_order

    def __call__(self, output: Any, image: Tensor) -> Tensor:
        """Return the differences (n,), float32."""
        return self.target(output, image) - self.other(output, image)


Objective: TypeAlias = ClassObjective | FunctionObjective | ContrastObjective


def objective_of(network: BoundNetwork, images: Tensor, target: Target, score: str, batch_size: int) -> Objective:
    """Return what is scored for a target of `gmarpp.explain`.

    The network runs only where the target is the predicted class.

    Args:
        network: any network from images to logits, in eval mode.
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

    def side(of: "ClassTarget | Callable[[Any], Tensor]") -> ClassObjective | FunctionObjective:
        if callable(of):
            return _function_objective(of, score, len(images))
        if of is None:
            parts = torch.split(torch.arange(len(images), device=images.device), batch_size)
            predicted = [logits_of(network(images[part], part)).argmax(1) for part in parts]
            return ClassObjective(score, torch.cat(predicted))
        return ClassObjective(score, _one_class_per_image(class_indices(of, network.module), images))

    if isinstance(target, Contrast):
        return ContrastObjective(side(target.target), side(target.other))
    return side(target)


def _function_objective(function: Callable[[Any], Tensor], score: str, images: int) -> FunctionObjective:
    if score == "sigmoid":
        raise ValueError(
            "a target that is a function is scored by its own value: leave score out, and apply the sigmoid in the "
            "function"
        )
    if isinstance(function, ImageScore):
        function.require(images)
    return FunctionObjective(function)


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
