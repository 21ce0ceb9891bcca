"""Facts about a network beyond its attention calls: patch grid, prefix tokens and blocks.

Maps need the grid and the number of tokens around the patches; LeGrad and recomputation need the blocks too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from gmarpp.network.transport import Step


@dataclass(frozen=True)
class Architecture:
    """The token layout of a Vision Transformer.

    Attributes:
        grid: returns the patch grid (h, w) of an image of a given height and width in pixels; or (t, h, w) of a video
            of a given number of frames, height and width.
        prefix_tokens: number of tokens before the patch tokens (class, distillation and register tokens).
        blocks: the transformer blocks, from the input upward.
        head: what the network computes from the tokens that leave the last block, shape (B, N, D), up to its output.
            Only a shortcut: without it, or where the network does something else, LeGrad runs the network itself again
            with its blocks skipped.
        suffix_tokens: number of tokens after the patch tokens (detection tokens).
        transport: returns, for an image of a given height and width in pixels, over which tokens each block attends;
            `None` if all blocks attend over all tokens. Maps are on the finest grid, which `grid` returns.
        fused: attention modules that write their attention out, and for each a forward that computes the same by
            `scaled_dot_product_attention`.
        channels_first: whether blocks are given tokens as (B, D, h, w), and not as (B, N, D) or (B, h, w, D).
        prefix_from: the block that prefix tokens first enter; blocks below it have patch tokens alone. The number of
            blocks means that they enter after the last one, and attend alone there, in several layers perhaps.
        pictures: brings what the network is given to the form (B, C, H, W), or (B, C, T, H, W) for videos, over which
            the grid lies; `None` if it is given images (B, C, H, W).
    """

    grid: Callable[..., tuple[int, ...]]
    prefix_tokens: int
    blocks: Sequence[nn.Module] = ()
    head: Callable[[Tensor], Any] | None = None
    suffix_tokens: int = 0
    transport: Callable[[int, int], Sequence[Step]] | None = None
    fused: Mapping[nn.Module, Callable[..., Any]] = field(default_factory=dict)
    channels_first: bool = False
    prefix_from: int = 0
    pictures: Callable[[Tensor], Tensor] | None = None

    def pictures_of(self, images: Tensor) -> Tensor:
        """Return what the network is given in the form (B, C, H, W), or (B, C, T, H, W).

        Raises:
            ValueError: for a tensor of another number of dimensions.
        """
        pictures = images if self.pictures is None else self.pictures(images)
        if pictures.dim() not in ((4,) if self.pictures is None else (4, 5)):
            given = f"{tuple(images.shape)}: for videos or sounds, describe `pictures` in gmarpp.Architecture"
            raise ValueError(f"images: expected shape (images, channels, height, width), got {given}")
        return pictures

    def patches(self, tokens: int, block: int = 0) -> slice:
        """Return where the patch tokens are among all of a number of tokens of a block."""
        return slice(self.prefix_at(block), tokens - self.suffix_tokens)

    def prefix_at(self, block: int) -> int:
        """Return how many prefix tokens enter a block."""
        return self.prefix_tokens if block >= self.prefix_from else 0
