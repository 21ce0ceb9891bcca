"""A network as it runs on images alone: with its further arguments, or by its image half where it also takes texts."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gmarpp.network.wrappers import unwrapped


class ImageEmbedding(NamedTuple):
    """What a network of images and texts makes of images: their embeddings, (B, D), as it returns them."""

    image_embeds: Tensor


def _image_half(model: Any) -> Callable[..., Any] | None:
    """Return what makes images' embeddings in a network of transformers that compares images with texts."""
    known = all(hasattr(model, name) for name in ("get_image_features", "get_text_features", "logit_scale"))
    return model.get_image_features if known else None


@dataclass(frozen=True)
class BoundNetwork:
    """A network and the further arguments of its forward.

    Networks of transformers that compare images with texts (CLIP, SigLIP) run by `get_image_features`, and their output
    is an `ImageEmbedding`.

    Args:
        model: the network.
        images: (B, ...), that it will be given; decides which arguments belong to images.
        inputs: further arguments by name. Those that are tensors of B entries belong to the images, entry by entry; all
            others are passed as they are.

    Raises:
        ValueError: for arguments that the network does not take, for those that it misses, and for tensors inside
            others.
    """

    model: nn.Module
    images: Tensor = field(repr=False)
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", {name: _usable(name, each) for name, each in self.inputs.items()})
        half = _image_half(self.model)
        try:
            signature = inspect.signature(half or self.model.forward)
        except ValueError:
            return  # Compiled code may tell none.
        if half is not None:
            # What it does not know, it hands on, and nobody uses it.
            named = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
            signature = signature.replace(parameters=named)
        try:
            signature.bind(self.images, **self.inputs)
        except TypeError as error:
            given = ", ".join(("the images", *self.inputs))
            raise ValueError(f"inputs: {type(self.model).__name__} cannot be called with {given}: {error}") from error

    @property
    def module(self) -> nn.Module:
        """The network itself, inside what runs it: `DataParallel`, `torch.compile`."""
        return unwrapped(self.model)

    def __call__(self, images: Tensor, rows: Tensor | slice = slice(None)) -> Any:
        """Return the network's output for images made of those at some positions of the batch; of all by default."""
        inputs = {
            name: each[rows if isinstance(rows, slice) else rows.to(each.device)] if self._is_by_image(each) else each
            for name, each in self.inputs.items()
        }
        half = _image_half(self.model)
        if half is None:
            return self.model(images, **inputs)
        output = half(images, **inputs)
        return ImageEmbedding(output if isinstance(output, Tensor) else output.pooler_output)

    def _is_by_image(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 0 and len(value) == len(self.images)


def _usable(name: str, value: Any) -> Any:
    """Return an argument that autograd can save; tensors inside others could not be told from those of images."""
    if isinstance(value, Tensor):
        with torch.inference_mode(False):
            return value.clone() if value.is_inference() else value.detach()
    nested = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    if any(isinstance(each, Tensor) for each in nested):
        raise ValueError(f"inputs: {name}: expected a tensor or a plain value, got tensors in a {type(value).__name__}")
    return value
