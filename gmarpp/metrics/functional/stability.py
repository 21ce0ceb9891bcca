"""Max-sensitivity and infidelity (Yeh et al., "On the (In)fidelity and Sensitivity of Explanations", NeurIPS 2019)."""

import torch
from torch import Tensor

from gmarpp.metrics.functional.reduction import Reduction, reduce_images


def max_sensitivity(map_changes: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Compute max-sensitivity: the largest change of a map, relative to its size, under small changes of the image.

    It is `max_s ‖Φ(x + ε_s) - Φ(x)‖ / ‖Φ(x)‖`. Lower is more stable, which says nothing of what the map shows: one that
    ignores the image has 0.

    Args:
        map_changes: (B, S), relative changes of S samples, as `gmarpp.perturbation.map_changes` returns them; NaN for a
            map of zeros, which has no size.
        reduction: `mean`, or `none` for a value per image.

    Raises:
        ValueError: a wrong shape, or an unknown reduction.

    Examples:
        >>> max_sensitivity(torch.tensor([[0.1, 0.3], [0.2, 0.1]]), reduction="none")
        tensor([0.3000, 0.2000])
    """
    _check(map_changes=map_changes)
    return reduce_images(map_changes.float().amax(dim=1), reduction)


def infidelity(removed_relevance: Tensor, score_drops: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Compute infidelity: how far the relevance of what is removed is from the drop of the score.

    It is `mean_s (β I_s - D_s)²`, I_s the relevance removed and D_s the drop. Maps have no unit of their own, so that
    each is scaled by its best factor `β = max(0, Σ I_s D_s / Σ I_s²)`; as it has no sign, a map that points the wrong
    way is as good as an empty one. Lower is better, in squared units of the score.

    Args:
        removed_relevance: (B, S), sums over what S samples remove, as `gmarpp.perturbation.square_removals` returns
            them.
        score_drops: (B, S), score on the image minus that without.
        reduction: `mean`, or `none` for a value per image.

    Raises:
        ValueError: wrong shapes, or an unknown reduction.

    Examples:
        >>> infidelity(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 3.0]]))
        tensor(0.1000)
    """
    _check(removed_relevance=removed_relevance, score_drops=score_drops)
    # Squares of relevance that spreads over many patches are too small for single precision.
    removed, drops = removed_relevance.double(), score_drops.double()
    square = removed.square().sum(dim=1)
    factor = ((removed * drops).sum(dim=1) / torch.where(square > 0, square, 1.0)).clamp_min(0)
    return reduce_images((factor[:, None] * removed - drops).square().mean(dim=1).float(), reduction)


def _check(**given: Tensor) -> None:
    shapes = {tuple(each.shape) for each in given.values()}
    if len(shapes) > 1 or any(len(shape) != 2 or 0 in shape for shape in shapes):
        got = " and ".join(str(tuple(each.shape)) for each in given.values())
        raise ValueError(f"expected {' and '.join(given)} of one shape (images, samples), got {got}")
