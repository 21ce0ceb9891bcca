"""From a score down to the input tokens: once for each score and gradient rule."""

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gmarpp.attribution.call import CUT
from gmarpp.attribution.decisions import decide
from gmarpp.attribution.forward import ForwardPass
from gmarpp.attribution.head import Head
from gmarpp.attribution.method import Method
from gmarpp.attribution.operations import next_sequence_number, require_known
from gmarpp.attribution.own_scores import OwnScores
from gmarpp.attribution.plan import rule_of
from gmarpp.attribution.readout import Readout
from gmarpp.attribution.relevance import Relevance
from gmarpp.attribution.scores import Scores
from gmarpp.attribution.target import Score
from gmarpp.attribution.written import WrittenAttention
from gmarpp.network.errors import UnsupportedNetworkError

_DILUTED = ("gmarpp_l1", "gmarpp_l2", "gmarpp_sum", "rollout")
"""Methods whose maps say little where the head reads all tokens; see docs/methods.md."""

Rows = dict[str, Tensor]
"""By method, a row (B, N) for the input tokens."""


class WayDown:
    """Carries relevance from scores of the network's output to its input tokens.

    Args:
        passed: the forward pass.
        output: of the network.
        scores: of the output.
        images: (B, 3, H, W).
        replay: the network with its blocks skipped.
        written: attention that the network wrote out in the forward pass.

    Raises:
        UnsupportedNetworkError: if the layers' own scores are wanted of a head that cannot be run alone.
    """

    def __init__(
        self, passed: ForwardPass, output: Any, scores: Scores, images: Tensor, replay: Head, written: WrittenAttention
    ) -> None:
        self._written, self._scores = written, scores
        self._passed, self._output, self._images = passed, output, images
        self._end_of_network = next_sequence_number()
        own = OwnScores(passed, output, scores, replay, written.is_needed) if passed.plan.local_scores else None
        self._own_scores = own

    def rows(self, score: Score, margin: Score, last: bool) -> Rows:
        """Return the rows of all methods for a score and its margin; after the last one the graph is gone."""
        groups = self._passed.plan.groups
        found: Rows = {}
        for position, methods in enumerate(groups):
            found |= self._rows(methods, score, margin, keep=not last or position < len(groups) - 1)
        return found

    def _rows(self, methods: Sequence[Method], score: Score, margin: Score, keep: bool) -> Rows:
        """Go down for methods that share a backward pass; float16 scales its gradients automatically."""
        is_half = self._passed.dtype == torch.float16
        is_balanced = rule_of(methods) == "balanced"
        total = (margin if is_balanced else score)(self._output)
        if is_balanced:
            require_known(total, self._end_of_network)
        self._written.require_none(total, self._passed.token_counts)
        scale = _largest_scale(total, self._passed.score_start) if is_half else 1.0
        rows = self._descend(methods, score, total, scale, keep=keep or is_half)
        while is_half and scale > 2.0**-24 and not all(bool(row.isfinite().all()) for row in rows.values()):
            scale /= 16
            rows = self._descend(methods, score, total, scale, keep=True)
        return rows

    def _descend(self, methods: Sequence[Method], score: Score, total: Tensor, scale: float, keep: bool) -> Rows:
        passed, layout = self._passed, self._passed.plan.layout
        top = passed.calls[-1].block
        block = len(layout.blocks) if top is None else top
        need_local = any(method.needs_local_gradient for method in methods)
        need_gradient = need_local or any(method.needs_gradient for method in methods)
        found = Readout(total, self._output, passed, scale)
        own_scores = self._own_scores if need_local else None
        local: list[Tensor] = []
        checks: list[Tensor] = []
        if own_scores is not None:
            local, are_right = own_scores.gradients(score, scale)
            checks = [are_right]
        readout, taps = found.rows()
        checks = [self._scores.are_finite(), found.is_plain(), *checks]
        may_dilute = not passed.calls[-1].is_pool and any(method.name in _DILUTED for method in methods)
        patches = readout[:, layout.patches(passed.top_tokens, block)]
        # A GPU is not waited for but here, when it has enough to do.
        *are_usual, dilutes = decide(*checks, (patches > 0).all() if may_dilute else torch.zeros_like(checks[0]))
        if not all(are_usual):
            self._scores.require_finite()
            found.require_plain(need_gradient)
            readout, taps = found.rows()
            local = [] if own_scores is None else own_scores.carefully(score, scale)
        if dilutes:
            _warn_once()
        if not keep:
            passed.forget_tokens()
        around = layout.prefix_at(block), layout.suffix_tokens
        relevance = Relevance(methods, readout, self._images, passed.top_tokens, passed.tokens, around, taps)
        passed.descent.begin(relevance, local, scale, passed.calls, rule_of(methods) == "balanced")
        if passed.plan.gradients:
            ends = passed.leaves
            if passed.first_tokens is not None and any(method.needs_tokens for method in methods):
                ends = [passed.first_tokens]
            torch.autograd.grad(total.float().sum() * scale, ends, retain_graph=keep, allow_unused=True)
            self._check_visited(methods)
        else:
            self._replay(keep)
        passed.descent.end()
        return relevance.rows()

    def _replay(self, keep: bool) -> None:
        """Visit the layers without the score's gradient."""
        with torch.no_grad(), torch.autocast(self._images.device.type, enabled=False):
            for call in reversed(self._passed.calls):
                assert call.inputs is not None
                self._passed.descent.visit(call, *call.inputs, outer=None)
                if not keep:
                    call.inputs = None

    def _check_visited(self, methods: Sequence[Method]) -> None:
        passed, descent = self._passed, self._passed.descent
        missing = {call.index for call in passed.calls} - set(descent.visited)
        if missing:
            raise UnsupportedNetworkError(
                f"no gradient of the score reaches attention layers {sorted(missing)}, which these methods need: {CUT}"
            )
        blocks = sorted({call.block for call in passed.calls if call.block is not None})
        received = sorted(descent.received)
        if any(method.needs_tokens for method in methods) and received != blocks:
            raise UnsupportedNetworkError(
                f"expected a gradient of the score at the tokens of each of blocks {blocks}, got {received}: {CUT}"
            )


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "the network's head reads all of its tokens, as average pooling does, and the maps of "
        f"{', '.join(_DILUTED)} are hardly more faithful than random ones there: use gmarpp_balanced",
        stacklevel=2,
    )


def _largest_scale(total: Tensor, start: Any) -> float:
    """Return the largest power of two for float16 gradients that leaves room for growth on the way down.

    Args:
        total: scores, (B,).
        start: where the graph of the score alone begins.
    """
    scale, highest = 2.0**10, 2.0**15 if total.dtype == torch.float16 else 2.0**60
    for _ in range(32 if total.requires_grad and start is not None else 0):
        gradient = torch.autograd.grad(total.float().sum() * scale, start, retain_graph=True, allow_unused=True)[0]
        peak = 0.0 if gradient is None else float(gradient.abs().amax())
        if math.isfinite(peak):
            # Peaks of 2⁹ leave room for the layers below to make gradients grow 2⁷-fold.
            following = min(highest, scale * 2.0 ** min(16, 9 - math.ceil(math.log2(peak)) if peak else 16))
        else:
            following = highest = scale / 4
        if following == scale:
            break
        scale = following
    return scale
