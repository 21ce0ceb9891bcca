"""`explain`: maps of all methods from one forward pass and a backward pass per gradient rule."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from gmarpp.attribution.balanced import ruled
from gmarpp.attribution.block import wrapped
from gmarpp.attribution.decisions import decide
from gmarpp.attribution.descent import Descent
from gmarpp.attribution.explanation import Explanation
from gmarpp.attribution.forward import ForwardPass
from gmarpp.attribution.head import layers_read
from gmarpp.attribution.method import AttributionMethod, MapMethod, Method
from gmarpp.attribution.own_maps import own_maps, require_classes
from gmarpp.attribution.plan import Plan
from gmarpp.attribution.registry import select_methods
from gmarpp.attribution.replay import Replay, forwards_replaced
from gmarpp.attribution.scores import Scores
from gmarpp.attribution.seam import answered_by, intercepted, one_at_a_time
from gmarpp.attribution.target import Target
from gmarpp.attribution.way_down import WayDown
from gmarpp.network.architecture import Architecture
from gmarpp.network.bound import BoundNetwork
from gmarpp.network.errors import UnsupportedNetworkError
from gmarpp.network.extent import fit_to_extent, grid_extent
from gmarpp.network.families import architecture_of
from gmarpp.network.modes import evaluation_mode
from gmarpp.network.output import class_names
from gmarpp.network.preprocessing import displayable
from gmarpp.network.task import task_of
from gmarpp.network.wrappers import unwrapped


def explain(
    model: nn.Module,
    images: Tensor,
    methods: str | AttributionMethod | Iterable[str | AttributionMethod] = ("gmarpp_l1",),
    target: Target = None,
    *,
    inputs: Mapping[str, Any] | None = None,
    architecture: Architecture | None = None,
    recompute: bool = False,
) -> Explanation:
    """Explain a Vision Transformer's output by all given methods, in one forward and one or two backward passes.

    The network runs in eval mode without its own activation checkpointing and is left exactly as it was; no parameter's
    gradient is computed. `explain` works under autocast, and inside `torch.inference_mode`.

    Args:
        model: any network that attends through `torch.nn.functional.scaled_dot_product_attention`, or writes its
            attention out as a softmax times values. One of images and texts (CLIP, SigLIP) runs on images alone, and
            the target is a `gmarpp.targets.Text`.
        images: preprocessed for the network, shape (B, 3, H, W); or what else it is given first, of any floating-point
            type with a batch axis, such as videos and spectrograms.
        methods: names in `gmarpp.METHODS` or `gmarpp.VARIANTS`, of registered methods, aliases, or objects with their
            own options; those that make their maps themselves run one after the other, after the others.
        target: `None` for the predicted class; a class (index or name), one per image, or (B, K) with as many backward
            passes; a `Contrast`; one of `gmarpp.targets`; or a function of the network's output that returns one score
            per image, (B,), or K of them, (B, K).
        inputs: further arguments of the network's forward, by name.
        architecture: token layout of a network of an unknown family.
        recompute: keep only the inputs of blocks, and run each block again in the backward pass, if any.

    Raises:
        ValueError: for unusable images or targets, unknown methods, or logits that are not finite.
        UnsupportedNetworkError: if the network's attention cannot be followed.

    Examples:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, depth=2)
        >>> explanation = explain(vit, torch.randn(4, 3, 32, 32), methods=["gmarpp_l1", "rollout"])
        >>> explanation.maps["rollout"].shape
        torch.Size([4, 2, 2])
    """
    request = Request.of(model, images, methods, target, inputs=inputs, architecture=architecture, recompute=recompute)
    with request.running():
        # Autograd cannot save tensors that were made in inference mode.
        usable = images.clone() if images.is_inference() else images.detach()
        maps, scores = request.maps(usable)
        maps |= own_maps(request.outside, request.network.model, usable, scores.indices, request.plan.layout)
    return request.explanation(images, maps, scores)


@dataclass(frozen=True)
class Request:
    """What a call of `explain` asks for, checked.

    Attributes:
        network: with its further inputs.
        plan: for the methods that take part in the pass.
        target: what is explained.
        outside: methods that make their maps themselves.
        selected: all methods, in the order of the maps.
    """

    network: BoundNetwork
    plan: Plan
    target: Target
    outside: tuple[MapMethod, ...]
    selected: tuple[AttributionMethod, ...]

    @staticmethod
    def of(
        model: nn.Module,
        images: Tensor,
        methods: str | AttributionMethod | Iterable[str | AttributionMethod],
        target: Target,
        *,
        inputs: Mapping[str, Any] | None = None,
        architecture: Architecture | None = None,
        recompute: bool = False,
    ) -> "Request":
        """Check the arguments of `explain`."""
        selected = tuple(select_methods(methods))
        rules = [method for method in selected if isinstance(method, Method)]
        outside = tuple(method for method in selected if isinstance(method, MapMethod))
        require_classes(outside, target)
        model = unwrapped(model)
        _check(model, images)
        network = BoundNetwork(model, images, inputs or {})
        if outside and network.inputs:
            own = ", ".join(method.name for method in outside)
            raise ValueError(f"inputs: {own} run the network on images alone: leave out the methods that make own maps")
        layout = architecture or architecture_of(model)
        # Refuses what is no picture of the network.
        layout.pictures_of(images)
        return Request(network, Plan.of(model, images, rules, layout, recompute), target, outside, selected)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Prepare the network and autograd."""
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            evaluation_mode(self.network.model),
            _explained_errors(),
        ):
            yield

    def maps(self, images: Tensor) -> tuple[dict[str, Tensor], Scores]:
        """Return the maps of the methods that take part in the pass, and the scores that are explained."""
        with one_at_a_time:
            if self.plan.names:
                return _maps(self.network, images, self.plan, self.target)
            return {}, _scores(self.network, images, self.target)

    def explanation(self, images: Tensor, maps: Mapping[str, Tensor], scores: Scores) -> Explanation:
        """Return the explanation of images by all methods' maps."""
        model, layout = self.network.model, self.plan.layout
        pictures = layout.pictures_of(images).detach()
        seen = displayable(model, fit_to_extent(pictures, grid_extent(layout, *pictures.shape[2:])))
        names = class_names(model) if scores.of_classes else tuple(getattr(self.target, "names", ()))
        signed = tuple(method.name for method in self.selected if method.signed)
        ordered = {method.name: maps[method.name] for method in self.selected}
        return Explanation(ordered, scores.indices, scores.logits, scores.values, seen, names, signed, task_of(model))


@contextmanager
def _explained_errors() -> Iterator[None]:
    """Explain how to remedy autograd's errors that the network's or the target's own code causes."""
    try:
        yield
    except CheckpointError as error:
        raise UnsupportedNetworkError(
            "activation checkpointing inside the network could not be switched off: switch it off for the explanation"
        ) from error
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error):
            raise UnsupportedNetworkError(
                f"the network changes a tensor in place that its gradients need ({str(error).partition(';')[0]}): "
                "write x = x + y in place of x += y, or ask for methods that need no gradients (rollout, attention)"
            ) from error
        if "Inference tensors cannot be saved for backward" not in str(error):
            raise
        raise ValueError(
            "the network or the target function uses a tensor that was made in torch.inference_mode, which gradients "
            "cannot pass: make it outside, or pass tensor.clone() made outside"
        ) from error


def _maps(network: BoundNetwork, images: Tensor, plan: Plan, target: Target) -> tuple[dict[str, Tensor], Scores]:
    """Run the network once, and each score and gradient rule once down through its layers."""
    model = network.model
    passed = ForwardPass(plan, Descent(plan.needs_attention, plan.is_balanced), len(images))
    fused = plan.layout.fused
    with intercepted(model), forwards_replaced(list(fused), list(fused.values())):
        with (
            answered_by(passed.attend) as written,
            wrapped(plan.layout.blocks, passed),
            ruled(passed.descent),
        ):
            output = _output(network, images)
        scores = Scores.of(output, target, model, len(images))
        total = torch.stack([score(output).float().sum() for score in scores.functions]).sum()
        passed.leave_out_unread(total)
        passed.check_calls()
        passed.read = layers_read(total, passed)
        passed.leave_out_upper(total)
        grid = _grid(plan, images, passed.tokens)
        way = WayDown(passed, output, scores, images, Replay(network, images, passed), written)
        pairs = list(zip(scores.functions, scores.margins, strict=True))
        columns = [way.rows(*pair, last=pair is pairs[-1]) for pair in pairs]
    shape = (*scores.indices.shape, *grid)
    patches = plan.layout.patches(passed.tokens)
    stacked = {name: torch.stack([rows[name] for rows in columns], dim=1)[..., patches] for name in plan.names}
    if plan.steps and (cells := plan.steps[0].cells) is not None:
        stacked = {name: each[..., cells] for name, each in stacked.items()}
    maps = {name: each.reshape(shape) for name, each in stacked.items()}
    _check_maps(maps)
    return maps, scores


def _scores(network: BoundNetwork, images: Tensor, target: Target) -> Scores:
    with torch.no_grad():
        scores = Scores.of(_output(network, images), target, network.model, len(images))
    scores.require_finite()
    return scores


def _output(network: BoundNetwork, images: Tensor) -> Any:
    model = network.model
    try:
        return network(images)
    except UnsupportedNetworkError:
        raise
    except NotImplementedError as error:
        raise UnsupportedNetworkError(
            f"{type(model).__name__} does not run ({error}): explain the network inside it, or give it a forward"
        ) from error
    except Exception as error:
        if not hasattr(model, "get_image_features"):
            raise
        raise UnsupportedNetworkError(
            f"{type(model).__name__} takes texts beside images ({type(error).__name__}: {error}): explain a "
            "module whose forward returns model.get_image_features(images), with the similarity to a text's features "
            "as target"
        ) from error


def _grid(plan: Plan, images: Tensor, tokens: int) -> tuple[int, ...]:
    """Return the patch grid (h, w) or (t, h, w), after checking that it and the tokens around it make up all tokens."""
    grid = plan.layout.grid(*plan.layout.pictures_of(images).shape[2:])
    prefix, suffix = plan.layout.prefix_at(0), plan.layout.suffix_tokens
    if prefix + math.prod(grid) + suffix != tokens:
        around = f"{prefix} prefix tokens" + (f" and {suffix} suffix tokens" if suffix else "")
        raise UnsupportedNetworkError(
            f"the network attends over {tokens} tokens, but a patch grid of {' x '.join(map(str, grid))} and {around} "
            f"make {prefix + math.prod(grid) + suffix}: correct grid, prefix_tokens and suffix_tokens in "
            "gmarpp.Architecture, or the size of the images. Networks that mask patches (ViTMAE) cannot be explained"
        )
    return grid


def _check_maps(maps: dict[str, Tensor]) -> None:
    finite = torch.stack([each.flatten(1).isfinite().all(dim=1) for each in maps.values()])
    if not decide(finite.all())[0]:
        names = [name for name, each in zip(maps, finite, strict=True) if not each.all()]
        images = (~finite.all(dim=0)).nonzero().flatten().tolist()
        raise ValueError(
            f"the maps of {', '.join(names)} are not finite for images {images}: "
            "gradients are too large for the precision. Use a wider one (bfloat16 or float32)"
        )


def _check(model: nn.Module, images: Tensor) -> None:
    if not isinstance(images, Tensor) or images.dim() < 2 or not images.is_floating_point() or len(images) == 0:
        given = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"images: expected a floating-point tensor of shape (images, channels, height, width), got {given}"
        )
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.device != images.device:
        raise ValueError(
            f"the network is on {parameter.device} and the images are on {images.device}: move them with "
            f"images.to({str(parameter.device)!r})"
        )
