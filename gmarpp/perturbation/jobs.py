"""Scoring of many partly removed images in few large batches."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gmarpp.network.bound import BoundNetwork
from gmarpp.perturbation.objective import Objective

Render = Callable[[Tensor, Tensor], Any]
"""Runs the network on perturbed images: from their positions (n,) and what to keep (n, h * w) to its output."""

_WORD = 62
_IMAGES, _VALUES_ON_GPU = 128, 2**25


def images_per_pass(images: Tensor, batch_size: int | None) -> int:
    """Return how many perturbed images are scored at a time.

    It follows from the images' size alone, so that a run's values do not depend on how much memory was free.

    Args:
        images: (B, ...).
        batch_size: where it is asked for.
    """
    if batch_size is not None:
        return batch_size
    return max(1, _VALUES_ON_GPU // math.prod(images.shape[1:])) if images.is_cuda else _IMAGES


def composite(network: BoundNetwork, images: Tensor, baseline: Tensor, to_patch: Tensor) -> Render:
    """Return the network on images whose patches fade into the baseline: keep 1 shows the image, keep 0 the baseline.

    Args:
        network: network.
        images: (B, C, H, W).
        baseline: (B, C, H, W) or (B, C, 1, 1).
        to_patch: (H * W,) long, the patch of every pixel.
    """

    def render(image: Tensor, keep: Tensor) -> Any:
        weights = keep.to(images.dtype)[:, to_patch].view(len(keep), 1, *images.shape[2:])
        return network(torch.lerp(baseline[image], images[image], weights), image)

    return render


def score_weighted(render: Render, weights: Tensor, objective: Objective, batch_size: int) -> Tensor:
    """Score every image once under each map's weights.

    Args:
        render: network on perturbed images.
        weights: (M, B, h * w) in [0, 1].
        objective: what is scored.
        batch_size: most images per forward pass.

    Returns:
        (M, B) float32.

    Raises:
        ValueError: scores that are not finite (naming the image positions).
    """
    methods, batch, _ = weights.shape
    scores = torch.empty(methods * batch, dtype=torch.float32, device=weights.device)
    jobs = torch.arange(methods * batch, device=weights.device)
    for job in torch.split(jobs, batch if objective.in_order else batch_size):
        image = job % batch
        scores[job] = objective(render(image, weights.flatten(0, 1)[job]), image)
    return _finite(scores.view(methods, batch, 1)).squeeze(2)


def _finite(scores: Tensor) -> Tensor:
    """Return scores (M, B, I) unless some are not finite, which metrics would take as undefined and leave out."""
    unusable = (~scores.isfinite()).any(2).any(0).nonzero().flatten().tolist()
    if unusable:
        raise ValueError(
            f"NaN or infinite scores of perturbed images at image positions {unusable}: check the weights, or use a "
            "wider precision (bfloat16 or float32)"
        )
    return scores


def _distinct(ranks: Tensor, intervals: Tensor) -> tuple[Tensor, Tensor]:
    """Return the jobs that differ, and for each of the (M, B, I) jobs the position among them of the one it equals.

    Two jobs are the same when they keep the same patches of the same image, whatever methods and curves they belong
    to: kept sets are compared exactly, as bits packed into words.
    """
    methods, batch, patches = ranks.shape
    powers = 2 ** torch.arange(_WORD, device=ranks.device)
    image = torch.arange(batch, device=ranks.device).expand(methods, batch)[..., None]
    keys = []
    for low, high in intervals.tolist():
        keep = F.pad((ranks >= low) & (ranks < high), (0, -patches % _WORD))
        keys.append(torch.cat([image, (torch.unflatten(keep, -1, (-1, _WORD)) * powers).sum(-1)], dim=-1))
    rows = torch.stack(keys, dim=2).flatten(0, 2)
    unique, inverse = torch.unique(rows, dim=0, return_inverse=True)
    positions = torch.arange(len(rows), device=ranks.device)
    first = positions.new_full((len(unique),), len(rows)).scatter_reduce_(0, inverse, positions, "amin")
    return first, inverse


def score_intervals(
    render: Render,
    ranks: Tensor,
    intervals: Sequence[tuple[int, int]],
    objective: Objective,
    batch_size: int,
    equal_sizes: bool = False,
) -> Tensor:
    """Score every image with only the patches kept whose rank lies in an interval, for each map and interval.

    All jobs (images × methods × intervals) are flattened; jobs that keep the same patches of the same image are scored
    once; masks and composites exist for one batch at a time. An objective that needs its images in order is given all
    of them at a time, once for each map and interval.

    Args:
        render: network on perturbed images.
        ranks: (M, B, h * w) long.
        intervals: kept ranks as half-open intervals; (0, h * w) is the image itself, (0, 0) the baseline.
        objective: what is scored.
        batch_size: most images per forward pass.
        equal_sizes: batches hold only jobs that keep the same number of patches.

    Returns:
        (M, B, I) float32.

    Raises:
        ValueError: scores that are not finite (naming the image positions).
    """
    methods, batch, _ = ranks.shape
    bounds = torch.tensor(intervals, device=ranks.device)
    if objective.in_order:
        every = torch.arange(methods * batch * len(bounds), device=ranks.device)
        jobs = every.view(methods, batch, len(bounds)).transpose(1, 2).flatten()
        inverse, order, sizes, batch_size = jobs.argsort(), every, [len(every)], batch
    else:
        jobs, inverse = _distinct(ranks, bounds)
        kept = (bounds[:, 1] - bounds[:, 0])[jobs % len(bounds)]
        kept, order = kept.sort(stable=True)
        sizes = torch.unique_consecutive(kept, return_counts=True)[1].tolist() if equal_sizes else [len(order)]
    scores = torch.empty(len(jobs), dtype=torch.float32, device=ranks.device)
    for group in torch.split(order, sizes):
        for chunk in torch.split(group, batch_size):
            row = jobs[chunk] // len(bounds)
            low, high = bounds[jobs[chunk] % len(bounds)].T[..., None]
            image, ranked = row % batch, ranks.flatten(0, 1)[row]
            keep = (ranked >= low) & (ranked < high)
            scores[chunk] = objective(render(image, keep), image)
    return _finite(scores[inverse].view(methods, batch, len(bounds)))
