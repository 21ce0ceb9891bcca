"""What a call of `explain` will do, decided before the network runs."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from gmarpp.attribution.method import Method
from gmarpp.attribution.products import RowProduct
from gmarpp.network.architecture import Architecture
from gmarpp.network.errors import UnsupportedNetworkError
from gmarpp.network.transport import Step

GRADIENT_RULES = ("plain", "balanced")
"""How a score's gradient may be propagated: `plain`, unchanged, or `balanced` (`gmarpp.attribution.balanced`).

The balanced one is that of a class's margin, the plain one that of its logit.
"""


def _is_hooked(module: nn.Module) -> bool:
    # Asked of every module: `any` of a tuple takes three times as long, and a GPU waits.
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def _by_rule(methods: Sequence[Method]) -> tuple[tuple[Method, ...], ...]:
    """Group methods by their gradient rule; those that need no gradient go with the first."""
    used = dict.fromkeys(method.gradient_rule for method in methods if method.needs_gradient) or {
        GRADIENT_RULES[0]: None
    }
    for rule in used:
        if rule not in GRADIENT_RULES:
            raise ValueError(f"unknown gradient rule {rule!r}: choose from {', '.join(GRADIENT_RULES)}")
    first = next(iter(used))
    rules = [method.gradient_rule if method.needs_gradient else first for method in methods]
    return tuple(tuple(each for each, own in zip(methods, rules, strict=True) if own == rule) for rule in used)


def _steps(layout: Architecture, images: Tensor) -> tuple[Step, ...]:
    if layout.transport is None:
        return ()
    steps = tuple(step.to(images.device) for step in layout.transport(images.shape[-2], images.shape[-1]))
    if len(steps) != len(layout.blocks):
        raise UnsupportedNetworkError(
            f"expected transport to describe {len(layout.blocks)} blocks, got {len(steps)}: correct gmarpp.Architecture"
        )
    return steps


def _require_prefix(methods: Sequence[Method], layout: Architecture) -> None:
    """Refuse methods that need prefix tokens where they have not entered yet, or where they leave the blocks."""
    if 0 < layout.prefix_from < len(layout.blocks):
        named = [method.name for method in methods if method.needs_local_gradient]
        why = f"the head would have to score the tokens of every block, and those below block {layout.prefix_from} have"
        why += " no class token"
    elif layout.prefix_from:
        named = [method.name for method in methods if method.needs_residual]
        why = "what the class token keeps of itself in the layers after the blocks is not followed"
    else:
        return
    if named:
        raise UnsupportedNetworkError(f"{', '.join(named)}: {why}. Ask for other methods (gmarpp_l1)")


def rule_of(methods: Sequence[Method]) -> str:
    """Return the gradient rule of a group of methods."""
    return next((method.gradient_rule for method in methods if method.needs_gradient), GRADIENT_RULES[0])


def blind_to_sign(groups: Sequence[Sequence[Method]]) -> list[str]:
    """Return the names of methods that take attention as it is, whatever sign the network gives it."""
    return [method.name for methods in groups for method in methods if getattr(method, "relevance", "") == "attention"]


def of_one_layer(groups: Sequence[Sequence[Method]]) -> list[str]:
    """Return the names of methods that have no place for tokens which the head reads below the last layer."""
    return [
        method.name
        for methods in groups
        for method in methods
        if method.needs_local_gradient or (method.needs_attention and not isinstance(method, RowProduct))
    ]


@dataclass(frozen=True)
class Plan:
    """Which methods are wanted of which network, and what they need.

    Attributes:
        names: of the methods, in the order of the maps.
        groups: the methods, by gradient rule; each group has its own backward pass, on the graph of all.
        layout: the network's tokens and blocks.
        gradients: whether gradients pass from block to block. If not, blocks run without a graph.
        local_scores: whether the layers' own scores are wanted.
        tails_again: whether blocks may run once more, because they have no hooks.
        head_again: whether the head may run once more, because it does so for the layers' own scores or nothing in the
            network has hooks.
        recompute: whether blocks run again in the backward pass instead of keeping their activations.
        steps: over which tokens each block attends; empty if all attend over all tokens.
    """

    names: tuple[str, ...]
    groups: tuple[tuple[Method, ...], ...]
    layout: Architecture
    gradients: bool
    local_scores: bool
    tails_again: bool
    head_again: bool
    recompute: bool
    steps: tuple[Step, ...]

    @property
    def is_balanced(self) -> bool:
        """Whether a backward pass is that of the balanced gradient."""
        return any(rule_of(group) == "balanced" for group in self.groups)

    @property
    def needs_attention(self) -> bool:
        """Whether a method takes anything of the attention layers."""
        return any(method.needs_attention for group in self.groups for method in group)

    @property
    def needs_residuals(self) -> bool:
        """Whether the residual's share is wanted of each layer."""
        return any(method.needs_residual for group in self.groups for method in group)

    @property
    def follows_tokens(self) -> bool:
        """Whether the tokens that enter blocks are followed."""
        return self.needs_residuals or any(method.needs_tokens for group in self.groups for method in group)

    @staticmethod
    def of(
        model: nn.Module, images: Tensor, methods: Sequence[Method], layout: Architecture, recompute: bool
    ) -> "Plan":
        """Plan a call.

        Args:
            model: the network.
            images: (B, 3, H, W).
            methods: each once, in the order of the maps.
            layout: of the network.
            recompute: whether the caller wants recomputation; methods without gradients need none.

        Raises:
            ValueError: for an unknown gradient rule.
            UnsupportedNetworkError: if the methods need blocks that the layout lacks, or the layers' own scores where
                there are none.
        """
        if len(set(layout.blocks)) < len(layout.blocks):
            raise UnsupportedNetworkError(
                "the same module is several of the network's blocks: leave blocks out, gmarpp.Architecture(grid, "
                "prefix_tokens), and ask for methods that do not need them (gmarpp_l1, rollout)"
            )
        local_scores = any(method.needs_local_gradient for method in methods)
        tails_again = not any(_is_hooked(module) for block in layout.blocks for module in block.modules())
        head_again = layout.head is not None and (local_scores or not any(map(_is_hooked, model.modules())))
        # Without a second run, the layers' own scores come from the graph of the forward pass.
        gradients = any(method.needs_gradient for method in methods) or (local_scores and not tails_again)
        recompute = recompute and gradients
        if (local_scores or recompute) and not layout.blocks:
            raise UnsupportedNetworkError(
                "LeGrad and recomputation need the network's blocks: pass them in gmarpp.Architecture(..., blocks=...)"
            )
        followed = [method.name for method in methods if method.needs_tokens or method.needs_residual]
        if followed and not layout.blocks:
            raise UnsupportedNetworkError(
                f"{', '.join(followed)}: the network's blocks are needed: pass them in "
                "gmarpp.Architecture(..., blocks=...)"
            )
        _require_prefix(methods, layout)
        names = tuple(method.name for method in methods)
        groups = _by_rule(methods)
        steps = _steps(layout, images)
        if len({grid for step in steps for grid in (step.grid, step.above.grid)}) > 1 and local_scores:
            own = ", ".join(method.name for method in methods if method.needs_local_gradient)
            raise UnsupportedNetworkError(
                f"{own}: the head would have to score the tokens of every block, and where tokens are merged those "
                "of lower blocks have other channels than the last ones. Ask for other methods (gmarpp_l1)"
            )
        return Plan(names, groups, layout, gradients, local_scores, tails_again, head_again, recompute, steps)
