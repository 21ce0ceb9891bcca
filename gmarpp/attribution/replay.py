"""The head as the network itself computes it: the network runs again with its blocks skipped."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from gmarpp.attribution.forward import BlockRun
from gmarpp.attribution.seam import answered_by

Forward = Callable[..., Any]


@contextmanager
def forwards_replaced(modules: Sequence[nn.Module], replacements: Sequence[Forward]) -> Iterator[None]:
    """Replace each module's `forward`, and restore it even after an error."""
    own = [vars(module).get("forward") for module in modules]
    for module, replacement in zip(modules, replacements, strict=True):
        module.forward = replacement
    try:
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


class Replay:
    """Everything that a network does after its last block, whatever that is: a head of any wrapper, a pool, several.

    The network runs again, each block hands on what it is given, and the last one returns the tokens asked for. Below
    it nothing has a graph, so a replay costs the patch embedding and the head.

    Args:
        model: the network.
        images: (B, 3, H, W), that the forward pass was given.
        blocks: of the network, from the input upward.
        runs: of the blocks in the forward pass.
    """

    def __init__(self, model: nn.Module, images: Tensor, blocks: Sequence[nn.Module], runs: Sequence[BlockRun]) -> None:
        self._model, self._images, self._blocks, self._runs = model, images, blocks, runs

    def __call__(self, tokens: Tensor) -> Any:
        """Return the network's output for tokens of the first images that leave the last block, (b, R, D)."""
        *skipped, last = self._runs
        replacements = [*(_skipped(run, None) for run in skipped), _skipped(last, tokens)]
        with forwards_replaced(self._blocks, replacements), answered_by(None):
            return self._model(self._images[: len(tokens)])


def _skipped(run: BlockRun, tokens: Tensor | None) -> Forward:
    """Return a block's forward that returns given tokens, or its own; other threads still run the block."""
    owner = threading.get_ident()

    def forward(*inputs: Any, **options: Any) -> Any:
        if threading.get_ident() != owner:
            return run.forward(*inputs, **options)
        left = inputs[0] if tokens is None else tokens
        return left if run.rest is None else (left, *run.rest)

    return forward
