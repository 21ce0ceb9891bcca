"""What the head is, and which tokens it reads."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from typing_extensions import override

from gmarpp.attribution.call import gradient_of
from gmarpp.attribution.decisions import decide
from gmarpp.attribution.forward import ForwardPass
from gmarpp.attribution.plan import of_one_layer
from gmarpp.attribution.precision import close
from gmarpp.attribution.seam import answered_by
from gmarpp.network.errors import UnsupportedNetworkError


class Head(ABC):
    """What makes the network's output of the tokens that leave the last block."""

    @abstractmethod
    def __call__(self, tokens: Tensor) -> Any:
        """Return the output for tokens (b, R, D) of the first images: of all tokens, or of the prefix tokens."""

    def of_layers(self, layers: Sequence[Tensor]) -> Iterable[Any]:
        """Return the outputs for the tokens of several layers, each (B, R, D)."""
        return map(self, layers)


class DescribedHead(Head):
    """An architecture's head, whose logits come in the form of the network's output.

    Args:
        described: the architecture's head.
        output: of the network.
    """

    def __init__(self, described: Callable[[Tensor], Any], output: Any = None) -> None:
        self._described, self._names_logits = described, hasattr(output, "logits")

    @override
    def __call__(self, tokens: Tensor) -> Any:
        with answered_by(None):
            return self._in_form(self._described(tokens))

    @override
    def of_layers(self, layers: Sequence[Tensor]) -> Iterable[Any]:
        # As one batch, which takes fewer kernels.
        with answered_by(None):
            made = self._described(torch.cat(tuple(layers)))
        return map(self._in_form, made.chunk(len(layers))) if isinstance(made, Tensor) else map(self, layers)

    def _in_form(self, made: Any) -> Any:
        return SimpleNamespace(logits=made) if self._names_logits and isinstance(made, Tensor) else made


_DESCRIBE_HEAD = (
    "describe what follows the last block: dataclasses.replace(gmarpp.architecture_of(net), head=lambda tokens: ...)"
)


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


def agreement(head_output: Any, output: Any) -> Tensor | None:
    """Return whether a head's output has, up to rounding, the values of the network's; `None` if its form is another.

    The answer is on the device, for which nothing waits.
    """
    found, expected = tensors_of(head_output), tensors_of(output)
    if _form(head_output) != _form(output) or not expected:
        return None
    if [each.shape for each in found] != [each.shape for each in expected]:
        return None
    return torch.stack([close(*pair) for pair in zip(found, expected, strict=True)]).all()


def distinct_sum(output: Any) -> Tensor:
    """Return one number that every value of the output influences, each by its own factor.

    A plain sum has no gradient where the output is normalized. A number for all images, such as a temperature, does not
    count.
    """
    sums = []
    for each in (each for each in tensors_of(output) if each.dim()):
        factors = torch.linspace(0.5, 1, each[0].numel(), device=each.device, dtype=torch.float32).view_as(each[0])
        sums.append((each.float() * factors).sum())
    # A network on several devices has an output on several, too.
    return sum((each.to(sums[-1].device) for each in sums[:-1]), start=sums[-1]) if sums else torch.zeros(())


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
    return gradient is not None and decide(gradient.any())[0]


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
    candidates = (replay,) if described is None else (DescribedHead(described, output), replay)
    reasons = []
    for head in candidates:
        try:
            with torch.no_grad():
                made = head(tokens)
        # Whatever kind of error code of others raises, it makes no output.
        except Exception as error:
            reasons.append(error)
            continue
        agrees = agreement(made, output)
        if agrees is not None and decide(agrees)[0]:
            return head
    raise UnsupportedNetworkError(
        "LeGrad asks for the score of each layer's tokens, and what the network makes of the last block's tokens is "
        "not all of its output: it also uses what earlier blocks return, keeps a state, or draws random numbers"
        f"{f' ({reasons[-1]})' if reasons else ''}. Leave LeGrad out, or {_DESCRIBE_HEAD}"
    ) from (reasons[-1] if reasons else None)


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
        if gradient is None or not prefix:
            return False
        agrees = agreement(head(tokens[:, :prefix]), made)
        reads_prefix = gradient[:, :prefix].any() & ~gradient[:, prefix:].any()
    except Exception:
        # For example, the head may arrange the patch tokens in a grid and give them weights of zero; as its code is not
        # ours, it may fail by any error. One that all tokens cause is raised where the head is needed (`head_of`).
        return False
    return agrees is not None and decide(agrees & reads_prefix)[0]
