"""`GraphedExplain`: a call of `explain` captured as a CUDA graph, which Python does not slow down."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from gmarpp.attribution.decisions import Decisions, deciding
from gmarpp.attribution.explain import Request, explain
from gmarpp.attribution.explanation import Explanation
from gmarpp.attribution.method import AttributionMethod
from gmarpp.attribution.precision import close
from gmarpp.attribution.seam import one_at_a_time
from gmarpp.attribution.target import ClassTarget, Contrast, Score, Target, class_indices
from gmarpp.network.architecture import Architecture
from gmarpp.network.errors import UnsupportedNetworkError
from gmarpp.network.wrappers import unwrapped

_WARM_UP = 3
"""Calls before the capture, in which kernels are compiled and chosen, and the allocator finds its sizes."""


def _on_device(target: Target, model: nn.Module, device: torch.device) -> Target:
    """Return a target of which nothing is copied from the host later."""

    def placed(side: "ClassTarget | Score") -> "ClassTarget | Score":
        if side is None or callable(side):
            return side
        return torch.as_tensor(class_indices(side, model)).to(device)

    return Contrast(placed(target.target), placed(target.other)) if isinstance(target, Contrast) else placed(target)


class GraphedExplain:
    """`explain` for many batches of one shape on a GPU, captured once and replayed without Python.

    `explain` starts thousands of kernels, and for small batches the GPU waits for Python. A replay starts them all at
    once. Weights may change in place between calls, as an optimizer changes them. For anything else that changes - the
    network's code, hooks, the autocast context, the shape or type of images - make a new one. What is unusual in a
    batch, such as logits that are not finite, is noticed after the replay; `explain` itself then decides, in the
    autocast context of the capture.

    The memory of the captured call, about what `explain` needs at its peak, is kept as long as this object is.

    Args:
        model: see `explain`; on a CUDA device.
        images: a batch of the shape and type that will be explained.
        methods: see `explain`; none that make their maps themselves.
        target: see `explain`; the same for all batches, for example `None` for the predicted class.
        architecture: see `explain`.
        recompute: see `explain`.

    Raises:
        ValueError: for images that are not on a CUDA device, or as `explain`.
        UnsupportedNetworkError: as `explain`.

    Examples:
        >>> graphed = gmarpp.GraphedExplain(vit, batch, ["token_relevance", "gmarpp_l1"])  # doctest: +SKIP
        >>> maps = [graphed(batch).maps for batch in batches]  # doctest: +SKIP

    Source: NVIDIA, "Getting started with CUDA graphs", 2019; `torch.cuda.CUDAGraph`.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        methods: str | AttributionMethod | Iterable[str | AttributionMethod] = ("gmarpp_l1",),
        target: Target = None,
        *,
        architecture: Architecture | None = None,
        recompute: bool = False,
    ) -> None:
        self._model, self._architecture, self._recompute = model, architecture, recompute
        if not images.is_cuda:
            raise ValueError(f"GraphedExplain: expected images on a CUDA device, got {images.device}: use explain")
        self._target = _on_device(target, unwrapped(model), images.device)
        self._request = Request.of(model, images, methods, self._target, architecture=architecture, recompute=recompute)
        if self._request.outside:
            own = ", ".join(method.name for method in self._request.outside)
            raise ValueError(f"GraphedExplain: {own} make their maps themselves, with code that may not be captured")
        with torch.inference_mode(False):
            self._images = images.detach().clone()
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        self._autocast = torch.autocast("cuda", dtype, enabled=enabled)
        self._graph = torch.cuda.CUDAGraph()
        with one_at_a_time, self._request.running():
            expected = self._warm_up()
            self._capture()
        self._require(expected)

    def _warm_up(self) -> dict[str, Tensor]:
        """Note what calls decide that are not captured, and return their maps."""
        stream, current = torch.cuda.Stream(self._images.device), torch.cuda.current_stream(self._images.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                # The graph reads what is noted here as long as it lives.
                self._decisions = Decisions()
                with deciding(self._decisions):
                    maps, _ = self._request.maps(self._images)
        current.wait_stream(stream)
        return maps

    def _capture(self) -> None:
        self._decisions.repeat(self._images.device)
        try:
            # Other threads, such as those that pin memory for loaders, may use the GPU meanwhile.
            with deciding(self._decisions), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._maps, self._scores = self._request.maps(self._images)
                self._is_usual = self._decisions.are_right()
        except RuntimeError as error:
            raise UnsupportedNetworkError(
                f"GraphedExplain: the call cannot be captured ({error}): the network, a target or a method waits for "
                "the GPU or copies from the host, as float16 does to find its gradient scale. Use explain"
            ) from error

    def _require(self, expected: dict[str, Tensor]) -> None:
        """Raise `UnsupportedNetworkError` unless a replay makes the maps of the calls before the capture."""
        self._graph.replay()
        others = [name for name, each in expected.items() if not close(self._maps[name], each)]
        if others or not self._is_usual:
            raise UnsupportedNetworkError(
                f"GraphedExplain: replayed, the call makes other maps ({', '.join(others)}): what the network or a "
                "method computes on the host is not captured. Use explain"
            )

    def __call__(self, images: Tensor) -> Explanation:
        """Explain a batch.

        Args:
            images: of the shape, type and device of those it was made with.

        Raises:
            ValueError: for other images, or as `explain`.
        """
        like = self._images
        if (images.shape, images.dtype, images.device) != (like.shape, like.dtype, like.device):
            raise ValueError(
                f"GraphedExplain: expected images {like.dtype} {tuple(like.shape)} on {like.device}, got "
                f"{images.dtype} {tuple(images.shape)} on {images.device}: use explain, or make another one"
            )
        with torch.inference_mode(False):
            self._images.copy_(images)
        self._graph.replay()
        if not bool(self._is_usual):
            with self._autocast:
                return explain(
                    self._model,
                    images,
                    self._request.selected,
                    self._target,
                    architecture=self._architecture,
                    recompute=self._recompute,
                )
        # The next replay overwrites what the graph has made.
        found = self._scores
        scores = replace(found, logits=found.logits.clone(), indices=found.indices.clone(), values=found.values.clone())
        return self._request.explanation(images, {name: each.clone() for name, each in self._maps.items()}, scores)
