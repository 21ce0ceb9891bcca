"""Swin Transformers: attention in windows, shifted in every second block, and tokens merged four by four in between.

Version 2 attends by cosines, and with a bias that a small network makes of the distances.

Source: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gmarpp.network.pooling import Grid
from gmarpp.network.transport import Step, cells, padded, partitioned, put_together, shifted


def timm_step(block: Any, grid: Grid) -> Step:
    """Describe the windows of a block of timm, which shifts its tokens before it pads them."""
    tokens = padded(shifted(cells(grid), block.shift_size), block.window_size, value=grid[0] * grid[1])
    return Step(grid, partitioned(tokens, block.window_size)[..., 0])


def timm_attention(attention: Any) -> Callable[..., Tensor]:
    """Return the forward of an attention module of timm with its fused attention, which is off by default."""

    def forward(windows: Tensor, mask: Tensor | None = None) -> Tensor:
        fused = copy.copy(attention)
        fused.fused_attn = True
        attended: Tensor = type(attention).forward(fused, windows, mask)
        return attended

    return forward


def timm_cosine_attention(attention: Any) -> Callable[..., Tensor]:
    """Return what computes the same as an attention module of timm's version 2 by fused attention."""

    def forward(windows: Tensor, mask: Tensor | None = None) -> Tensor:
        biases, places = (attention.q_bias, attention.k_bias, attention.v_bias), windows.shape[1]
        by_distance = attention.cpb_mlp(attention.relative_coords_table).view(-1, attention.num_heads)
        by_pair = by_distance[attention.relative_position_index.view(-1)].view(places, places, -1)
        return attended(
            attention,
            windows,
            None if attention.q_bias is None else torch.cat(biases),
            16 * by_pair.permute(2, 0, 1)[None].sigmoid(),
            None if mask is None else mask[:, None],
        )

    return forward


def timm_logarithmic_attention(attention: Any) -> Callable[..., Tensor]:
    """Return the same for the other version 2 of timm, whose bias is made of logarithms of distances."""

    def forward(windows: Tensor, mask: Tensor | None = None) -> Tensor:
        by_position, apart = attention._relative_positional_encodings(), None if mask is None else mask[:, None]
        return attended(attention, windows, attention.qkv.bias, by_position, apart)

    return forward


def torchvision_step(block: Any, grid: Grid) -> Step:
    """Describe the windows of a block of torchvision, which pads its tokens before it shifts them."""
    window = block.attn.window_size
    tokens = padded(cells(grid), window, value=grid[0] * grid[1])
    return Step(grid, partitioned(shifted(tokens, _shift(block.attn, tokens.shape[1:3])), window)[..., 0])


def torchvision_attention(attention: Any) -> Callable[[Tensor], Tensor]:
    """Return what computes the same as an attention module of torchvision, version 1 or 2, by fused attention."""

    def forward(tokens: Tensor) -> Tensor:
        height, width = tokens.shape[1:3]
        whole, window = padded(tokens, attention.window_size), attention.window_size
        grid = whole.shape[1:3]
        shift, bias = _shift(attention, grid), attention.qkv.bias
        if hasattr(attention, "logit_scale") and bias is not None:
            # Version 2 has no bias of keys.
            of_query, of_key, of_value = bias.chunk(3)
            bias = torch.cat([of_query, torch.zeros_like(of_key), of_value])
        windows = partitioned(shifted(whole, shift), window)
        apart = _apart(grid, window, shift, windows) if any(shift) else None
        windows = attended(attention, windows, bias, attention.get_relative_position_bias(), apart)
        left = shifted(put_together(windows, window, grid), [-each for each in shift])
        return left[:, :height, :width].contiguous()

    return forward


def hugging_face_step(block: Any, grid: Grid) -> Step:
    """Describe the windows of a block of transformers, which pads its tokens before it shifts them."""
    covers = min(grid) <= block.window_size
    window, shift = [min(*grid, block.window_size)] * 2, [0 if covers else block.shift_size] * 2
    tokens = padded(cells(grid), window, value=grid[0] * grid[1])
    return Step(grid, partitioned(shifted(tokens, shift), window)[..., 0])


def hugging_face_second_step(block: Any, grid: Grid) -> Step:
    """Describe the windows of a block of version 2 of transformers, which are those of the network's image size."""
    window, shift = [block.window_size] * 2, [block.shift_size] * 2
    tokens = padded(cells(grid), window, value=grid[0] * grid[1])
    return Step(grid, partitioned(shifted(tokens, shift), window)[..., 0])


def _shift(attention: Any, grid: Sequence[int]) -> list[int]:
    """Return by how much windows are shifted: not along a side that one window covers."""
    sides = zip(attention.shift_size, attention.window_size, grid, strict=True)
    return [0 if window >= side else shift for shift, window, side in sides]


def attended(
    attention: Any,
    windows: Tensor,
    bias: Tensor | None,
    by_position: Tensor | None = None,
    apart: Tensor | None = None,
) -> Tensor:
    """Return what an attention module makes of windows, (B * W, n, D).

    Args:
        attention: with projections `qkv` and `proj`, and, if it attends by cosines, their factor's `logit_scale`.
        windows: (B * W, n, D).
        bias: of queries, keys and values, (3 D,).
        by_position: added to the scores, (1, H, n, n).
        apart: likewise, (W, 1, n, n), of tokens that do not attend to each other; only beside the former.
    """
    projected = F.linear(windows, attention.qkv.weight, bias)
    query, key, value = torch.unflatten(projected, 2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    scale = None
    if hasattr(attention, "logit_scale"):
        factor = attention.logit_scale.clamp(max=math.log(100)).exp()
        query = F.normalize(query, dim=-1) * factor.view(-1, 1, 1)
        key, scale = F.normalize(key, dim=-1), 1.0
    mask = by_position
    if by_position is not None and apart is not None:
        mask = (by_position + apart).repeat(len(windows) // len(apart), 1, 1, 1)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    left: Tensor = attention.proj(attended.transpose(1, 2).flatten(2))
    return left


def _apart(grid: Sequence[int], window: Sequence[int], shift: Sequence[int], like: Tensor) -> Tensor:
    """Return the mask, (W, 1, n, n), of tokens that only the circular shift brings into one window."""
    down, right = (_regions(*each) for each in zip(grid, window, shift, strict=True))
    regions = partitioned((3 * down[:, None] + right)[None, ..., None], window)
    mask = torch.where(regions == regions.mT, 0.0, -100.0)
    return mask[:, None].to(like)


def _regions(side: int, window: int, shift: int) -> Tensor:
    """Return numbers of the parts of a shifted side that other windows cover, or that were at its other end."""
    places = torch.arange(side)
    return (places >= side - window).long() + (places >= side - shift)
