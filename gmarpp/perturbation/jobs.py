"""Scoring of many partly removed images in few large batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmarpp.attribution.target import logits_of

Score = Literal["probability", "logit"]
SCORES: tuple[str, ...] = get_args(Score)

Render = Callable[[Tensor, Tensor], Tensor]
"""Network on perturbed images: positions of the images (n,) and what to keep (n, h * w) to logits (n, classes)."""

_WORD = 62


@dataclass(frozen=True)
class Objective:
    """What is scored: the softmax probability or the logit of each image's target class, in float32.

    Args:
        target: (B,) long.
        score: `probability` or `logit`.
        highest: the largest class index in `target`.
    """

    target: Tensor
    score: str
    highest: int

    @classmethod
    def of(cls, target: Tensor | Sequence[int] | int, score: str, images: Tensor) -> "Objective":
        """Check target, one class per image or for all, and score against the images.

        Raises:
            ValueError: another score, or not one class index (0 or more) per image.
        """
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
        target = torch.as_tensor(target, device=images.device)
        if target.dim() == 0:
            target = target.expand(len(images))
        if target.shape != images.shape[:1] or target.is_floating_point() or target.dtype == torch.bool:
            raise ValueError(
                f"target must hold one class index per image, shape ({len(images)},), got {tuple(target.shape)}"
            )
        if int(target.min()) < 0:
            raise ValueError("target has negative class indices: an unknown label cannot be scored")
        return cls(target.long(), score, int(target.max()))

    def __call__(self, logits: Tensor, image: Tensor) -> Tensor:
        """Scores (n,) of logits (n, classes) computed from the images at positions (n,)."""
        if logits.ndim != 2 or logits.shape[1] <= self.highest:
            raise ValueError(
                f"target class {self.highest} needs logits of shape (B, more than {self.highest}), the network "
                f"returned {tuple(logits.shape)}"
            )
        scores = logits.float().softmax(-1) if self.score == "probability" else logits.float()
        return scores.gather(1, self.target[image, None]).squeeze(1)


def composite(model: nn.Module, images: Tensor, baseline: Tensor, to_patch: Tensor) -> Render:
    """Network on images whose patches fade into the baseline: keep 1 shows the image, keep 0 the baseline.

    Args:
        model: network.
        images: (B, C, H, W).
        baseline: (B, C, H, W) or (B, C, 1, 1).
        to_patch: (H * W,) long, the patch of every pixel.
    """

    def render(image: Tensor, keep: Tensor) -> Tensor:
        weights = keep.to(images.dtype)[:, to_patch].view(len(keep), 1, *images.shape[2:])
        return logits_of(model(torch.lerp(baseline[image], images[image], weights)))

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
    """
    methods, batch, _ = weights.shape
    scores = torch.empty(methods * batch, device=weights.device)
    for job in torch.split(torch.arange(methods * batch, device=weights.device), batch_size):
        image = job % batch
        scores[job] = objective(render(image, weights.flatten(0, 1)[job]), image)
    return scores.view(methods, batch)


def _distinct(ranks: Tensor, intervals: Tensor) -> tuple[Tensor, Tensor]:
    """Jobs which differ, and for each of the (M, B, I) jobs the position among them of the one it equals.

    Two jobs are the same when they keep the same patches of the same image, whatever the methods and curves they come
    from: kept sets are compared exactly, as bits packed into words.
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
    once; masks and composites exist for one batch at a time.

    Args:
        render: network on perturbed images.
        ranks: (M, B, h * w) long.
        intervals: kept ranks as half-open intervals; (0, h * w) is the image itself, (0, 0) the baseline.
        objective: what is scored.
        batch_size: most images per forward pass.
        equal_sizes: batches hold only jobs that keep the same number of patches.

    Returns:
        (M, B, I) float32.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    methods, batch, _ = ranks.shape
    bounds = torch.tensor(intervals, device=ranks.device)
    jobs, inverse = _distinct(ranks, bounds)
    kept = (bounds[:, 1] - bounds[:, 0])[jobs % len(bounds)]
    kept, order = kept.sort(stable=True)
    sizes = torch.unique_consecutive(kept, return_counts=True)[1].tolist() if equal_sizes else [len(order)]
    scores = torch.empty(len(jobs), device=ranks.device)
    for group in torch.split(order, sizes):
        for chunk in torch.split(group, batch_size):
            row = jobs[chunk] // len(bounds)
            low, high = bounds[jobs[chunk] % len(bounds)].T[..., None]
            image, ranked = row % batch, ranks.flatten(0, 1)[row]
            keep = (ranked >= low) & (ranked < high)
            scores[chunk] = objective(render(image, keep), image)
    return scores[inverse].view(methods, batch, len(bounds))
