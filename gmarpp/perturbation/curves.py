"""Insertion and deletion curves and kept-region scores."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gmarpp.attribution.target import Target
from gmarpp.maps import check_maps, minmax, rank_patches, stacked_maps
from gmarpp.network.bound import BoundNetwork
from gmarpp.network.modes import evaluation_mode
from gmarpp.perturbation.baselines import BASELINES, Baseline, TokenDrop, baseline_images
from gmarpp.perturbation.jobs import Render, composite, images_per_pass, score_intervals, score_weighted
from gmarpp.perturbation.masks import patch_extent, pixel_to_patch, step_counts
from gmarpp.perturbation.objective import Score, objective_of

KeptMask = Literal["topk", "soft"]
KEPT_SHARE = 0.25


@dataclass(frozen=True)
class Curves:
    """Insertion and deletion curves of one map per image.

    Attributes:
        fractions: (S + 1,), share of the patches inserted or deleted, from 0 to 1.
        insertion: (B, S + 1), from the baseline's score to the image's.
        deletion: (B, S + 1), from the image's score to the baseline's.
    """

    fractions: Tensor
    insertion: Tensor
    deletion: Tensor


@dataclass(frozen=True)
class PerturbationScores:
    """Scores of perturbed images, per method.

    Attributes:
        fractions: (S + 1,), share of the patches inserted or deleted, from 0 to 1.
        full: (B,), score on the image.
        empty: (B,), score on the baseline alone; None without curves.
        insertion: (B, S + 1) per method; empty without curves.
        deletion: (B, S + 1) per method; empty without curves.
        kept: (B,) per method, score on the kept region; empty without kept regions.
    """

    fractions: Tensor
    full: Tensor
    empty: Tensor | None
    insertion: dict[str, Tensor]
    deletion: dict[str, Tensor]
    kept: dict[str, Tensor]


def _check_options(baseline: str, mask: str, kept: bool) -> None:
    if baseline not in BASELINES:
        raise ValueError(f"unknown baseline {baseline!r}: choose from {', '.join(BASELINES)}")
    if mask not in get_args(KeptMask):
        raise ValueError(f"unknown mask {mask!r}: choose from {', '.join(get_args(KeptMask))}")
    if kept and mask == "soft" and baseline == "drop":
        raise ValueError("mask 'soft' cannot drop half a token: use mask 'topk', or baseline 'blur', 'mean' or 'black'")


def _intervals(counts: Sequence[int], curves: bool, topk: bool) -> list[list[tuple[int, int]]]:
    """Return the ranks kept on the image itself, along insertion, along deletion, and of the kept region."""
    patches = counts[-1]
    inserted = [(0, count) for count in counts] if curves else []
    deleted = [(count, patches) for count in counts] if curves else []
    region = [(0, math.ceil(KEPT_SHARE * patches))] if topk else []
    return [[(0, patches)], inserted, deleted, region]


def renderer(network: BoundNetwork, images: Tensor, baseline: str, grid: tuple[int, int], batch_size: int) -> Render:
    """Return the network on images (B, C, H, W) that are removed by patches of a grid (h, w)."""
    if baseline == "drop":
        if network.inputs:
            raise ValueError("baseline 'drop' runs a network on its tokens, without inputs: use blur, mean or black")
        return TokenDrop(network.module, images, grid, batch_size)
    size = (images.shape[2], images.shape[3])
    to_patch = pixel_to_patch(grid, size, images.device, patch_extent(network.module, size, grid))
    return composite(network, images, baseline_images(network.module, images, baseline), to_patch)


def _rescaled(curves: Tensor, full: Tensor, empty: Tensor) -> Tensor:
    span = (full - empty)[:, None]
    return torch.where(span > 0, (curves - empty[:, None]) / span, math.nan)


def score_perturbations(
    model: nn.Module,
    images: Tensor,
    maps: Mapping[str, Tensor],
    target: Target,
    *,
    inputs: Mapping[str, Any] | None = None,
    steps: int = 28,
    baseline: Baseline = "blur",
    score: Score = "probability",
    mask: KeptMask = "topk",
    normalize: bool = False,
    batch_size: int | None = None,
    curves: bool = True,
    kept: bool = True,
) -> PerturbationScores:
    """Score images of which patches are removed in the order of their maps, for several methods at once.

    Patches are ranked once per map (ties by index). All jobs (images × methods × curves × steps) run in batches
    without gradients, under the ambient autocast, with the network in eval mode. The image, the baseline and every set
    of kept patches that several methods or curves share are scored once.

    Args:
        model: any network from images to logits (or to an object with `.logits`); to anything where the target is a
            function. One of images and texts (CLIP, SigLIP) runs on images alone.
        images: (B, C, H, W), normalized.
        maps: raw maps (B, h, w) per method, all on one grid. It is laid over the pixels that the network's patches
            cover; on a network of an unknown family, and for maps on another grid, it is upsampled to the image by
            nearest neighbor. Every pixel belongs to exactly one patch.
        target: what is scored, as in `gmarpp.explain`, of one class per image: `None` for the class predicted on
            the image, an index or name, or one of either per image; a `Contrast`, whose two sides' scores are
            subtracted; or one of `gmarpp.targets` or a function of the network's output, which is scored by its own
            value. For several classes per image (B, K), score each alone, `target[:, k]` with `maps[:, k]`.
        inputs: further arguments of the network's forward, by name, as in `gmarpp.explain`.
        steps: S, curve steps; more steps than patches means one patch per step (see `fractions`).
        baseline: what replaces a removed patch: `blur`, `mean` (the image's mean color), `black` (needs
            `model.pretrained_cfg`) or `drop` (the token leaves the sequence; timm Vision Transformers).
        score: softmax `probability` of the target, the `sigmoid` of its logit, for networks with one output or outputs
            that do not exclude each other, or its `logit`. Ignored where the target is a function.
        mask: kept region: `topk` keeps the top 25 % of the patches, rounded up; `soft` fades the image into the
            baseline with weight 1 - E, E the min-max map on its grid (constant: 0; negative relevance is its low end),
            which over `black` is the E * x of Grad-CAM++ (Chattopadhyay et al. 2018).
        normalize: rescale each curve by (full - empty); a curve is NaN where the image scores no higher than its
            baseline, and metrics leave that image out. `kept`, `full` and `empty` stay as they are.
        batch_size: most images per forward pass; bounds the memory. When not given, 128, and on a GPU, which waits for
            Python in small passes, as many as have 2**25 values: 222 of 224 x 224 pixels. A target that is a function,
            and none of `gmarpp.targets`, is given all B images at a time.
        curves: score insertion and deletion.
        kept: score kept regions.

    Raises:
        ValueError: wrong options or shapes, maps or scores that are not finite (naming the image positions), a softmax
            over one output, `drop` for other networks or with `soft`, `black` without `pretrained_cfg`.
    """
    grid = check_maps(maps, images)
    _check_options(baseline, mask, kept)
    stacked = stacked_maps(maps, images.device)
    ranks = rank_patches(stacked)
    counts = step_counts(ranks.shape[-1], steps)
    intervals = _intervals(counts, curves, kept and mask == "topk")
    batch_size = images_per_pass(images, batch_size)
    network = BoundNetwork(model, images, inputs or {})
    with evaluation_mode(model), torch.no_grad():
        objective = objective_of(network, images, target, score, batch_size)
        render = renderer(network, images, baseline, grid, batch_size)
        scores = score_intervals(
            render, ranks, list(chain(*intervals)), objective, batch_size, equal_sizes=baseline == "drop"
        )
        full, inserted, deleted, region = torch.split(scores, [len(each) for each in intervals], dim=-1)
        if kept and mask == "soft":
            region = score_weighted(render, minmax(stacked).flatten(2), objective, batch_size)[..., None]
    full, empty = full[0, :, 0], inserted[0, :, 0] if curves else None
    if empty is not None and normalize:
        inserted, deleted = (_rescaled(each, full, empty) for each in (inserted, deleted))
    return PerturbationScores(
        fractions=torch.tensor(counts, dtype=torch.float32, device=images.device) / counts[-1],
        full=full,
        empty=empty,
        insertion=dict(zip(maps, inserted, strict=True)) if curves else {},
        deletion=dict(zip(maps, deleted, strict=True)) if curves else {},
        kept=dict(zip(maps, region.squeeze(-1), strict=True)) if kept else {},
    )


def perturbation_curves(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    target: Target,
    steps: int = 28,
    baseline: Baseline = "blur",
    score: Score = "probability",
    normalize: bool = False,
    batch_size: int | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Curves:
    """Compute insertion and deletion curves of one map per image (Petsiuk et al. 2018, by whole patches).

    Args:
        model: any network from images to logits.
        images: (B, C, H, W), normalized.
        maps: (B, h, w), raw.
        target: what is scored, as in `gmarpp.explain`; see `score_perturbations`.
        steps: S; capped at the number of patches.
        baseline: `blur`, `mean`, `black` or `drop`.
        score: `probability`, `sigmoid` or `logit`, see `score_perturbations`.
        normalize: rescale by (full - empty), see `score_perturbations`.
        batch_size: most images per forward pass, see `score_perturbations`.
        inputs: further arguments of the network's forward, by name.
    """
    scores = score_perturbations(
        model,
        images,
        {"maps": maps},
        target,
        inputs=inputs,
        steps=steps,
        baseline=baseline,
        score=score,
        normalize=normalize,
        batch_size=batch_size,
        kept=False,
    )
    return Curves(scores.fractions, scores.insertion["maps"], scores.deletion["maps"])
