"""What an attribution method is: a rule that consumes attention layers from the top down."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from gmarpp.attribution.layer import AttentionLayer


class Method(ABC):
    """A rule that turns a network's attention layers into one relevance per token.

    It carries one row per image, shape (B, N), from the readout to the input tokens. A custom method may ask a layer
    for its matrices, `layer.attention` and `layer.gradient`, or for products with them, which is faster on a GPU.

    Attributes:
        name: key of the method's map, used in code, config, tags and file names.
        label: name for people.
        needs_gradient: whether the score's gradient must be propagated through all layers.
        needs_local_gradient: whether each layer's own score must be differentiated.
        needs_attention: whether `step` takes anything of a layer; if not, it hands on the row as it is, (B, N) from
            the start.
        needs_tokens: whether it takes the relevance of the tokens that enter each block (`receive`).
        needs_residual: whether it takes each layer's `residual`.
        gradient_rule: how the score is propagated, if it is; methods with the same rule share a backward pass.
        signed: whether maps have negative values, for what speaks against the score.
    """

    name: str
    label: str
    needs_gradient: ClassVar[bool] = True
    needs_local_gradient: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = True
    needs_tokens: ClassVar[bool] = False
    needs_residual: ClassVar[bool] = False
    gradient_rule: ClassVar[str] = "plain"
    signed: ClassVar[bool] = False

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
