"""The operations of a network's graph, as the balanced gradient sees them: linear, product, or a nonlinearity.

Nodes that are made for the rule (`gmarpp.attribution.balanced`) have an attribute `followed`, the positions of the
inputs that the balanced gradient goes on to. All other nodes pass it on as autograd does, which is right for linear
operations only.
"""

import re
from typing import Any

import torch
from torch import Tensor

from gmarpp.network.errors import UnsupportedNetworkError

_LINEAR = {
    # Arithmetic; the largest or smallest entry is linear where it is differentiable.
    *("Add", "Sub", "Rsub", "Neg", "Sum", "Mean", "Cumsum", "Amax", "Amin", "Max", "Min"),
    # Views, copies and rearrangement.
    *(
        "View",
        "UnsafeView",
        "AsStrided",
        "ReshapeAlias",
        "Alias",
        "Clone",
        "Copy",
        "ToCopy",
        "Transpose",
        "T",
        "Permute",
        "Select",
    ),
    *("Slice", "Split", "SplitWithSizes", "Unbind", "Cat", "Stack", "Expand", "Repeat", "Squeeze", "Unsqueeze", "Flip"),
    *("Roll", "Index", "IndexSelect", "IndexPut", "Gather", "Where", "MaskedFill", "Diagonal", "Tril", "Triu"),
    *("ViewAsReal", "ViewAsComplex"),
    # On grids of patches.
    *("ConstantPadNd", "ReflectionPad2D", "Unfold", "Im2Col", "Col2Im", "PixelShuffle", "PixelUnshuffle", "AvgPool2D"),
    *("AdaptiveAvgPool2D", "MaxPool2DWithIndices", "UpsampleBilinear2D", "UpsampleBicubic2D", "UpsampleNearest2D"),
    # Where a graph starts, and where a module's backward hook looks at it.
    *("AccumulateGrad", "BackwardHookFunction"),
}
_FACTORS = {"Mul": (0, 1), "Div": (0, 1), "Addcmul": (1, 2)}
_LAYERS = {"Mm": (0, 1), "Bmm": (0, 1), "Mv": (0, 1), "Addmm": (1, 2), "Baddbmm": (1, 2), "Addmv": (1, 2)} | {
    "Linear": (0, 1),
    "Convolution": (0, 1),
}
# Of queries and keys: attention that a network writes out keeps its own gradient down to these.
_SIMILARITIES = {"Bmm", "Baddbmm"}
# Fused attention below a node that visits its layer, and the nodes that visit layers.
_ATTENTION = re.compile(r"(_?ScaledDotProduct\w*|_DenseAttention|_Visited)")


def operation(node: Any) -> str:
    """Return the name of a node's operation, such as `Gelu` for `GeluBackward0`."""
    return re.sub(r"Backwards?\d*$", "", node.name().removeprefix("torch::autograd::"))


def _is_constant(node: Any) -> bool:
    return node is None or getattr(node, "followed", None) == ()


def followed(node: Any) -> list[Any]:
    """Return the nodes that the balanced gradient goes on to."""
    inputs = range(len(node.next_functions))
    if operation(node) == "Copy":
        # Of the first, which is overwritten, nothing is left.
        inputs = inputs[-1:]
    chosen = getattr(node, "followed", inputs)
    return [node.next_functions[each][0] for each in chosen if not _is_constant(node.next_functions[each][0])]


def is_linear(node: Any) -> bool:
    """Return whether a node is linear in all that the balanced gradient goes on to, or made for the rule."""
    name = operation(node)
    factors = _FACTORS.get(name) or _LAYERS.get(name)
    if factors is not None:
        first, second = (not _is_constant(node.next_functions[each][0]) for each in factors)
        return not second if name == "Div" else not (first and second)
    if name == "NativeBatchNorm":
        return not node._saved_training
    return hasattr(node, "followed") or name in _LINEAR or _ATTENTION.fullmatch(name) is not None


def gating(tensor: Tensor) -> int:
    """Return how surely a factor of a product is its gate.

    Returns:
        2 for a nonlinearity that only gates consist of, as in `x * sigmoid(x)` or `x * rsqrt(mean(x ** 2))`; 1 for an
        activation, as in `silu(a) * b`; 0 for values. Whatever only rearranges, scales or shifts is looked through.
    """
    node = tensor.grad_fn
    while node is not None:
        if hasattr(node, "followed"):
            return int(getattr(node, "is_activation", False))
        if not is_linear(node):
            return 2
        below = followed(node)
        if len(below) != 1 or operation(node) in _LAYERS:
            return 0
        node = below[0]
    return 0


def next_sequence_number() -> int:
    """Return a number that autograd gives to no earlier node of this thread, and to none that is made later."""
    node: Any = torch.zeros((), requires_grad=True, device="cpu").clone().grad_fn
    return int(node._sequence_nr())


def require_known(score: Tensor, end_of_network: int) -> None:
    """Refuse a network with an operation that the balanced gradient would not be right for.

    Args:
        score: with the network's graph.
        end_of_network: a sequence number between the network's nodes and those of the score, which is taken as it is.

    Raises:
        UnsupportedNetworkError: naming the operations.
    """
    waiting, seen, unknown = [(score.grad_fn, False)], set(), set()
    while waiting:
        node, is_of_weights = each = waiting.pop()
        if node is None or each in seen:
            continue
        seen.add(each)
        is_of_weights = is_of_weights or hasattr(node, "is_weights")
        is_of_score = operation(node) != "AccumulateGrad" and node._sequence_nr() > end_of_network
        if is_of_weights and operation(node) in _SIMILARITIES and not is_linear(node):
            is_of_weights = False
        elif not (is_of_score or is_linear(node) or (is_of_weights and operation(node) == "Softmax")):
            unknown.add(operation(node))
            continue
        waiting += [(below, is_of_weights) for below in followed(node)]
    if unknown:
        raise UnsupportedNetworkError(
            f"the balanced gradient has no rule for operations of this network: {', '.join(map(_described, unknown))}. "
            "Leave out the methods that use it (token_relevance, gmarpp_balanced), or write the operations as "
            "torch.nn.functional.layer_norm, rms_norm, gelu, silu and the like"
        )


def _described(name: str) -> str:
    if name in _FACTORS or name in _LAYERS:
        return f"{name} (of two branches, neither of them activated)"
    return name
