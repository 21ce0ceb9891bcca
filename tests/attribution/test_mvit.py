"""MViT version 2, whose queries, keys and residual are pooled, against explicit matrices."""

import contextlib
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from naive_balanced import balanced_run, margin_of
from naive_pooled import pooled_matrix
from test_families import images, relative_error
from test_pooled_queries import PRODUCTS, TARGET, logit, prepared
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

import gmarpp


def mvit(prefix, **options):
    torch.manual_seed(0)
    sizes = {"depths": (1, 2, 1), "embed_dim": (8, 16, 32), "num_heads": (1, 2, 4), "mlp_ratio": 2.0}
    sizes |= {"stride_q": ((1, 1), (2, 2), (2, 2)), "use_cls_token": prefix > 0}
    return prepared(MultiScaleVit(MultiScaleVitCfg(**sizes | options), img_size=(32, 32), num_classes=5))


# name: network, number of prefix tokens, size of the image, grid
NETWORKS = {
    "average pool": (lambda: mvit(0), 0, (32, 32), (8, 8)),
    "class token": (lambda: mvit(1), 1, (32, 32), (8, 8)),
    "other size": (lambda: mvit(1), 1, (29, 23), (8, 6)),
    "no positions, wider before the MLP": (
        lambda: mvit(0, rel_pos_type="", use_abs_pos=True, expand_attn=False), 0, (32, 32), (8, 8),
    ),
}  # fmt: skip


def under_kernel(grid, stride, prefix):
    """Give the matrix of equal shares of the tokens under a kernel of 3 x 3, and the grid of its places."""
    rows, columns = ((side - 1) // stride + 1 for side in grid)
    matrix = torch.zeros(prefix + rows * columns, prefix + math.prod(grid))
    matrix[:prefix, :prefix] = torch.eye(prefix)
    for row, column, down, right in itertools.product(range(rows), range(columns), (-1, 0, 1), (-1, 0, 1)):
        at = row * stride + down, column * stride + right
        if 0 <= at[0] < grid[0] and 0 <= at[1] < grid[1]:
            matrix[prefix + row * columns + column, prefix + at[0] * grid[1] + at[1]] = 1
    return matrix / matrix.sum(1, keepdim=True), (rows, columns)


def layers_of(model, grid, prefix):
    """Describe the blocks: what keys, and pooled tokens in equal shares, are made of."""
    found = []
    blocks = [(index, block) for index, stage in enumerate(model.stages) for block in stage.blocks]
    for stage, block in blocks:
        stride = 1 if block.shortcut_pool_attn is None else 2
        same = torch.eye(prefix + math.prod(grid))
        equal, above = (same, grid) if stride == 1 else under_kernel(grid, 2, prefix)
        key_stride = (4, 2, 1)[stage]
        keys = same if key_stride == 1 else under_kernel(grid, key_stride, prefix)[0]
        found.append(SimpleNamespace(block=block, grid=grid, above=above, equal=equal, keys=keys))
        grid = above
    return found


@torch.no_grad()
def pooled_residual(layer, tokens, prefix):
    """Give the residual (B, Q, D), and what it is made of, (B, Q, N)."""
    if layer.above == layer.grid:
        return tokens, layer.equal.repeat(len(tokens), 1, 1)
    projection = layer.block.shortcut_proj_attn
    values = tokens if projection is None else projection(layer.block.norm1(tokens))
    alone, cells = values[:, :prefix], values[:, prefix:].mT.unflatten(2, layer.grid)
    pooled, winners = F.max_pool2d(cells, 3, 2, 1, return_indices=True)
    made_of = torch.zeros(len(tokens), *layer.equal.shape)
    made_of[:, :prefix, :prefix] = torch.eye(prefix)
    made_of[:, prefix:, prefix:] = F.one_hot(winners.flatten(2), math.prod(layer.grid)).float().mean(1)
    return torch.cat([alone, pooled.flatten(2).mT], 1), made_of


@contextlib.contextmanager
def written_out():
    """Give the list that collects the attention matrices, which the network makes by a tensor's method."""
    collected, original = [], torch.Tensor.softmax

    def softmax(scores, *args, **options):
        collected.append(original(scores, *args, **options))
        return collected[-1]

    torch.Tensor.softmax = softmax
    try:
        yield collected
    finally:
        torch.Tensor.softmax = original


def readout(model, top, prefix):
    row = torch.zeros(prefix + math.prod(top.above))
    row[: prefix or None] = 1
    return row / row.sum()


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_are_the_product_of_all_blocks(name):
    make, prefix, size, grid = NETWORKS[name]
    model, batch, entered = make(), images(size), []
    found = gmarpp.explain(model, batch, PRODUCTS, TARGET)
    torch.testing.assert_close(found.logits, model(batch), rtol=1e-4, atol=1e-4)
    layers = layers_of(model, grid, prefix)
    hooks = [layer.block.register_forward_pre_hook(lambda _, args: entered.append(args[0])) for layer in layers]
    with written_out() as attentions:
        output = model(batch.clone().requires_grad_())
        gradients = torch.autograd.grad(logit(output).sum(), attentions)
    for hook in hooks:
        hook.remove()
    for method, image in itertools.product(PRODUCTS, range(2)):
        row = readout(model, layers[-1], prefix)
        for layer, tokens, attention, gradient in reversed(
            list(zip(layers, entered, attentions, gradients, strict=True))
        ):
            kept = pooled_residual(layer, tokens, prefix)[1][image]
            if method != "attention":
                row = row @ pooled_matrix(method, attention[image].detach(), gradient[image], kept, layer.keys)
            else:
                row = row @ (attention[image].detach().mean(0) @ layer.keys if layer is layers[-1] else kept)
        assert relative_error(found.maps[method][image], row[prefix:].view(grid)) < 1e-4, method
        if not prefix and method not in ("chefer", "attention"):
            torch.testing.assert_close(found.maps[method][image].sum(), torch.ones(()))
    recomputed = gmarpp.explain(model, batch, PRODUCTS, TARGET, recompute=True).maps
    assert all(relative_error(recomputed[method], found.maps[method]) < 1e-5 for method in PRODUCTS)


@pytest.mark.parametrize("name", NETWORKS)
def test_balanced_maps_are_the_sum_over_all_blocks(name):
    make, prefix, size, grid = NETWORKS[name]
    model, batch = make(), images(size)
    found = gmarpp.explain(model, batch, ("token_relevance", "gmarpp_balanced"), TARGET).maps
    layers = layers_of(model, grid, prefix)
    # The reference shares out fused attention; that it computes the same is seen by the logits above.
    for module, forward in gmarpp.architecture_of(model).fused.items():
        module.forward = forward
    run = balanced_run(model, batch, margin_of(TARGET), [layer.block for layer in layers])
    for image in range(2):
        row, total, relevance = readout(model, layers[-1], prefix), torch.zeros(()), torch.zeros(())
        for layer, x, dx, dm, attention, gradient in reversed(
            list(zip(layers, run.x, run.dx, run.dm, run.attentions, run.gradients, strict=True))
        ):
            residual, kept = (each[image] for each in pooled_residual(layer, x, prefix))
            matrix = (gradient[image].clamp(min=0) * attention[image]).sum(0) @ layer.keys
            matrix = matrix + (residual * dm[image]).sum(1).clamp(min=0)[:, None] * kept
            empty = matrix.sum(1) == 0
            matrix[empty] = kept[empty]
            row = row @ (matrix / matrix.sum(1, keepdim=True))
            above = [each @ layer.equal if each.dim() else each for each in (total, relevance)]
            own = (x * dx)[image].sum(1)
            total, relevance = above[0] + row, above[1] + own / own[prefix:].abs().sum()
        assert relative_error(found["gmarpp_balanced"][image], total[prefix:].view(grid)) < 1e-4
        assert relative_error(found["token_relevance"][image], relevance[prefix:].view(grid)) < 1e-4


def test_legrad_is_refused():
    with pytest.raises(gmarpp.UnsupportedNetworkError, match="legrad: the head would have to score"):
        gmarpp.explain(mvit(0), images(), "legrad", TARGET)


def test_the_version_that_pools_before_it_projects_is_unknown():
    with pytest.raises(gmarpp.UnsupportedNetworkError, match="MultiScaleVit"):
        gmarpp.explain(mvit(0, pool_first=True), images(), "rollout", TARGET)
