"""Every family and readout against the naive reference on small random networks."""

import itertools

import open_clip
import pytest
import timm
import torch
import torchvision
from naive_attribution import attention_and_gradients, naive_legrad, naive_row, pool_start

import gmarpp

PRODUCTS = ("gmarpp_l1", "gmarpp_l2", "gmarpp_sum", "gmar_l1", "gmar_l2", "rollout", "chefer", "attention")
SMALL_TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}


def sharpened(model):
    """Give the network attention that is far from uniform, as trained networks have it."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(5)
    return model.eval()


def timm_network(name, **options):
    torch.manual_seed(0)
    given = {option: value for option, value in (SMALL_TIMM | options).items() if value is not None}
    return sharpened(timm.create_model(name, **given))


def torchvision_network():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=3, hidden_dim=48, mlp_dim=96, num_classes=7
    )
    torch.nn.init.normal_(model.heads.head.weight, std=0.02)
    return sharpened(model)


def images(size=(32, 32), batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def shares(tokens, read):
    row = torch.zeros(tokens)
    row[list(read)] = 1
    return row / row.sum()


# name: network, image size, grid, prefix tokens, tokens that the head reads (of 1 or more prefix and 16 patch tokens)
NETWORKS = {
    "timm, class token": (lambda: timm_network("vit_tiny_patch16_224"), (32, 32), (4, 4), 1, [0]),
    "timm, average pool, prefix left out": (
        lambda: timm_network("vit_tiny_patch16_224", global_pool="avg"), (32, 32), (4, 4), 1, range(1, 17),
    ),
    "timm, average pool with prefix": (
        lambda: timm_network("vit_tiny_patch16_224", global_pool="avg", pool_include_prefix=True),
        (32, 32), (4, 4), 1, range(17),
    ),
    "timm, average pool, no prefix": (
        lambda: timm_network("vit_tiny_patch16_224", global_pool="avg", class_token=False),
        (32, 32), (4, 4), 0, range(16),
    ),
    "timm, average and maximum": (
        lambda: timm_network("vit_tiny_patch16_224", global_pool="avgmax"), (32, 32), (4, 4), 1, range(1, 17),
    ),
    "timm, registers": (lambda: timm_network("vit_small_patch14_reg4_dinov2"), (32, 32), (4, 4), 5, [0]),
    "timm, distilled DeiT": (lambda: timm_network("deit_tiny_distilled_patch16_224"), (32, 32), (4, 4), 2, [0, 1]),
    "timm, DeiT III": (lambda: timm_network("deit3_small_patch16_224"), (32, 32), (4, 4), 1, [0]),
    "timm, EVA-02, rotary": (
        lambda: timm_network("eva02_tiny_patch14_224", mlp_ratio=2), (32, 32), (4, 4), 1, range(1, 17),
    ),
    "timm, DINOv3, rotary and registers": (
        lambda: timm_network("vit_small_patch16_dinov3", global_pool="token"), (32, 32), (4, 4), 5, [0],
    ),
    "timm, BEiT, relative position bias": (
        lambda: timm_network("beit_base_patch16_224"), (32, 32), (4, 4), 1, range(1, 17),
    ),
    "timm, BEiT, relative position bias and class token": (
        lambda: timm_network("beit_base_patch16_224", global_pool="token"), (32, 32), (4, 4), 1, [0],
    ),
    "timm, FlexiViT": (lambda: timm_network("flexivit_small"), (32, 32), (4, 4), 1, [0]),
    "timm, not square": (
        lambda: timm_network("vit_tiny_patch16_224", img_size=(24, 48)), (24, 48), (3, 6), 1, [0],
    ),
    "timm, dynamic size": (
        lambda: timm_network("vit_tiny_patch16_224", dynamic_img_size=True), (40, 16), (5, 2), 1, [0],
    ),
    "timm, patches of 16": (lambda: timm_network("vit_tiny_patch16_224", patch_size=16), (32, 32), (2, 2), 1, [0]),
    "timm, patches of 32": (
        lambda: timm_network("vit_tiny_patch16_224", img_size=96, patch_size=32), (96, 96), (3, 3), 1, [0],
    ),
    "timm, NaFlexViT": (
        lambda: timm_network("naflexvit_base_patch16_gap", img_size=None, patch_size=None),
        (48, 64), (3, 4), 4, range(4, 16),
    ),
    "timm, NaFlexViT, class token": (
        lambda: timm_network("naflexvit_base_patch16_radio_v3", img_size=None, patch_size=None),
        (64, 64), (4, 4), 8, [0],
    ),
    "torchvision": (torchvision_network, (32, 32), (4, 4), 1, [0]),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_every_family_and_readout_equals_the_naive_reference(name):
    make, size, grid, prefix, read = NETWORKS[name]
    model, batch = make(), images(size)
    target = torch.tensor([2, 5])
    score = lambda output: output.gather(1, target[:, None])[:, 0]  # noqa: E731
    found = assert_equals_naive(model, batch, target, score, grid, read, *blocks_and_head(model), prefix=prefix)
    recomputed = gmarpp.explain(model, batch, found, target, recompute=True).maps
    assert all(relative_error(recomputed[method], found[method]) < 1e-5 for method in found)


def assert_equals_naive(model, batch, target, score, grid, read, blocks, head, prefix, suffix=0, head_score=None):
    """Compare all methods with the naive reference, give the maps.

    `read` are the tokens that the head reads, or `None` for an attention pool; `head` computes of the last tokens what
    `head_score`, or else `score`, is a score of.
    """
    assert_patches_lie_where_the_grid_says(model, batch, blocks, grid, prefix)
    found = gmarpp.explain(model, batch, (*gmarpp.METHODS, "gmarpp_sum"), target).maps
    assert all(maps.shape == (len(batch), *grid) for maps in found.values())
    attentions, gradients = attention_and_gradients(model, batch, score)
    tokens = prefix + grid[0] * grid[1] + suffix
    patches = slice(prefix, tokens - suffix)
    if read is None:
        (*attentions, pool), (*gradients, pool_gradient) = attentions, gradients
        assert pool.shape[2:] in ((1, tokens), (1, tokens - prefix))
    for method, image in itertools.product(PRODUCTS, range(len(batch))):
        if read is None:
            row = pool_start(method, pool[image, :, 0], pool_gradient[image, :, 0])
            row = torch.cat((torch.zeros(tokens - len(row)), row))
        else:
            row = shares(tokens, read)
        if not (read is None and method == "attention"):
            row = naive_row(method, attentions, gradients, row, image)
        assert relative_error(found[method][image], row[patches].reshape(grid)) < 1e-4, method

    expected = naive_legrad(model, batch, blocks, head, head_score or score)[:, patches].reshape(len(batch), *grid)
    for legrad in (found["legrad"], gmarpp.explain(model, batch, "legrad", target).maps["legrad"]):
        assert relative_error(legrad, expected) < 1e-4
    return found


def assert_patches_lie_where_the_grid_says(model, batch, blocks, grid, prefix):
    """Change the image under one cell: the token that changes most is the cell's."""
    entered = []
    hook = blocks[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    row, column = grid[0] - 1, 1
    height, width = batch.shape[2] // grid[0], batch.shape[3] // grid[1]
    changed = batch.clone()
    changed[:, :, row * height : (row + 1) * height, column * width : (column + 1) * width] += 1
    with torch.no_grad():
        model(batch), model(changed)
    hook.remove()
    change = (entered[1] - entered[0]).abs().sum((0, 2))
    assert change.argmax().item() == prefix + row * grid[1] + column


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def blocks_and_head(model):
    if isinstance(model, torchvision.models.VisionTransformer):
        return model.encoder.layers, lambda tokens: model.heads(model.encoder.ln(tokens)[:, 0])
    return model.blocks, lambda tokens: model.forward_head(model.norm(tokens))


# name: network, side of the image, cells a side, prefix tokens
POOLED = {
    "timm, SigLIP": (lambda: timm_network("vit_base_patch16_siglip_224"), 32, 4, 0),
    "timm, pool of prefix and patches": (lambda: timm_network("vit_base_patch16_224", global_pool="map"), 32, 4, 1),
    "timm, pool that leaves out the registers": (lambda: timm_network("vit_so150m_patch16_reg4_map_256"), 32, 4, 4),
    "timm, NaFlexViT": (
        lambda: timm_network("naflexvit_base_patch16_map", img_size=None, patch_size=None), 64, 4, 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", POOLED)
def test_attention_pool_head_gives_the_starting_row(name):
    make, side, cells, prefix = POOLED[name]
    model, batch = make(), images((side, side))
    target = torch.tensor([2, 5])
    score = lambda output: output.gather(1, target[:, None])[:, 0]  # noqa: E731
    assert_equals_naive(model, batch, target, score, (cells, cells), None, *blocks_and_head(model), prefix=prefix)


def encoder_network(name, side):
    torch.manual_seed(0)
    model = timm.create_model(name, depth=2, img_size=side, num_classes=7)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(2)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "side", "patch"), [("qwen3_vit_88m", 64, 16), ("deepseek_vit_412m", 56, 14), ("gemma4_vit_167m", 96, 16)]
)
def test_encoders_of_language_models_are_found_in_their_classifiers(name, side, patch):
    model, batch = encoder_network(name, side), images((side, side))
    cells, encoder = side // patch, model.encoder

    def head(tokens):
        if name.startswith("gemma"):
            return model.forward_head(tokens)
        tokens = encoder.norm(tokens) if name.startswith("deepseek") else tokens
        return model.forward_head(tokens.unflatten(1, (cells, cells)))

    target = torch.tensor([2, 5])
    score = lambda output: output.gather(1, target[:, None])[:, 0]  # noqa: E731
    read = range(cells * cells)
    assert_equals_naive(model, batch, target, score, (cells, cells), read, encoder.blocks, head, prefix=0)


def test_torchvision_weights_in_timm_give_the_same_maps():
    source = torchvision_network()
    model = timm.create_model("vit_tiny_patch16_224", **SMALL_TIMM, mlp_ratio=2).eval()
    renamed = {
        "class_token": "cls_token",
        "encoder.pos_embedding": "pos_embed",
        "encoder.ln": "norm",
        "heads.head": "head",
    }
    renamed |= {"conv_proj": "patch_embed.proj", "encoder.layers.encoder_layer_": "blocks.", "ln_1": "norm1"}
    renamed |= {"ln_2": "norm2", "self_attention.in_proj_": "attn.qkv.", "self_attention.out_proj": "attn.proj"}
    renamed |= {"mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2"}
    state = {}
    for key, value in source.state_dict().items():
        for old, new in renamed.items():
            key = key.replace(old, new)
        state[key] = value
    model.load_state_dict(state)
    batch = images()
    ours, theirs = gmarpp.explain(model, batch, gmarpp.METHODS), gmarpp.explain(source, batch, gmarpp.METHODS)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
    for method in gmarpp.METHODS:
        assert relative_error(ours.maps[method], theirs.maps[method]) < 1e-4, method
    assert not any(module._forward_pre_hooks for module in source.modules())


def test_legrad_finds_what_the_head_reads_whatever_the_head_gives():
    model, batch = timm_network("vit_tiny_patch16_224", global_pool="avg"), images()
    layout = gmarpp.architecture_of(model)
    with torch.no_grad():
        model.head.weight[0] = 0
    score = lambda output: output[:, 2]  # noqa: E731
    expected = naive_legrad(model, batch, layout.blocks, layout.head, score)[:, 1:].reshape(2, 4, 4)
    assert relative_error(gmarpp.explain(model, batch, "legrad", 2).maps["legrad"], expected) < 1e-4

    model.head = torch.nn.Unflatten(1, (6, 8))
    score = lambda output: output[:, 2, 3]  # noqa: E731
    expected = naive_legrad(model, batch, layout.blocks, layout.head, score)[:, 1:].reshape(2, 4, 4)
    assert relative_error(gmarpp.explain(model, batch, "legrad", score).maps["legrad"], expected) < 1e-4


def test_open_clip_tower_explains_a_text_prompt_score():
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 48, "head_width": 16, "layers": 3}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    clip = sharpened(open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text))
    prompts = torch.nn.functional.normalize(clip.encode_text(torch.randint(1, 64, (2, 8))), dim=-1).detach()
    score = lambda features: torch.nn.functional.normalize(features, dim=-1) @ prompts[1]  # noqa: E731
    batch = images()
    found = gmarpp.explain(clip.visual, batch, gmarpp.METHODS + gmarpp.VARIANTS, target=score)
    torch.testing.assert_close(found.logits[:, 0], score(clip.visual(batch)).detach())
    attentions, gradients = attention_and_gradients(clip.visual, batch, score)
    for method, image in itertools.product(PRODUCTS, range(2)):
        expected = naive_row(method, attentions, gradients, shares(17, [0]), image)[1:].reshape(4, 4)
        assert relative_error(found.maps[method][image], expected) < 1e-4, method
    blocks, head = (
        clip.visual.transformer.resblocks,
        lambda tokens: clip.visual.ln_post(tokens)[:, 0] @ clip.visual.proj,
    )
    expected = naive_legrad(clip.visual, batch, blocks, head, score)[:, 1:].reshape(2, 4, 4)
    assert relative_error(found.maps["legrad"], expected) < 1e-4
    # The whole network, called with images alone, returns more than their features: a temperature, for example.
    whole = gmarpp.explain(clip, batch, gmarpp.METHODS, target=lambda output: output[0] @ prompts[1]).maps
    assert all(relative_error(whole[method], found.maps[method]) < 1e-5 for method in whole)


def test_contrast_is_the_difference_of_two_logits():
    model, batch = timm_network("vit_tiny_patch16_224"), images()
    found = gmarpp.explain(model, batch, gmarpp.METHODS, gmarpp.Contrast(2, [5, 6]))
    other = torch.tensor([5, 6])
    expected = gmarpp.explain(model, batch, gmarpp.METHODS, lambda out: out[:, 2] - out[[0, 1], other])
    assert found.target.tolist() == [2, 2]
    for method in gmarpp.METHODS:
        assert relative_error(found.maps[method], expected.maps[method]) < 1e-5


def test_blocks_that_take_their_tokens_by_keyword_are_named():
    model = timm_network("vit_tiny_patch16_224")

    class Keyword(torch.nn.Module):
        def forward(self, images):
            tokens = model._pos_embed(model.patch_embed(images))
            for block in model.blocks:
                tokens = block(x=tokens)
            return model.forward_head(model.norm(tokens))

    with pytest.raises(gmarpp.UnsupportedNetworkError, match=r"block 0 takes its tokens by keyword \(x\)"):
        gmarpp.explain(Keyword(), images(), architecture=gmarpp.architecture_of(model))


def unsupported(name):
    torch.manual_seed(0)
    if name == "Swin, described as a ViT":
        model = timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=56, window_size=7, embed_dim=24, num_classes=3
        )
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = True
        return model, images((56, 56)), "windowed attention"
    return timm.create_model("resnet10t", num_classes=3), images(), "ResNet is not known to attend"


@pytest.mark.parametrize("name", ["Swin, described as a ViT", "ResNet"])
def test_what_cannot_be_explained_says_so(name):
    model, batch, message = unsupported(name)
    by_hand = (
        gmarpp.Architecture(grid=lambda height, width: (7, 7), prefix_tokens=0)
        if name == "Swin, described as a ViT"
        else None
    )
    with pytest.raises(gmarpp.UnsupportedNetworkError, match=message):
        gmarpp.explain(model, batch, architecture=by_hand)
    assert torch.nn.functional.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
