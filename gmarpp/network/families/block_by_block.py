"""Networks whose blocks each begin with the tokens that the one below leaves, which it may have pooled."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn

from gmarpp.network.families.stages import Stages
from gmarpp.network.pooling import Grid, convolved
from gmarpp.network.transport import Step


def along(
    grid: Callable[[int, int], Grid],
    blocks: Sequence[nn.Module],
    step: Callable[[Any, Grid], Step],
    fused: Mapping[nn.Module, Callable[..., Any]] = MappingProxyType({}),
) -> Stages:
    """Describe such a network.

    Args:
        grid: of the tokens that enter the first block, for the height and width of an image.
        blocks: from the input upward.
        step: describes a block for the grid of the tokens that enter it.
        fused: see `Architecture`.
    """

    def transport(*size: int) -> list[Step]:
        steps, entering = [], grid(*size)
        for block in blocks:
            steps.append(step(block, entering))
            entering = steps[-1].above.grid
        return steps

    return Stages(grid, list(blocks), transport, fused)


def by_convolution(convolution: Any) -> Callable[[int, int], Grid]:
    """Return what gives the grid of patches that a convolution makes of an image."""
    return lambda *size: convolved(size, convolution)
