"""Networks with windows and merged tokens written out naively: an explicit N x N matrix for each block.

Attention is the network's own, unfused, as its softmax returns it. Nothing here comes from gmarpp.
"""

import contextlib

import torch
import torch.nn.functional as F
from naive_attribution import layer_matrix


@contextlib.contextmanager
def softmax_collected():
    """Give the list that collects the attention matrices of a network without fused attention, in forward order."""
    collected, original = [], F.softmax

    def softmax(*args, **options):
        collected.append(original(*args, **options))
        return collected[-1]

    F.softmax = softmax
    try:
        yield collected
    finally:
        F.softmax = original


def place(row, column, grid, window, shift, pads_first):
    """Give the window of a cell, and its place in the window."""
    height, width = (-(-side // length) * length for side, length in zip(grid, window, strict=True))
    around = (height, width) if pads_first else grid
    row, column = (row - shift[0]) % around[0], (column - shift[1]) % around[1]
    number = row // window[0] * (width // window[1]) + column // window[1]
    return number, row % window[0] * window[1] + column % window[1]


def assembled(in_windows, batch, grid, window, shift, pads_first):
    """Give matrices (B, H, N, N) of the entries of matrices (B * W, H, n, n), without padding."""
    tokens = grid[0] * grid[1]
    places = [place(i // grid[1], i % grid[1], grid, window, shift, pads_first) for i in range(tokens)]
    count = len(in_windows) // batch
    whole = torch.zeros(batch, in_windows.shape[1], tokens, tokens)
    for image in range(batch):
        for i, (window_i, place_i) in enumerate(places):
            for j, (window_j, place_j) in enumerate(places):
                if window_i == window_j:
                    whole[image, :, i, j] = in_windows[image * count + window_i, :, place_i, place_j]
    return whole


def merging(fine, coarse):
    """Give the matrix (N_coarse, N_fine) of equal shares in the four or fewer tokens that are merged into one."""
    matrix = torch.zeros(coarse[0] * coarse[1], fine[0] * fine[1])
    for row in range(fine[0]):
        for column in range(fine[1]):
            matrix[row // 2 * coarse[1] + column // 2, row * fine[1] + column] = 1
    return matrix / matrix.sum(1, keepdim=True)


def windows_of(block, grid):
    """Give the window and the shift of a block of timm or torchvision, and whether it pads before it shifts."""
    if hasattr(block, "input_resolution"):
        return block.window_size, block.shift_size, False
    whole = [-(-side // length) * length for side, length in zip(grid, block.attn.window_size, strict=True)]
    sides = zip(block.attn.shift_size, block.attn.window_size, whole, strict=True)
    return block.attn.window_size, [0 if window >= side else shift for shift, window, side in sides], True


def whole_matrices(model, images, score, blocks, grids):
    """Give lists of A and G, (B, H, N, N), lowest layer first."""
    with softmax_collected() as collected:
        output = model(images.clone().requires_grad_())
        gradients = torch.autograd.grad(score(output).sum(), collected)
    layers = zip(collected, gradients, blocks, grids, strict=True)
    return zip(
        *(
            [assembled(each.detach(), len(images), grid, *windows_of(block, grid)) for each in matrices]
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
