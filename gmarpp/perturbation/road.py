"""ROAD: remove and debias (Rong et al. 2022)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gmarpp.attribution.target import Target
from gmarpp.maps import check_maps, rank_patches, stacked_maps
from gmarpp.network.bound import BoundNetwork
from gmarpp.network.modes import evaluation_mode
from gmarpp.perturbation.imputation import noisy_linear_imputation
from gmarpp.perturbation.jobs import images_per_pass, score_intervals
from gmarpp.perturbation.masks import patch_extent, pixel_to_patch
from gmarpp.perturbation.objective import Score, objective_of

FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class RoadScores:
    """Scores after imputing removed patches.

    Attributes:
        fractions: (F,), share of the patches removed.
        most_relevant_first: (B, F) per method; low where the map is faithful.
        least_relevant_first: (B, F) per method; high where the map is faithful.
    """

    fractions: Tensor
    most_relevant_first: dict[str, Tensor]
    least_relevant_first: dict[str, Tensor]


def road_scores(
    model: nn.Module,
    images: Tensor,
    maps: Mapping[str, Tensor],
    target: Target,
    *,
    inputs: Mapping[str, Any] | None = None,
    fractions: Sequence[float] = FRACTIONS,
    score: Score = "probability",
    noise: float = 0.01,
    seed: int = 0,
    batch_size: int | None = None,
) -> RoadScores:
    """Remove patches in both orders, fill them by noisy linear imputation, and score (Rong et al. 2022).

    Args:
        model: any network from images to logits.
        images: (B, C, H, W), normalized.
        maps: raw maps (B, h, w) per method, all on one grid.
        target: what is scored, as in `gmarpp.explain`; see `score_perturbations`.
        inputs: further arguments of the network's forward, by name, as in `gmarpp.explain`.
        fractions: shares of the patches to remove, strictly between 0 and 1; rounded to whole patches, at least one
            removed and one left.
        score: `probability`, `sigmoid` or `logit`, see `score_perturbations`.
        noise: standard deviation of the noise on imputed pixels, in units of the normalized image.
        seed: of the noise, one field for all images, so that no score depends on the batch it was computed in.
        batch_size: most images per forward pass; see `score_perturbations`.

    Raises:
        ValueError: as `score_perturbations`, or fractions outside (0, 1), or a map of one patch.
    """
    grid = check_maps(maps, images)
    patches = grid[0] * grid[1]
    if not fractions or not all(0 < fraction < 1 for fraction in fractions):
        raise ValueError(f"fractions: expected numbers strictly between 0 and 1, got {tuple(fractions)}")
    if patches < 2:
        raise ValueError(f"maps: expected at least 2 patches, of which imputation needs one, got {patches}")
    counts = [min(max(round(fraction * patches), 1), patches - 1) for fraction in fractions]
    batch_size = images_per_pass(images, batch_size)
    network = BoundNetwork(model, images, inputs or {})
    size = (images.shape[2], images.shape[3])
    to_patch = pixel_to_patch(grid, size, images.device, patch_extent(network.module, size, grid))
    generator = torch.Generator().manual_seed(seed)
    field = noise * torch.randn(images.shape[1:], generator=generator, dtype=torch.float32).to(images.device)

    def render(image: Tensor, keep: Tensor) -> Any:
        known = keep[:, to_patch].view(len(keep), *images.shape[2:])
        return network(noisy_linear_imputation(images[image], known, field), image)

    ranks = rank_patches(stacked_maps(maps, images.device))
    intervals = [(count, patches) for count in counts] + [(0, patches - count) for count in counts]
    with evaluation_mode(model), torch.no_grad():
        objective = objective_of(network, images, target, score, batch_size)
        scores = score_intervals(render, ranks, intervals, objective, batch_size)
    most, least = torch.split(scores, len(counts), dim=-1)
    return RoadScores(
        fractions=torch.tensor(counts, dtype=torch.float32, device=images.device) / patches,
        most_relevant_first=dict(zip(maps, most, strict=True)),
        least_relevant_first=dict(zip(maps, least, strict=True)),
    )
