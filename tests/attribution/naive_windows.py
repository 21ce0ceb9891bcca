"""Networks with windows and merged tokens written out naively: an explicit N x N matrix for each block.

Attention is unfused: the network's own, as its softmax returns it, or that of a fused call, written out. Nothing here
comes from gmarpp.
"""

import contextlib

import torch
import torch.nn.functional as F
from naive_attribution import layer_matrix


@contextlib.contextmanager
def softmax_collected(owner=F, share=1.0):
    """Give the list that collects the attention matrices, in forward order; scores get a share of their gradient.

    `owner` is `torch.Tensor` for networks that call the method. The function calls it too.
    """
    collected, original, fused = [], owner.softmax, F.scaled_dot_product_attention

    def softmax(scores, *args, **options):
        collected.append(original(share * scores + (1 - share) * scores.detach(), *args, **options))
        return collected[-1]

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
        assert dropout_p == 0
        assert not is_causal
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        return F.softmax(scores if attn_mask is None else scores + attn_mask, dim=-1) @ value

    owner.softmax, F.scaled_dot_product_attention = softmax, attend
    try:
        yield collected
    finally:
        owner.softmax, F.scaled_dot_product_attention = original, fused


def places_of(block, grid):
    """Give the window of each cell, and its place in the window, for a block of any of the networks."""
    cells = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    if getattr(block, "partition_type", "") == "grid" or not getattr(block, "partition_block", True):
        count = getattr(block, "partition_size", None) or [side // block.p for side in grid]
        apart = [side // parts for side, parts in zip(grid, count, strict=True)]
        windows = [row % apart[0] * apart[1] + column % apart[1] for row, column in cells]
        return windows, [row // apart[0] * count[1] + column // apart[1] for row, column in cells]
    window, shift, pads_first = window_and_shift(block, grid)
    whole = [-(-side // length) * length for side, length in zip(grid, window, strict=True)]
    around = whole if pads_first else grid
    cells = [((row - shift[0]) % around[0], (column - shift[1]) % around[1]) for row, column in cells]
    windows = [row // window[0] * (whole[1] // window[1]) + column // window[1] for row, column in cells]
    return windows, [row % window[0] * window[1] + column % window[1] for row, column in cells]


def window_and_shift(block, grid):
    """Give the window and the shift of a block, and whether it pads before it shifts."""
    if hasattr(block, "partition_block"):
        return block.partition_size, (0, 0), True
    if hasattr(block, "partition_type"):  # torchvision's MaxViT
        return [block.p] * 2, (0, 0), True
    if hasattr(block, "token_mixer"):  # one window
        return grid, (0, 0), True
    if hasattr(block, "local_conv"):  # TinyViT
        return [block.window_size] * 2, (0, 0), True
    if hasattr(block, "layernorm_before"):  # transformers, which changes the block by what it was given last
        return [block.window_size] * 2, [block.shift_size] * 2, True
    if hasattr(block, "input_resolution") or hasattr(block, "feat_size"):  # timm
        return block.window_size, block.shift_size, False
    whole = [-(-side // length) * length for side, length in zip(grid, block.attn.window_size, strict=True)]
    sides = zip(block.attn.shift_size, block.attn.window_size, whole, strict=True)
    return block.attn.window_size, [0 if window >= side else shift for shift, window, side in sides], True


def assembled(in_windows, batch, block, grid):
    """Give matrices (B, H, N, N) of the entries of matrices (B * W, H, n, n), without padding."""
    windows, places = (torch.tensor(each) for each in places_of(block, grid))
    by_image = in_windows.reshape(batch, -1, *in_windows.shape[-3:]).transpose(1, 2)
    entries = by_image[:, :, windows[:, None], places[:, None], places[None]]
    return entries * (windows[:, None] == windows[None])


def merging(fine, coarse):
    """Give the matrix (N_coarse, N_fine) of equal shares in the four or fewer tokens that are merged into one."""
    matrix = torch.zeros(coarse[0] * coarse[1], fine[0] * fine[1])
    for row in range(fine[0]):
        for column in range(fine[1]):
            matrix[row // 2 * coarse[1] + column // 2, row * fine[1] + column] = 1
    return matrix / matrix.sum(1, keepdim=True)


def whole_matrices(model, images, score, blocks, grids, owner=F):
    """Give lists of A and G, (B, H, N, N), lowest layer first; see `softmax_collected` for the owner."""
    with softmax_collected(owner) as collected:
        output = model(images.clone().requires_grad_())
        gradients = torch.autograd.grad(score(output).sum(), collected)
    layers = zip(collected, gradients, blocks, grids, strict=True)
    return zip(
        *(
            [assembled(each.detach(), len(images), block, grid) for each in matrices]
            for *matrices, block, grid in layers
        ),
        strict=True,
    )


def naive_row(name, attentions, gradients, grids, image):
    """Give the row of the input tokens, (N,): the product of all layers and mergings, as one matrix, times the readout.

    The head reads all tokens alike.
    """
    top = attentions[-1].shape[-1]
    product = torch.eye(attentions[0].shape[-1])
    below = grids[0]
    for index, (attention, gradient, grid) in enumerate(zip(attentions, gradients, grids, strict=True)):
        if grid != below:
            product, below = merging(below, grid) @ product, grid
        if name != "attention":
            product = layer_matrix(name, attention[image], gradient[image]) @ product
        elif index == len(grids) - 1:
            product = attention[image].mean(0) @ product
    return torch.full((top,), 1 / top) @ product
