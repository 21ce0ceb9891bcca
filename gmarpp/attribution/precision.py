"""The precision that results have, and whether two agree within it."""

import torch
from torch import Tensor


def tf32_is_allowed() -> bool:
    """Return whether PyTorch may multiply float32 matrices in tf32 on a GPU."""
    matmul = torch.backends.cuda.matmul
    # PyTorch 2.9 has a new setting, and raises an error when the old one is read after the new one was set.
    return bool(matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32)


def rounding(*results: Tensor) -> float:
    """Return the relative rounding error of results, which may exceed that of their own dtype.

    It does under autocast, and on a GPU that may compute in tf32, which has as many digits as float16.
    """
    device = results[0].device.type
    dtypes = [each.dtype for each in results if each.is_floating_point()]
    if torch.is_autocast_enabled(device):
        dtypes.append(torch.get_autocast_dtype(device))
    if device == "cuda" and tf32_is_allowed():
        dtypes.append(torch.float16)
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def close(found: Tensor, expected: Tensor) -> Tensor:
    """Return whether two results of the same computation agree, up to rounding in the precision that it ran in."""
    tolerance = max(1e-4, 8 * rounding(found, expected))
    found, expected = found.detach().float(), expected.detach().float()
    return (found - expected).abs().max() <= tolerance * expected.abs().max()
