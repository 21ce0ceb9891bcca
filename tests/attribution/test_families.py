"""Every family and readout against the naive reference on small random networks."""

import itertools

import open_clip
import pytest
import timm
import torch
import torchvision
import transformers
from naive_attribution import attention_and_gradients, naive_legrad, naive_row

import gmarpp
from gmarpp.network.output import logits_of

PRODUCTS = ("gmarpp_l1", "gmarpp_l2", "gmarpp_sum", "gmar_l1", "gmar_l2", "rollout", "chefer", "attention")
SMALL_TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}
SMALL_HF = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 7,
}


def sharpened(model):
    """Give the network attention that is far from uniform, as trained networks have it."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(5)
    return model.eval()


def timm_network(name, **options):
    torch.manual_seed(0)
    return sharpened(timm.create_model(name, **(SMALL_TIMM | options)))


def hugging_face_network(kind, **options):
    torch.manual_seed(0)
    network = getattr(transformers, kind)
    if kind.startswith("Siglip"):
        config = network.config_class(vision_config=SMALL_HF, num_labels=7, **options)
    else:
        config = network.config_class(**SMALL_HF, **options)
    config._attn_implementation = "sdpa"
    model = sharpened(network(config))
    for parameter in model.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


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
    "torchvision": (torchvision_network, (32, 32), (4, 4), 1, [0]),
    "Hugging Face ViT": (lambda: hugging_face_network("ViTForImageClassification"), (32, 32), (4, 4), 1, [0]),
    "Hugging Face DeiT": (lambda: hugging_face_network("DeiTForImageClassification"), (32, 32), (4, 4), 2, [0]),
    "Hugging Face DINOv2": (
        lambda: hugging_face_network("Dinov2ForImageClassification"), (32, 32), (4, 4), 1, range(17),
    ),
    "Hugging Face DINOv2 with registers": (
        lambda: hugging_face_network("Dinov2WithRegistersForImageClassification"),
        (32, 32), (4, 4), 5, [0, *range(5, 21)],
    ),
    "Hugging Face SigLIP": (
        lambda: hugging_face_network("SiglipForImageClassification"), (32, 32), (4, 4), 0, range(16),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_every_family_and_readout_equals_the_naive_reference(name):
    make, size, grid, prefix, read = NETWORKS[name]
    model, batch = make(), images(size)
    target = torch.tensor([2, 5])
    score = lambda output: logits_of(output).gather(1, target[:, None])[:, 0]  # noqa: E731
    found = gmarpp.explain(model, batch, gmarpp.METHODS + gmarpp.VARIANTS, target).maps
    assert all(maps.shape == (2, *grid) for maps in found.values())

    attentions, gradients = attention_and_gradients(model, batch, score)
    readout = shares(prefix + grid[0] * grid[1], read)
    for method, image in itertools.product(PRODUCTS, range(2)):
        expected = naive_row(method, attentions, gradients, readout, image)[prefix:].reshape(grid)
        assert relative_error(found[method][image], expected) < 1e-4, method

    layout = gmarpp.architecture_of(model)
    torch.testing.assert_close(logits_of(layout.head(last_tokens(model, layout, batch))), logits_of(model(batch)))
    expected = naive_legrad(model, batch, layout.blocks, layout.head, score)[:, prefix:].reshape(2, *grid)
    for legrad in (found["legrad"], gmarpp.explain(model, batch, "legrad", target).maps["legrad"]):
        assert relative_error(legrad, expected) < 1e-4
    recomputed = gmarpp.explain(model, batch, found, target, recompute=True).maps
    assert all(relative_error(recomputed[method], found[method]) < 1e-5 for method in found)


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def last_tokens(model, layout, batch):
    outputs = []
    hook = layout.blocks[-1].register_forward_hook(
        lambda module, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(batch)
    hook.remove()
    return outputs[0]


def test_attention_pool_head_gives_the_starting_row():
    model, batch = timm_network("vit_base_patch16_siglip_224"), images()
    assert model.global_pool == "map"
    target = torch.tensor([2, 5])
    found = gmarpp.explain(model, batch, gmarpp.METHODS, target).maps
    score = lambda output: output.gather(1, target[:, None])[:, 0]  # noqa: E731
    (*attentions, pool), (*gradients, pool_gradient) = attention_and_gradients(model, batch, score)
    assert pool.shape == (2, 3, 1, 16)
    for image in range(2):
        a, g = pool[image, :, 0], pool_gradient[image, :, 0]
        positive = g.clamp(min=0)
        weights = positive.sum(1) / positive.sum()
        relevance = (weights[:, None] * positive * a).sum(0)
        norms = g.abs().sum(1) / g.abs().sum()
        starts = {
            "rollout": a.mean(0),
            "gmar_l1": (norms[:, None] * a).sum(0),
            "gmarpp_l1": relevance / relevance.sum(),
            "chefer": (g * a).clamp(min=0).mean(0),
        }
        for method, row in starts.items():
            expected = naive_row(method, attentions, gradients, row, image).reshape(4, 4)
            assert relative_error(found[method][image], expected) < 1e-4, method
        torch.testing.assert_close(found["attention"][image].flatten(), a.mean(0), rtol=1e-4, atol=1e-7)
    layout = gmarpp.architecture_of(model)
    expected = naive_legrad(model, batch, layout.blocks, layout.head, score).reshape(2, 4, 4)
    assert relative_error(found["legrad"], expected) < 1e-4


def test_distilled_hugging_face_network_reads_both_tokens():
    model, batch = hugging_face_network("DeiTForImageClassificationWithTeacher"), images()
    found = gmarpp.explain(model, batch, ["rollout", "legrad"], target=1).maps
    score = lambda output: output.logits[:, 1]  # noqa: E731
    attentions, gradients = attention_and_gradients(model, batch, score)
    expected = naive_row("rollout", attentions, gradients, shares(18, [0, 1]), 0)[2:].reshape(4, 4)
    assert relative_error(found["rollout"][0], expected) < 1e-4


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
    layout = gmarpp.architecture_of(clip.visual)
    expected = naive_legrad(clip.visual, batch, layout.blocks, layout.head, score)[:, 1:].reshape(2, 4, 4)
    assert relative_error(found.maps["legrad"], expected) < 1e-4


def test_contrast_is_the_difference_of_two_logits():
    model, batch = timm_network("vit_tiny_patch16_224"), images()
    found = gmarpp.explain(model, batch, gmarpp.METHODS, gmarpp.Contrast(2, [5, 6]))
    other = torch.tensor([5, 6])
    expected = gmarpp.explain(model, batch, gmarpp.METHODS, lambda out: out[:, 2] - out[[0, 1], other])
    assert found.target.tolist() == [2, 2]
    for method in gmarpp.METHODS:
        assert relative_error(found.maps[method], expected.maps[method]) < 1e-5


def test_a_function_of_a_hugging_face_output_explains_by_every_method():
    model, batch = hugging_face_network("ViTForImageClassification"), images()
    found = gmarpp.explain(model, batch, gmarpp.METHODS, target=lambda output: output.logits[:, 3])
    expected = gmarpp.explain(model, batch, gmarpp.METHODS, target=3)
    for method in gmarpp.METHODS:
        assert relative_error(found.maps[method], expected.maps[method]) < 1e-5, method


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


def test_class_names_are_targets():
    model = hugging_face_network("ViTForImageClassification")
    model.config.label2id = {"tabby": 3, "espresso": 5}
    assert gmarpp.explain(model, images(), target="espresso").target.tolist() == [5, 5]
    assert gmarpp.explain(model, images(), target=["tabby", "espresso"]).target.tolist() == [3, 5]
    with pytest.raises(ValueError, match="unknown class 'tab': did you mean tabby"):
        gmarpp.explain(model, images(), target="tab")
    with pytest.raises(ValueError, match="carries no class names"):
        gmarpp.explain(timm_network("vit_tiny_patch16_224"), images(), target="tabby")


def test_an_unknown_wrapper_takes_the_architecture_of_what_it_wraps():
    vit = timm_network("vit_tiny_patch16_224")
    wrapper = torch.nn.Sequential(torch.nn.Identity(), vit)
    with pytest.raises(gmarpp.UnsupportedNetworkError, match=r"architecture=gmarpp\.architecture_of"):
        gmarpp.explain(wrapper, images())
    found = gmarpp.explain(wrapper, images(), gmarpp.METHODS, architecture=gmarpp.architecture_of(vit)).maps
    expected = gmarpp.explain(vit, images(), gmarpp.METHODS).maps
    torch.testing.assert_close(found, expected)
    by_hand = gmarpp.Architecture(grid=lambda height, width: (height // 8, width // 8), prefix_tokens=1)
    torch.testing.assert_close(
        gmarpp.explain(wrapper, images(), architecture=by_hand).maps["gmarpp_l1"], expected["gmarpp_l1"]
    )
    with pytest.raises(gmarpp.UnsupportedNetworkError, match="LeGrad needs the network's blocks and head"):
        gmarpp.explain(wrapper, images(), "legrad", architecture=by_hand)
    wrong = gmarpp.Architecture(grid=lambda height, width: (4, 4), prefix_tokens=0)
    with pytest.raises(gmarpp.UnsupportedNetworkError, match="attends over 17 tokens, but a patch grid of 4 x 4 and 0"):
        gmarpp.explain(wrapper, images(), architecture=wrong)


def unsupported(name):
    torch.manual_seed(0)
    if name == "Swin":
        model = timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=56, window_size=7, embed_dim=24, num_classes=3
        )
        return model, images((56, 56)), r"windowed or pyramid attention \(Swin"
    if name == "Swin with fused attention":
        model, batch, _ = unsupported("Swin")
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = True
        return model, batch, "windowed attention"
    if name == "CaiT":
        return timm.create_model("cait_xxs24_224", img_size=32, depth=2, num_classes=3), images(), "class-attention"
    if name == "parallel":
        return timm.create_model("vit_small_patch16_18x2_224", **SMALL_TIMM), images(), "parallel or shared attention"
    if name == "eager Hugging Face":
        model = hugging_face_network("ViTForImageClassification")
        model.set_attn_implementation("eager")
        return model, images(), r"set_attn_implementation\('sdpa'\)"
    if name == "unfused timm":
        model = timm_network("vit_tiny_patch16_224")
        for block in model.blocks:
            block.attn.fused_attn = False
        return model, images(), "module.fused_attn = True"
    return timm.create_model("resnet10t", num_classes=3), images(), "ResNet is not known"


@pytest.mark.parametrize(
    "name", ["Swin", "Swin with fused attention", "CaiT", "parallel", "eager Hugging Face", "unfused timm", "ResNet"]
)
def test_what_cannot_be_explained_says_so(name):
    model, batch, message = unsupported(name)
    by_hand = (
        gmarpp.Architecture(grid=lambda height, width: (7, 7), prefix_tokens=0)
        if name == "Swin with fused attention"
        else None
    )
    with pytest.raises(gmarpp.UnsupportedNetworkError, match=message):
        gmarpp.explain(model, batch, architecture=by_hand)
    assert torch.nn.functional.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
