"""Hiera and the image encoders of SAM and SAM 2 against explicit matrices."""

import itertools
import math

import pytest
import torch
from naive_balanced import balanced_run, margin_of
from naive_pooled import (
    assembled,
    equal_shares,
    hiera_layers,
    kept_by,
    naive_row,
    pooled_residual,
    whole_matrices,
    windowed_layers,
)
from naive_windows import softmax_collected
from test_families import images, relative_error, sharpened
from timm.models.hiera import Hiera
from timm.models.hieradet_sam2 import HieraDet
from timm.models.vision_transformer_sam import VisionTransformerSAM

import gmarpp
from gmarpp.attribution import Method
from gmarpp.network.transport import QueryPool, Step, footprints

PRODUCTS = ("gmarpp_l1", "gmarpp_l2", "gmarpp_sum", "gmar_l1", "gmar_l2", "rollout", "chefer", "attention")
BALANCED = ("token_relevance", "gmarpp_balanced")
TARGET = torch.tensor([2, 4])


def prepared(model):
    """Give every parameter that starts as zero random values, so that something comes of it."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return sharpened(model)


def timm_hiera(size=(32, 64), **options):
    torch.manual_seed(0)
    sizes = {"img_size": size, "embed_dim": 8, "stages": (1, 2, 1), "mask_unit_size": (4, 4), "q_pool": 2}
    sizes |= {"patch_kernel": (4, 4), "patch_padding": (0, 0), "mask_unit_attn": (True, False, False)}
    return prepared(Hiera(num_heads=1, num_classes=5, mlp_ratio=2, **sizes | options))


def timm_sam2():
    torch.manual_seed(0)
    sizes = {"embed_dim": 8, "stages": (1, 2, 2), "window_spec": (4, 4, 2), "global_att_blocks": (2,), "q_pool": 2}
    sizes |= {"patch_kernel": (4, 4), "patch_padding": (0, 0)}
    return prepared(HieraDet(num_heads=1, num_classes=5, **sizes))


def timm_sam(**options):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2}
    sizes |= {"window_size": 3, "global_attn_indexes": (1,), "neck_chans": 8, "num_classes": 5, "use_rel_pos": True}
    return prepared(VisionTransformerSAM(**sizes | options))


# name: network, its layers, size of the image, grid
NETWORKS = {
    "Hiera": (timm_hiera, hiera_layers, (32, 64), (8, 16)),
    "Hiera, maxima and means": (lambda: timm_hiera(use_expand_proj=False), hiera_layers, (32, 64), (8, 16)),
    "Hiera, top not in rows": (lambda: timm_hiera(q_pool=1), hiera_layers, (32, 64), (8, 16)),
    "SAM 2": (timm_sam2, windowed_layers, (32, 48), (8, 12)),
    "SAM": (timm_sam, windowed_layers, (32, 32), (8, 8)),
    "SAM, other size, padding": (timm_sam, windowed_layers, (28, 44), (7, 11)),
    "SAM, rotary": (
        lambda: timm_sam(use_rel_pos=False, use_rope=True, window_size=4), windowed_layers, (32, 32), (8, 8),
    ),
}  # fmt: skip


def logits_of(output):
    return getattr(output, "logits", output)


def logit(output):
    return logits_of(output).gather(1, TARGET[:, None])[:, 0]


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_are_the_product_of_all_blocks(name):
    make, describe, size, grid = NETWORKS[name]
    model, batch = make(), images(size)
    found = gmarpp.explain(model, batch, PRODUCTS, TARGET)
    torch.testing.assert_close(found.logits, logits_of(model(batch)), rtol=1e-4, atol=1e-4)
    layers = whole_matrices(model, batch, logit, describe(model, grid))
    for method, image in itertools.product(PRODUCTS, range(2)):
        expected = naive_row(method, *layers, image).view(grid)
        assert relative_error(found.maps[method][image], expected) < 1e-4, method
    for method in set(PRODUCTS) - {"chefer", "attention"}:
        torch.testing.assert_close(found.maps[method].sum((1, 2)), torch.ones(2))
    recomputed = gmarpp.explain(model, batch, PRODUCTS, TARGET, recompute=True).maps
    assert all(relative_error(recomputed[method], found.maps[method]) < 1e-5 for method in PRODUCTS)
    alone = gmarpp.explain(model, batch, ("rollout", "attention"), TARGET).maps
    assert all(relative_error(alone[method], found.maps[method]) < 1e-5 for method in alone)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_changed_token_changes_those_that_attend_to_it_or_are_made_of_it(name):
    make, describe, size, grid = NETWORKS[name]
    model, batch = make(), images(size, batch=1)
    layers, entered = describe(model, grid), []
    hooks = [layer.block.register_forward_pre_hook(lambda _, args: entered.append(args[0])) for layer in layers]
    with torch.no_grad(), softmax_collected() as collected:
        model(batch)
        attentions = list(collected)
    for hook in hooks:
        hook.remove()
    for layer, tokens, attention in zip(layers, entered, attentions, strict=True):
        cell = len(layer.order) - 2
        attends = assembled(attention, layer, 1)[0].sum(0)[:, cell]
        residual = equal_shares(layer.grid) if layer.above != layer.grid else torch.eye(len(layer.order))
        changed = tokens.clone()
        changed.flatten(1, -2)[0, layer.order == cell, 0] += 3
        with torch.no_grad():
            change = (layer.block(changed) - layer.block(tokens)).flatten(1, -2)[0].abs().sum(1)
        by_cell = torch.empty_like(change).index_copy_(0, layer.order_above, change)
        reached = attends + residual[:, cell]
        assert not (by_cell[reached == 0] > 0).any()
        assert (by_cell[reached > 0.01] > 0).all()


@pytest.mark.parametrize("name", ["Hiera", "SAM 2", "SAM"])
def test_the_map_lies_on_the_image_as_the_patches_do(name):
    make, _, size, grid = NETWORKS[name]
    model, batch = make(), images(size, batch=1)
    entered, changed = [], batch.clone()
    changed[:, :, 8:12, 20:24] += 3
    hook = model.blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[0].flatten(1, -2)))
    with torch.no_grad():
        model(batch)
        model(changed)
    hook.remove()
    place = (entered[1] - entered[0])[0].abs().sum(1).nonzero().item()

    class OfToken(Method):
        name, label, needs_gradient = "of_token", "Of token", False

        def step(self, row, layer):
            row = torch.zeros_like(layer.keep(row))
            row[:, min(place, row.shape[1] - 1)] = 1
            return row

    found = gmarpp.explain(model, batch, OfToken(), 2).maps["of_token"]
    assert found.nonzero().tolist() == [[0, 2, 5]]
    assert found.shape == (1, *grid)


def test_a_method_that_hands_on_a_row_of_the_pooled_queries_is_told_so():
    class Careless(Method):
        name, label, needs_gradient = "careless", "Careless", False

        def step(self, row, layer):
            return row

    with pytest.raises(ValueError, match=r"careless: expected rows .* below layer 3, got .*, whose 8 queries"):
        gmarpp.explain(timm_hiera(), images((32, 64)), Careless(), TARGET)


class ByMatrix(Method):
    """Rollout of a method of one's own, with the layers' Q x N matrices."""

    name, label, needs_gradient = "by_matrix", "By matrix", False

    def step(self, row, layer):
        matrix = layer.attention.mean(1) + layer.keep(torch.eye(layer.queries).repeat(len(row), 1, 1))
        return (row[:, None] @ (matrix / matrix.sum(2, keepdim=True)))[:, 0]


@pytest.mark.parametrize("name", ["Hiera", "SAM 2"])
def test_methods_of_ones_own_get_whole_matrices(name):
    make, _, size, _ = NETWORKS[name]
    maps = gmarpp.explain(make(), images(size), [ByMatrix(), "rollout"], TARGET).maps
    assert relative_error(maps["by_matrix"], maps["rollout"]) < 1e-5


def test_legrad_of_windows_of_one_grid():
    model, batch = timm_sam(), images((32, 32))
    layers, left = windowed_layers(model, (8, 8)), []
    hooks = [layer.block.register_forward_hook(lambda _, args, output: left.append(output)) for layer in layers]
    with softmax_collected() as attentions:
        model(batch.clone().requires_grad_())
    for hook in hooks:
        hook.remove()
    expected = 0
    for layer, tokens, attention in zip(layers, left, attentions, strict=True):
        score = logit(model.forward_head(model.neck(tokens.permute(0, 3, 1, 2)))).sum()
        gradient = torch.autograd.grad(score, attention, retain_graph=True)[0]
        expected = expected + assembled(gradient, layer, 2).clamp(min=0).mean((1, 2)) / 3
    found = gmarpp.explain(model, batch, ("legrad", "gmarpp_l1"), TARGET).maps["legrad"]
    assert relative_error(found, expected.view(2, 8, 8)) < 1e-4
    with pytest.raises(gmarpp.UnsupportedNetworkError, match="legrad: the head would have to score"):
        gmarpp.explain(timm_hiera(), images((32, 64)), "legrad", TARGET)


def test_what_a_pooled_residual_is_made_of_by_hand():
    # Four tokens in two channels, pooled two by two; the last token is alone, and two are alike in the second channel.
    made_of = torch.tensor([[0, 1], [2, 3]])
    pool = QueryPool(Step((1, 2), torch.tensor([[0, 1]])), made_of, lambda tokens: 10 * tokens)
    step = Step((1, 3), torch.tensor([[0, 1, 2]]), pool=pool)
    pooled, shares = pool.of(torch.tensor([[[1.0, 5.0], [2.0, 5.0], [-3.0, -4.0]]]))
    assert pooled.tolist() == [[[20.0, 50.0], [-30.0, -40.0]]]
    assert shares.tolist() == [[[0.25, 0.75], [1.0, 0.0]]]
    rows = torch.tensor([[[4.0, 8.0]]])
    assert step.hand_down(rows, shares).tolist() == [[[1.0, 3.0, 8.0]]]
    assert step.hand_down(rows).tolist() == [[[2.0, 2.0, 8.0]]]


def test_footprints_by_hand():
    assert footprints((2, 3), (2, 2), (2, 2)).tolist() == [[0, 1, 3, 4]]
    padded = footprints((2, 2), (3, 3), (2, 2), (1, 1))
    assert padded.tolist() == [[4, 4, 4, 4, 0, 1, 4, 2, 3]]


def test_images_that_mask_units_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="grid that windows of 4 x 4 divide, got 8 x 9: give images of another size"):
        gmarpp.explain(timm_hiera(), images((32, 36)), "rollout", TARGET)


def balanced_reference(name):
    """Give the layers, what their residuals are and are made of, and what the balanced methods are made of."""
    make, describe, size, grid = NETWORKS[name]
    model, batch = make(), images(size)
    layers = describe(model, grid)
    # The reference shares out fused attention; that it computes the same is seen by the logits above.
    for module, forward in gmarpp.architecture_of(model).fused.items():
        module.forward = forward
    run = balanced_run(model, batch, lambda output: margin_of(TARGET)(output), [layer.block for layer in layers])
    with torch.no_grad():
        residuals = [
            by_cell(tokens.flatten(1, -2), layer.order)
            if layer.above == layer.grid
            else pooled_residual(layer, tokens)[0]
            for layer, tokens in zip(layers, run.x, strict=True)
        ]
    return layers, residuals, kept_by(layers, run.x), run


def test_a_residual_that_is_neither_kept_nor_pooled_has_no_balanced_rollout():
    make, _, size, _ = NETWORKS["Hiera, top not in rows"]
    with pytest.raises(gmarpp.UnsupportedNetworkError, match="expected block 3 to add its attention to its tokens"):
        gmarpp.explain(make(), images(size), "gmarpp_balanced", TARGET)


def by_cell(values, order):
    """Lay values of tokens, (B, N, ...), out by cell."""
    found = torch.empty_like(values)
    found[:, order] = values
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_token_relevance_is_that_of_all_blocks_in_equal_shares(name):
    make, _, size, grid = NETWORKS[name]
    found = gmarpp.explain(make(), images(size), "token_relevance", TARGET).maps["token_relevance"]
    layers, _, _, run = balanced_reference(name)
    expected, down = 0, torch.eye(math.prod(grid))
    for layer, x, dx in zip(layers, run.x, run.dx, strict=True):
        relevance = by_cell((x * dx).sum(-1).flatten(1), layer.order)
        expected = expected + relevance / relevance.abs().sum(1, keepdim=True) @ down
        down = down if layer.above == layer.grid else equal_shares(layer.grid) @ down
    assert relative_error(found, expected.view(2, *grid)) < 1e-4


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "Hiera, top not in rows"])
def test_the_balanced_rollout_is_the_sum_over_all_blocks(name):
    make, _, size, grid = NETWORKS[name]
    found = gmarpp.explain(make(), images(size), "gmarpp_balanced", TARGET).maps["gmarpp_balanced"]
    layers, residuals, kept, run = balanced_reference(name)
    top = math.prod(layers[-1].above)
    for image in range(2):
        row, total = torch.full((top,), 1 / top), torch.zeros(top)
        for layer, x, dm, made_of, attention, gradient in reversed(
            list(zip(layers, residuals, run.dm, kept, run.attentions, run.gradients, strict=True))
        ):
            relevance = assembled(gradient, layer, 2)[image].clamp(min=0) * assembled(attention, layer, 2)[image]
            share = (x * by_cell(dm.flatten(1, -2), layer.order_above)).sum(-1)[image].clamp(min=0)
            matrix = relevance.sum(0) + share[:, None] * made_of[image]
            empty = matrix.sum(1) == 0
            matrix[empty] = made_of[image][empty]
            row = row @ (matrix / matrix.sum(1, keepdim=True))
            total = row + (total if layer.above == layer.grid else total @ equal_shares(layer.grid))
        assert relative_error(found[image], total.view(grid)) < 1e-4
