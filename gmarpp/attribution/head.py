"""What the head reads, and whether it is the head that the architecture describes."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gmarpp.attribution.forward import CUT, ForwardPass
from gmarpp.attribution.seam import answered_by
from gmarpp.network.architecture import Architecture
from gmarpp.network.errors import UnsupportedNetworkError
from gmarpp.network.output import check_finite

_DESCRIBE_HEAD = (
    "describe what follows the last block: architecture=dataclasses.replace(gmarpp.architecture_of(net.vit), "
    "head=lambda tokens: net.fc(net.vit.forward_head(net.vit.norm(tokens))))"
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

    A plain sum has no gradient where the output is normalized.
    """
    total = torch.zeros(())
    for each in tensors_of(output):
        factors = torch.linspace(0.5, 1, each[0].numel(), device=each.device, dtype=torch.float32).view_as(each[0])
        total = total.to(each.device) + (each.float() * factors).sum()
    return total


def _gradient(total: Tensor, start: GradientEdge | Tensor | None) -> Tensor | None:
    if start is None or not total.requires_grad:
        return None
    return torch.autograd.grad(total, start, retain_graph=True, allow_unused=True)[0]


def _shares(gradient: Tensor) -> Tensor:
    """Return equal shares for the tokens with any gradient, (B, N, D) or (B, H, N, d)."""
    read = (gradient != 0).any(dim=-1)
    read = (read.any(dim=1) if gradient.dim() == 4 else read).float()
    return read / read.sum(dim=-1, keepdim=True).clamp_min(1)


def head_output(layout: Architecture, tokens: Tensor, output: Any) -> Any:
    """Return the head's output for tokens (B, N, D), in the form of the network's output, which scores expect."""
    assert layout.head is not None
    with answered_by(None):
        made = layout.head(tokens)
    return SimpleNamespace(logits=made) if hasattr(output, "logits") and isinstance(made, Tensor) else made


def check_head(output: Any, passed: ForwardPass) -> None:
    """Raise `UnsupportedNetworkError` unless the architecture's head reproduces the network's output."""
    assert passed.last_tokens is not None
    try:
        with torch.no_grad():
            made = head_output(passed.plan.layout, passed.last_tokens.detach(), output)
            agrees = agree(made, output)
    except Exception as error:
        raise UnsupportedNetworkError(
            f"the architecture's head fails on the last block's tokens ({error}): {_DESCRIBE_HEAD}"
        ) from error
    if not agrees:
        raise UnsupportedNetworkError(
            "the architecture's head does not reproduce the network's output from the last block's tokens, so "
            f"LeGrad, which uses it for each layer's own score, would explain something else: {_DESCRIBE_HEAD}, or "
            "leave LeGrad out"
        )


def reads_prefix(layout: Architecture, tokens: Tensor) -> bool:
    """Return whether the architecture's head reads prefix tokens only, and also works without the others.

    Args:
        layout: of the network, with a head.
        tokens: any of it, (B, N, D), of which the first image's are used.
    """
    tokens, prefix = tokens[:1].detach().requires_grad_(), layout.prefix_tokens
    try:
        made = head_output(layout, tokens, None)
        gradient = _gradient(distinct_sum(made), tokens)
        if gradient is None or not gradient[:, :prefix].any() or gradient[:, prefix:].any():
            return False
        return agree(head_output(layout, tokens[:, :prefix], None), made)
    except Exception:
        # For example, the head may arrange the patch tokens in a grid and give them weights of zero; as its code is not
        # ours, it may fail by any error. One that all tokens cause is raised where the head is needed (`check_head`).
        return False


def readout_of(scores: Tensor, output: Any, passed: ForwardPass, scale: float, needs_gradient: bool) -> Tensor:
    """Return the row above the top layer: equal shares for the tokens that the head reads.

    They are the tokens that the score depends on: the class token, all patches under average pooling, both tokens of a
    distilled network, the queries of an attention-pool head. Where a score's gradient is zero, for example because
    the weights of its class are, they are the tokens that any output depends on.

    Args:
        scores: of each image, (B,), with the network's graph.
        output: of the network.
        passed: the forward pass.
        scale: factor of the score.
        needs_gradient: whether a method needs a score with a gradient.

    Returns:
        float32, (B, Q); rows sum to 1.

    Raises:
        UnsupportedNetworkError: if the score does not depend on the last layer.
        ValueError: for gradients that are not finite, or zero where they are needed.
    """
    start = passed.score_start
    gradient = _gradient(scores.float().sum() * scale, start)
    if gradient is None:
        raise UnsupportedNetworkError(
            "the score does not depend on the last attention layer by any gradient: explain a score of the network's "
            f"output; {CUT}"
        )
    check_finite(gradient.flatten(1), "gradients")
    readout = _shares(gradient)
    without = readout.sum(dim=1) == 0
    if not without.any():
        return readout
    images = without.nonzero().flatten().tolist()
    if needs_gradient:
        raise ValueError(
            f"the score of images {images} has a gradient of exactly zero, from which methods that use gradients "
            "cannot make a map: explain another class or score, or ask for methods without gradients (rollout, "
            "attention)"
        )
    # What the head reads for other classes, it also reads for this one.
    general = _gradient(distinct_sum(output), start)
    if general is None or not _shares(general)[without].any(dim=1).all():
        raise ValueError(f"no output of the network depends on the tokens of images {images}, so they have no readout")
    return torch.where(without[:, None], _shares(general), readout)
