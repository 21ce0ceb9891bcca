"""What a batch of anyone's loader holds: its images and labels, wherever they are in it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

_IMAGE_NAMES = ("image", "images", "img", "pixel_values", "inputs", "x")
_LABEL_NAMES = ("label", "labels", "target", "targets", "y")


def batch_content(batch: Any, indices: Sequence[int] | None = None) -> dict[str, Any]:
    """Return a batch as the data modules of this package give them.

    Args:
        batch: tensors in tuples, lists, dictionaries or dataclasses, nested or not. The image is the only
            floating-point one of shape (B, C, H, W), the label the only integer one of shape (B,); of several, the only
            one with a common name such as `image` or `pixel_values`, `label` or `target`.
        indices: positions of the images in the data set; in the batch, if not given.

    Returns:
        `image` (B, C, H, W); `label` (B,) long, -1 where the batch tells none, or (B, C) of a dictionary's `label`, for
        labels that do not exclude each other; `index` (B,) long; `path`, of which some are made up of the index; `box`
        (B, 4) and `mask` (B, H, W), or (B, C, …) of labels, where the batch is a dictionary that has them.

    Raises:
        ValueError: there is no image, or there are several.
    """
    parts = list(_parts(batch))
    found = _chosen(parts, _IMAGE_NAMES, lambda each: each.dim() == 4 and each.is_floating_point())
    if len(found) != 1:
        given = ", ".join(f"{name or 'tensor'}: {each.dtype} {tuple(each.shape)}" for name, each in parts)
        raise ValueError(
            "expected one floating-point tensor of images (B, C, H, W) in a batch of the validation data, got "
            f"{given or type(batch).__name__}: let batches be dictionaries with the key image, and images be "
            "floating-point when validation_step gets them"
        )
    images = found[0]
    integer = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    labels = _chosen(parts, _LABEL_NAMES, lambda each: each.shape == images.shape[:1] and each.dtype in integer)
    index = torch.arange(len(images)) if indices is None else torch.as_tensor(indices)
    known: Mapping[str, Any] = batch if isinstance(batch, Mapping) else {}
    several = known.get("label")
    if isinstance(several, Tensor) and several.dim() == 2 and several.dtype in integer:
        labels = [several]
    content = {
        "image": images,
        "label": labels[0].long() if len(labels) == 1 else torch.full((len(images),), -1, device=images.device),
        "index": index,
        "path": known.get("path", [f"image {each}" for each in index.tolist()]),
    }
    return content | {name: known[name] for name in _OBJECTS if _OBJECTS[name](known.get(name))}


_OBJECTS: dict[str, Callable[[Any], bool]] = {
    "box": lambda box: isinstance(box, Tensor) and box.dim() in (2, 3) and box.shape[-1] == 4,
    # Masks of several classes are integers, and none of one object.
    "mask": lambda mask: isinstance(mask, Tensor) and mask.dim() in (3, 4) and mask.dtype == torch.bool,
}


def _parts(batch: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Find the tensors of a batch, with dotted names."""
    if isinstance(batch, Tensor):
        yield name, batch
        return
    items: Any = ()
    if isinstance(batch, Mapping):
        items = batch.items()
    elif is_dataclass(batch):
        items = [(each.name, getattr(batch, each.name)) for each in fields(batch)]
    elif isinstance(batch, list | tuple):
        items = enumerate(batch)
    for key, value in items:
        yield from _parts(value, f"{name}.{key}" if name else str(key))


def _chosen(parts: Sequence[tuple[str, Tensor]], names: Sequence[str], fits: Callable[[Tensor], bool]) -> list[Tensor]:
    """Return the tensors that fit: those with one of the names, if there are any."""
    fitting = [(name, each) for name, each in parts if fits(each)]
    named = [each for name, each in fitting if name.rpartition(".")[2] in names]
    return named or [each for _, each in fitting]
