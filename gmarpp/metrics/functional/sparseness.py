"""Sparseness of maps."""

import torch
from torch import Tensor

from gmarpp.maps import check_finite_maps
from gmarpp.metrics.functional.reduction import Reduction, reduce_images


def sparseness(maps: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Compute the Gini index of absolute relevance (Chalasani et al. 2020): 0 if even, near 1 for a single patch.

    With the absolute values sorted, v_1 <= … <= v_n, it is `sum_k (2k - n - 1) v_k / (n sum_k v_k)`.

    Relevance against the class, which is negative, counts by its size. A map of zeros is even, so its index is 0.

    Args:
        maps: (B, h, w), raw; the index depends on an offset but not on the scale.
        reduction: `mean`, or `none` for a value per image.

    Raises:
        ValueError: a wrong shape, a map that is not finite, or an unknown reduction.

    Examples:
        >>> sparseness(torch.tensor([[[0.0, 0.0], [0.0, 5.0]], [[1.0, 1.0], [1.0, 1.0]]]), reduction="none")
        tensor([0.7500, 0.0000])
    """
    check_finite_maps(maps)
    values = maps.double().abs().flatten(1).sort(dim=1).values
    count = values.shape[1]
    weights = torch.arange(1 - count, count, 2, device=values.device, dtype=values.dtype)
    total = count * values.sum(1)
    gini = (values * weights).sum(1) / torch.where(total > 0, total, 1.0)
    return reduce_images(gini.float(), reduction)
