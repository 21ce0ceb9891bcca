"""From a score down to the input tokens: once for each score and gradient rule."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gmarpp.attribution.call import UnsupportedNetworkError
from gmarpp.attribution.forward import ForwardPass
from gmarpp.attribution.head import check_seen, readout_of
from gmarpp.attribution.method import Method
from gmarpp.attribution.own_scores import OwnScores
from gmarpp.attribution.relevance import Relevance
from gmarpp.attribution.target import Score

Rows = dict[str, Tensor]
"""By method, a row (B, N) for the input tokens."""


class WayDown:
    """Carries relevance from scores of the network's output to its input tokens.

    Args:
        passed: the forward pass.
        output: of the network.
        unseen: outputs of modules whose attention was not intercepted, by their names.
        images: (B, 3, H, W).
        of_classes: whether the scores are logits of classes.
    """

    def __init__(
        self, passed: ForwardPass, output: Any, unseen: dict[str, Tensor], images: Tensor, of_classes: bool
    ) -> None:
        self._passed, self._output, self._unseen = passed, output, unseen
        self._images, self._of_classes = images, of_classes
        self._own_scores = OwnScores(passed, output) if passed.plan.local_scores else None

    def rows(self, score: Score, last: bool) -> Rows:
        """Return the rows of all methods for a score; after the last one the graph is gone."""
        groups = self._passed.plan.groups
        found: Rows = {}
        for position, methods in enumerate(groups):
            found |= self._rows(methods, score, keep=not last or position < len(groups) - 1)
        return found

    def _rows(self, methods: Sequence[Method], score: Score, keep: bool) -> Rows:
        """Go down for methods that share a backward pass; float16 finds the scale of its gradients by itself."""
        is_half = self._passed.dtype == torch.float16
        total = score(self._output)
        check_seen(total, self._unseen)
        scale = _largest_scale(total, self._passed.score_start) if is_half else 1.0
        rows = self._descend(methods, score, total, scale, keep=keep or is_half)
        while is_half and scale > 2.0**-24 and not all(bool(row.isfinite().all()) for row in rows.values()):
            scale /= 16
            rows = self._descend(methods, score, total, scale, keep=True)
        return rows

    def _descend(self, methods: Sequence[Method], score: Score, total: Tensor, scale: float, keep: bool) -> Rows:
        passed = self._passed
        need_gradient = any(method.needs_gradient or method.needs_local_gradient for method in methods)
        readout = readout_of(
            score, total, self._output, passed, scale, may_ask_head=self._of_classes and not need_gradient
        )
        local = () if self._own_scores is None else self._own_scores.gradients(score, scale)
        relevance = Relevance(methods, readout, self._images, passed.calls[-1].keys)
        passed.descent.begin(relevance, local, scale, passed.calls)
        if passed.plan.gradients:
            torch.autograd.grad(total.float().sum() * scale, passed.leaves, retain_graph=keep, allow_unused=True)
            self._check_visited()
        else:
            self._replay(keep)
        return relevance.rows()

    def _replay(self, keep: bool) -> None:
        """Visit the layers without the score's gradient."""
        with torch.no_grad(), torch.autocast(self._images.device.type, enabled=False):
            for call in reversed(self._passed.calls):
                assert call.inputs is not None
                for _ in self._passed.descent.visit(call, *call.inputs, outer=None):
                    pass
                if not keep:
                    call.inputs = None

    def _check_visited(self) -> None:
        layers, visited = len(self._passed.calls), self._passed.descent.visited
        if layers - 1 not in visited:
            raise UnsupportedNetworkError(
                "the score does not depend on the last attention layer: explain a score of the network's output"
            )
        if visited != list(reversed(range(layers))):
            cut = max(set(range(layers)) - set(visited))
            raise UnsupportedNetworkError(
                f"the score's gradient does not get to attention layer {cut} from above: the network cuts it off "
                "(detach, quantized layers). Only methods that need no gradient, such as rollout, can explain it"
            )


def _largest_scale(total: Tensor, start: Any) -> float:
    """Return the power of two by which float16 gradients get as large as leaves room for growth on the way down."""
    scale, limit = 2.0**10, 2.0**15 if total.dtype == torch.float16 else 2.0**60
    for _ in range(8):
        gradient = torch.autograd.grad(total.float().sum() * scale, start, retain_graph=True, allow_unused=True)[0]
        peak = 0.0 if gradient is None else float(gradient.abs().amax())
        if math.isfinite(peak) and peak > 0:
            return float(min(limit, scale * 2.0 ** (9 - math.ceil(math.log2(peak)))))
        scale = min(limit, scale * (2.0**10 if peak == 0 else 2.0**-8))
    return 1.0
