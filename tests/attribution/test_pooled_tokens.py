"""Networks with fewer keys than tokens, and with tokens pooled by modules of their own, against explicit matrices.

What a pooled token is made of is had from torch's own pooling of single cells. Nothing of the references comes from
gmarpp.
"""

import itertools
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from naive_attribution import layer_matrix
from naive_balanced import balanced_run, margin_of
from naive_windows import assembled, softmax_collected
from test_families import images, relative_error, sharpened
from test_transport import BALANCED, PRODUCTS, TARGET, ByMatrix, logit, logits_of
from timm.models.davit import DaVit, SpatialBlock
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg, TransformerBlock2d
from timm.models.nest import Nest
from timm.models.nextvit import NextTransformerBlock, NextViT
from timm.models.pit import PoolingVisionTransformer
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.twins import Twins

import gmarpp


def seeded(make):
    torch.manual_seed(0)
    return sharpened(make())


def pvt(**options):
    sizes = {"depths": (1, 2), "embed_dims": (8, 16), "num_heads": (1, 2), "sr_ratios": (2, 1), "mlp_ratios": (2, 2)}
    return seeded(lambda: PyramidVisionTransformerV2(num_classes=5, **sizes, **options))


def segformer():
    sizes = {"depths": [1, 1, 1], "hidden_sizes": [8, 8, 16], "num_attention_heads": [1, 1, 2], "mlp_ratios": [2, 2, 2]}
    patches = {"patch_sizes": [7, 3, 3], "strides": [4, 2, 2], "sr_ratios": [4, 2, 1], "num_encoder_blocks": 3}
    config = transformers.SegformerConfig(num_labels=5, **sizes, **patches)
    return seeded(lambda: transformers.SegformerForImageClassification(config))


def twins(**options):
    sizes = {"depths": (2, 2), "embed_dims": (8, 16), "num_heads": (1, 2), "sr_ratios": (2, 1), "mlp_ratios": (2, 2)}
    return seeded(lambda: Twins(img_size=32, num_classes=5, **sizes, **options))


def next_vit():
    return seeded(
        lambda: NextViT(3, num_classes=5, depths=(1, 2, 5, 2), stem_chs=(8, 8, 8), sr_ratios=(8, 2, 1, 1), head_dim=32)
    )


def pit(**options):
    sizes = {"base_dims": (8, 8), "depth": (1, 2), "heads": (1, 2), "mlp_ratio": 2, "patch_size": 8, "stride": 4}
    return seeded(lambda: PoolingVisionTransformer(img_size=(36, 44), num_classes=5, **sizes, **options))


def coatnet(kinds, **options):
    config = MaxxVitCfg(
        (8, 16, 32), (1, 2, 2), kinds, stem_width=8, transformer_cfg=MaxxVitTransformerCfg(dim_head=8), **options
    )
    return seeded(lambda: MaxxVit(config, img_size=(64, 96), num_classes=5))


def davit(**options):
    sizes = {"depths": (1, 2), "embed_dims": (8, 16), "num_heads": (1, 2), "window_size": 3}
    return seeded(lambda: DaVit(num_classes=5, **sizes, **options))


def nest():
    sizes = {"num_levels": 2, "embed_dims": (8, 16), "num_heads": (1, 2), "depths": (1, 2)}
    return seeded(lambda: Nest(img_size=32, num_classes=5, **sizes))


# How tokens are pooled, as torch averages: the matrix of this, (N_coarse, N_fine), is that of equal shares.
overlapping = partial(F.avg_pool2d, kernel_size=3, stride=2, padding=1, count_include_pad=False)
two_by_two = partial(F.avg_pool2d, kernel_size=2)
two_by_two_padded = partial(F.avg_pool2d, kernel_size=2, ceil_mode=True, count_include_pad=False)
four_by_four = partial(F.avg_pool2d, kernel_size=4)
to_seven = partial(F.adaptive_avg_pool2d, output_size=7)


def runs_of_four(grids):
    return F.avg_pool1d(grids.flatten(2), 4)


def spatial(part):
    return [each for each in part.modules() if isinstance(each, SpatialBlock)]


def attending(kind):
    return lambda model: [[block for block in stage.blocks if isinstance(block, kind)] for stage in model.stages]


def case(make, size, grids, steps, merging, blocks, prefix=0, rule=True, added="norm2", exact=True):
    """Describe a network.

    `steps` are by stage, one for each block: `None` for attention over all tokens, a side of windows, or how keys are
    pooled. `merging` is how tokens are, `exact` whether nothing else mixes them. `rule` says whether the balanced
    gradient knows all operations, `added` which module takes tokens with attention added to them, if there is one.
    """
    return SimpleNamespace(**locals())


by_stage = lambda model: [list(stage.blocks) for stage in model.stages]  # noqa: E731
twins_blocks = lambda model: [list(stage) for stage in model.blocks]  # noqa: E731
pit_blocks = lambda model: [list(stage.blocks) for stage in model.transformers]  # noqa: E731
coatnet_blocks = lambda model: [each for each in attending(TransformerBlock2d)(model) if each]  # noqa: E731
davit_blocks = lambda model: [spatial(stage) for stage in model.stages]  # noqa: E731

NETWORKS = {
    "PVT v2": case(
        pvt, (36, 44), [(9, 11), (5, 6)], [[two_by_two], [None, None]], overlapping, by_stage,
    ),
    "PVT v2, keys of the mean": case(
        partial(pvt, linear=True), (36, 60), [(9, 15), (5, 8)], [[to_seven], [to_seven] * 2], overlapping, by_stage,
    ),
    "SegFormer": case(
        segformer, (62, 72), [(16, 18), (8, 9), (4, 5)], [[four_by_four], [two_by_two], [None]], overlapping,
        lambda model: by_stage(model.segformer), added="layernorm_after",
    ),
    "Twins-PCPVT": case(
        twins, (38, 44), [(9, 11), (4, 5)], [[two_by_two] * 2, [None] * 2], two_by_two, twins_blocks,
    ),
    "Twins-SVT": case(
        partial(twins, wss=(4, 3)), (38, 44), [(9, 11), (4, 5)], [[4, two_by_two], [3, None]], two_by_two, twins_blocks,
    ),
    "NextViT": case(
        next_vit, (68, 92), [(9, 12), (5, 6), (3, 3)], [[runs_of_four], [None], [None]], two_by_two_padded,
        lambda model: attending(NextTransformerBlock)(model)[1:], added="projection", exact=False,
    ),
    "PiT": case(pit, (36, 44), [(8, 10), (4, 5)], [[None], [None] * 2], overlapping, pit_blocks, prefix=1),
    "PiT, distilled": case(
        partial(pit, distilled=True), (36, 44), [(8, 10), (4, 5)], [[None], [None] * 2], overlapping, pit_blocks,
        prefix=2,
    ),
    "CoAtNet": case(
        partial(coatnet, ("C", "T", "T")), (64, 96), [(8, 12), (4, 6)], [[None] * 2] * 2, two_by_two, coatnet_blocks,
        added=None, exact=False,
    ),
    "CoAtNet with ConvNeXt blocks": case(
        partial(coatnet, ("C", "C", ("C", "T")), conv_cfg=MaxxVitConvCfg(block_type="convnext")), (64, 96), [(4, 6)],
        [[None]], None, coatnet_blocks, exact=False,
    ),
    "DaViT": case(
        davit, (34, 44), [(9, 11), (5, 6)], [[3], [3] * 2], two_by_two_padded, davit_blocks, rule=False, exact=False,
    ),
    "DaViT, overlapping": case(
        partial(davit, down_kernel_size=3), (36, 44), [(9, 11), (5, 6)], [[3], [3] * 2], overlapping, davit_blocks,
        rule=False, exact=False,
    ),
    "Nest": case(
        nest, (32, 32), [(8, 8), (4, 4)], [[4], [4] * 2], two_by_two,
        lambda model: [list(level.transformer_encoder) for level in model.levels], exact=False,
    ),
}  # fmt: skip


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
                yield grid, None if step is None else pooling(grid, step), None


def whole(net, matrices, batch=2):
    """Give matrices over all tokens, (B, H, N, N), or (B, H, N, K) where keys are fewer."""
    found = []
    for each, (grid, _, window) in zip(matrices, layers_of(net), strict=True):
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
    for index, (attention, gradient, (_, keys, _)) in enumerate(zip(attentions, gradients, layers_of(net), strict=True)):
        product = torch.eye(attention.shape[2]) if product is None else product
        if index and stages[index] != stages[index - 1]:
            product = down_to(net, stages[index]) @ product
        if name != "attention":
            product = layer_matrix(name, attention[image], gradient[image], keys=keys) @ product
        elif index == len(stages) - 1:
            product = attention[image].mean(0) @ (torch.eye(len(product)) if keys is None else keys) @ product
    return (readout(net) @ product)[net.prefix :].view(net.grids[0])


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_are_the_product_of_all_blocks_and_poolings(name):
    net = NETWORKS[name]
    model, batch = net.make(), images(net.size)
    found = gmarpp.explain(model, batch, PRODUCTS, TARGET)
    torch.testing.assert_close(found.logits, logits_of(model(batch)), rtol=1e-4, atol=1e-4)
    with softmax_collected() as collected:
        gradients = torch.autograd.grad(logit(model(batch.clone().requires_grad_())).sum(), collected)
    attentions, gradients = whole(net, [each.detach() for each in collected]), whole(net, gradients)
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


def by_token(tokens):
    """Give a view (B, N, D), or in windows (B, W, n, D), of what a block is given."""
    return tokens.flatten(2).mT if tokens.dim() == 4 and tokens.shape[1] > 4 else tokens
