"""The balanced gradient: a backward pass that shares a score out among the tokens of every layer.

The forward pass is that of the network. Its graph gets nodes that let the plain gradient through as it is, and in a
balanced pass (`Descent.is_balanced`) do the following instead:

- norms hold their standard deviation (root mean square) constant, `dx = (g w - mean(g w)) / std`;
- attention lets a quarter of the gradient through to queries and keys, and all of it to values;
- activations y = f(x) hold their gate y / x constant, `dx = g y / x`; where two branches are multiplied, the activated
  one is constant, and so is a divisor.

So both gradients go down one graph. The nodes are put in where the network calls torch's functions, in modules or by
hand: no class of a network is known here, and nothing of a network is replaced. What the rule does not know stays in
the graph as it is, and `operations.require_known` finds it there.

Source: Mehri et al., "LibraGrad: Balancing Gradient Flow for Universally Better Vision Transformer Attributions",
CVPR 2025, for norms, attention and activations; the share of queries and keys is ours.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gmarpp.attribution.descent import Descent
from gmarpp.attribution.operations import gating

QUERY_KEY_SHARE = 0.25
"""How much of their gradient queries and keys get."""

_NEAR_ZERO = 1e-6

_ACTIVATIONS = {F.gelu, F.silu, F.mish, F.hardswish, F.hardtanh, F.relu6, F.softsign, F.tanhshrink, F.softshrink} | {
    *(F.relu, torch.relu, Tensor.relu, F.elu, F.selu, torch.selu, F.celu, torch.celu, F.leaky_relu, F.hardshrink),
    *(torch.tanh, Tensor.tanh),
}
_IN_PLACE: dict[Callable[..., Any], Callable[..., Tensor]] = {
    **dict.fromkeys((torch.relu_, Tensor.relu_), torch.relu),
    **dict.fromkeys((torch.tanh_, Tensor.tanh_), torch.tanh),
    **{F.elu_: F.elu, F.selu_: F.selu, F.celu_: F.celu, F.leaky_relu_: F.leaky_relu, F.hardtanh_: F.hardtanh},
}
_DIVISIONS = {torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.div_, Tensor.divide, Tensor.true_divide}
_PRODUCTS_IN_PLACE: dict[Callable[..., Any], Callable[..., Tensor]] = {Tensor.mul_: torch.mul}
_PRODUCTS = {torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, *_PRODUCTS_IN_PLACE} | _DIVISIONS


class _Norm(torch.autograd.Function):
    """The unchanged output of a norm, whose balanced gradient holds the factor 1 / std constant."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        tokens: Tensor,
        weight: Tensor | None,
        scale: Callable[[Tensor], Tensor],
        dims: tuple[int, ...],
        is_centered: bool,
        descent: Descent,
    ) -> Tensor:
        ctx.scale, ctx.dims, ctx.is_centered, ctx.descent, ctx.followed = scale, dims, is_centered, descent, (1,)
        ctx.save_for_backward(tokens, weight)
        ctx.set_materialize_grads(False)
        # A view could not be changed in place, as some networks do.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        # Recomputation lets go of what was taken, so it is taken even if it is not needed.
        (outer,), (tokens, weight) = gradients, ctx.saved_tensors
        if outer is None or not ctx.descent.is_balanced:
            return (outer, *[None] * 6)
        with torch.autocast(outer.device.type, enabled=False):
            found = outer.float() if weight is None else outer.float() * weight.float()
            if ctx.is_centered:
                found = found - found.mean(ctx.dims, keepdim=True)
            found = found * ctx.scale(tokens.float())
        return (None, found.to(tokens.dtype), *[None] * 5)


class _Gate(torch.autograd.Function):
    """The unchanged output y = f(x) of an activation, whose balanced gradient holds y / x constant."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        entered: Tensor,
        function: Callable[[Tensor], Tensor],
        gate_at_zero: float,
        descent: Descent,
    ) -> Tensor:
        ctx.function, ctx.gate_at_zero, ctx.descent = function, gate_at_zero, descent
        ctx.followed, ctx.is_activation = (1,), True
        ctx.save_for_backward(entered)
        ctx.set_materialize_grads(False)
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        (outer,), (entered,) = gradients, ctx.saved_tensors
        if outer is None or not ctx.descent.is_balanced:
            return (outer, *[None] * 4)
        with torch.autocast(outer.device.type, enabled=False):
            values = entered.float()
            gate = ctx.function(values).div_(values).nan_to_num_(ctx.gate_at_zero)
            return (None, gate.mul_(outer).to(entered.dtype), *[None] * 3)


class _Share(torch.autograd.Function):
    """The unchanged tensor, of whose balanced gradient a share goes on."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, share: float, descent: Descent) -> Tensor:
        ctx.share, ctx.descent, ctx.followed = share, descent, (0,) if share else ()
        ctx.set_materialize_grads(False)
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        (outer,) = gradients
        if outer is not None and ctx.descent.is_balanced:
            outer = outer * ctx.share if ctx.share else None
        return outer, None, None


def shared(tensor: Tensor, descent: Descent) -> Tensor:
    """Let through the share of a query's or key's balanced gradient."""
    found: Tensor = _Share.apply(tensor, QUERY_KEY_SHARE, descent) if tensor.requires_grad else tensor
    return found


class BalancedRule(TorchFunctionMode):
    """Puts the rule's nodes into the graph of the network that runs.

    Args:
        descent: which says whether a backward pass is balanced.
    """

    def __init__(self, descent: Descent) -> None:
        super().__init__()
        self._descent = descent

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if function in _PRODUCTS:
            held = self._with_constant(function, args)
            if function in _PRODUCTS_IN_PLACE and held[0] is not args[0]:
                # Changed in place, the constant would leave the network's own tensor without a graph.
                held = self._with_constant(function, (args[0].clone(), *args[1:]))
                return args[0].copy_(_PRODUCTS_IN_PLACE[function](*held, **options))
            args = held
        elif args and isinstance(args[0], Tensor) and args[0].requires_grad and torch.is_grad_enabled():
            if function in (F.layer_norm, torch.layer_norm):
                return self._layer_norm(function, *args, **options)
            if function in (F.rms_norm, torch.rms_norm):
                return self._rms_norm(function, *args, **options)
            if function is F.normalize and options.get("out") is None:
                return self._normalize(*args, **options)
            if function in _ACTIVATIONS or function in _IN_PLACE:
                return self._activation(function, *args, **options)
        return function(*args, **options)

    def _with_constant(self, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Hold constant which of two factors is the gate, if one is; a divisor is."""
        if len(args) < 2 or not all(isinstance(each, Tensor) and each.requires_grad for each in args[:2]):
            return args
        first, second, *others = args
        lead = -1 if function in _DIVISIONS else gating(first) - gating(second)
        if lead < 0:
            second = _Share.apply(second, 0.0, self._descent)
        elif lead > 0:
            first = _Share.apply(first, 0.0, self._descent)
        return first, second, *others

    def _layer_norm(
        self,
        function: Callable[..., Tensor],
        tokens: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        *others: Any,
        **options: Any,
    ) -> Tensor:
        def scale(values: Tensor) -> Tensor:
            _, _, factor = torch.native_layer_norm(values, shape, None, None, eps)
            return factor

        shape = tuple(normalized_shape)
        output = function(tokens, normalized_shape, weight, bias, eps, *others, **options)
        return self._norm(output, tokens, weight, scale, len(shape), is_centered=True)

    def _rms_norm(
        self,
        function: Callable[..., Tensor],
        tokens: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Tensor:
        def scale(values: Tensor) -> Tensor:
            return values.square().mean(dims, keepdim=True).add_(added).rsqrt_()

        dims = tuple(range(-len(tuple(normalized_shape)), 0))
        added = torch.finfo(tokens.dtype).eps if eps is None else eps
        output = function(tokens, normalized_shape, weight, eps)
        return self._norm(output, tokens, weight, scale, len(dims), is_centered=False)

    def _normalize(self, tokens: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, **_: Any) -> Tensor:
        # As the function itself computes it, which it does out of this rule's sight.
        norm = torch.linalg.vector_norm(tokens, p, dim, keepdim=True).clamp_min(eps)
        return torch.div(*self._with_constant(torch.div, (tokens, norm)))

    def _norm(
        self,
        output: Tensor,
        tokens: Tensor,
        weight: Tensor | None,
        scale: Callable[[Tensor], Tensor],
        dims: int,
        is_centered: bool,
    ) -> Tensor:
        if weight is not None and weight.requires_grad:
            # A weight that depends on the tokens is a product that the rule does not know.
            return output
        normed: Tensor = _Norm.apply(output, tokens, weight, scale, tuple(range(-dims, 0)), is_centered, self._descent)
        return normed

    def _activation(self, function: Callable[..., Tensor], entered: Tensor, *args: Any, **options: Any) -> Tensor:
        is_in_place = function in _IN_PLACE or any(each is True for each in (options.get("inplace"), *args))
        function = _IN_PLACE.get(function, function)
        args = tuple(each for each in args if each is not True)
        options = {name: each for name, each in options.items() if name != "inplace"}

        def apply(values: Tensor) -> Tensor:
            return function(values, *args, **options)

        # On the CPU, for no GPU should wait for a number.
        near_zero = float(apply(torch.tensor([_NEAR_ZERO], dtype=torch.float32, device="cpu")))
        # What is changed in place afterwards must not be what the backward pass needs.
        values = entered.clone() if is_in_place else entered
        output = apply(values)
        if abs(near_zero) < 1000 * _NEAR_ZERO:
            output = _Gate.apply(output, values, apply, near_zero / _NEAR_ZERO, self._descent)
        return entered.copy_(output) if is_in_place else output


def ruled(descent: Descent) -> AbstractContextManager[object]:
    """Give the context in which a network runs, with the rule if some passes are balanced."""
    return BalancedRule(descent) if descent.may_balance else nullcontext()
