"""What an attribution method is: a rule that consumes attention layers, or code that makes maps itself."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from torch import Tensor, nn
from typing_extensions import override

from gmarpp.attribution.layer import AttentionLayer, HeadNorm


class AttributionMethod(ABC):
    """What all methods have: a name, and how their maps are shown.

    Attributes:
        name: key of the method's map, used in code, config, tags and file names.
        label: name for people.
        color: of the method in figures and reports, `#rrggbb`; one that nothing else has, if it is empty.
        signed: whether maps have negative values, for what speaks against the score.
    """

    name: str
    label: str
    color: str = ""
    signed: bool = False

    @property
    def description(self) -> dict[str, Any]:
        """Class and options, by which runs tell whether a method is the same."""
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", "options": dict(vars(self))}


class Method(AttributionMethod):
    """A rule that turns a network's attention layers into one relevance per token.

    It carries one row per image, shape (B, N), from the readout to the input tokens. A custom method may ask a layer
    for its matrices, `layer.attention` and `layer.gradient`, or for products with them, which is faster on a GPU.
    What the residual connection makes of a row is `layer.keep(row)`.

    Attributes:
        needs_gradient: whether the score's gradient must be propagated through all layers.
        needs_local_gradient: whether each layer's own score must be differentiated.
        needs_attention: whether `step` takes anything of a layer; if not, it hands on the row as it is, (B, N) from
            the start.
        needs_tokens: whether it takes the relevance of the tokens that enter each block (`receive`).
        needs_residual: whether it takes each layer's `residual`.
        gradient_rule: how the score is propagated, if it is; methods with the same rule share a backward pass.
    """

    needs_gradient: ClassVar[bool] = True
    needs_local_gradient: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = True
    needs_tokens: ClassVar[bool] = False
    needs_residual: ClassVar[bool] = False
    gradient_rule: ClassVar[str] = "plain"

    @property
    def head_norms(self) -> tuple[HeadNorm, ...]:
        """Norms of heads that it takes; on a GPU others are computed when they are asked for. By default none."""
        return ()

    def start(self, readout: Tensor, images: Tensor, tokens: int) -> Tensor:
        """Return the row above the top layer, shape (B, Q); by default the readout, whose rows sum to 1."""
        return readout

    @abstractmethod
    def step(self, row: Tensor, layer: AttentionLayer) -> Tensor:
        """Carry the row (B, Q) down through one layer, and return (B, N)."""

    def receive(self, row: Tensor, relevance: Tensor, patches: slice) -> Tensor:
        """Return the row (B, N) below a block, after its `step`; called if `needs_tokens`.

        Args:
            row: (B, N).
            relevance: `x · ds/dx`, (B, N), of the tokens x that entered the block, by the method's gradient rule and up
                to a positive factor.
            patches: where among them the patch tokens are.
        """
        return row


class MapMethod(AttributionMethod):
    """A method that makes its maps itself: code of another library, or anything else that a network can be asked."""

    @abstractmethod
    def maps(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        """Return the maps of one class per image.

        Args:
            model: the network, in eval mode, its parameters without gradients.
            images: (B, 3, H, W), preprocessed; a copy that gradients can be taken of. Code that needs none saves memory
                under `torch.no_grad()`.
            target: class explained, long, (B,).

        Returns:
            (B, h, w) on the network's patch grid; or values of pixels, (B, H, W) or (B, C, H, W), which are averaged
            over channels and over the pixels of each patch.
        """


# Any, because command lines would refuse functions without a return type.
MapFunction: TypeAlias = Callable[[nn.Module, Tensor, Tensor], Any]
"""Takes network, images and classes, and returns maps, as `MapMethod.maps` does."""


@dataclass(frozen=True)
class FunctionMethod(MapMethod):
    """A method whose maps a function makes.

    Args:
        name: key of the map.
        function: takes network, images (B, 3, H, W) and classes (B,), and returns maps; see `MapMethod.maps`.
        label: name for people; the key if it is empty.
        color: in figures and reports, `#rrggbb`; one that nothing else has, if it is empty.
        signed: whether maps have negative values, for what speaks against the class.
    """

    name: str
    function: MapFunction
    label: str = ""
    color: str = ""
    signed: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.label or self.name)

    @override
    def maps(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        maps: Tensor = self.function(model, images, target)
        return maps
