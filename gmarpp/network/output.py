"""The output of a network: its logits, and the names of its classes."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn


def logits_of(output: Any) -> Tensor:
    """Return the logits, shape (B, C), of a network's output: a tensor, or an object with the attribute `logits`.

    Raises:
        ValueError: if the output holds none.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError(
            f"the network's output ({_content(output)}) holds no logits of shape (images, classes): pass "
            "gmarpp.explain one of gmarpp.targets (Text, Region, Query) as target, or a function of the output, which "
            "returns one score per image, shape (images,); the similarity with a direction, for example: "
            "lambda output: output.pooler_output @ direction"
        )
    return logits


def _content(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    fields = ", ".join(map(str, output)) if isinstance(output, Mapping) else ""
    return f"{type(output).__name__}{f' of {fields}' if fields else ''}"


def check_finite(logits: Tensor, what: str = "logits") -> None:
    """Raise `ValueError`, naming the images, unless all logits (B, C) are finite."""
    unusable = (~logits.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if unusable:
        raise ValueError(
            f"the {what} of images {unusable} are not finite: check the input's normalization and the weights, or use "
            "a wider precision (bfloat16 or float32)"
        )


def class_names(model: nn.Module) -> tuple[str, ...]:
    """Return the class names that a network carries: its attribute `class_names`, or Hugging Face's `id2label`."""
    labels = getattr(getattr(model, "config", None), "id2label", None) or getattr(model, "class_names", None) or ()
    return tuple(labels[index] for index in sorted(labels)) if isinstance(labels, Mapping) else tuple(labels)


def class_index(name: str, model: nn.Module) -> int:
    """Return the index of a class, by its name or identifier.

    Names come from the network: the attributes `class_names` and `classes` (set by `gmarpp.load_model`), or a Hugging
    Face configuration's `label2id`. Digits that name no class are an index.

    Raises:
        ValueError: if the network knows no such class, or several.
    """
    known: dict[str, set[int]] = {}
    label2id = getattr(getattr(model, "config", None), "label2id", None)
    for names in (label2id or {}, getattr(model, "classes", None) or (), class_names(model)):
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
        raise ValueError(f"unknown class {name!r}: the network carries no class names; pass the class's index")
    close = ", ".join([each for each in known if name.lower() in each.lower()][:5] or get_close_matches(name, known))
    raise ValueError(f"unknown class {name!r}: " + (f"did you mean {close}?" if close else "no class is named like it"))
