"""Products with a layer's attention and its gradient, from q, k, v and the output's gradient, without N × N matrices.

Two kernels per layer serve all methods. `statistics` goes over the matrices once, for the weights of heads and the
sums of rows; `carry` goes over them again, and carries the rows of all methods through the layer at once. Tiles of
A and G are computed where they are used and never stored (see `gmarpp.attribution.kernels`).

An example: rollout and GMAR++ through a layer of ViT-L/16, for 8 images::

    layer = dict(query=q, key=k, value=v, outer=gradient, scale=0.125)  # each tensor (8, 16, 197, 64)
    found = statistics(**layer)  # found.norms (4, 8, 16), found.product_rows (8, 16, 197)
    ...  # each method's row (8, 197), over its row sums, times its heads' weights: (8, 16, 1, 197)
    rollout, gmarpp, _ = carry(**layer, statistics=found, attention_rows=..., product_rows=...)  # each (8, 1, 197)
"""

import functools
import importlib.util
import math
import os
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gmarpp.attribution.layer import HeadNorm
from gmarpp.attribution.precision import tf32_is_allowed

_HAS_TRITON = importlib.util.find_spec("triton") is not None
if _HAS_TRITON:
    from gmarpp.attribution import kernels

_LARGEST_HEAD = 256
NORMS: tuple[HeadNorm, ...] = ("gradient_l1", "positive_l1", "gradient_l2", "positive_l2")
_FLAGS = dict(zip(NORMS, ("L1", "POSITIVE_L1", "L2", "POSITIVE_L2"), strict=True))
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Statistics:
    """What methods need to know of a layer before their rows pass through it; all float32.

    `G = outer vᵀ / gradient_scale` where a query attends to a key, and 0 elsewhere. A query that attends to no key
    has no attention. Without `outer` there is no gradient, and all but the logarithms are NaN.

    Attributes:
        log_sums: `log₂ Σ_j exp(scale · q kᵀ + mask)` over the keys, (B, H, Q); inf for a query that attends to nothing.
        norms: of heads, those that were asked for of `Σ|G|`, `Σ ReLU(G)`, `sqrt Σ G²` and `sqrt Σ ReLU(G)²`, in this
            order, that of `NORMS`; (k, B, H).
        product_rows: row sums `Σ_j ReLU(G)_ij A_ij`, (B, H, Q).
    """

    log_sums: Tensor
    norms: Tensor
    product_rows: Tensor


def available(device: torch.device) -> bool:
    """Return whether fused layers work there.

    That is on CUDA with Triton, unless the environment has GMARPP_FUSED=0; and on the CPU, slowly, if it has
    GMARPP_FUSED=1, and had TRITON_INTERPRET=1 when Triton was imported.
    """
    wanted = os.environ.get("GMARPP_FUSED")
    if device.type == "cpu":
        return _HAS_TRITON and kernels.INTERPRETED and wanted == "1"
    return _HAS_TRITON and device.type == "cuda" and wanted != "0"


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    outer: Tensor | None,
    mask: Tensor | None,
    scale: float,
    gradient_scale: float,
) -> dict[str, Any]:
    """Check the tensors of a call, and return the arguments that both kernels take."""
    _check_shapes(query, key, value, outer)
    batch, heads, queries, size = query.shape
    keys, value_size = value.shape[2:]
    if scale <= 0:
        # The kernels look for the largest score before they multiply by the factor.
        query, scale = query * scale, 1.0
    query, key = _alike(query, key)
    value, outer = (_alike(value)[0], None) if outer is None else _alike(value, outer)
    mask = None if mask is None else _expanded(mask, (batch, heads, queries, keys))
    tensors = {"query": query, "key": key, "value": value, "outer": outer}
    strides: dict[str, int] = {}
    for name, tensor in tensors.items():
        strides |= _strides(tensor, name, "image", "head", "token")
    unit = math.gcd(16, *strides.values())
    block, value_block = _power_of_two(size), _power_of_two(value_size)
    # Matrix units compute no IEEE products; three of tf32 keep all but the last two or three bits of float32.
    precision = "tf32" if tf32_is_allowed() else "tf32x3"
    tile = _tile(max(block * query.element_size(), value_block * value.element_size()), query.device)
    return {
        **tensors,
        **{name: stride // unit for name, stride in strides.items()},
        "mask": mask,
        **_strides(mask, "mask", "image", "head", "query", "key"),
        "heads": heads,
        "group": heads // key.shape[1],
        "queries": queries,
        "keys": keys,
        "scale": float(scale),
        "factor": 1.0 / gradient_scale,
        "PRECISION": precision,
        "SIZE": size,
        "BLOCK": block,
        "VALUE_SIZE": value_size,
        "VALUE_BLOCK": value_block,
        "UNIT": unit,
        "QUERIES": min(tile, _power_of_two(queries)),
        "KEYS": min(tile, _power_of_two(keys)),
        "num_warps": 4,
        "num_stages": 2,
    }


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, outer: Tensor | None) -> None:
    batch, heads, queries, size = query.shape
    key_heads, keys, value_size = value.shape[1:]
    expected = {
        "key": (key, (batch, key_heads, keys, size)),
        "value": (value, (batch, key_heads, keys, value_size)),
        "outer": (outer, (batch, heads, queries, value_size)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if heads % key_heads:
        raise ValueError(f"expected query heads in equal groups for {key_heads} key heads, got {heads}")
    if max(size, value_size) > _LARGEST_HEAD:
        raise ValueError(
            f"expected heads of at most {_LARGEST_HEAD} channels, got {max(size, value_size)}: set GMARPP_FUSED=0"
        )


def _check_rows(
    rows: dict[str, Tensor | None], query: Tensor, outer: Tensor | None, statistics: Statistics | None
) -> None:
    given = {name: each for name, each in rows.items() if each is not None}
    if not given:
        raise ValueError(f"expected at least one of {', '.join(rows)}, got none")
    for name, each in given.items():
        shape = (*query.shape[:2], each.shape[2], query.shape[2]) if each.dim() == 4 else ()
        if each.shape != shape:
            batch, heads, queries, _ = query.shape
            raise ValueError(f"{name}: expected shape ({batch}, {heads}, M, {queries}), got {tuple(each.shape)}")
    if outer is None and given.keys() != {"attention_rows"}:
        raise ValueError(f"{', '.join(given)}: expected the output's gradient, got outer=None")
    if statistics is None and given.keys() != {"gradient_rows"}:
        raise ValueError(f"{', '.join(given)}: expected the layer's statistics, got None")
    if statistics is not None and statistics.log_sums.shape != query.shape[:3]:
        found = tuple(statistics.log_sums.shape)
        raise ValueError(f"statistics: expected those of queries {tuple(query.shape[:3])}, got {found}")


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors in one dtype that the kernels take, each with its last axis contiguous."""
    dtype = functools.reduce(torch.promote_types, (each.dtype for each in tensors))
    # The interpreter would multiply the bit patterns of bfloat16.
    if dtype not in _DTYPES or (dtype == torch.bfloat16 and kernels.INTERPRETED):
        dtype = torch.float32
    tensors = tuple(each.to(dtype) for each in tensors)
    return tuple(each if each.stride(-1) == 1 else each.contiguous() for each in tensors)


def _expanded(mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Return a mask, booleans as bytes, in the shape of the scores but not of their size."""
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else _alike(mask)[0]
    try:
        return mask.expand(shape)
    except RuntimeError as error:
        raise ValueError(f"mask: expected a shape that expands to {shape}, got {tuple(mask.shape)}") from error


def _strides(tensor: Tensor | None, name: str, *axes: str) -> dict[str, int]:
    """Return the strides of a tensor's first axes as arguments, such as query_image; 0 without a tensor."""
    return {f"{name}_{axis}": 0 if tensor is None else tensor.stride(i) for i, axis in enumerate(axes)}


def _power_of_two(size: int) -> int:
    """Return the next power of two, at least 16, the smallest size that a matrix unit multiplies."""
    return max(16, 1 << (size - 1).bit_length())


def _tile(bytes_per_token: int, device: torch.device) -> int:
    """Return how many queries and how many keys a tile has: at most 64, at least 16.

    A program holds q, outer, and two stages of k and v. Two programs should fit into a multiprocessor's shared memory,
    so that one computes while the other waits.
    """
    memory = _shared_memory(device)
    return next((tile for tile in (64, 32) if 2 * 6 * tile * bytes_per_token <= memory), 16)


def _is_short(keys: int) -> bool:
    """Return whether smaller tiles are faster: on an H100 they are for 197 keys, and are not for 1,370."""
    return keys <= 256


def _shared_memory(device: torch.device) -> int:
    """Return a multiprocessor's shared memory in bytes; 0 in the interpreter, which then takes the smallest tiles."""
    return 0 if device.type == "cpu" else torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


def _launching_on(device: torch.device) -> AbstractContextManager[None]:
    """Make a tensor's device current: Triton launches kernels on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def statistics(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    outer: Tensor | None,
    *,
    mask: Tensor | None = None,
    scale: float,
    gradient_scale: float = 1.0,
    norms: Collection[HeadNorm] = NORMS,
) -> Statistics:
    """Return what methods need to know of a layer before their rows pass through it: one kernel and two reductions.

    Args:
        query: (B, H, Q, d); d is at most 256 here and for values. All tensors may have any strides.
        key: (B, H / g, N, d), where g heads of queries share one head of keys.
        value: (B, H / g, N, dv).
        outer: gradient of the call's output, times `gradient_scale`, (B, H, Q, dv); `None` without a gradient.
        mask: as `scaled_dot_product_attention` takes it: `True` where a query attends to a key, or an additive bias.
        scale: factor of the scores.
        gradient_scale: what `outer` was multiplied by.
        norms: those that are wanted.

    Raises:
        ValueError: the shapes do not fit each other, or a head is too large.
    """
    layer = _arguments(query, key, value, outer, mask, scale, gradient_scale)
    batch, heads, queries, _ = query.shape
    if _is_short(key.shape[2]) or query.dtype == torch.float32:
        layer["KEYS"] = min(layer["KEYS"], 32)
    blocks = -(-queries // layer["QUERIES"])
    log_sums = query.new_empty((batch, heads, queries), dtype=torch.float32)
    product_rows = None if outer is None else torch.empty_like(log_sums)
    parts = None if outer is None else log_sums.new_empty((len(norms), batch, heads, blocks))
    wanted = {_FLAGS[norm]: int(norm in norms) for norm in NORMS}
    with _launching_on(query.device):
        kernels.statistics_kernel[(batch * heads * blocks,)](
            **layer, **wanted, log_sums=log_sums, product_rows=product_rows, norms=parts
        )
    if parts is None or product_rows is None:
        nothing = log_sums.new_full((), float("nan"))
        return Statistics(log_sums, nothing.expand(len(norms), batch, heads), nothing.expand(batch, heads, queries))
    sums = parts.sum(dim=-1)
    if wanted["L2"] or wanted["POSITIVE_L2"]:
        sums[wanted["L1"] + wanted["POSITIVE_L1"] :].sqrt_()
    return Statistics(log_sums, sums, product_rows)


def carry(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    outer: Tensor | None,
    statistics: Statistics | None,
    *,
    attention_rows: Tensor | None = None,
    product_rows: Tensor | None = None,
    gradient_rows: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float,
    gradient_scale: float = 1.0,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return rows times the layer's matrices, summed over heads: one kernel for all rows, and the sum.

    Args:
        query: as in `statistics`, like key, value, outer, mask, scale and gradient_scale.
        key: see there.
        value: see there.
        outer: see there; not needed for `attention_rows` alone.
        statistics: of the same arguments; not needed for `gradient_rows` alone.
        attention_rows: (B, H, M, Q), any number M of rows, to be multiplied by `A`.
        product_rows: (B, H, M, Q), to be multiplied by `ReLU(G) ⊙ A`.
        gradient_rows: (B, H, M, Q), to be multiplied by `ReLU(G)`.
        mask: see there.
        scale: see there.
        gradient_scale: see there.

    Returns:
        `Σ_h rows_h @ matrix_h` for each of the three, (B, M, N), float32; `None` for `None`. The sum's order does not
        change from run to run.

    Raises:
        ValueError: the shapes do not fit each other, a head is too large, or an argument is missing.
    """
    kinds = {"attention_rows": attention_rows, "product_rows": product_rows, "gradient_rows": gradient_rows}
    _check_rows(kinds, query, outer, statistics)
    log_sums = None if statistics is None else statistics.log_sums.contiguous()
    layer = _arguments(query, key, value, outer, mask, scale, gradient_scale)
    batch, heads, _, _ = query.shape
    keys = key.shape[2]
    # Float32 rows need registers: with fewer queries in a tile, more programs fit beside each other.
    layer["QUERIES"] = min(layer["QUERIES"], 16 if _is_short(keys) and query.dtype != torch.float32 else 32)
    # What comes of half-precision scores has fewer digits than one tf32 product keeps.
    layer["ROW_PRECISION"] = layer["PRECISION"] if query.dtype == torch.float32 else "tf32"
    counts = [0 if each is None else each.shape[2] for each in kinds.values()]
    by_head = query.new_empty((batch, heads, sum(counts), keys), dtype=torch.float32)
    for (name, each), count in zip(kinds.items(), counts, strict=True):
        rows = None if each is None else _alike(each.float())[0]
        kind = name.removesuffix("_rows")
        layer |= {name: rows, f"{kind}_count": count, **_strides(rows, kind, "image", "head", "row")}
    programs = batch * heads * -(-keys // layer["KEYS"])
    with _launching_on(query.device):
        kernels.carry_kernel[programs, -(-max(counts) // kernels.ROWS.value)](
            **layer, log_sums=log_sums, output=by_head
        )
    attention, product, gradient = torch.split(by_head.sum(dim=1), counts, dim=1)
    return (
        None if attention_rows is None else attention,
        None if product_rows is None else product,
        None if gradient_rows is None else gradient,
    )
