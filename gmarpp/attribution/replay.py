"""The head as the network itself computes it: the network runs again with its blocks skipped."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from gmarpp.attribution.forward import ForwardPass
from gmarpp.attribution.head import Head
from gmarpp.attribution.seam import answered_by
from gmarpp.network.bound import BoundNetwork

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


class Replay(Head):
    """Everything that a network does after its last block, whatever that is: a head of any wrapper, a pool, several.

    The network runs again, each block hands on what it is given, and the last one returns the tokens asked for. Nothing
    below it has a graph, and what convolutions make of the images is kept from the first time, so that little more than
    the head is computed.

    Args:
        network: the network.
        images: (B, ...), that the forward pass was given.
        passed: the forward pass.
    """

    def __init__(self, network: BoundNetwork, images: Tensor, passed: ForwardPass) -> None:
        self._network, self._images, self._passed = network, images, passed
        self._embedded: dict[nn.Module, Tensor | None] = {}
        self._is_first = self._is_embedding = True

    @override
    def __call__(self, tokens: Tensor) -> Any:
        blocks = self._passed.plan.layout.blocks
        given = [*(None for _ in blocks[1:]), tokens]
        replaced = {
            block: self._skip(block.forward, rest, each)
            for block, rest, each in zip(blocks, self._passed.rests, given, strict=True)
        }
        inside = {module for block in blocks for module in block.modules()}
        modules = [each for each in self._network.model.modules() if each not in inside]
        convolutions = [each for each in modules if isinstance(each, nn.Conv2d | nn.Conv3d)]
        replaced |= {each: self._embed(each) for each in convolutions}
        self._is_embedding = True
        with forwards_replaced(list(replaced), list(replaced.values())), answered_by(None):
            output = self._network(self._images[: len(tokens)], slice(len(tokens)))
        self._is_first = False
        return output

    def _skip(self, run: Forward, rest: tuple[Any, ...] | None, tokens: Tensor | None) -> Forward:
        """Return a block's forward that returns given tokens, or those it is given."""

        def forward(*inputs: Any, **_: Any) -> Any:
            self._is_embedding = False
            left = inputs[0] if tokens is None else tokens
            return left if rest is None else (left, *rest)

        return _in_this_thread(forward, run)

    def _embed(self, convolution: nn.Conv2d | nn.Conv3d) -> Forward:
        """Return a convolution's forward that gives again what it gave the first time, up to the first block."""
        run = convolution.forward

        def forward(images: Tensor) -> Tensor:
            if not self._is_embedding:
                return run(images)
            if self._is_first:
                made = run(images)
                # What runs twice gives different results. Others are copied, because networks may add to them in place.
                self._embedded[convolution] = None if convolution in self._embedded else made.clone()
                return made
            kept = self._embedded.get(convolution)
            return run(images) if kept is None else kept[: len(images)].clone()

        return _in_this_thread(forward, run)


def _in_this_thread(here: Forward, elsewhere: Forward) -> Forward:
    """Return a forward for this thread; others still run the module."""
    owner = threading.get_ident()
    return lambda *args, **options: (here if threading.get_ident() == owner else elsewhere)(*args, **options)
