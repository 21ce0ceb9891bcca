"""What the head reads, and whether it is the one that the architecture describes."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gmarpp.attribution.call import UnsupportedNetworkError
from gmarpp.attribution.forward import ForwardPass
from gmarpp.attribution.grid import Architecture
from gmarpp.attribution.seam import answered_by
from gmarpp.attribution.target import Score, logits_of

REMEDY = (
    "describe what the network makes of the tokens of its last block, up to its output, in "
    "gmarpp.Architecture(..., head=...); for one that wraps a network of a known family: "
    "architecture=dataclasses.replace(gmarpp.architecture_of(network.vit), head=lambda tokens: "
    "network.classifier(network.vit.forward_head(network.vit.norm(tokens))))"
)


def head_output(layout: Architecture, tokens: Tensor, output: Any) -> Any:
    """Return what the head makes of tokens (B, N, D), in the form of the network's output, which scores take apart."""
    assert layout.head is not None
    with answered_by(None):
        made = layout.head(tokens)
    return SimpleNamespace(logits=made) if hasattr(output, "logits") and isinstance(made, Tensor) else made


def check_seen(total: Tensor, unseen: dict[str, Tensor]) -> None:
    """Raise `UnsupportedNetworkError` if the scores (B,) depend on attention that went past the interception."""
    watched = {name: output for name, output in unseen.items() if output.requires_grad}
    if not watched or not total.requires_grad:
        return
    gradients = torch.autograd.grad(total.sum(), list(watched.values()), retain_graph=True, allow_unused=True)
    names = [name for name, gradient in zip(watched, gradients, strict=True) if gradient is not None]
    if names:
        raise UnsupportedNetworkError(
            f"{', '.join(names)} attended without torch.nn.functional.scaled_dot_product_attention, so the network's "
            "attention cannot be followed: set module.fused_attn = True on attention modules of timm networks, and "
            "need_weights=False in calls of nn.MultiheadAttention"
        )


def check_head(score: Score, output: Any, passed: ForwardPass) -> None:
    """Raise `UnsupportedNetworkError` unless the architecture's head gives what the network made of the last tokens."""
    layout, last_tokens = passed.plan.layout, passed.last_tokens
    assert last_tokens is not None
    try:
        with torch.no_grad():
            made = head_output(layout, last_tokens.detach(), output)
            found, expected = _values(made), _values(output)
            if found is None or expected is None:
                found, expected = score(made), score(output)
    except Exception as error:
        raise UnsupportedNetworkError(
            f"the architecture's head does not give an output that can be scored as the network's ({error}): {REMEDY}"
        ) from error
    if found.shape == expected.shape:
        found, expected = found.float(), expected.detach().float()
        if bool((found - expected).abs().amax() <= (1e-3 + 4 * passed.epsilon) * expected.abs().amax()):
            return
    raise UnsupportedNetworkError(
        f"the architecture's head, which LeGrad applies to every layer, does not give the network's output: {REMEDY}"
    )


def _values(output: Any) -> Tensor | None:
    values = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return values if isinstance(values, Tensor) else None


def readout_of(
    score: Score, total: Tensor, output: Any, passed: ForwardPass, scale: float, may_ask_head: bool
) -> Tensor:
    """Return the row above the top layer: equal shares for the tokens that the head reads.

    They are the tokens that the score depends on: the class token, all patches under average pooling, both tokens of a
    distilled network, the queries of an attention-pool head. Where the score has no gradient, as that of a class whose
    weights are zero, the architecture's head can tell.

    Args:
        score: of an output.
        total: of each image, (B,), with the network's graph.
        output: of the network.
        passed: the forward pass.
        scale: factor of the score.
        may_ask_head: whether a score without a gradient is none of a method's concern.

    Returns:
        float32, (B, Q); rows sum to 1.

    Raises:
        UnsupportedNetworkError: if the score depends on nothing that the last layer gives.
    """
    gradient = None
    if total.requires_grad:
        start = passed.score_start
        gradient = torch.autograd.grad(total.float().sum() * scale, start, retain_graph=True, allow_unused=True)[0]
    readout = None if gradient is None else _shares(gradient)
    if readout is not None and bool((readout.sum(dim=1) > 0).all()):
        return readout
    top = passed.calls[-1]
    if may_ask_head and passed.plan.layout.head is not None and passed.last_tokens is not None and not top.is_pool:
        check_head(score, output, passed)
        probed = _shares(probe(passed.plan.layout, passed.last_tokens.detach(), output))
        return probed if readout is None else torch.where(readout.sum(dim=1, keepdim=True) > 0, readout, probed)
    if readout is None:
        raise UnsupportedNetworkError(
            "the score does not depend on the last attention layer, or not by a gradient: explain a score of the "
            "network's output, and let its head run with gradients"
        )
    images = (readout.sum(dim=1) == 0).nonzero().flatten().tolist()
    raise UnsupportedNetworkError(
        f"the score of images {images} has no gradient: it does not change with any token, so there is nothing to "
        "explain. Choose another target, or methods that need no gradient, such as rollout"
    )


def probe(layout: Architecture, tokens: Tensor, output: Any) -> Tensor:
    """Return the gradient, (B, N, D), of a sum of all that the architecture's head gives, with different factors.

    A plain sum has no gradient where the head ends in a normalisation.
    """
    tokens = tokens.requires_grad_()
    made = head_output(layout, tokens, output)
    values = (made if isinstance(made, Tensor) else logits_of(made)).float()
    factors = torch.arange(1, values[0].numel() + 1, device=values.device, dtype=torch.float32).view_as(values[0])
    gradient: Tensor = torch.autograd.grad((values * factors).sum(), tokens)[0]
    return gradient


def _shares(gradient: Tensor) -> Tensor:
    """Return equal shares for the tokens with any gradient, (B, N, D) or (B, H, N, d)."""
    read = (gradient != 0).any(dim=-1)
    read = (read.any(dim=1) if gradient.dim() == 4 else read).float()
    return read / read.sum(dim=-1, keepdim=True).clamp_min(1)
