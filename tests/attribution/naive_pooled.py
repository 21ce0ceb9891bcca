"""Networks that pool their queries written out naively: an explicit matrix from pooled tokens to tokens for each block.

Nothing here comes from gmarpp.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from naive_attribution import layer_matrix
from naive_windows import softmax_collected


def hiera_layers(model, grid):
    """Describe the blocks of Hiera: cells of the tokens in their sequence, before and after, and of each window."""
    order = model.unroll(torch.arange(math.prod(grid)).view(1, -1, 1)).flatten()
    found = []
    for block in model.blocks:
        above, order_above = grid, order
        if block.attn.q_stride > 1:
            above = grid[0] // 2, grid[1] // 2
            row, column = order.view(4, -1)[0] // grid[1] // 2, order.view(4, -1)[0] % grid[1] // 2
            order_above = row * above[1] + column
        windows = 1
        if block.attn.use_mask_unit_attn:
            windows = len(order) // (block.attn.window_size * block.attn.q_stride)
        keys, queries = (each.view(-1, windows).T for each in (order, order_above))
        layer = {"block": block, "grid": grid, "above": above, "order": order, "order_above": order_above}
        found.append(SimpleNamespace(**layer, keys=keys, queries=queries))
        grid, order = above, order_above
    return found


def windowed_layers(model, grid):
    """Describe the blocks of the image encoders of SAM and SAM 2 alike; their tokens are the cells in rows."""
    found = []
    for block in model.blocks:
        pools = getattr(block, "q_stride", None) is not None
        above = (grid[0] // 2, grid[1] // 2) if pools else grid
        window = block.window_size if isinstance(block.window_size, tuple) else (block.window_size,) * 2
        window = window if any(window) else grid
        small = (window[0] // 2, window[1] // 2) if pools else window
        found.append(
            SimpleNamespace(
                block=block,
                grid=grid,
                above=above,
                order=torch.arange(math.prod(grid)),
                order_above=torch.arange(math.prod(above)),
                keys=windows_of(grid, window),
                queries=windows_of(above, small),
            )
        )
        grid = above
    return found


def windows_of(grid, window):
    """Give the cell at each place of each window, -1 for padding."""
    rows, columns = (math.ceil(side / length) for side, length in zip(grid, window, strict=True))
    found = torch.full((rows * columns, math.prod(window)), -1)
    for row in range(grid[0]):
        for column in range(grid[1]):
            index = row // window[0] * columns + column // window[1]
            found[index, row % window[0] * window[1] + column % window[1]] = row * grid[1] + column
    return found


def assembled(entries, layer, batch):
    """Give matrices (B, H, Q, N) of what windows have, laid out as the network has it."""
    windows, places, others = len(layer.keys), layer.queries.shape[1], layer.keys.shape[1]
    if entries.dim() == 5:  # (B, H, W, q, n)
        entries = entries.transpose(1, 2)
    entries = entries.reshape(batch, windows, -1, places, others)
    whole = torch.zeros(batch, entries.shape[2], math.prod(layer.above), math.prod(layer.grid))
    for window in range(windows):
        rows, columns = layer.queries[window], layer.keys[window]
        inside = entries[:, window][:, :, rows >= 0][..., columns >= 0]
        whole[:, :, rows[rows >= 0][:, None], columns[columns >= 0]] = inside
    return whole


def pooled_residual(layer, tokens):
    """Give the pooled residual (B, Q, D) of tokens that enter a block, and what it is made of, (B, Q, N)."""
    block = layer.block
    values = (tokens if block.proj is None else block.proj(block.norm1(tokens))).flatten(1, -2)
    by_cell = torch.empty_like(values)
    by_cell[:, layer.order] = values
    on_grid = by_cell.mT.unflatten(2, layer.grid)
    pooled, winners = F.max_pool2d(on_grid, 2, return_indices=True)
    made_of = F.one_hot(winners.flatten(2), math.prod(layer.grid)).float().mean(1)
    if block.proj is None:
        pooled = torch.cat([pooled, F.avg_pool2d(on_grid, 2)], 1)
        made_of = (made_of + equal_shares(layer.grid)) / 2
    return pooled.flatten(2).mT, made_of


def equal_shares(grid):
    """Give the matrix (Q, N) of equal shares in the cells that are merged two by two; the last odd one is left out."""
    matrix = torch.zeros(grid[0] // 2 * (grid[1] // 2), math.prod(grid))
    for row in range(grid[0] // 2 * 2):
        for column in range(grid[1] // 2 * 2):
            matrix[row // 2 * (grid[1] // 2) + column // 2, row * grid[1] + column] = 1 / 4
    return matrix


def whole_matrices(model, images, score, layers):
    """Give lists of A and G, (B, H, Q, N), and of what the residual is made of, (B, Q, N), lowest layer first."""
    entered = []
    hooks = [layer.block.register_forward_pre_hook(lambda _, args: entered.append(args[0])) for layer in layers]
    with softmax_collected() as collected:
        output = model(images.clone().requires_grad_())
        gradients = torch.autograd.grad(score(output).sum(), collected)
    for hook in hooks:
        hook.remove()
    attentions, gradients = (
        [assembled(each.detach(), layer, len(images)) for each, layer in zip(all_, layers, strict=True)]
        for all_ in (collected, gradients)
    )
    return attentions, gradients, kept_by(layers, entered)


@torch.no_grad()
def kept_by(layers, entered):
    """Give what the residual of each layer is made of, (B, Q, N)."""
    return [
        torch.eye(math.prod(layer.grid)).repeat(len(tokens), 1, 1)
        if layer.above == layer.grid
        else pooled_residual(layer, tokens)[1]
        for layer, tokens in zip(layers, entered, strict=True)
    ]


def pooled_matrix(name, attention, gradient, kept, keys=None):
    """Give M of one image, (Q, N), from A and G of shape (H, Q, K) and what residual and keys are made of.

    The residual is made of tokens, (Q, N), and keys are too, (K, N), if they are not tokens themselves.
    """
    heads, queries, tokens = attention.shape
    # Each query's residual is a column of its own at first.
    square = torch.zeros(2, heads, queries + tokens, queries + tokens)
    square[0, :, :queries, queries:], square[1, :, :queries, queries:] = attention, gradient
    matrix = layer_matrix(name, *square)[:queries]
    return matrix[:, :queries] @ kept + matrix[:, queries:] @ (torch.eye(tokens) if keys is None else keys)


def naive_row(name, attentions, gradients, kept, image):
    """Give the row of the input tokens, (N,): the product of all layers, as one matrix, times an equal readout."""
    product = torch.eye(attentions[0].shape[-1])
    for index, (attention, gradient, residual) in enumerate(zip(attentions, gradients, kept, strict=True)):
        if name != "attention":
            matrix = pooled_matrix(name, attention[image], gradient[image], residual[image])
        else:
            matrix = attention[image].mean(0) if index == len(kept) - 1 else residual[image]
        product = matrix @ product
    return torch.full((len(product),), 1 / len(product)) @ product
