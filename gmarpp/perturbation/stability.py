"""What max-sensitivity and infidelity are made of: maps of noisy images, and scores without random squares."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from gmarpp.attribution import Architecture, AttributionMethod, Contrast, explain
from gmarpp.attribution.target import Target
from gmarpp.maps import check_maps
from gmarpp.network.bound import BoundNetwork
from gmarpp.network.modes import evaluation_mode
from gmarpp.perturbation.baselines import BASELINES, Baseline
from gmarpp.perturbation.curves import renderer
from gmarpp.perturbation.jobs import images_per_pass, score_weighted
from gmarpp.perturbation.objective import Score, objective_of

NOISE = 0.02
NOISY_IMAGES = 10
SQUARES = 32


def map_changes(
    model: nn.Module,
    images: Tensor,
    methods: str | AttributionMethod | Iterable[str | AttributionMethod],
    target: Target = None,
    *,
    inputs: Mapping[str, Any] | None = None,
    architecture: Architecture | None = None,
    noise: float = NOISE,
    samples: int = NOISY_IMAGES,
    seed: int = 0,
    recompute: bool = False,
) -> dict[str, Tensor]:
    """Return how far maps move when images change a little, `‖Φ(x + ε) - Φ(x)‖ / ‖Φ(x)‖` (Yeh et al. 2019).

    It costs S + 1 calls of `gmarpp.explain`.

    Args:
        model: as `gmarpp.explain` takes it.
        images: (B, ...), likewise.
        methods: likewise.
        target: likewise, of one class or score per image. A predicted class is that of the image without noise.
        inputs: further arguments of the network's forward, by name.
        architecture: of a network of an unknown family.
        noise: largest size of ε, which is uniform, in units of the normalized image.
        samples: S.
        seed: of ε, one field per sample for all images, so that no value depends on the batch it was computed in.
        recompute: as `gmarpp.explain` takes it.

    Returns:
        (B, S) per method; NaN for a map of zeros.

    Raises:
        ValueError: for no samples or no noise, or several classes per image; what `gmarpp.explain` raises.
    """
    if samples < 1 or not noise > 0:
        raise ValueError(f"expected at least 1 sample and noise above 0, got {samples} and {noise}")
    methods = [methods] if isinstance(methods, str | AttributionMethod) else list(methods)
    options: dict[str, Any] = {"inputs": inputs, "architecture": architecture, "recompute": recompute}
    whole = explain(model, images, methods, target, **options)
    if whole.target.dim() != 1:
        raise ValueError(f"target: expected one class or score per image, got {tuple(whole.target.shape)}")
    fixed = _fixed(target, whole.target, whole.logits)
    generator = torch.Generator().manual_seed(seed)
    changes: dict[str, list[Tensor]] = {method: [] for method in whole.maps}
    for _ in range(samples):
        field = noise * (2 * torch.rand(images.shape[1:], generator=generator, dtype=torch.float32) - 1)
        noisy = explain(model, images + field.to(images), methods, fixed, **options)
        for method, maps in whole.maps.items():
            size = torch.linalg.vector_norm(maps.flatten(1), dim=1)
            moved = torch.linalg.vector_norm((noisy.maps[method] - maps).flatten(1), dim=1)
            changes[method].append(torch.where(size > 0, moved / size, torch.nan))
    return {method: torch.stack(each, dim=1) for method, each in changes.items()}


def _fixed(target: Target, explained: Tensor, logits: Tensor) -> Target:
    """Return a target whose predicted classes are those of given logits."""
    if isinstance(target, Contrast):
        predicted = logits.argmax(dim=1)
        sides = (predicted if each is None else each for each in (target.target, target.other))
        return Contrast(*sides)
    return target if callable(target) else explained


@dataclass(frozen=True)
class SquareRemovals:
    """Scores of images without random squares of patches.

    Attributes:
        removed_relevance: (B, S) per method, the sum of the map over each square.
        score_drops: (B, S), score on the image minus that without the square.
    """

    removed_relevance: dict[str, Tensor]
    score_drops: Tensor


def square_removals(
    model: nn.Module,
    images: Tensor,
    maps: Mapping[str, Tensor],
    target: Target,
    *,
    inputs: Mapping[str, Any] | None = None,
    samples: int = SQUARES,
    baseline: Baseline = "blur",
    score: Score = "probability",
    seed: int = 0,
    batch_size: int | None = None,
) -> SquareRemovals:
    """Remove random squares of patches and score what is left: infidelity with square removal (Yeh et al. 2019).

    It costs S + 1 runs of the network per image, for all methods together. Sides are uniform from one patch to half the
    grid, places too; they are the same for all images.

    Args:
        model: as `score_perturbations` takes it.
        images: (B, C, H, W), normalized.
        maps: raw maps (B, h, w) per method, all on one grid.
        target: what is scored, as in `gmarpp.explain`; see `score_perturbations`.
        inputs: further arguments of the network's forward, by name.
        samples: S.
        baseline: what replaces a removed patch, see `score_perturbations`.
        score: `probability`, `sigmoid` or `logit`, see `score_perturbations`.
        seed: of the squares.
        batch_size: most images per forward pass; see `score_perturbations`.

    Raises:
        ValueError: as `score_perturbations`, or for no samples.
    """
    grid = check_maps(maps, images)
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    if baseline not in BASELINES:
        raise ValueError(f"unknown baseline {baseline!r}: choose from {', '.join(BASELINES)}")
    squares = _squares(grid, samples, seed).to(images.device)
    batch_size = images_per_pass(images, batch_size)
    network = BoundNetwork(model, images, inputs or {})
    kept = torch.cat([torch.zeros_like(squares[:1]), squares]).logical_not().flatten(1)
    with evaluation_mode(model), torch.no_grad():
        objective = objective_of(network, images, target, score, batch_size)
        render = renderer(network, images, baseline, grid, batch_size)
        # Dropped tokens leave sequences of one length: squares of one side go together.
        scores = [
            score_weighted(render, torch.stack(list(group))[:, None].expand(-1, len(images), -1), objective, batch_size)
            for _, group in groupby(kept, key=lambda patches: int(patches.sum()))
        ]
    full, *rest = torch.cat(scores)
    removed = {
        method: torch.einsum("bhw,shw->bs", each.to(images.device, torch.float32), squares.float())
        for method, each in maps.items()
    }
    return SquareRemovals(removed, full[:, None] - torch.stack(rest, dim=1))


def _squares(grid: tuple[int, int], samples: int, seed: int) -> Tensor:
    """Return random squares of patches, (S, h, w), ordered by their sides."""
    generator = torch.Generator().manual_seed(seed)

    def below(end: int) -> int:
        return int(torch.randint(end, (), generator=generator))

    squares = torch.zeros(samples, *grid, dtype=torch.bool)
    for square, side in zip(squares, sorted(1 + below(max(1, min(grid) // 2)) for _ in range(samples)), strict=True):
        top, left = (below(length - side + 1) for length in grid)
        square[top : top + side, left : left + side] = True
    return squares
