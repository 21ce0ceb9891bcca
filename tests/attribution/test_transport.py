"""Windows and merged tokens against explicit N x N matrices."""

import contextlib
import dataclasses
import itertools
import math
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from naive_balanced import balanced_run, margin_of
from naive_windows import assembled, merging, naive_row, softmax_collected, whole_matrices
from test_families import images, relative_error, sharpened
from timm.models.fastvit import AttentionBlock, FastVit
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from timm.models.tiny_vit import TinyVit
from torchvision.models import MaxVit, SwinTransformer
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

import gmarpp
from gmarpp.attribution import Method
from gmarpp.network.pooling import Pooling

PRODUCTS = ("gmarpp_l1", "gmarpp_l2", "gmarpp_sum", "gmar_l1", "gmar_l2", "rollout", "chefer", "attention")
BALANCED = ("token_relevance", "gmarpp_balanced")
TARGET = torch.tensor([2, 4])


def timm_swin(size, window, **options):
    torch.manual_seed(0)
    given = {"img_size": size, "window_size": window, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2)} | options
    return sharpened(timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **given))


def torchvision_swin(window, **options):
    torch.manual_seed(0)
    model = SwinTransformer([4, 4], 8, [2, 2], [1, 2], [window, window], num_classes=5, **options)
    return sharpened(model)


def timm_second_version(size, window):
    torch.manual_seed(0)
    given = {"img_size": size, "window_size": window, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2)}
    model = timm.create_model("swinv2_tiny_window8_256", num_classes=5, **given)
    for block in (block for stage in model.layers for block in stage.blocks):
        # They start as zero, so that nothing would come of attention.
        torch.nn.init.ones_(block.norm1.weight)
        torch.nn.init.ones_(block.norm2.weight)
    return sharpened(model)


def timm_logarithmic(size, window):
    torch.manual_seed(0)
    given = {"img_size": size, "window_size": window, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2)}
    return sharpened(timm.create_model("swinv2_cr_tiny_ns_224", num_classes=5, init_values=1.0, **given))


def transformers_swin(window, kind="Swin"):
    torch.manual_seed(0)
    network = getattr(transformers, f"{kind}ForImageClassification")
    config = network.config_class(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=window, num_labels=5
    )
    return sharpened(network(config))


def timm_maxvit(size):
    torch.manual_seed(0)
    attention = MaxxVitTransformerCfg(window_size=(2, 3), grid_size=(4, 2), dim_head=8)
    config = MaxxVitCfg((8, 16), (1, 2), ("M", "M"), stem_width=8, transformer_cfg=attention)
    model = MaxxVit(config, img_size=size, num_classes=5)
    return sharpened(model)


def timm_tiny_vit():
    torch.manual_seed(0)
    sizes = {"embed_dims": (8, 8, 16), "depths": (1, 2, 1), "num_heads": (1, 1, 2), "window_sizes": (3, 3, 3)}
    return sharpened(TinyVit(num_classes=5, **sizes))


def timm_caformer():
    torch.manual_seed(0)
    mixers, norms = [SepConv, Attention, Attention], [LayerNorm2dNoBias, LayerNormNoBias, LayerNormNoBias]
    sizes = {"depths": (1, 2, 1), "dims": (8, 32, 64), "num_classes": 5, "res_scale_init_values": (None, 1.0, 1.0)}
    return sharpened(MetaFormer(token_mixers=mixers, norm_layers=norms, **sizes))


def timm_fast_vit():
    torch.manual_seed(0)
    sizes = {"layers": (1, 1, 2), "embed_dims": (8, 32, 64), "mlp_ratios": (2,) * 3}
    model = FastVit(token_mixers=("repmixer", "attention", "attention"), num_classes=5, **sizes)
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            torch.nn.init.ones_(parameter)
    return sharpened(model)


def torchvision_maxvit():
    torch.manual_seed(0)
    return sharpened(MaxVit((32, 32), 8, 2, [8, 16], [1, 2], 4, 0.0, num_classes=5))


second_version = partial(torchvision_swin, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)

# name: network, size of the image, grids of the stages
NETWORKS = {
    "timm": (lambda: timm_swin(32, 4), (32, 32), [(8, 8), (4, 4)]),
    "timm, not square, windows that do not divide": (lambda: timm_swin((32, 48), 4), (32, 48), [(8, 12), (4, 6)]),
    "timm, shift and padding, odd sizes": (lambda: timm_swin((28, 36), 3), (28, 36), [(7, 9), (4, 5)]),
    "timm, windows larger than the grid": (
        lambda: timm_swin((24, 32), 5, always_partition=True), (24, 32), [(6, 8), (3, 4)],
    ),
    "timm, windows that are not square": (lambda: timm_swin((24, 40), (2, 5)), (24, 40), [(6, 10), (3, 5)]),
    "timm, dynamic size": (lambda: timm_swin(32, 4, dynamic_img_size=True), (20, 36), [(5, 9), (3, 5)]),
    "torchvision": (lambda: torchvision_swin(4), (32, 32), [(8, 8), (4, 4)]),
    "torchvision, shift and padding, odd sizes": (lambda: torchvision_swin(3), (28, 36), [(7, 9), (4, 5)]),
    "torchvision, sizes that patches do not divide": (lambda: torchvision_swin(4), (31, 43), [(7, 10), (4, 5)]),
    "timm, version 2": (lambda: timm_second_version((28, 36), 3), (28, 36), [(7, 9), (4, 5)]),
    "timm, version 2 with logarithms": (lambda: timm_logarithmic((28, 36), 3), (28, 36), [(7, 9), (4, 5)]),
    "transformers": (lambda: transformers_swin(3), (32, 32), [(8, 8), (4, 4)]),
    "transformers, one window above, sizes that patches do not divide": (
        lambda: transformers_swin(4), (31, 43), [(8, 11), (4, 6)],
    ),
    "transformers, version 2": (lambda: transformers_swin(3, "Swinv2"), (32, 32), [(8, 8), (4, 4)]),
    "transformers, Donut": (lambda: transformers_swin(3, "DonutSwin"), (32, 32), [(8, 8), (4, 4)]),
    "timm, MaxViT": (lambda: timm_maxvit((32, 48)), (32, 48), [(8, 12), (4, 6)]),
    "timm, TinyViT": (timm_tiny_vit, (60, 76), [(8, 10), (4, 5)]),
    "timm, CAFormer": (timm_caformer, (30, 44), [(4, 6), (2, 3)]),
    "timm, FastViT": (timm_fast_vit, (60, 76), [(8, 10), (4, 5)]),
    "torchvision, MaxViT": (torchvision_maxvit, (32, 32), [(8, 8), (4, 4)]),
    "torchvision, version 2": (lambda: second_version(3), (28, 32), [(7, 8), (4, 4)]),
}  # fmt: skip


def logits_of(output):
    return getattr(output, "logits", output)


def logit(output):
    return logits_of(output).gather(1, TARGET[:, None])[:, 0]


def blocks_and_grids(model, stages):
    if isinstance(model, MaxxVit):
        found = [
            [each for block in stage.blocks for each in (block.attn_block, block.attn_grid)] for stage in model.stages
        ]
    elif hasattr(model, "blocks"):
        layers = [[layer.layers for layer in stage.layers] for stage in model.blocks]
        found = [
            [each for layer in stage for each in (layer.window_attention, layer.grid_attention)] for stage in layers
        ]
    elif hasattr(model, "stages"):
        found = [stage.blocks for stage in model.stages[-len(stages) :]]
    elif hasattr(model, "features"):
        found = model.features[1::2]
    else:
        encoder = model.base_model.encoder if hasattr(model, "base_model") else model
        found = [stage.blocks for stage in encoder.layers]
    return [(block, grid) for stage, grid in zip(found, stages, strict=True) for block in stage]


def owner_of_softmax(model):
    """Give what has the softmax that a network calls."""
    return torch.Tensor if isinstance(model, SwinTransformerV2Cr) else F


def by_token(tokens, block):
    """Give a view (B, N, D) of what a block is given or returns."""
    if isinstance(block, AttentionBlock) or hasattr(block, "partition_type"):
        return tokens.flatten(2).mT
    return tokens.reshape(len(tokens), -1, tokens.shape[-1])


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_are_the_product_of_all_blocks_and_mergings(name):
    make, size, stages = NETWORKS[name]
    model, batch = make(), images(size)
    blocks, grids = zip(*blocks_and_grids(model, stages), strict=True)
    found = gmarpp.explain(model, batch, PRODUCTS, TARGET)
    torch.testing.assert_close(found.logits, logits_of(model(batch)), rtol=1e-4, atol=1e-4)
    attentions, gradients = whole_matrices(model, batch, logit, blocks, grids, owner_of_softmax(model))
    for method, image in itertools.product(PRODUCTS, range(2)):
        expected = naive_row(method, attentions, gradients, grids, image).view(stages[0])
        assert relative_error(found.maps[method][image], expected) < 1e-4, method
    for method in set(PRODUCTS) - {"chefer", "attention"}:
        torch.testing.assert_close(found.maps[method].sum((1, 2)), torch.ones(2))
    recomputed = gmarpp.explain(model, batch, PRODUCTS, TARGET, recompute=True).maps
    assert all(relative_error(recomputed[method], found.maps[method]) < 1e-5 for method in PRODUCTS)
    alone = gmarpp.explain(model, batch, ("rollout", "attention"), TARGET).maps
    assert all(relative_error(alone[method], found.maps[method]) < 1e-5 for method in alone)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_changed_cell_changes_the_tokens_that_attend_to_it(name):
    make, size, stages = NETWORKS[name]
    model, batch = make(), images(size, batch=1)
    given, blocks = [], blocks_and_grids(model, stages)
    hooks = [
        block.register_forward_pre_hook(lambda _, *inputs: given.append(inputs), with_kwargs=True)
        for block, _ in blocks
    ]
    with torch.no_grad(), softmax_collected(owner_of_softmax(model)) as collected:
        model(batch)
        attentions = list(collected)
        for hook in hooks:
            hook.remove()
        for (block, grid), ((tokens, *others), options), attention in zip(blocks, given, attentions, strict=True):
            attends = assembled(attention, 1, block, grid)[0].sum(0)
            cell = (grid[0] - 1) * grid[1] + grid[1] // 2
            changed = tokens.clone()
            by_token(changed, block)[0, cell, 0] += 3
            before, after = (block(each, *others, **options) for each in (tokens, changed))
            change = after[0] - before[0] if isinstance(after, tuple) else after - before
            is_changed = by_token(change, block)[0].abs().sum(1) > 0
            # Those of TinyViT and FastViT have convolutions, too.
            has_convolutions = any(isinstance(module, torch.nn.Conv2d) for module in block.modules())
            assert has_convolutions or not (is_changed & (attends[:, cell] == 0)).any()
            assert is_changed[attends[:, cell] > 0.01].all()


WITHOUT_RULE = {
    "timm, CAFormer": "expected block 0 to add its attention to its tokens in one place",
    "torchvision, MaxViT": "expected block 0 to add its attention to its tokens in one place",
}


@pytest.mark.parametrize("name", WITHOUT_RULE)
def test_where_the_balanced_rule_does_not_hold_it_is_refused(name):
    make, size, _ = NETWORKS[name]
    with pytest.raises(gmarpp.UnsupportedNetworkError, match=WITHOUT_RULE[name]):
        gmarpp.explain(make(), images(size), BALANCED, TARGET)


# What writes its attention out.
WRITTEN = (
    "timm, version 2",
    "timm, version 2 with logarithms",
    "transformers, version 2",
    "torchvision, version 2",
    "transformers, Donut",
)


def balanced_reference(model, batch, stages, is_written):
    """Give blocks, grids, the merging of each grid from the finest, and what the balanced methods are made of."""
    blocks, grids = zip(*blocks_and_grids(model, stages), strict=True)
    # The reference shares out fused attention; that it computes the same is seen by the logits above.
    for module, forward in gmarpp.architecture_of(model).fused.items():
        module.forward = forward
    with softmax_collected(share=0.25) if is_written else contextlib.nullcontext(()) as written:
        run = balanced_run(model, batch, lambda output: margin_of(TARGET)(logits_of(output)), blocks, written=written)
    run.x, run.dx = ([by_token(each, blocks[0]) for each in all_] for all_ in (run.x, run.dx))
    to_finest = [torch.eye(math.prod(grid)) if grid == grids[0] else merging(grids[0], grid) for grid in grids]
    return blocks, grids, to_finest, run


@pytest.mark.parametrize("name", [*(name for name in NETWORKS if name not in WITHOUT_RULE), "torchvision, MaxViT"])
def test_token_relevance_is_that_of_all_blocks_on_the_finest_grid(name):
    make, size, stages = NETWORKS[name]
    model, batch = make(), images(size)
    found = gmarpp.explain(model, batch, "token_relevance", TARGET).maps["token_relevance"]
    _, _, to_finest, run = balanced_reference(model, batch, stages, name in WRITTEN)
    expected = 0
    for x, dx, down in zip(run.x, run.dx, to_finest, strict=True):
        relevance = (x * dx).sum(-1)
        expected = expected + relevance / relevance.abs().sum(1, keepdim=True) @ down
    assert relative_error(found, expected.view(2, *stages[0])) < 1e-4


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in WITHOUT_RULE])
def test_the_balanced_rollout_is_the_sum_over_all_blocks_on_the_finest_grid(name):
    make, size, stages = NETWORKS[name]
    model, batch = make(), images(size)
    found = gmarpp.explain(model, batch, "gmarpp_balanced", TARGET).maps["gmarpp_balanced"]
    blocks, grids, to_finest, run = balanced_reference(model, batch, stages, name in WRITTEN)
    attentions, gradients = (
        [assembled(each, 2, block, grid) for each, block, grid in zip(all_, blocks, grids, strict=True)]
        for all_ in ([each.detach() for each in run.attentions], run.gradients)
    )
    # TinyViT adds attention before a convolution.
    added = [each.movedim(1, -1) if hasattr(blocks[0], "local_conv") else each for each in run.dm]
    residuals = [(x * by_token(dm, blocks[0])).sum(-1) for x, dm in zip(run.x, added, strict=True)]
    for image in range(2):
        top = math.prod(grids[-1])
        row, above, total = torch.full((top,), 1 / top), grids[-1], 0
        for index in reversed(range(len(grids))):
            if grids[index] != above:
                row, above = row @ merging(grids[index], above), grids[index]
            matrix = (gradients[index][image].clamp(min=0) * attentions[index][image]).sum(0)
            matrix = matrix + torch.diag(residuals[index][image].clamp(min=0))
            empty = matrix.sum(1) == 0
            matrix[empty] = torch.eye(len(matrix))[empty]
            row = row @ (matrix / matrix.sum(1, keepdim=True))
            total = total + row @ to_finest[index]
        # In networks with norms behind attention some rows are sums of rounding errors, and divided by these.
        tolerance = 1e-2 if "version 2" in name else 1e-4
        assert relative_error(found[image], total.view(stages[0])) < tolerance


def test_weights_of_torchvision_give_the_same_maps_in_timm():
    source, model = torchvision_swin(4), timm_swin(32, 4)
    renamed = {"features.0.0": "patch_embed.proj", "features.0.2": "patch_embed.norm", "head.": "head.fc."}
    renamed |= {
        "features.1.": "layers.0.blocks.",
        "features.3.": "layers.1.blocks.",
        "features.2.": "layers.1.downsample.",
    }
    renamed |= {"mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2"}
    state = {}
    for key, value in source.state_dict().items():
        if not key.endswith("relative_position_index"):
            for old, new in renamed.items():
                key = key.replace(old, new)
            state[key] = value
    model.load_state_dict(state)
    ours, theirs = (gmarpp.explain(each, images(), (*PRODUCTS, *BALANCED), TARGET) for each in (model, source))
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
    for method, maps in ours.maps.items():
        assert relative_error(maps, theirs.maps[method]) < 1e-4, method


def test_relevance_of_merged_tokens_is_shared_out_by_hand():
    rows = torch.tensor([[6.0, 2.0, 4.0, 1.0]])
    expected = [[1.5, 1.5, 1.0], [1.5, 1.5, 1.0], [2.0, 2.0, 1.0]]
    assert Pooling.cells((3, 3), (2, 2)).spread(rows).view(3, 3).tolist() == expected
    with pytest.raises(ValueError, match=r"tokens of a \(3, 3\) grid can be merged into, got \(4, 1\)"):
        Pooling.cells((3, 3), (4, 1))


class ByMatrix(Method):
    """Rollout of a method of one's own, with the layers' N x N matrices."""

    name, label, needs_gradient = "by_matrix", "By matrix", False

    def step(self, row, layer):
        matrix = layer.attention.mean(1) + layer.has_residual * torch.eye(layer.queries)
        return (row[:, None] @ (matrix / matrix.sum(2, keepdim=True)))[:, 0]


def test_methods_of_ones_own_get_whole_matrices():
    make, size, _ = NETWORKS["timm, shift and padding, odd sizes"]
    maps = gmarpp.explain(make(), images(size), [ByMatrix(), "rollout"], TARGET).maps
    assert relative_error(maps["by_matrix"], maps["rollout"]) < 1e-5


def test_random_maps_are_as_fine_as_others():
    maps = gmarpp.explain(timm_swin(32, 4), images(), ("random", "rollout"), TARGET).maps
    assert maps["random"].shape == maps["rollout"].shape == (2, 8, 8)
    assert len(maps["random"].unique()) == 128
    assert torch.equal(maps["random"], gmarpp.explain(timm_swin(32, 4), images(), "random", TARGET).maps["random"])


def test_legrad_needs_blocks_of_one_grid():
    with pytest.raises(gmarpp.UnsupportedNetworkError, match="legrad: the head would have to score"):
        gmarpp.explain(timm_swin(32, 4), images(), ("gmarpp_l1", "legrad"))

    model, batch, grid = timm_swin((28, 36), 3, depths=(2,), num_heads=(2,)), images((28, 36)), (7, 9)
    left, blocks = [], list(model.layers[0].blocks)
    hooks = [block.register_forward_hook(lambda _, args, output: left.append(output)) for block in blocks]
    with softmax_collected() as attentions:
        model(batch.clone().requires_grad_())
    expected = 0
    for block, tokens, attention in zip(blocks, left, attentions, strict=True):
        score = logit(model.forward_head(model.norm(tokens))).sum()
        gradient = torch.autograd.grad(score, attention, retain_graph=True)[0]
        whole = assembled(gradient, 2, block, grid)
        expected = expected + whole.clamp(min=0).mean((1, 2)) / 2
    for hook in hooks:
        hook.remove()
    for methods in ("legrad", ("legrad", "gmarpp_l1")):
        found = gmarpp.explain(model, batch, methods, TARGET).maps["legrad"]
        assert relative_error(found, expected.view(2, *grid)) < 1e-4


def test_the_network_is_left_as_it_was():
    for model in (timm_swin(32, 4).train(), torchvision_swin(4).train()):
        attention = blocks_and_grids(model, [0, 1])[0][0].attn
        before = dict(vars(attention))
        gmarpp.explain(model, images(), ("gmarpp_l1", *BALANCED))
        assert vars(attention) == before
        assert model.training
        assert all(module.training for module in model.modules())


def test_windows_other_than_described_are_named():
    model = timm_swin(32, 4)
    layout, smaller = gmarpp.architecture_of(model), gmarpp.architecture_of(timm_swin(16, 4))
    wrong = dataclasses.replace(layout, transport=lambda height, width: smaller.transport(height // 2, width // 2))
    with pytest.raises(gmarpp.UnsupportedNetworkError, match="expected block 0 to attend in 1 windows of 16 tokens"):
        gmarpp.explain(model, images(), "rollout", architecture=wrong)
    few = dataclasses.replace(layout, blocks=layout.blocks[1:])
    with pytest.raises(gmarpp.UnsupportedNetworkError, match="transport to describe 3 blocks, got 4"):
        gmarpp.explain(model, images(), "rollout", architecture=few)
