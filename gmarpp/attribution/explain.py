"""`explain`: maps of all methods from one forward and one backward pass."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from gmarpp.attribution.call import UnsupportedNetworkError, require_one_chain
from gmarpp.attribution.explanation import Explanation
from gmarpp.attribution.extent import fit_to_extent, grid_extent
from gmarpp.attribution.grid import Architecture, architecture_of
from gmarpp.attribution.layer import AttentionLayer
from gmarpp.attribution.methods import Method, select_methods
from gmarpp.attribution.normalisation import displayable
from gmarpp.attribution.preserve import evaluation_mode
from gmarpp.attribution.recompute import RecomputedBlocks
from gmarpp.attribution.tap import AttentionTap
from gmarpp.attribution.target import (
    NO_CLASS,
    Contrast,
    Score,
    Target,
    check_finite,
    class_names,
    class_score,
    logits_of,
    resolve_target,
)


def explain(
    model: nn.Module,
    images: Tensor,
    methods: str | Method | Iterable[str | Method] = ("gmarpp_l1",),
    target: Target = None,
    *,
    architecture: Architecture | None = None,
    recompute: bool = False,
) -> Explanation:
    """Explain a Vision Transformer's output by all given methods, in one forward and one backward pass.

    The network is explained in eval mode and without activation checkpointing of its own, and left exactly as it was:
    modes, `requires_grad` and `.grad` of the parameters; no parameter's gradient is computed. Works under autocast,
    with attention arithmetic in float32, and inside `torch.inference_mode`.

    Args:
        model: any network that attends through `torch.nn.functional.scaled_dot_product_attention`.
        images: preprocessed for the network, shape (B, 3, H, W).
        methods: names in `gmarpp.METHODS` or `gmarpp.VARIANTS`, aliases, or `Method` objects with their own options.
        target: what is explained: `None` for the predicted class; a class index or name; one of either per image, or
            (B, K) for K classes per image at the cost of K backward passes; a `Contrast` of two classes; or a function
            that takes the network's output and gives one score per image.
        architecture: token layout of a network of an unknown family.
        recompute: keep only inputs of blocks in the forward pass and run each block again in the backward pass. Beyond
            512 tokens the number of kept inputs, and so the memory, does not grow with the number of blocks. Methods
            without gradients need no such pass.

    Raises:
        ValueError: for unusable images or targets, unknown methods, or logits that are not finite.
        UnsupportedNetworkError: if the network's attention cannot be followed.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, depth=2)
        >>> explanation = explain(vit, torch.randn(4, 3, 32, 32), methods=["gmarpp_l1", "rollout"])
        >>> explanation.maps["rollout"].shape
        torch.Size([4, 2, 2])
    """
    selected = select_methods(methods)
    _check_images(model, images)
    layout = architecture or architecture_of(model)
    with torch.inference_mode(False), torch.enable_grad(), evaluation_mode(model):
        # Autograd cannot save tensors that were made in inference mode.
        usable = images.clone() if images.is_inference() else images.detach()
        # Blocks described by hand may mix tokens elsewhere too, and a function may ask for more than the logits.
        plain_blocks = architecture is None
        narrowing = plain_blocks and not callable(target)
        maps, indices, logits, scores = _Pass(model, usable, selected, layout, recompute, plain_blocks, narrowing).run(
            target
        )
    names = () if callable(target) else class_names(model)
    seen = fit_to_extent(images.detach(), grid_extent(layout, images.shape[-2], images.shape[-1]))
    return Explanation(maps, indices, logits, scores, displayable(model, seen), names)


class _Pass:
    """One forward pass over a batch, and the backward passes that its targets need."""

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        methods: Sequence[Method],
        layout: Architecture,
        recompute: bool,
        plain_blocks: bool,
        narrowing: bool,
    ) -> None:
        self.model = model
        self.images = images
        self.methods = methods
        self.layout = layout
        self.grid = layout.grid(images.shape[-2], images.shape[-1])
        self.blocks = list(layout.blocks)
        needs_local = any(method.needs_local_gradient for method in methods)
        # Blocks that run without gradients keep queries, keys and values, more than recomputation does.
        through_gradients = any(method.needs_gradient for method in methods) or (
            needs_local and (recompute or not plain_blocks)
        )
        self.recompute = recompute and through_gradients
        if (needs_local and (not self.blocks or layout.head is None)) or (self.recompute and not self.blocks):
            raise UnsupportedNetworkError(
                "LeGrad needs the network's blocks and head, recomputation its blocks: pass them in "
                "gmarpp.Architecture(..., blocks=..., head=...)"
            )
        narrowing = narrowing and through_gradients and layout.head is not None
        self.recomputed_blocks = RecomputedBlocks()
        self.tap = AttentionTap(
            self.blocks,
            self._consume,
            self._read_prefix if needs_local or narrowing else None,
            needs_local,
            narrowing,
            through_gradients,
            self.recomputed_blocks.left if self.recompute else None,
        )
        self.rows: dict[str, Tensor] = {}

    def run(self, target: Target) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        """Give maps by method, targets, logits and scores."""
        narrowed = _replacing_forward(self.blocks[-1:], self.tap.last_block.narrowed)
        detached = _replacing_forward(self.blocks, self.tap.detached_blocks.repeated)
        recomputed = _replacing_forward(self.blocks[:-1] if self.recompute else (), self.recomputed_blocks.recomputed)
        with (
            self.tap.intercepting(),
            _contiguous_projections(self.model),
            narrowed,
            detached,
            recomputed,
            closing(self.tap),
        ):
            with self.tap.recording(len(self.images)):
                output = self.model(self.images)
            require_one_chain(self.tap.calls, len(self.blocks))
            self._check_grid()
            logits, indices, scores = self._scores(output, target)
            device = self.images.device.type
            computed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.images.dtype
            # float16 would lose small gradients.
            self.tap.gradient_scale = 2.0**10 if torch.float16 in (computed, logits.dtype) else 1.0
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

    def _scores(self, output: Any, target: Target) -> tuple[Tensor, Tensor, list[Score]]:
        if callable(target):
            score = target(output)
            if not isinstance(score, Tensor) or score.shape != (len(self.images),):
                raise ValueError(
                    f"the target function must give one score per image, shape ({len(self.images)},), and gave "
                    f"{tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__}"
                )
            logits = score[:, None]
            check_finite(logits)
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
        total = score(output).sum()

        def score_tokens(tokens: Tensor) -> Tensor:
            with self.tap.passing():
                return score(self._head(tokens, output))

        for echoes in self.tap.echoes:
            total = total + score_tokens(echoes).sum()
        self.tap.layer_scores.score_tokens = score_tokens
        total = total + sum(self.tap.layer_scores.terms)
        if not total.requires_grad:
            raise UnsupportedNetworkError("the score does not depend on the network's attention")
        total = total * self.tap.gradient_scale
        if self.tap.through_gradients:
            torch.autograd.grad(total, self.tap.leaves, retain_graph=retain_graph, allow_unused=True)
        else:
            local = self.tap.gradients_of_outputs(total, retain_graph)
            with torch.no_grad(), torch.autocast(self.images.device.type, enabled=False):
                self.tap.replay(local, keep=retain_graph)
        if not self.rows:
            raise UnsupportedNetworkError("the score does not depend on the network's attention")
        first_patch = self.layout.prefix_tokens
        return {name: row[:, first_patch:].reshape(-1, *self.grid) for name, row in self.rows.items()}

    def _head(self, tokens: Tensor, output: Any) -> Any:
        """Give what the head makes of tokens in the form of the network's output, which scores take apart."""
        assert self.layout.head is not None
        logits = self.layout.head(tokens)
        return SimpleNamespace(logits=logits) if hasattr(output, "logits") and isinstance(logits, Tensor) else logits

    def _consume(self, part: slice, layer: AttentionLayer) -> None:
        batch, tokens = len(self.images), layer.attention.shape[-1]
        for method in self.methods:
            if layer.is_top:
                assert self.tap.readout is not None
                row = method.start(self.tap.readout[part], self.images[part], tokens)
            elif method.name not in self.rows:
                raise UnsupportedNetworkError(
                    "the score does not depend on the last attention layer: explain a score of the network's output"
                )
            else:
                row = self.rows[method.name][part]
            row = method.step(row, layer)
            self.rows.setdefault(method.name, row.new_zeros(batch, tokens))[part] = row

    def _read_prefix(self, tokens: Tensor) -> int:
        """Give the number of prefix tokens if the head reads no others, and else 0."""
        assert self.layout.head is not None
        prefix = self.layout.prefix_tokens
        probe = tokens[:1].detach().requires_grad_()
        with self.tap.passing():
            output = self.layout.head(probe)
            values = (output if isinstance(output, Tensor) else logits_of(output)).float()
            # Different factors: a plain sum has no gradient where the head ends in a normalisation.
            factors = torch.arange(1.0, values.numel() + 1, device=values.device).view_as(values)
            read = torch.autograd.grad((values * factors).sum(), probe)[0] != 0
        return prefix if read[:, :prefix].any() and not read[:, prefix:].any() else 0

    def _check_grid(self) -> None:
        tokens = self.tap.calls[-1].keys
        height, width = self.grid
        if self.layout.prefix_tokens + height * width != tokens:
            # An attention-pool head may leave the prefix tokens out, which is no chain of layers either.
            raise UnsupportedNetworkError(
                f"the network attends over {tokens} tokens, but a patch grid of {height} x {width} and "
                f"{self.layout.prefix_tokens} prefix tokens make {self.layout.prefix_tokens + height * width}: "
                "correct grid and prefix_tokens in gmarpp.Architecture, or the size of the images"
            )


@contextmanager
def _replacing_forward(
    blocks: Sequence[nn.Module], wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    own = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = wrap(block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


@contextmanager
def _contiguous_projections(model: nn.Module) -> Iterator[None]:
    """Hand `nn.MultiheadAttention` tokens that are contiguous once it has transposed them.

    Else its projection, with weights that are frozen, becomes a product per image, each with a copy of the weights:
    several times the time of the whole network, in the backward pass above all.
    """

    def relay(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        query, *others = args
        if any(each is not query for each in others) or query.dim() != 3:
            return None
        relaid = query.transpose(0, 1).contiguous().transpose(0, 1)
        return (relaid,) * len(args)

    layers = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention) and module.batch_first]
    handles = [layer.register_forward_pre_hook(relay) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_images(model: nn.Module, images: Tensor) -> None:
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point() or len(images) == 0:
        given = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"images must be a floating-point tensor of shape (images, channels, height, width), not {given}"
        )
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.device != images.device:
        raise ValueError(
            f"the network is on {parameter.device} and the images are on {images.device}: move them with "
            f"images.to({str(parameter.device)!r})"
        )
