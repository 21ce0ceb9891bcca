"""Networks with fewer keys than tokens, and with tokens pooled by modules of their own, against explicit matrices.

What a pooled token is made of is had from torch's own pooling of single cells. Nothing of the references comes from
gmarpp.
"""

import contextlib
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from naive_attribution import layer_matrix
from naive_balanced import balanced_run, margin_of
from naive_windows import assembled, softmax_collected
from pooled_networks import COARSE, FROM_FEWER, NETWORKS, two_by_two, two_by_two_padded
from test_families import images, relative_error
from test_transport import BALANCED, PRODUCTS, TARGET, ByMatrix, logit, logits_of

import gmarpp


def pooling(fine, pool):
    """Give the matrix of a pooling of all tokens of a grid, (N_coarse, N_fine)."""
    tokens = math.prod(fine)
    return pool(torch.eye(tokens).view(tokens, 1, *fine)).flatten(1).T


def layers_of(net):
    """Give each block's grid, and its matrix of what keys are made of or the block as `naive_windows` takes it."""
    for grid, steps in zip(net.grids, net.steps, strict=True):
        for step in steps:
            if isinstance(step, int):
                yield grid, None, SimpleNamespace(partition_block=True, partition_size=(step, step))
            else:
                pool = COARSE.get(step, step)
                yield grid, None if pool in (None, FROM_FEWER) else pooling(grid, pool), None


def whole(net, matrices, batch=2, are_gradients=False):
    """Give matrices over all tokens, (B, H, N, N), or (B, H, N, K) where keys are fewer.

    Tokens that attend together have the same attention, and share its gradient.
    """
    found, steps = [], [step for steps in net.steps for step in steps]
    for each, step, (grid, _, window) in zip(matrices, steps, layers_of(net), strict=True):
        each = each.unflatten(0, (batch, -1)) if each.dim() == 3 else each
        if step in COARSE:
            shares = pooling(grid, two_by_two_padded)
            each = (shares if are_gradients else (shares > 0).float()).T @ each
        if window is not None:
            each = each.movedim(1, 2) if each.dim() == 5 and net is NETWORKS["Nest"] else each
            each = assembled(each, batch, window, grid)
        found.append(each)
    return found


def down_to(net, index):
    """Give the matrix that hands relevance from a stage's grid to that of the stage below."""
    matrix = pooling(net.grids[index - 1], net.merging)
    return torch.block_diag(torch.eye(net.prefix), matrix)


def readout(net):
    tokens = net.prefix or math.prod(net.grids[-1])
    return F.pad(torch.full((tokens,), 1 / tokens), (0, net.prefix and math.prod(net.grids[-1])))


def naive_map(name, net, attentions, gradients, image):
    """Give the map of one image: the product of all layers and poolings as one matrix, times the readout."""
    product, stages = None, [stage for stage, steps in enumerate(net.steps) for _ in steps]
    from_fewer = [step is FROM_FEWER for steps in net.steps for step in steps]
    layers = zip(attentions, gradients, layers_of(net), strict=True)
    for index, (attention, gradient, (_, keys, _)) in enumerate(layers):
        product = torch.eye(attention.shape[2]) if product is None else product
        if index and stages[index] != stages[index - 1] and not from_fewer[index - 1]:
            product = down_to(net, stages[index]) @ product
        if name != "attention":
            alpha = 0.0 if from_fewer[index] else 1.0
            product = layer_matrix(name, attention[image], gradient[image], alpha, keys) @ product
        elif from_fewer[index]:
            product = down_to(net, stages[index] + 1) @ product
        elif index == len(stages) - 1:
            product = attention[image].mean(0) @ (torch.eye(len(product)) if keys is None else keys) @ product
    return (readout(net) @ product)[net.prefix :].view(net.grids[0])


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_are_the_product_of_all_blocks_and_poolings(name):
    net = NETWORKS[name]
    model, batch = net.make(), images(net.size)
    found = gmarpp.explain(model, batch, PRODUCTS, TARGET)
    torch.testing.assert_close(found.logits, logits_of(model(batch)), rtol=1e-4, atol=1e-4)
    with softmax_collected(torch.Tensor if net.written else F) as collected:
        gradients = torch.autograd.grad(logit(model(batch.clone().requires_grad_())).sum(), collected)
    attentions, gradients = whole(net, [each.detach() for each in collected]), whole(net, gradients, are_gradients=True)
    for method, image in itertools.product(PRODUCTS, range(2)):
        expected = naive_map(method, net, attentions, gradients, image)
        assert relative_error(found.maps[method][image], expected) < 1e-4, method
    if not net.prefix:
        for method in set(PRODUCTS) - {"chefer", "attention"}:
            torch.testing.assert_close(found.maps[method].sum((1, 2)), torch.ones(2))
    recomputed = gmarpp.explain(model, batch, PRODUCTS, TARGET, recompute=True).maps
    assert all(relative_error(recomputed[method], found.maps[method]) < 1e-5 for method in PRODUCTS)
    alone = gmarpp.explain(model, batch, ("rollout", "attention", ByMatrix()), TARGET).maps
    assert all(relative_error(alone[method], found.maps[method]) < 1e-5 for method in ("rollout", "attention"))
    assert relative_error(alone["by_matrix"], found.maps["rollout"]) < 1e-5


def flat(net, tokens):
    """Give a view (B, prefix + h w, D) of what a block is given or computes, the cells in rows."""
    if net is NETWORKS["Nest"]:
        side = math.isqrt(tokens.shape[1])
        parts = tokens.unflatten(2, (4, 4)).unflatten(1, (side, side)).transpose(2, 3)
        return parts.flatten(3, 4).flatten(1, 2).flatten(1, 2)
    if net is NETWORKS["GCViT"]:
        return tokens.flatten(1, 2)
    return tokens.flatten(2).mT if tokens.dim() == 4 else tokens


def given_to(block, model, batch):
    """Give what a block is given, tokens and all else."""
    given = []
    hook = block.register_forward_pre_hook(lambda _, *inputs: given.append(inputs), with_kwargs=True)
    with torch.no_grad():
        model(batch)
    hook.remove()
    return given[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_cell_of_the_image_is_the_token_that_changes(name):
    net = NETWORKS[name]
    model, batch = net.make(), images(net.size, batch=1)
    first, (rows, columns) = net.blocks(model)[0][0], net.grids[0]
    row, column = rows - 3, 1
    pixels = [
        slice(at * side // cells, (at + 1) * side // cells)
        for at, side, cells in zip((row, column), net.size, net.grids[0], strict=True)
    ]
    changed = batch.clone()
    changed[..., pixels[0], pixels[1]] += 1
    before, after = (flat(net, given_to(first, model, each)[0][0])[:, net.prefix :] for each in (batch, changed))
    finer = math.isqrt(before.shape[1] // (rows * columns))
    change = (after - before).square().sum((0, 2)).view(rows * finer, columns * finer)
    centers = [(torch.arange(cells * finer) + 0.5) / finer - 0.5 for cells in net.grids[0]]
    found = [(change.sum(1 - axis) @ center / change.sum()).item() for axis, center in enumerate(centers)]
    assert found == pytest.approx([row, column], abs=0.75)


def keys_of(block, tokens, others, options):
    """Give the keys of a block's attention call, (..., places, d)."""
    kept, original = [], F.scaled_dot_product_attention

    def attend(query, key, value, **given):
        kept.append(key)
        return original(query, key, value, **given)

    F.scaled_dot_product_attention = attend
    try:
        block(tokens, *others, **options)
    finally:
        F.scaled_dot_product_attention = original
    return kept[0]


@pytest.mark.parametrize(
    "name", [name for name, net in NETWORKS.items() if net.exact or name in ("NextViT", "MobileNet v4")]
)
def test_keys_and_merged_tokens_are_made_of_the_tokens_that_change_them(name):
    net = NETWORKS[name]
    model, batch = net.make(), images(net.size, batch=1)
    stages = net.blocks(model)
    blocks, steps = [block for stage in stages for block in stage], gmarpp.architecture_of(model).transport(*net.size)
    for block, step in zip(blocks, steps, strict=True):
        cell = step.grid[1] + 2
        (tokens, *others), options = given_to(block, model, batch)
        changed = tokens.clone()
        flat(net, changed)[0, net.prefix + cell, 0] += 3
        with torch.no_grad():
            before, after = (keys_of(block, each, others, options) for each in (tokens, changed))
        is_changed = (after - before).abs().sum((1, -1) if before.dim() == 4 else (2, -1)) > 0
        if step.keys is not None:
            expected = step.keys.spread(torch.eye(step.keys.tokens))[:, cell] > 0
        else:
            expected = step.windows == net.prefix + cell
        assert torch.equal(is_changed.view(expected.shape), expected)
    for below, above in itertools.pairwise(stages) if net.exact else ():
        step = steps[blocks.index(above[0])]
        cell = 3 * step.merged.right.shape[1] + 2

        def change(_, args, output, cell=cell):
            output = output.clone()
            output[0, net.prefix + cell, 0] += 3
            return output

        before, hook = given_to(above[0], model, batch)[0][0], below[-1].register_forward_hook(change)
        after = given_to(above[0], model, batch)[0][0]
        hook.remove()
        is_changed = (after - before).abs().sum((0, 2))[net.prefix :] > 0
        assert torch.equal(is_changed, step.merged.spread(torch.eye(step.merged.tokens))[:, cell] > 0)


def to_finest(net):
    """Give for each block the matrix that hands its tokens' relevance to the finest grid's."""
    matrix, found = torch.eye(net.prefix + math.prod(net.grids[0])), []
    for stage, steps in enumerate(net.steps):
        matrix = down_to(net, stage) @ matrix if stage else matrix
        found += [matrix] * len(steps)
    return found


def relevance_of(net, tokens, gradient, grid):
    """Give `x · g` of the tokens that attend, (B, N), which may be pooled of those that a block is given."""
    relevance = (flat(net, tokens) * flat(net, gradient)).sum(-1)
    finer = tuple(2 * side for side in grid)
    if relevance.shape[1] == math.prod(finer):
        return relevance @ (pooling(finer, two_by_two).T > 0).float()
    return relevance


@pytest.mark.parametrize("name", [name for name, net in NETWORKS.items() if net.rule])
def test_the_balanced_methods_are_those_of_all_blocks_on_the_finest_grid(name):
    net = NETWORKS[name]
    model, batch = net.make(), images(net.size)
    methods = BALANCED if net.adds else BALANCED[:1]
    found = gmarpp.explain(model, batch, methods, TARGET).maps
    blocks, down, layers = (
        [block for stage in net.blocks(model) for block in stage],
        to_finest(net),
        list(layers_of(net)),
    )
    with softmax_collected(torch.Tensor, share=0.25) if net.written else contextlib.nullcontext(()) as written:
        run = balanced_run(model, batch, lambda output: margin_of(TARGET)(logits_of(output)), blocks, written=written)
    expected = 0
    for x, dx, (grid, _, _), matrix in zip(run.x, run.dx, layers, down, strict=True):
        relevance = relevance_of(net, x, dx, grid)
        expected = expected + relevance / relevance[:, net.prefix :].abs().sum(1, keepdim=True) @ matrix
    assert relative_error(found["token_relevance"], expected[:, net.prefix :].view(2, *net.grids[0])) < 1e-4
    if not net.adds:
        return
    attentions, gradients = (
        whole(net, [each.detach() for each in all_], are_gradients=all_ is run.gradients)
        for all_ in (run.attentions, run.gradients)
    )
    stages = [stage for stage, steps in enumerate(net.steps) for _ in steps]
    for image in range(2):
        row, total = readout(net), 0
        for index in reversed(range(len(layers))):
            if index + 1 < len(layers) and stages[index + 1] != stages[index]:
                row = row @ down_to(net, stages[index + 1])
            grid, keys, _ = layers[index]
            matrix = (gradients[index][image].clamp(min=0) * attentions[index][image]).sum(0)
            matrix = matrix if keys is None else matrix @ keys
            kept = relevance_of(net, run.x[index], run.dm[index], grid)[image].clamp(min=0)
            matrix = matrix + torch.diag(kept)
            empty = matrix.sum(1) == 0
            matrix[empty] = torch.eye(len(matrix))[empty]
            row = row @ (matrix / matrix.sum(1, keepdim=True))
            total = total + row @ down[index]
        assert relative_error(found["gmarpp_balanced"][image], total[net.prefix :].view(net.grids[0])) < 1e-4


@pytest.mark.parametrize(("name", "method", "message"), [
    ("DaViT", "token_relevance", "no rule for operations of this network: Bmm"),
    ("iFormer", "token_relevance", "no rule for operations of this network: Mul"),
    ("CoAtNet", "gmarpp_balanced", "expected block 0 to add its attention to its tokens in one place"),
    ("PVT v2", "legrad", "legrad: the head would have to score the tokens of every block"),
])  # fmt: skip
def test_what_does_not_hold_is_refused(name, method, message):
    net = NETWORKS[name]
    with pytest.raises(gmarpp.UnsupportedNetworkError, match=message):
        gmarpp.explain(net.make(), images(net.size), method, TARGET)


def test_legrad_asks_the_head_where_one_stage_attends():
    net = NETWORKS["EfficientFormer"]
    model, batch, left = net.make(), images(net.size), []
    (blocks,) = net.blocks(model)
    hooks = [block.register_forward_hook(lambda _, args, output: left.append(output)) for block in blocks]
    with softmax_collected(torch.Tensor) as attentions:
        model(batch.clone().requires_grad_())
    for hook in hooks:
        hook.remove()
    expected = 0
    for tokens, attention in zip(left, attentions, strict=True):
        score = logit(model.forward_head(model.norm(tokens))).sum()
        gradient = torch.autograd.grad(score, attention, retain_graph=True)[0]
        expected = expected + gradient.clamp(min=0).mean((1, 2)) / len(blocks)
    found = gmarpp.explain(model, batch, ("legrad", "gmarpp_l1"), TARGET).maps["legrad"]
    assert relative_error(found, expected.view(2, 7, 7)) < 1e-4
