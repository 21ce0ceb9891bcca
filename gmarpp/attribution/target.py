"""Targets: which score of the network's output is explained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Score = Callable[[Any], Tensor]
"""Takes the network's output and gives one score per image, shape (B,)."""

NO_CLASS = -1
"""Target of an explanation of a function, which explains no class."""


@dataclass(frozen=True)
class Contrast:
    """What speaks for one class and against another: the difference of their logits.

    Args:
        target: the class explained, as a target of `gmarpp.explain` for one class per image.
        other: the class it is set against, likewise.
    """

    target: "ClassTarget"
    other: "ClassTarget"


ClassTarget: TypeAlias = "int | str | Tensor | Sequence[Any] | None"
Target: TypeAlias = "ClassTarget | Contrast | Score"


def logits_of(output: Any) -> Tensor:
    """Give the logits, shape (B, C), of a network's output: a tensor, or an object with the attribute `logits`.

    Raises:
        ValueError: if there are none.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError(
            f"the network's output ({type(output).__name__}) holds no logits of shape (images, classes); "
            "gmarpp.explain takes a function of the output as target instead"
        )
    return logits


def check_finite(logits: Tensor, what: str = "logits") -> None:
    """Raise `ValueError`, naming the images, unless all logits (B, C) are finite."""
    unusable = (~logits.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if unusable:
        raise ValueError(
            f"the {what} of images {unusable} are not finite: check the input's normalisation and the weights, or use "
            "a wider precision (bfloat16 or float32)"
        )


def class_names(model: nn.Module) -> tuple[str, ...]:
    """Give the class names that a network carries: its attribute `class_names`, or Hugging Face's `id2label`."""
    labels = getattr(getattr(model, "config", None), "id2label", None)
    return tuple(labels[index] for index in sorted(labels)) if labels else tuple(getattr(model, "class_names", ()))


def class_index(name: str, model: nn.Module) -> int:
    """Find a class by its name or identifier.

    Names come from the network: the attributes `class_names` and `classes` (set by `gmarpp.load_model`), or a Hugging
    Face configuration's `label2id`. Digits that name no class are an index.

    Raises:
        ValueError: if the network knows no such class, or several.
    """
    known: dict[str, set[int]] = {}
    label2id = getattr(getattr(model, "config", None), "label2id", None)
    for names in (label2id or {}, getattr(model, "classes", ()), getattr(model, "class_names", ())):
        pairs = names.items() if isinstance(names, dict) else ((each, index) for index, each in enumerate(names))
        for each, index in pairs:
            known.setdefault(each, set()).add(int(index))
    if len(known.get(name, ())) > 1:
        raise ValueError(f"{name!r} names several classes, {sorted(known[name])}: pass the index of one of them")
    if name in known:
        return known[name].pop()
    if name.isdecimal():
        return int(name)
    if not known:
        raise ValueError(f"class {name!r} cannot be found: the network carries no class names; pass the class's index")
    close = ", ".join([each for each in known if name.lower() in each.lower()][:5] or get_close_matches(name, known))
    raise ValueError(f"unknown class {name!r}: " + (f"did you mean {close}?" if close else "no class is named like it"))


def resolve_target(target: ClassTarget, logits: Tensor, model: nn.Module) -> Tensor:
    """Give class indices for every image.

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
    indices = torch.as_tensor(class_indices(target, model), device=logits.device)
    if indices.dtype == torch.bool or indices.is_floating_point() or indices.is_complex():
        raise ValueError(f"targets must be class indices of an integer type, not {indices.dtype}")
    if indices.dim() == 0:
        indices = indices.expand(batch)
    if indices.dim() not in (1, 2) or len(indices) != batch or indices.numel() == 0:
        raise ValueError(
            f"targets have shape {tuple(indices.shape)} for {batch} images: expected one class, ({batch},), or "
            f"({batch}, K) for K classes per image"
        )
    if indices.min() < 0 or indices.max() >= classes:
        raise ValueError(
            f"targets range from {indices.min().item()} to {indices.max().item()}, but the network has {classes} "
            f"classes, 0 to {classes - 1}"
        )
    # A copy, for autograd cannot save indices that were made in inference mode.
    return indices.long().clone()


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
