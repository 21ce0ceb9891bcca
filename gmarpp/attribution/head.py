"""What the head is, and which tokens it reads."""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gmarpp.attribution.call import gradient_of
from gmarpp.attribution.forward import CUT, ForwardPass
from gmarpp.attribution.plan import of_one_layer
from gmarpp.attribution.seam import answered_by
from gmarpp.network.errors import UnsupportedNetworkError
from gmarpp.network.output import check_finite

Head = Callable[[Tensor], Any]
"""Takes the tokens that leave the last block, (B, N, D), and returns the network's output."""

_DESCRIBE_HEAD = (
    "describe what follows the last block: dataclasses.replace(gmarpp.architecture_of(net), head=lambda tokens: ...)"
)


def rounding(*results: Tensor) -> float:
    """Return the relative rounding error of results, which under autocast may exceed that of their own dtype."""
    device = results[0].device.type
    dtypes = [each.dtype for each in results if each.is_floating_point()]
    if torch.is_autocast_enabled(device):
        dtypes.append(torch.get_autocast_dtype(device))
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def close(found: Tensor, expected: Tensor) -> bool:
    """Return whether two results of the same computation agree, up to rounding in the precision that it ran in."""
    tolerance = max(1e-4, 8 * rounding(found, expected))
    found, expected = found.detach().float(), expected.detach().float()
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def tensors_of(output: Any) -> list[Tensor]:
    """Return the floating-point tensors in a network's output, its logits alone where it has the attribute."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return [logits]
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = tuple(output.values())
    return [each for item in output for each in tensors_of(item)] if isinstance(output, tuple | list) else []


def _form(output: Any) -> object:
    # A head may return bare logits where the network names them: scores get both in the network's form.
    if isinstance(output, Tensor) or isinstance(getattr(output, "logits", None), Tensor):
        return Tensor
    if isinstance(output, Mapping):
        return {name: _form(each) for name, each in output.items()}
    return [_form(each) for each in output] if isinstance(output, tuple | list) else type(output)


def agree(head_output: Any, output: Any) -> bool:
    """Return whether a head's output is the network's: of the same form and, up to rounding, of the same values."""
    found, expected = tensors_of(head_output), tensors_of(output)
    if _form(head_output) != _form(output) or not expected or len(found) != len(expected):
        return False
    return all(a.shape == b.shape and close(a, b) for a, b in zip(found, expected, strict=True))


def distinct_sum(output: Any) -> Tensor:
    """Return one number that every value of the output influences, each by its own factor.

    A plain sum has no gradient where the output is normalized. A number for all images, such as a temperature, does not
    count.
    """
    total = torch.zeros(())
    for each in (each for each in tensors_of(output) if each.dim()):
        factors = torch.linspace(0.5, 1, each[0].numel(), device=each.device, dtype=torch.float32).view_as(each[0])
        total = total.to(each.device) + (each.float() * factors).sum()
    return total


def _is_read(gradient: Tensor) -> Tensor:
    """Return 1 for the tokens with any gradient, (B, N, D) or (B, H, N, d), and 0 for others."""
    read = (gradient != 0).any(dim=-1)
    return (read.any(dim=1) if gradient.dim() == 4 else read).float()


def _reads_beside_class_attention(total: Tensor, passed: ForwardPass) -> bool:
    """Return whether a number depends on the last block's tokens otherwise than by class attention after that block."""
    made = [
        edge for call, edge in zip(passed.calls, passed.outputs, strict=True) if call.is_class and call.block is None
    ]
    if not made:
        return False
    # Without the gradient of what class attention makes of the tokens, that of reading them directly is left.
    cut = [edge.node.register_prehook(_without_gradient) for edge in made if isinstance(edge, GradientEdge)]
    try:
        gradient = gradient_of(total, passed.last_tokens)
    finally:
        for hook in cut:
            hook.remove()
    return gradient is not None and bool(gradient.any())


def _without_gradient(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if each is None else torch.zeros_like(each) for each in gradients)


def layers_read(total: Tensor, passed: ForwardPass) -> list[int]:
    """Return which blocks below the last one leave tokens that a score reads otherwise than through the last ones.

    Raises:
        UnsupportedNetworkError: if what the score takes from them would be missing in a map.
    """
    if passed.last_tokens is None:
        return []
    if _reads_beside_class_attention(total, passed):
        raise UnsupportedNetworkError(
            "the score reads patch tokens that leave the last block directly, and not only by the class attention "
            "after it: what it takes from them would be missing. Explain a score of the class token"
        )
    read, elsewhere = passed.chain.read_by(total, passed.last_tokens)
    blind = of_one_layer(passed.plan.groups)
    if read and blind:
        raise UnsupportedNetworkError(
            f"the score reads the tokens that leave blocks {read} directly, and so several layers, of which "
            f"{', '.join(blind)} would see one: ask for others (gmarpp_l1, gmarpp_balanced, token_relevance, rollout)"
        )
    if elsewhere or (read and (passed.plan.steps or not passed.chain.is_whole)):
        raise UnsupportedNetworkError(
            f"the score reads the tokens that leave blocks {sorted({*read, *elsewhere})} directly, from inside a block "
            "or in a network that merges or changes tokens between blocks: what it takes from them would be missing. "
            "Explain a score of the last block's tokens. If it does read the last block, from an attribute for "
            "example, pass architecture=dataclasses.replace(gmarpp.architecture_of(model), head=None)"
        )
    return read


def head_of(passed: ForwardPass, output: Any, replay: Head) -> Head:
    """Return what makes the network's output of the last block's tokens: the architecture's head, or else the network.

    Args:
        passed: the forward pass.
        output: of the network.
        replay: the network with its blocks skipped.

    Returns:
        of tokens (B, N, D), an output in the form of the network's, which scores expect.

    Raises:
        UnsupportedNetworkError: if neither reproduces the network's output.
    """
    assert passed.last_tokens is not None
    described, tokens = passed.plan.layout.head, passed.last_tokens.detach()
    candidates = (replay,) if described is None else (in_form_of(output, described), replay)
    reasons = []
    for head in candidates:
        try:
            with torch.no_grad():
                made = head(tokens)
        # Whatever kind of error code of others raises, it makes no output.
        except Exception as error:
            reasons.append(error)
            continue
        if agree(made, output):
            return head
    raise UnsupportedNetworkError(
        "LeGrad asks for the score of each layer's tokens, and what the network makes of the last block's tokens is "
        "not all of its output: it also uses what earlier blocks return, keeps a state, or draws random numbers"
        f"{f' ({reasons[-1]})' if reasons else ''}. Leave LeGrad out, or {_DESCRIBE_HEAD}"
    ) from (reasons[-1] if reasons else None)


def in_form_of(output: Any, described: Head) -> Head:
    """Return a described head whose logits come in the form of the network's output."""

    def head(tokens: Tensor) -> Any:
        with answered_by(None):
            made = described(tokens)
        return SimpleNamespace(logits=made) if hasattr(output, "logits") and isinstance(made, Tensor) else made

    return head


def reads_prefix(head: Head, tokens: Tensor, prefix: int) -> bool:
    """Return whether a head reads prefix tokens only, and also works without the others.

    Args:
        head: of the network.
        tokens: any of it, (B, N, D), of which the first image's are used.
        prefix: number of prefix tokens.
    """
    tokens = tokens[:1].detach().requires_grad_()
    try:
        made = head(tokens)
        gradient = gradient_of(distinct_sum(made), tokens)
        if gradient is None or not gradient[:, :prefix].any() or gradient[:, prefix:].any():
            return False
        return agree(head(tokens[:, :prefix]), made)
    except Exception:
        # For example, the head may arrange the patch tokens in a grid and give them weights of zero; as its code is not
        # ours, it may fail by any error. One that all tokens cause is raised where the head is needed (`head_of`).
        return False


def _gradients_by_token(total: Tensor, passed: ForwardPass) -> list[Tensor] | None:
    """Return the gradient of a number where the graph of the score begins, (B, N, D) or (B, H, Q, d), and at the taps.

    `None` where it does not depend on the first of these places.
    """
    starts: list[Any] = [passed.score_start, *(passed.chain.taps[block] for block in passed.read)]
    if starts[0] is None or not total.requires_grad:
        return None
    first, *others = torch.autograd.grad(total, starts, retain_graph=True, allow_unused=True)
    if first is None:
        return None
    top = passed.calls[-1]
    if top.is_class and top.block is None:
        first = F.pad(first, (0, 0, 0, top.keys - first.shape[2]))
    elif any(starts[0] is each for each in (passed.last_tokens, passed.top)):
        first = _by_token(first, passed)
    # A part of the score alone, such as one image's, may not read them.
    return [first, *(first.new_zeros(first.shape) if each is None else _by_token(each, passed) for each in others)]


def _by_token(gradient: Tensor, passed: ForwardPass) -> Tensor:
    # Some networks lay out tokens as (B, h, w, D) or (B, D, h, w).
    return (gradient.movedim(1, -1) if passed.plan.layout.channels_first else gradient).flatten(1, -2)


def readout_of(
    scores: Tensor, output: Any, passed: ForwardPass, scale: float, needs_gradient: bool
) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the row above the top layer, equal shares for the tokens that the head reads, and rows of other layers.

    They are the tokens that the score depends on: the class token, all patches under average pooling, both tokens of a
    distilled network, the queries of an attention-pool head. Where a score's gradient is zero, for example because
    the weights of its class are, they are the tokens that any output depends on. A head that reads several layers (of
    segmentation, for example) gives equal shares to the tokens of all.

    Args:
        scores: of each image, (B,), with the network's graph.
        output: of the network.
        passed: the forward pass.
        scale: factor of the score.
        needs_gradient: whether a method needs a score with a gradient.

    Returns:
        float32, (B, Q), and by position of the blocks in `passed.read`, (B, N); an image's entries sum to 1.

    Raises:
        UnsupportedNetworkError: if the score does not depend on the last layer.
        ValueError: for gradients that are not finite, or zero where they are needed.
    """
    gradients = _gradients_by_token(scores.float().sum() * scale, passed)
    if gradients is None:
        raise UnsupportedNetworkError(
            "the score does not depend on the last attention layer by any gradient: explain a score of the network's "
            f"output; {CUT}"
        )
    for gradient in gradients:
        check_finite(gradient.flatten(1), "gradients")
    read = [_is_read(gradient) for gradient in gradients]
    without = _count(read) == 0
    if without.any():
        images = without.nonzero().flatten().tolist()
        if needs_gradient:
            raise ValueError(
                f"the score of images {images} has a gradient of exactly zero, from which methods that use gradients "
                "cannot make a map: explain another class or score, or ask for methods without gradients (rollout, "
                "attention)"
            )
        # What the head reads for other classes, it also reads for this one.
        general = [_is_read(each) for each in _gradients_by_token(distinct_sum(output), passed) or ()]
        if not general or (_count(general)[without] == 0).any():
            raise ValueError(
                f"no output of the network depends on the tokens of images {images}, so they have no readout"
            )
        read = [torch.where(without[:, None], *pair) for pair in zip(general, read, strict=True)]
    top, *others = (each / _count(read)[:, None] for each in read)
    return top, dict(zip(passed.read, others, strict=True))


def _count(read: Sequence[Tensor]) -> Tensor:
    """Return how many tokens of an image are read, (B,), of all layers."""
    return torch.stack([each.sum(dim=1) for each in read]).sum(dim=0)
