"""One forward pass over a batch, and the backward passes that its targets need."""

from collections.abc import Callable, Sequence
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from gmarpp.attribution.call import UnsupportedNetworkError, require_one_chain
from gmarpp.attribution.grid import Architecture
from gmarpp.attribution.head import DESCRIBE_HEAD, agree, distinct_sum, tensors_of
from gmarpp.attribution.layer import AttentionLayer
from gmarpp.attribution.methods import Method
from gmarpp.attribution.narrow import close, goes_token_by_token
from gmarpp.attribution.recompute import RecomputedBlocks
from gmarpp.attribution.replaced import contiguous_projections, replacing_forward
from gmarpp.attribution.scale import gradients, in_float16, scaled_sum
from gmarpp.attribution.tap import AttentionTap
from gmarpp.attribution.tapped_attention import readout_row
from gmarpp.attribution.target import (
    NO_CLASS,
    Contrast,
    Score,
    Target,
    check_finite,
    class_score,
    logits_of,
    resolve_target,
)

# In float16 a scale that overflows is lowered, by so much and so often, until all gradients are finite.
_BACKOFF = 2.0**-4
_ATTEMPTS = 8
_CUT = (
    "a part that runs under torch.no_grad, detaches its input or is quantized ends all gradients: run it with "
    "gradients, or ask for methods that need none (rollout, attention)"
)


class HeadDiffersError(Exception):
    """The head that narrowed the last block is not what the network has behind it: run the network whole."""


class NetworkPass:
    """One forward pass over a batch, and the backward passes that its targets need.

    Args:
        model: in evaluation mode.
        images: no inference tensor.
        methods: each with a name of its own.
        layout: of the network, or of the part of it that attends.
        recompute: see `gmarpp.explain`.
        narrowing: whether the last block may run for the prefix tokens alone, where the head reads no others.
        hooked: whether anybody's hooks watch the network, which must see it run as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        methods: Sequence[Method],
        layout: Architecture,
        recompute: bool,
        narrowing: bool,
        hooked: bool,
    ) -> None:
        self.model = model
        self.images = images
        self.methods = methods
        self.layout = layout
        self.hooked = hooked
        self.grid = layout.grid(images.shape[-2], images.shape[-1])
        self.blocks = list(layout.blocks)
        self.forwards = [block.forward for block in self.blocks]
        self.needs_local = any(method.needs_local_gradient for method in methods)
        self.needs_gradient = any(method.needs_gradient for method in methods)
        # Blocks that run without gradients keep queries, keys and values, more than recomputation does.
        through_gradients = self.needs_gradient or (self.needs_local and recompute)
        self.recompute = recompute and through_gradients
        if (self.needs_local and (not self.blocks or layout.head is None)) or (self.recompute and not self.blocks):
            raise UnsupportedNetworkError(
                "LeGrad needs the network's blocks and head, recomputation its blocks: pass them in "
                "gmarpp.Architecture(..., blocks=..., head=...)"
            )
        self.recomputed_blocks = RecomputedBlocks()
        self.tap = AttentionTap(
            self.blocks,
            self._consume,
            self._read_prefix,
            self.needs_local,
            narrowing and through_gradients and layout.head is not None and not hooked,
            through_gradients,
            self.recomputed_blocks.left if self.recompute else None,
        )
        self.rows: dict[str, Tensor] = {}

    def run(self, target: Target) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        """Return maps by method, targets, logits and scores.

        Raises:
            HeadDiffersError: if the last block ran for tokens that are not all that the network reads.
        """
        with (
            closing(self.tap),
            self.tap.intercepting(),
            contiguous_projections(self.model),
            replacing_forward(self.blocks, self._runs()),
        ):
            with self.tap.recording(len(self.images)):
                output = self.model(self.images)
            self._check_calls()
            self._check_head(output)
            logits, indices, scores = self._scores(output, target)
            maps = [
                self._maps(output, score, retain_graph=position < len(scores) - 1)
                for position, score in enumerate(scores)
            ]
        stacked = {
            method.name: torch.stack([each[method.name] for each in maps], dim=1)
            if indices.dim() == 2
            else maps[0][method.name]
            for method in self.methods
        }
        values = torch.stack([score(output).detach().float() for score in scores], dim=1)
        return stacked, indices, logits.detach(), values if indices.dim() == 2 else values[:, 0]

    def _runs(self) -> list[Callable[..., Any]]:
        """Return what runs in place of each block's `forward`."""
        runs = []
        for position, forward in enumerate(self.forwards):
            if position == len(self.forwards) - 1:
                run = self.tap.last_block.narrowed(forward)
            else:
                run = self.recomputed_blocks.recomputed(self.tap.claimed(forward)) if self.recompute else forward
            runs.append(self.tap.here(self.tap.repeated_blocks.repeated(run, forward), forward))
        return runs

    def _check_calls(self) -> None:
        calls, prefix = self.tap.calls, self.layout.prefix_tokens
        require_one_chain(calls, len(self.blocks))
        tokens = calls[-1].keys
        height, width = self.grid
        if prefix + height * width != tokens:
            # An attention-pool head may leave the prefix tokens out, which is no chain of layers either.
            raise UnsupportedNetworkError(
                f"the network attends over {tokens} tokens, but a patch grid of {height} x {width} and "
                f"{prefix} prefix tokens make {prefix + height * width}: correct grid and prefix_tokens in "
                "gmarpp.Architecture, or the size of the images. Networks that mask patches (ViTMAE) or have tokens "
                "behind the patch tokens (YOLOS) cannot be explained"
            )
        cut = [call.index for call in calls[1:] if not call.follows]
        if self.tap.through_gradients and cut:
            raise UnsupportedNetworkError(
                f"no gradient passes from attention layer {cut[-1]} to the one below, which these methods need: {_CUT}"
            )

    def _check_head(self, output: Any) -> None:
        """Compare what the head makes of the last block's tokens with the network's output, where it is relied on."""
        narrowed = bool(self.tap.last_block.prefix)
        if not self.needs_local and not narrowed:
            return
        assert self.tap.last_tokens is not None
        assert self.layout.head is not None
        try:
            with torch.no_grad(), self.tap.passing():
                told = agree(self.layout.head(self.tap.last_tokens), output)
        except (RuntimeError, IndexError, TypeError, AttributeError) as error:
            raise UnsupportedNetworkError(
                f"the architecture's head fails on the last block's tokens ({error}): {DESCRIBE_HEAD}"
            ) from error
        if not told and narrowed:
            raise HeadDiffersError
        if not told:
            raise UnsupportedNetworkError(
                "the architecture's head does not give the network's output from the last block's tokens, so LeGrad, "
                f"which asks it for each layer's own score, would explain something else: {DESCRIBE_HEAD}, or leave "
                "LeGrad out"
            )

    def _scores(self, output: Any, target: Target) -> tuple[Tensor, Tensor, list[Score]]:
        if callable(target):
            score = target(output)
            if not isinstance(score, Tensor) or score.shape != (len(self.images),):
                raise ValueError(
                    f"the target function must give one score per image, shape ({len(self.images)},), and gave "
                    f"{tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__}"
                )
            logits = score[:, None]
            check_finite(logits, "scores")
            return logits, torch.full((len(score),), NO_CLASS, device=score.device), [target]
        logits = logits_of(output)
        check_finite(logits)
        if isinstance(target, Contrast):
            indices = resolve_target(target.target, logits, self.model)
            other = resolve_target(target.other, logits, self.model)
            if indices.dim() != 1 or other.dim() != 1:
                raise ValueError("a contrast takes one class per image on either side")
            plus, minus = class_score(indices), class_score(other)
            return logits, indices, [lambda output: plus(output) - minus(output)]
        indices = resolve_target(target, logits, self.model)
        columns = indices[:, None] if indices.dim() == 1 else indices
        return logits, indices, [class_score(column) for column in columns.unbind(dim=1)]

    def _maps(self, output: Any, score: Score, retain_graph: bool) -> dict[str, Tensor]:
        self.rows.clear()
        scores = score(output)
        self.tap.readout, self.tap.scale = self._readout(scores, output)
        self._differentiate_own_scores(score, output)
        if self.tap.through_gradients:
            self._go_backward(scores, retain_graph)
        else:
            with torch.no_grad(), torch.autocast(self.images.device.type, enabled=False):
                self.tap.replay(keep=retain_graph)
        first_patch = self.layout.prefix_tokens
        maps = {name: row[:, first_patch:].reshape(-1, *self.grid) for name, row in self.rows.items()}
        for name, each in maps.items():
            _require_finite(each, f"maps of {name}")
        return maps

    def _readout(self, scores: Tensor, output: Any) -> tuple[Tensor, Tensor]:
        """Return the row above the top layer, and the scale of each image's gradient."""
        boundary = self.tap.boundary
        found: Tensor | None = None
        if scores.requires_grad and boundary is not None:
            (found,), scale = gradients(scores, [boundary])
        if boundary is None or found is None:
            raise UnsupportedNetworkError(
                "the score does not depend on the last attention layer by any gradient: explain a score of the "
                f"network's output; {_CUT}"
            )
        tokens = self.tap.calls[-1].keys
        self.tap.unseen.require_none(scores, {tokens, tokens - self.layout.prefix_tokens} - {0, 1})
        _require_finite(found, "gradients")
        readout = readout_row(found)
        without = readout.sum(dim=1) == 0
        if not without.any():
            return readout, scale
        images = without.nonzero().flatten().tolist()
        if self.needs_gradient or self.needs_local:
            raise ValueError(
                f"the score of images {images} has a gradient of exactly zero, of which no method that uses gradients "
                "can make a map: explain another class or score, or ask for methods without gradients (rollout, "
                "attention)"
            )
        # What the head reads for the other classes, it reads.
        (general,) = torch.autograd.grad(distinct_sum(output), [boundary], retain_graph=True, allow_unused=True)
        if general is None or not general.flatten(1).any(dim=1)[without].all():
            raise ValueError(f"no output of the network depends on the tokens of images {images}: there is no readout")
        return torch.where(without[:, None], readout_row(general), readout), scale

    def _differentiate_own_scores(self, score: Score, output: Any) -> None:
        """Prepare the gradients of the layers' own scores: at once if blocks were repeated, else layer by layer."""
        if not self.needs_local:
            return

        def score_tokens(tokens: Tensor) -> Tensor:
            with self.tap.passing():
                return score(self._head(tokens, output))

        left = self.tap.repeated_blocks.left
        if not left:
            self.tap.layer_scores.score_tokens = score_tokens
            return
        calls = [call for call in self.tap.calls if call.output is not None]
        total = torch.stack([score_tokens(tokens).float() for tokens in left]).sum(dim=0)
        found, scale = gradients(total, [call.output for call in calls if call.output is not None])
        for call, gradient in zip(calls, found, strict=True):
            call.local = None if gradient is None else gradient.float() / scale.view(-1, 1, 1, 1)

    def _go_backward(self, scores: Tensor, retain_graph: bool) -> None:
        """Visit all layers by the backward pass of the scores; in float16 again with a smaller scale on overflow."""
        assert self.tap.boundary is not None
        again = in_float16(scores, self.tap.boundary)
        for _ in range(_ATTEMPTS if again else 1):
            self.tap.visited.clear()
            self.tap.finite = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
            total = scaled_sum(scores, self.tap.scale)
            torch.autograd.grad(total, self.tap.leaves, retain_graph=retain_graph or again, allow_unused=True)
            if self.tap.finite.all():
                break
            self.rows.clear()
            self.tap.scale = self.tap.scale * torch.where(self.tap.finite, 1, _BACKOFF).float()
        else:
            images = (~self.tap.finite).nonzero().flatten().tolist()
            raise ValueError(
                f"the gradients of images {images} are not finite: use a wider precision (bfloat16 or float32), and "
                "check the weights"
            )
        missing = {call.index for call in self.tap.calls} - self.tap.visited
        if missing:
            raise UnsupportedNetworkError(
                f"no gradient of the score reaches attention layers {sorted(missing)}, which these methods need: {_CUT}"
            )

    def _head(self, tokens: Tensor, output: Any) -> Any:
        """Return what the head makes of tokens in the form of the network's output, which scores take apart."""
        assert self.layout.head is not None
        logits = self.layout.head(tokens)
        return SimpleNamespace(logits=logits) if hasattr(output, "logits") and isinstance(logits, Tensor) else logits

    def _consume(self, part: slice, layer: AttentionLayer) -> None:
        batch, tokens = len(self.images), layer.attention.shape[-1]
        for method in self.methods:
            if layer.is_top:
                assert self.tap.readout is not None
                row = method.start(self.tap.readout[part], self.images[part], tokens)
            else:
                row = self.rows[method.name][part]
            row = method.step(row, layer)
            self.rows.setdefault(method.name, row.new_zeros(batch, tokens))[part] = row

    def _read_prefix(self, tokens: Tensor, *others: Any, **options: Any) -> int:
        """Return the number of prefix tokens if blocks may run for them alone, and else 0.

        They may if the head reads no other tokens, if outside attention each token goes its own way, and if nobody
        watches. Tensors beside the tokens, such as rotary embeddings, have an entry for each of them.
        """
        prefix, head = self.layout.prefix_tokens, self.layout.head
        beside = (*others, *options.values())
        if not prefix or head is None or self.hooked:
            return 0
        if not all(each is None or isinstance(each, bool | int | float) for each in beside):
            return 0
        probe = tokens[:1].detach().requires_grad_()
        with self.tap.passing():
            whole = head(probe)
            (read,) = torch.autograd.grad(distinct_sum(whole), probe, allow_unused=True)
            if read is None or not read[:, :prefix].any() or read[:, prefix:].any():
                return 0
            alone = tensors_of(head(probe[:, :prefix]))
        if not all(map(close, alone, tensors_of(whole))):
            return 0
        with self.tap.probing():
            for forward in self.forwards if self.needs_local else self.forwards[-1:]:
                if not goes_token_by_token(lambda few, run=forward: run(few, *others, **options), tokens, prefix):
                    return 0
        return prefix


def _require_finite(values: Tensor, what: str) -> None:
    unusable = (~values.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if unusable:
        raise ValueError(
            f"the {what} of images {unusable} are not finite: use a wider precision (bfloat16 or float32), and check "
            "the weights"
        )
